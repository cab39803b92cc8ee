"""Runs, checkpoints and snapshots: what was made before 0.1.0 is refused, and what this version made is found again."""
import json

import pytest
import torch
from safetensors.torch import save_file

from image_diffusion.drive import open_run
from image_diffusion.files import UserError, write_json
from image_diffusion.pipeline import start_over
from image_diffusion.runs import FORMAT, Run, load_checkpoint, load_snapshot, name_runs, save_checkpoint, save_snapshot
from image_diffusion.train_autoencoder import load_autoencoder

SETTINGS = {"stage": "autoencoder", "preset": "tiny-kl", "recipe": {"size": 32, "model": {"bottleneck": "kl"}}}
OLD = "was made by image_diffusion before 0.1.0, which this version does not read: train it again, or install image_diffusion<0.1"


@pytest.fixture
def old(tmp_path):
    "A run folder as version 0.0 wrote it: no format number anywhere."
    run = Run(tmp_path / "old")
    write_json(run.folder / "config.json", SETTINGS)
    save_checkpoint(run, 7, {"step": 7})
    (run.folder / "snapshots").mkdir()
    save_file({"weight": torch.ones(2)}, run.folder / "snapshots/step_0000007.safetensors", {"config": json.dumps({"model": {}}), "step": "7"})
    return run.folder


@pytest.mark.parametrize("act", [Run.load, lambda folder: Run.open(folder, SETTINGS), lambda folder: open_run(folder, SETTINGS),
                                 lambda folder: name_runs([folder])], ids=["load", "open", "open_run", "name_runs"])
def test_a_run_made_before_0_1_is_refused(old, act):
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"{old} {OLD}"):
        act(old)
    assert before == {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}


def test_a_checkpoint_made_before_0_1_is_refused_without_its_config_json(old):
    (old / "config.json").unlink()
    with pytest.raises(UserError, match=f"{old} {OLD}"):
        Run.open(old, SETTINGS)


def test_fresh_replaces_a_run_made_before_0_1(old):
    write_json(old / "config.json", {"source": "synthetic", "preset": "tiny", "hours": 1.0, "bottlenecks": ["kl"]})
    start_over(old)
    assert not old.exists()


@pytest.mark.parametrize("load", [load_snapshot, load_autoencoder])
def test_a_snapshot_made_before_0_1_is_refused(old, load):
    with pytest.raises(UserError, match=f"step_0000007.safetensors {OLD}"):
        load(old)


def test_a_run_of_this_version_is_found_again(tmp_path):
    run = Run.open(tmp_path / "run", SETTINGS)
    save_checkpoint(run, 3, {"step": 3})
    assert Run.open(run.folder, SETTINGS) == Run.load(run.folder) == run and run.config == {"format": FORMAT} | SETTINGS
    (run.folder / "config.json").unlink()                    # it never reached Drive: the checkpoint has a copy
    assert load_checkpoint(Run.open(run.folder, SETTINGS)) == {"step": 3}
    with pytest.raises(UserError, match='preset: "tiny-kl" there, "tiny-vq" now'):
        Run.open(run.folder, SETTINGS | {"preset": "tiny-vq"})


def test_a_snapshot_is_known_by_its_content(tmp_path):
    "The hash that names a snapshot is the checksum in its metadata: of weights, names, config and step, wherever the file lies."
    hashes = []
    for name, weight, config in (("a", 1.0, {}), ("b", 1.0, {}), ("c", 2.0, {}), ("d", 1.0, {"ch": 1})):
        run = Run.open(tmp_path / name, SETTINGS)
        save_snapshot(run, 5, {"weight": torch.full((3,), weight)}, config)
        hashes.append(load_snapshot(run.folder)[1]["sha256"])
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
