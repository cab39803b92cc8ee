"""Places are not settings: paths are expanded alike everywhere, and what has moved, or cannot be written, still works by its fingerprint."""
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import MAIN, type_in
from image_diffusion.data import load_prepared, prepare
from image_diffusion.drive import runs_root
from image_diffusion.files import UserError, expand
from image_diffusion.generate import LatentDiffusion, load_photo
from image_diffusion.plots import save_png
from image_diffusion.runs import Run
from image_diffusion.train_autoencoder import load_autoencoder, train_autoencoder
from image_diffusion.train_diffusion import train_diffusion


@pytest.fixture(scope="module")
def stages(prepared, tmp_path_factory):
    "A folder with an autoencoder `kl` and a diffusion model `prior`, of a few steps each."
    home = tmp_path_factory.mktemp("stages")
    train_autoencoder(prepared, home / "kl", "tiny-kl", steps=2)
    train_diffusion(prepared, home / "kl", home / "prior", "tiny", steps=2)
    return home


@pytest.fixture
def moved(stages, tmp_path):
    return Path(shutil.copytree(stages, tmp_path / "moved"))


def test_home_and_variables_are_expanded_at_every_door(stages, tmp_path, monkeypatch):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("MINE", "~/mine")
    monkeypatch.setenv("IMAGE_DIFFUSION_HOME", "$HOME/exp")
    assert runs_root() == home / "exp" and expand("$MINE/x") == home / "mine/x"
    shutil.copytree(stages, home / "mine")
    data = prepare("synthetic:24", "~/data", 32, progress=False, packed="$MINE/data.tar")
    assert data.folder == home / "data" and len(load_prepared("$HOME/data")) == 24 and (home / "mine/data.tar").exists()
    save_png(np.zeros((1, 64, 64, 3), np.uint8), "~/photo.png")
    assert load_photo("$HOME/photo.png", 32).shape == (1, 3, 32, 32)
    assert Run.load("$MINE/kl").folder == load_autoencoder("~/mine/kl").folder == home / "mine/kl"
    assert LatentDiffusion.from_pretrained("~/mine/prior", "$MINE/kl").folder == home / "mine/prior"
    train_autoencoder(data, "~/kl", "tiny-kl", steps=1)
    train_diffusion(data, "$HOME/kl", "~/prior", "tiny", steps=1)
    for words in (["prepare", "~/photos", "--out=$MINE/photos"], ["train-autoencoder", "--data=~/data", "--run=$HOME/kl", "--preset=tiny-kl", "--steps=1"],
                  ["generate", "--run=~/prior", "--autoencoder=~/kl", "--out=~/out/x.png", "--n=1", "--steps=1"],
                  ["evaluate", "--run=~/kl", "--data=$HOME/data", "--allow-small-n"], ["diagnose", "--run=~/kl", "--out=$MINE/d.png"]):
        if words[0] == "prepare":
            save_png(np.zeros((1, 64, 64, 3), np.uint8), "~/photos/1.png")
            words += ["--size=32"]
        result = type_in(*words)
        assert result.exit_code == 0, result.output
    assert not list(here.iterdir()) and {"x.png"} == {p.name for p in (home / "out").iterdir()}


def test_a_real_name_is_taken_as_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("b", "c")
    Path("a$b").touch()
    assert expand("a$b") == Path("a$b") and expand("x$b") == Path("xc") and expand("x$unset-") == Path("x$unset-")


@pytest.mark.parametrize("new", ["models/kl", "kl renamed", "../kl"])
def test_a_moved_autoencoder_is_found_by_its_fingerprint(moved, prepared, new):
    (moved / new).parent.mkdir(exist_ok=True)
    shutil.move(moved / "kl", moved / new)
    assert LatentDiffusion.from_pretrained(moved / "prior").autoencoder.folder.resolve() == (moved / new).resolve()
    train_diffusion(prepared, moved / new, moved / "prior", "tiny", steps=2)                 # the same settings: it is finished
    assert Run.load(moved / "prior").config["autoencoder"] == f"../{new}"


def test_an_autoencoder_that_is_far_away_is_asked_for(moved, tmp_path):
    shutil.move(moved / "kl", tmp_path / "far/away/from/here/kl")
    with pytest.raises(UserError, match="--autoencoder"):
        LatentDiffusion.from_pretrained(moved / "prior")
    assert LatentDiffusion.from_pretrained(moved / "prior", tmp_path / "far/away/from/here/kl").sha256


def test_another_autoencoder_in_its_place_is_refused_in_training(moved, prepared):
    train_autoencoder(prepared, moved / "other", "tiny-kl", steps=2, seed=1)
    with pytest.raises(UserError, match="autoencoder_sha256"):
        train_diffusion(prepared, moved / "other", moved / "prior", "tiny", steps=2)


def test_a_path_written_on_windows_is_read_here(moved):
    config = json.loads((moved / "prior/config.json").read_text())
    assert config["autoencoder"] == "../kl"
    (moved / "deep/er").mkdir(parents=True)
    shutil.move(moved / "kl", moved / "deep/er/kl")
    (moved / "prior/config.json").write_text(json.dumps(config | {"autoencoder": "..\\deep\\er\\kl"}))
    assert LatentDiffusion.from_pretrained(moved / "prior").autoencoder.folder == moved / "prior/../deep/er/kl"


READ_ONLY = """
mount --bind input input && mount -o remount,ro,bind input input || exit 77
export PYTHONPATH={path}
for words in "train-diffusion --data input/data --autoencoder input/kl --preset tiny --run work/prior --steps 2" \\
             "evaluate --run input/kl --data input/data --allow-small-n" "evaluate --run input/prior --data input/data --allow-small-n --n 8 --steps 2" \\
             "generate --run input/prior --n 1 --steps 2" "generate --run input/prior --n 1 --out input/x.png" "diagnose --run input/prior"; do
  echo "--- $words"; {main} $words 2>/dev/null || {main} $words 2>&1 | tail -1
done
"""


def test_what_cannot_be_written_can_be_used(moved, prepared):
    "As Kaggle gives the output of an earlier session."
    moved.rename(moved.with_name("input"))
    home = moved.parent
    shutil.copytree(prepared.folder, home / "input/data")
    for cache in (*home.glob("input/kl/latents-*"), *home.glob("input/data/stats")):
        shutil.rmtree(cache)
    main = " ".join([MAIN[0], "-m", "image_diffusion"])
    (home / "work").mkdir()
    (home / "script").write_text(READ_ONLY.format(main=main, path=os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])))
    done = subprocess.run(["unshare", "-m", "bash", "script"], cwd=home, capture_output=True, text=True) if shutil.which("unshare") else None
    if done is None or done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip("needs a mount of its own")
    answers = {part.partition("\n")[0].partition(" ")[0] + str(k): part for k, part in enumerate(done.stdout.split("--- ")[1:])}
    assert "Trained 2 steps" in answers["train-diffusion0"] and list(home.glob("work/prior/latents-*"))
    assert "PSNR" in answers["evaluate1"] and "not kept" in answers["evaluate1"]
    assert "class accuracy" in answers["evaluate2"] and "not kept" in answers["evaluate2"]
    assert "Saved 1 image: samples-seed0.png" in answers["generate3"] and "Cannot write" in answers["generate4"]
    assert "(input/prior):" in answers["diagnose5"] and "Figure: none" in answers["diagnose5"]
