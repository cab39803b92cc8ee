"""Writing can fail, and that does not cost the work: output that nobody takes, places that cannot be written, pictures that are there already."""
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import MAIN, type_in
from image_diffusion.files import UserError, check_writable
from image_diffusion.plots import save_png
from PIL import Image

WORK = [*MAIN, "prepare", "synthetic:24", "--size", "32", "--out"]


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def gone_terminal():
    master, slave = os.openpty()
    os.close(master)
    return slave


def full_disk():
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/full")
@pytest.mark.parametrize("gone", [broken_pipe, gone_terminal, full_disk])
def test_output_that_nobody_takes_does_not_end_the_work(tmp_path, gone):
    descriptor = gone()
    done = subprocess.run([*WORK, str(tmp_path / "data")], stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor)
    os.close(descriptor)
    assert done.returncode == 0 and (tmp_path / "data/manifest.json").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "| head -c 0"])
def test_closed_output_does_not_end_the_work(tmp_path, closed):
    words = [*WORK, str(tmp_path / "data")]
    done = subprocess.run(["bash", "-c", f'set -o pipefail; "$@" {closed}', "-", *words], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and (tmp_path / "data/manifest.json").exists()


def test_training_in_python_outlives_its_output(prepared, tmp_path):
    code = ("import os, sys\nfrom image_diffusion.data import load_prepared\nfrom image_diffusion import train_autoencoder\n"
            "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\nos.dup2(1, 2)\n"
            f"train_autoencoder(load_prepared({str(prepared.folder)!r}), {str(tmp_path / 'kl')!r}, 'tiny-kl', steps=2)\n"
            "os._exit(0)\n")
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "kl/finished.json").exists()


def test_a_place_that_cannot_be_written_is_told_before_the_work(whole_run, tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file/x.png", tmp_path / "file/a/b/x.png"):
        with pytest.raises(UserError, match="Cannot write"):
            check_writable(place)
    for words in (["generate", "--run", str(whole_run / "prior"), "--n", "100000"], ["figure", "samplers", "--run", str(whole_run / "prior")]):
        result = type_in(*words, "--out", str(tmp_path / "file/x.png"))
        assert result.exit_code == 1 and "Cannot write" in result.output and "sample" not in result.output.partition("Error")[0]
    result = type_in("run", "nowhere.zip", "--run", str(tmp_path / "file/run"))
    assert result.exit_code == 1 and "Cannot write" in result.output


def test_one_picture_never_replaces_another(whole_run, tmp_path):
    run = whole_run / "prior"
    for words in (["--n", "1"], ["--n", "1"], ["--n", "2"], ["--n", "1", "--steps", "3"], ["--n", "1", "--seed", "1"]):
        result = type_in("generate", "--run", str(run), "--steps", "2", *words, "--out", str(tmp_path))
        assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"samples-seed0.png", "samples-seed0-2.png", "samples-seed0-3.png", "samples-seed1.png"}
    with Image.open(tmp_path / "samples-seed0-2.png") as image:
        assert image.width > image.height                                  # of two
    (tmp_path / "text.png").write_text("no image")
    assert save_png(np.zeros((1, 8, 8, 3), np.uint8), tmp_path / "text.png", replace=False).name == "text-2.png"
    assert (tmp_path / "text.png").read_text() == "no image"
