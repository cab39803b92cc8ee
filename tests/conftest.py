"""What several test files share: photos, one finished run, a machine without network and downloaded weights, and the size of campaigns."""
import os
import random
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from image_diffusion import cli
from image_diffusion.data import prepare
from image_diffusion.landscapes import CLASSES, synthetic_landscapes
from image_diffusion.pipeline import run
from image_diffusion.train_autoencoder import PRESETS

ROOT = Path(__file__).resolve().parent.parent
SIZE = PRESETS["tiny-kl"].size
MAIN = [sys.executable, "-c", "from image_diffusion.cli import main; main(prog_name='image_diffusion')"]   # the console script

torch.set_num_threads(1)   # tests run side by side, one on each core
NARROW = """
from functools import partial
PRESETS["tiny"] = replace(PRESETS["tiny"], model=replace(PRESETS["tiny"].model, ch=16, num_groups=8), batch_size=8)
sample_strip = partial(sample_strip, steps=4)
"""                        # for the module of these names; sampling is most of what tests wait for
exec(NARROW, vars(import_module("image_diffusion.train_diffusion")))
BRIEF = 6 / 3600           # hours of a whole run
hypothesis.settings.register_profile("suite", deadline=None, max_examples=50)   # a busy machine is no failure
hypothesis.settings.load_profile("suite")


class Campaign(NamedTuple):
    "How much of the random trials this run does, and the seed of all of them."
    whole: bool
    seed: int

    def share(self, count):
        "How many of `count` trials: a tenth, or all with `-m campaign`."
        return count if self.whole else -(-count // 10)


def pytest_configure(config):
    os.environ.setdefault("CAMPAIGN_SEED", str(random.randrange(10**6)))     # the workers of xdist inherit it


def pytest_report_header(config):
    size = "whole" if config.option.markexpr == "campaign" else "a tenth (whole: pytest -m campaign)"
    return f"campaigns: {size}, CAMPAIGN_SEED={os.environ['CAMPAIGN_SEED']}"


@pytest.fixture(scope="session")
def campaign(pytestconfig):
    "The size and seed of the campaigns."
    return Campaign(pytestconfig.option.markexpr == "campaign", int(os.environ["CAMPAIGN_SEED"]))


@pytest.fixture(scope="session", autouse=True)
def bare_machine(tmp_path_factory):
    "No network, no weights from earlier downloads, and runs that land in a temporary folder."
    def refuse(self, address):
        raise OSError(f"a test tried to reach {address}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("no-weights")))
        patch.setenv("IMAGE_DIFFUSION_HOME", str(tmp_path_factory.mktemp("home")))
        for name in ("IMAGE_DIFFUSION_INCEPTION", "IMAGE_DIFFUSION_VGG16"):
            patch.delenv(name, raising=False)
        yield


def type_in(*words):
    "Type `image_diffusion WORDS` in this process; returns click's result (`exit_code`, `output`)."
    return CliRunner().invoke(cli.main, [str(word) for word in words])


def start(command, **options):
    "Start a command as a process of its own, with its output in a pipe and one thread, so that two can run side by side."
    def hear_ctrl_c():   # a shell that runs the tests in the background makes its children deaf to it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, preexec_fn=hear_ctrl_c, **options)


def contents(folder):
    "Every file below a folder with its bytes."
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def write_photos(folder, count, by_class):
    "JPEG files of synthetic landscapes, in a folder per class or all in one."
    images, labels = synthetic_landscapes(range(count), 72, seed=5)
    for i, (image, label) in enumerate(zip(images, labels)):
        path = folder / (CLASSES[label] if by_class else "") / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, quality=92)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    "120 JPEG files in five class folders, and among them a text file that calls itself one."
    folder = write_photos(tmp_path_factory.mktemp("source") / "photos", 120, by_class=True)
    (folder / "sea" / "notes.jpg").write_text("This is no photo.")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    "A prepared set of 160 synthetic landscapes at the size of the tiny preset."
    return prepare("synthetic", tmp_path_factory.mktemp("prepared") / "data", SIZE, limit=160, progress=False)


@pytest.fixture(scope="session")
def whole_run(photos, tmp_path_factory):
    "The folder of a whole run on photos with classes, both autoencoders, in some seconds of training."
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(str(photos), folder, "tiny", hours=BRIEF, bottlenecks=("kl", "vq"), samples=24)
    return folder
