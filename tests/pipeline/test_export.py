"""The package is what the notebooks export, and the notebooks are committed clean."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

MODULES = """files plots landscapes download photos data blocks bottleneck linear autoencoder perceptual discriminator features fid
runs drive ema diagnostics training cost train_autoencoder latents unet diffusion sampling guidance train_diffusion generate evaluate report
pipeline cli""".split()   # in order of their notebooks' numbers


def git(folder, *words):
    return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A repository of its own that holds the files of this one, new ones included."
    folder = tmp_path_factory.mktemp("copy")
    for name in git(ROOT, "ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    return folder


def nbdev(command, folder):
    "Run one of nbdev's commands, from beside this Python, in a folder."
    subprocess.run([Path(sys.executable).with_name(command)], cwd=folder, check=True)


def changes(folder):
    "What differs from the index, and what is new."
    return git(folder, "diff") + git(folder, "ls-files", "--others", "--exclude-standard")


def test_clean_and_export_change_nothing(copy):
    nbdev("nbdev_clean", copy)
    nbdev("nbdev_export", copy)
    assert changes(copy) == ""


def test_what_was_edited_in_the_package_is_seen_and_exported_away(copy):
    with open(copy / "image_diffusion" / "plots.py", "a", encoding="utf-8") as file:
        file.write("\nedited = True\n")
    assert "+edited = True" in changes(copy)
    nbdev("nbdev_export", copy)
    assert changes(copy) == ""


def test_each_notebook_makes_the_module_of_its_name_and_numbers_follow_the_layers():
    notebooks = sorted(path.stem for path in (ROOT / "nbs").glob("*.ipynb"))
    assert [name[3:] for name in notebooks] == MODULES and all(name[:2].isdigit() for name in notebooks)
    exported = {path.stem for path in (ROOT / "image_diffusion").glob("*.py")}
    assert exported == {"__init__", "_modidx", *MODULES}
