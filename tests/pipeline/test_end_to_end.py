"""From photos on disk to a report, by the function and by the commands."""
import json
import re
import shutil
import zipfile

import numpy as np
import pytest
from conftest import BRIEF, SIZE, contents, type_in, write_photos
from image_diffusion import pipeline
from image_diffusion.data import load_prepared, prepare
from image_diffusion.landscapes import CLASSES
from image_diffusion.runs import Run
from PIL import Image

HEADINGS = ["Samples", "Metrics", "Reconstructions", "Codebook use", "Samples during training",
            "Training of autoencoder-kl", "Diagnostics of autoencoder-kl", "Training of autoencoder-vq", "Diagnostics of autoencoder-vq",
            "Training of prior", "Settings"]


@pytest.fixture(scope="module")
def report(whole_run):
    return (whole_run / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def metrics(whole_run):
    return Run.load(whole_run).finished["metrics"]


def test_photos_become_classes_and_what_is_no_photo_is_told(whole_run):
    data = load_prepared(whole_run / "data")
    assert data.classes == sorted(CLASSES) and len(data.images) == 120
    assert [skipped["name"] for skipped in data.manifest["skipped"]] == ["sea/notes.jpg"]


def test_the_report_has_every_part_and_needs_no_other_file(report):
    assert [heading for heading in re.findall(r"<h2>(.*?)</h2>", report)] == HEADINGS
    links = re.findall(r"""(?:src|href)=["']?([^"'>]{0,30})""", report)
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert "url(" not in report and "@import" not in report and "<script" not in report


def test_every_metric_says_what_it_is_of_and_how_it_was_made(metrics):
    names = {of: {record["name"] for record in metrics if record["of"] == of} for of in {record["of"] for record in metrics}}
    assert names.keys() == {"reconstructions KL", "reconstructions VQ", "samples"}
    assert names["samples"] >= {"FD-random", "FID"}
    assert names["reconstructions KL"] >= {"PSNR, dB", "SSIM", "rFD-random", "rFID"}
    assert names["reconstructions VQ"] == names["reconstructions KL"] | {"codes used", "perplexity"}
    for record in metrics:
        assert {"seed", "reference", "training_steps"} <= record.keys()
        if "FD-" in record["name"]:
            assert {"n", "n_reference", "dim", "features"} <= record.keys() and np.isfinite(record["value"])
        if record["name"] == "FD-random":
            assert record["n"] == 24 and np.isfinite(record["baseline"]) and {"sampler", "steps", "guidance"} <= record.keys()


def test_fid_without_its_weights_is_not_computed_and_says_why(metrics, report):
    records = [record for record in metrics if record["name"] in ("FID", "rFID")]
    assert len(records) == 3 and all(record["value"] is None for record in records)
    assert all("not computed, because" in record["reason"] and "https://" in record["reason"] for record in records)
    assert re.findall(r"<tr><td>r?FID</td><td>.*?</td><td>(.*?)</td>", report) == ["not computed"] * 3 and "weights-inception" in report


def test_numbers_in_the_report_are_those_of_the_run(metrics, report):
    assert all(f"<td>{record['value']:.4g}</td>" in report for record in metrics if record["value"] is not None)


def test_samples_are_an_image_with_a_row_per_class(whole_run):
    image = np.asarray(Image.open(whole_run / "samples.png").convert("RGB"))
    assert image.shape[0] > 5 * SIZE and image.std() > 5


def test_the_same_call_again_says_that_it_is_finished(whole_run, photos, capsys):
    before = contents(whole_run)
    report = pipeline.run(str(photos), whole_run, "tiny", hours=BRIEF, bottlenecks=("kl", "vq"), samples=24)
    assert report == whole_run / "report.html" and "finished" in capsys.readouterr().out
    assert contents(whole_run) == before


def test_generate_samples_the_same_images_again(whole_run, tmp_path):
    for name in ("a.png", "b.png"):
        result = type_in("generate", "--run", whole_run / "prior", "--n", 4, "--steps", 4, "--class", "sea", "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
    assert np.array_equal(Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png"))
    assert Image.open(tmp_path / "a.png").text["seed"] == "0"
    other = type_in("generate", "--run", whole_run / "prior", "--n", 4, "--steps", 4, "--seed", 1, "--out", tmp_path / "c.png")
    assert other.exit_code == 0 and not np.array_equal(Image.open(tmp_path / "a.png"), Image.open(tmp_path / "c.png"))


def test_evaluate_prints_a_line_per_distance_and_writes_them_as_json(whole_run):
    result = type_in("evaluate", "--run", whole_run / "prior", "--data", whole_run / "data", "--n", 8, "--steps", 4, "--allow-small-n")
    assert result.exit_code == 0, result.output
    path, = (whole_run / "prior/evaluation").glob("*.json")
    records = json.loads(path.read_text())["records"]
    assert {record["name"] for record in records} >= {"FD-random", "FID"} and records[0]["n"] == 8
    assert all(record["name"] in result.output for record in records)


def test_a_run_still_works_after_it_was_moved(whole_run, tmp_path):
    moved = shutil.copytree(whole_run, tmp_path / "elsewhere")
    result = type_in("generate", "--run", moved / "prior", "--n", 1, "--steps", 2)
    assert result.exit_code == 0 and (moved / "prior" / "samples-seed0.png").exists(), result.output


@pytest.fixture(scope="module")
def flat_zip(tmp_path_factory):
    "A zip of photos without folders, so without classes."
    folder = tmp_path_factory.mktemp("flat")
    with zipfile.ZipFile(folder / "holiday.zip", "w") as archive:
        for path in sorted(write_photos(folder / "holiday", 60, by_class=False).iterdir()):
            archive.write(path, path.name)
    return folder / "holiday.zip"


def test_a_folder_and_a_zip_of_it_give_the_same_images(flat_zip, tmp_path):
    a = prepare(flat_zip, tmp_path / "a", SIZE, progress=False)
    b = prepare(flat_zip.with_suffix(""), tmp_path / "b", SIZE, progress=False)
    assert a.manifest["sha256"] == b.manifest["sha256"] and a.classes == b.classes == []


def test_fresh_starts_over_and_a_zip_without_classes_gives_a_run_with_vq(flat_zip, whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    command = ["run", flat_zip, "--run", folder, "--preset", "tiny", "--hours", BRIEF, "--bottleneck", "vq", "--samples", 8]
    before = contents(folder)
    assert type_in(*command).exit_code == 1 and contents(folder) == before     # other settings
    result = type_in(*command, "--fresh")
    assert result.exit_code == 0, result.output
    assert not (folder / "autoencoder-kl").exists() and (folder / "autoencoder-vq" / "finished.json").exists()
    assert load_prepared(folder / "data").classes == []
    assert (folder / "report.html").stat().st_size > 10_000 and (folder / "samples.png").exists()
    again = type_in(*command)
    assert again.exit_code == 0 and "finished" in again.output


def test_demo_takes_its_name_and_place_from_the_root_of_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("IMAGE_DIFFUSION_HOME", str(tmp_path))
    calls = []
    monkeypatch.setattr(pipeline, "run", lambda *words, **options: calls.append((words, options)))
    assert type_in("demo", "--minutes", 6).exit_code == 0
    assert calls == [(("synthetic", tmp_path / "demo", "tiny", 0.1, ("kl", "vq")), {"limit": 3000, "samples": 384, "fresh": False})]
