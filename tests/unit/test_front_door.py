"""`from image_diffusion import …` gives what most users need, whatever was imported before, and costs nothing until then."""
import shutil
import subprocess
import sys
from pathlib import Path

import image_diffusion
import pytest
from conftest import ROOT

NAMES = ["LatentDiffusion", "prepare", "train_autoencoder", "train_diffusion"]
CHECK = "import image_diffusion as p\nfrom image_diffusion import LatentDiffusion, prepare, train_autoencoder, train_diffusion\n" + \
        "assert all(callable(f) and f is getattr(p, f.__name__) for f in (LatentDiffusion, prepare, train_autoencoder, train_diffusion))"


def python(code):
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("before", ["", "import image_diffusion.train_autoencoder, image_diffusion.train_diffusion",
                                    "from image_diffusion.train_diffusion import PRESETS", "import image_diffusion.generate",
                                    "from image_diffusion import *"])
def test_the_four_names_are_what_they_say_after_any_import(before):
    python(f"{before}\n{CHECK}\nfrom image_diffusion.train_autoencoder import PRESETS as a\nimport image_diffusion.train_diffusion\n"
           f"from image_diffusion.train_diffusion import PRESETS as b\n{CHECK}\nassert 'tiny-kl' in a and 'tiny' in b")


def test_nothing_is_imported_before_it_is_used():
    heavy = "torch torchvision numpy matplotlib PIL tqdm click".split()
    python(f"import sys, image_diffusion\nassert set({NAMES}) <= set(dir(image_diffusion)) and image_diffusion.__version__\n"
           f"assert not set({heavy}) & set(sys.modules)\nassert not hasattr(image_diffusion, 'paint')")


def test_a_module_of_such_a_name_is_still_there():
    python("import importlib, pickle, image_diffusion\nmodule = importlib.import_module('image_diffusion.train_diffusion')\n"
           "assert module.train_diffusion is image_diffusion.train_diffusion and 'tiny' in module.PRESETS\n"
           "assert pickle.loads(pickle.dumps(module.train_diffusion)) is module.train_diffusion")


def test_nbdev_changes_the_version_and_nothing_else(tmp_path, monkeypatch):
    config = pytest.importorskip("nbdev.config")
    monkeypatch.chdir(ROOT)
    path = Path(shutil.copy(image_diffusion.__file__, tmp_path / "__init__.py"))
    config.update_version(tmp_path)
    assert path.read_text() == Path(image_diffusion.__file__).read_text()             # it has the version of settings.ini
    path.write_text(path.read_text().replace(image_diffusion.__version__, "9.9"))
    config.update_version(tmp_path)
    assert path.read_text() == Path(image_diffusion.__file__).read_text()
