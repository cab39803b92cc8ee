"""Metrics of samples while training, and the evaluation of runs of both stages by its command."""
import json
from functools import partial
from importlib import import_module

import pytest
import torch
from conftest import type_in
from image_diffusion import fitting
from image_diffusion.data import load_prepared, prepare
from image_diffusion.fid import MIN_IMAGES
from image_diffusion.runs import Run, read_metrics
from image_diffusion.train_autoencoder import train_autoencoder
from image_diffusion.train_diffusion import DiffusionStage, train_diffusion


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "A prepared set, and an autoencoder and a prior of a few steps; the prior measured its samples twice."
    home = tmp_path_factory.mktemp("evaluation")
    patched = pytest.MonkeyPatch()
    patched.setattr(DiffusionStage, "sample", lambda self, path: None)               # no pictures: they take longer than the rest
    data = prepare("synthetic", home / "data", 32, limit=200, progress=False)
    train_autoencoder(data, home / "kl", "tiny-kl", steps=4)
    train_diffusion(data, home / "kl", home / "prior", "tiny", steps=5, eval_every=2, eval_samples=24)
    patched.undo()
    return home


def test_samples_are_measured_while_training_where_it_is_asked_for(runs, tmp_path):
    measured = [record for record in read_metrics(Run.load(runs / "prior")) if "FD-random" in record or "FD-lite0" in record]
    assert [record["step"] for record in measured] == [2, 4] and all(record["measured_samples"] == 24 for record in measured)
    name = "FD-lite0" if "FD-lite0" in measured[0] else "FD-random"
    assert measured[0][f"{name}_baseline"] == measured[1][f"{name}_baseline"] < measured[0][name] != measured[1][name]


class Killed(BaseException):
    "What nothing catches, like `kill -9`."


def test_a_killed_measurement_resumes(runs, tmp_path, monkeypatch):
    module = import_module("image_diffusion.train_diffusion")
    sample_images, append, sampled, kill = module.sample_images, fitting.append_metrics, [], ""

    def counted(stage, labels, indices, *how):
        sampled.extend(indices)
        if kill == "sampling" and 64 in indices: raise Killed
        return sample_images(stage, labels, indices, *how)

    def noted(run, record):
        append(run, record)
        if kill == "noted" and "measured_samples" in record: raise Killed

    monkeypatch.setattr(module, "sample_images", counted)
    monkeypatch.setattr(DiffusionStage, "sample", lambda self, path: None)          # no pictures: they take longer than the rest
    monkeypatch.setattr(fitting, "append_metrics", noted)
    monkeypatch.setattr(module, "SampleMetrics", partial(module.SampleMetrics, steps=2, batch_size=8))

    def train(folder):
        "Train, and return which samples were taken and whether it was killed."
        sampled.clear()
        try:
            train_diffusion(load_prepared(runs / "data"), runs / "kl", folder, "tiny", steps=3, eval_every=2, eval_samples=80)
        except Killed:
            return list(sampled), True
        return list(sampled), False

    kill = "sampling"
    assert train(tmp_path / "torn") == (list(range(72)), True)
    kill = ""
    assert train(tmp_path / "torn") == (list(range(64, 80)), False)                 # none of the saved samples again
    kill = "noted"
    assert train(tmp_path / "whole") == (list(range(80)), True)
    kill = ""
    assert train(tmp_path / "whole") == ([], False)                                  # measured and noted before: neither again
    torn, whole = ([record for record in read_metrics(Run.load(tmp_path / name)) if "measured_samples" in record] for name in ("torn", "whole"))
    assert torn == whole and len(torn) == 1


def evaluated(*words):
    "The JSON that the command wrote, and what it printed."
    result = type_in("evaluate", *words)
    assert result.exit_code == 0, result.output
    path = next(line for line in result.output.splitlines() if line.startswith("JSON: ")).removeprefix("JSON: ").partition(", figure")[0]
    with open(path) as file:
        return json.load(file), result.output, path


def test_evaluate_a_prior(runs):
    words = ("--run", runs / "prior", "--data", runs / "data", "--n", 24, "--steps", 2)
    refused = type_in("evaluate", *words)
    assert refused.exit_code == 1 and str(MIN_IMAGES) in refused.output and "--allow-small-n" in refused.output
    content, output, path = evaluated(*words, "--allow-small-n")
    records = {record["name"]: record for record in content["records"]}
    best = next(name for name in ("FID", "FD-lite0", "FD-random") if records.get(name, {}).get("value") is not None)
    assert {"FID", "FD-random", best.replace("FD", "KD"), *(f"{share}, {best}" for share in ("precision", "recall", "density", "coverage"))} <= records.keys()
    assert records[best]["n"] == records[best]["n_baseline"] == 24 and records[best]["biased"] and records[best]["baseline"] < records[best]["value"]
    assert records[best.replace("FD", "KD")]["error"] > 0 and len(records[best]["curve"]) == 7
    assert content["settings"]["allow_small_n"] and content["data"]["sha256"] and content["snapshot_sha256"] and torch.__version__.startswith(content["versions"]["torch"])
    assert f"{records[best]['value']:.4g}" in output and "fewer than" in output
    before = open(path).read()
    assert evaluated(*words, "--allow-small-n")[2] == path and open(path).read() == before      # the same command again


def test_evaluate_an_autoencoder_and_the_192_images_protocol(runs):
    words = ("--run", runs / "kl", "--data", runs / "data", "--allow-small-n")
    content, _, path = evaluated(*words)
    records = {record["name"]: record for record in content["records"]}
    assert {"PSNR, dB", "SSIM", "LPIPS", "rFID", "rFD-random"} <= records.keys() and records["PSNR, dB"]["error"] > 0
    assert records["rFD-random"]["n"] == records["rFD-random"]["n_reference"] == content["data"]["num_dev"] and open(path.replace(".json", ".png"), "rb").read(4) == b"\x89PNG"
    small, _, _ = evaluated(*words, "--protocol", "192-images")
    first = next(record for record in small["records"] if record["name"] == "rFD-random")
    assert first["baseline"] < 1e-9 and first["n_reference"] == 20                       # so few that the first 192 are all
    refused = type_in("evaluate", "--run", runs / "prior", "--data", runs / "data", "--protocol", "192-images")
    assert refused.exit_code == 1 and "autoencoder" in refused.output
