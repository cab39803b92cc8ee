"""Two sources are told apart by what is in them, and what the program writes is never among them."""
import shutil

import numpy as np
import pytest
from conftest import BRIEF, type_in
from image_diffusion import pipeline
from image_diffusion.data import default_name, load_prepared, prepare
from image_diffusion.files import UserError, write_json
from image_diffusion.pipeline import recorded_minutes, run
from PIL import Image


def write(folder, count=24, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.fromarray(np.random.default_rng([seed, k]).integers(0, 256, (48, 48, 3), np.uint8)).save(folder / f"{k}.jpg")
    return folder


@pytest.fixture
def untrained(monkeypatch):
    "`run` without its trainings: only the photos are prepared."
    monkeypatch.setattr(pipeline, "train_both_stages", lambda *words: None)
    monkeypatch.setattr(pipeline, "sample_and_measure", lambda *words: {})


def test_other_photos_of_the_same_name_are_never_taken_for_a_finished_run(untrained, tmp_path):
    a, b, to = write(tmp_path / "a/photos"), write(tmp_path / "b/photos", seed=1), tmp_path / "run"
    run(str(a), to, "tiny", hours=BRIEF)
    assert run(str(a), to, "tiny", hours=BRIEF) == to / "report.html"                         # finished
    with pytest.raises(UserError, match="other photos.*another --run.*--fresh"):
        run(str(b), to, "tiny", hours=BRIEF)
    shutil.move(a, tmp_path / "renamed")                                                      # the name is none of the settings
    assert run(str(tmp_path / "renamed"), to, "tiny", hours=BRIEF)
    run(str(b), to, "tiny", hours=BRIEF, fresh=True)
    assert run(str(b), to, "tiny", hours=BRIEF)


def test_an_archive_that_was_replaced_is_another_source(untrained, tmp_path):
    for count in (24, 30):
        shutil.rmtree(tmp_path / "photos", ignore_errors=True)
        shutil.make_archive(tmp_path / "photos", "zip", write(tmp_path / "photos", count))
        if count == 24:
            run(str(tmp_path / "photos.zip"), tmp_path / "run", "tiny", hours=BRIEF)
    with pytest.raises(UserError, match="other photos"):
        run(str(tmp_path / "photos.zip"), tmp_path / "run", "tiny", hours=BRIEF)
    (tmp_path / "photos.zip").unlink()                                                        # gone, but the run is finished
    assert run(str(tmp_path / "photos.zip"), tmp_path / "run", "tiny", hours=BRIEF)


def test_generated_landscapes_of_another_number_are_another_source(untrained, tmp_path):
    run("synthetic:40", tmp_path / "run", "tiny", hours=BRIEF)
    with pytest.raises(UserError):
        run("synthetic:50", tmp_path / "run", "tiny", hours=BRIEF)


@pytest.mark.parametrize("source, name", [("St. Moritz", "St. Moritz"), ("a/photos.tar.gz", "photos"), ("Photos.ZIP", "Photos"), ("v1.2 best", "v1.2 best"),
                                          ("..", None), ("photos.2024.zip", "photos.2024"), ("synthetic:40", "synthetic"), ("lhq", "lhq")])
def test_only_known_endings_are_cut_off_a_name(source, name):
    assert default_name(source) == name or name is None and default_name(source) not in ("", ".", "..")


def test_a_renamed_folder_is_the_prepared_one(tmp_path):
    photos = write(tmp_path / "photos")
    sha256 = prepare(photos, tmp_path / "data", 32, progress=False).manifest["sha256"]
    assert prepare(photos.rename(tmp_path / "pictures"), tmp_path / "data", 32, progress=False).manifest["sha256"] == sha256


def test_what_the_program_writes_is_never_its_input(untrained, tmp_path, monkeypatch):
    photos = write(tmp_path / "photos")
    monkeypatch.chdir(photos)
    monkeypatch.setenv("IMAGE_DIFFUSION_HOME", "runs")
    for _ in range(2):
        result = type_in("run", ".", "--preset", "tiny", "--hours", "0.01")
        assert result.exit_code == 0, result.output
        write(photos / "runs/photos/prior/samples", seed=2)                                   # what a run leaves, stopped or finished
        write_json(photos / "runs/photos/prior/config.json", {"stage": "diffusion", "recipe": {}})
    assert len(load_prepared("runs/photos/data")) == 24
    data = prepare(".", tmp_path / "data", 32, progress=False)
    assert len(data) == 24 and data.classes == [] and [left["name"] for left in data.manifest["skipped"]] == ["runs/photos"]
    shutil.copytree(tmp_path / "data", photos / "sets/data")
    write(photos / "sets/data", seed=3)
    skipped = prepare(".", tmp_path / "again", 32, progress=False).manifest["skipped"]
    assert [left["name"] for left in skipped] == ["runs/photos", "sets/data"] and "image_diffusion" in skipped[0]["reason"]


def test_a_config_of_somebody_else_does_not_hide_photos(tmp_path):
    write(tmp_path / "photos/album")
    for name, content in (("config.json", '{"model_type": "gpt2"}'), ("manifest.json", "[1]")):
        (tmp_path / "photos/album" / name).write_text(content)
    assert len(prepare(tmp_path / "photos", tmp_path / "data", 32, progress=False)) == 24


def test_time_for_sampling_that_one_busy_moment_asked_for_goes_back_to_training(tmp_path, monkeypatch):
    estimates, given = iter([50.0, 2.0]), {}
    monkeypatch.setattr(pipeline, "sampling_minutes", lambda *words: next(estimates))
    stage = {"minutes": 10.0, "step": 1, "dev_psnr": 20.0, "dev_ssim": 0.5, "dev_loss": 1.0}
    from importlib import import_module
    monkeypatch.setattr(import_module("image_diffusion.train_autoencoder"), "train_autoencoder", lambda *words, **more: stage)
    monkeypatch.setattr(import_module("image_diffusion.train_diffusion"), "train_diffusion",
                        lambda data, autoencoder, folder, preset, minutes, **more: given.update(minutes=minutes) or stage)
    data = prepare("synthetic:24", tmp_path / "data", 32, progress=False)
    settings = {"preset": "tiny", "bottlenecks": ["kl"], "hours": 1.0, "seed": 0, "samples": 64}
    pipeline.train_both_stages(data, tmp_path / "run", settings, None)
    assert recorded_minutes(tmp_path / "run/prior") is None and 60 - 10 - 2 - 60 * 0.08 - 0.1 < given["minutes"] < 60 - 10 - 2


def test_plan_names_the_channels_of_the_preset():
    assert "latents of 4 channels" in type_in("plan", "--preset", "photos64").output
