"""Figures and diagnostics, each by its command, on the autoencoders of a whole run."""
import io
import re

import numpy as np
import pytest
from conftest import SIZE, type_in
from image_diffusion import report
from image_diffusion.data import prepare
from image_diffusion.features import RandomFeatures
from image_diffusion.generate import LatentDiffusion
from image_diffusion.report import AUTOENCODER_FIGURES, DIFFUSION_FIGURES, originals, plot_samplers, sampler_distances
from image_diffusion.runs import name_runs
from image_diffusion.sampling import SAMPLERS
from PIL import Image


@pytest.fixture(scope="module")
def runs(whole_run):
    "The words that give both autoencoders to a command."
    return ["--run", whole_run / "autoencoder-kl", "--run", whole_run / "autoencoder-vq"]


def pixels(path):
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def refused(answer, *words):
    "Exit code 1 and one sentence with these words, no traceback."
    assert answer.exit_code == 1 and answer.output.startswith("Error: ") and answer.output.count("\n") == 1
    assert all(word in answer.output for word in words), answer.output


@pytest.mark.parametrize("name", AUTOENCODER_FIGURES)
def test_each_figure_comes_from_a_command(runs, tmp_path, name):
    out = tmp_path / "figures" / f"{name}.png"
    answer = type_in("figure", name, *runs, "--out", out)
    assert answer.exit_code == 0 and str(out) in answer.output
    assert pixels(out).shape[1] > 500 and pixels(out).std() > 20 and [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize("name", [*DIFFUSION_FIGURES, "trends_stage2"])
def test_each_figure_of_a_prior_comes_from_a_command(whole_run, tmp_path, name):
    assert type_in("figure", name, "--run", whole_run / "prior", "--out", tmp_path / "x.png").exit_code == 0
    assert pixels(tmp_path / "x.png").shape[1] > 400 and pixels(tmp_path / "x.png").std() > 10


def test_samplers_are_compared_at_equal_evaluations(whole_run, prepared, monkeypatch):
    monkeypatch.setattr(report, "available_features", lambda device: [RandomFeatures()])     # its 256 numbers take a moment, the 1,280 of lite0 a second
    prior = LatentDiffusion.from_pretrained(whole_run / "prior")
    records = sampler_distances(prior, prepared, samples=4, longest=12)
    assert {(r["sampler"], r["evaluations"]) for r in records} >= {("heun", 5), ("heun", 9), ("dpmpp_2m", 20), ("ddpm", 12)}
    assert all(np.isfinite(r["distance"]) for r in records)
    figure = plot_samplers(records)
    assert len(figure.axes[0].lines) == len(SAMPLERS) + 1


@pytest.mark.parametrize("name", ["stage1", "latents", "codebook"])
def test_the_same_command_draws_the_same_picture(runs, tmp_path, name):
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert type_in("figure", name, *runs, "--seed", seed, "--out", tmp_path / out).exit_code == 0
    first, again, other = ((tmp_path / out).read_bytes() for out in "abc")
    assert first == again != other


def test_originals_are_synthetic_and_unseen_or_dev_photos(whole_run, prepared):
    both = name_runs([whole_run / "autoencoder-kl", whole_run / "autoencoder-vq"])
    assert list(both) == ["KL", "VQ"]
    seen = {image.tobytes() for image in prepare("synthetic", whole_run.parent / "synthetic", SIZE, limit=160, progress=False).images}
    assert not seen & {image.tobytes() for image in originals(both)}
    assert np.array_equal(originals(both, prepared.folder), prepared.images[prepared.dev[:64]])


def test_photos_of_a_prepared_set_are_taken_where_asked(runs, prepared, tmp_path):
    for out, words in (("photos.png", ["--data", prepared.folder]), ("synthetic.png", [])):
        assert type_in("figure", "stage1", *runs, *words, "--out", tmp_path / out).exit_code == 0
    photos, synthetic = (pixels(tmp_path / out) for out in ("photos.png", "synthetic.png"))
    assert photos.shape != synthetic.shape or (photos != synthetic).any()


def test_without_out_a_figure_lies_in_the_first_run(whole_run):
    run = whole_run / "autoencoder-vq"
    for words, name in ((["diagnose"], "diagnostics"), (["figure", "codebook"], "codebook")):
        out = run / f"{name}.png"
        assert str(out) in type_in(*words, "--run", run).output and pixels(out).std() > 20
        out.unlink()


def test_a_figure_that_a_run_cannot_give_is_refused(whole_run, runs, tmp_path):
    kl, prior = whole_run / "autoencoder-kl", whole_run / "prior"
    refused(type_in("figure", "codebook", "--run", kl, "--out", tmp_path / "x.png"), "codebook", str(kl), "VQ")
    for name in AUTOENCODER_FIGURES:
        refused(type_in("figure", name, *runs, "--run", prior, "--out", tmp_path / "x.png"), "autoencoder", "diffusion model")
    for name in [*DIFFUSION_FIGURES, "trends_stage2", "samplers"]:
        refused(type_in("figure", name, *runs, "--run", prior, "--out", tmp_path / "x.png"), "diffusion model", "train-diffusion")
    refused(type_in("figure", "samplers", "--run", prior, "--out", tmp_path / "x.png"), "--data")
    refused(type_in("figure", "trends", "--run", tmp_path / "nowhere", "--out", tmp_path / "x.png"), "nowhere")
    for command in (["diagnose"], ["figure", "stage1"]):
        refused(type_in(*command, "--run", whole_run, "--out", tmp_path / "x.png"), "autoencoder-kl")
    refused(type_in("generate", "--run", whole_run, "--out", tmp_path / "x.png"), str(whole_run / "prior"))
    refused(type_in("evaluate", "--run", whole_run, "--data", whole_run / "data"), "autoencoder-kl")
    assert not list(tmp_path.iterdir())


def test_a_run_without_metrics_and_photos_of_another_size_are_refused(whole_run, runs, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((whole_run / "autoencoder-kl" / "config.json").read_bytes())
    for command in (["diagnose"], ["figure", "trends"]):
        refused(type_in(*command, "--run", bare), str(bare), "no metrics")
    refused(type_in("figure", "stage1", "--run", bare), str(bare), "snapshot")
    small = prepare("synthetic", tmp_path / "small", 16, limit=40, progress=False)
    refused(type_in("figure", "stage1", *runs, "--data", small.folder), f"--size {SIZE}", "16 px")
    assert not list(bare.glob("*.png"))


def test_every_run_is_diagnosed(whole_run, runs, tmp_path):
    answer = type_in("diagnose", *runs, "--run", whole_run / "prior", "--out", tmp_path / "diagnostics.png")
    assert answer.exit_code == 0 and pixels(tmp_path / "diagnostics.png").std() > 10
    found = re.findall(r"^(KL|VQ|diffusion) \(.*\):\n((?:- .+\.\n)+)", answer.output, re.MULTILINE)
    assert [name for name, _ in found] == ["KL", "VQ", "diffusion"]


def test_training_ends_with_a_diagnosis(prepared, tmp_path):
    answer = type_in("train-autoencoder", "--data", prepared.folder, "--preset", "tiny-vq", "--run", tmp_path / "vq", "--steps", 4)
    assert answer.exit_code == 0
    words = type_in("diagnose", "--run", tmp_path / "vq").output
    said = answer.output.split(str(tmp_path / "vq"))[-1].strip().splitlines()
    assert said and all(f"- {sentence}\n" in words for sentence in said)
