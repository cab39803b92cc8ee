"""A training that is killed with `kill -9` again and again, inside saves too, is to the bit the training that was left alone."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from image_diffusion.data import prepare
from image_diffusion.runs import Run, load_checkpoint, load_snapshot
from kills import STEPS_PER_KILL

KILLS = 25    # of each stage
pytestmark = pytest.mark.campaign


@pytest.fixture(scope="module")
def killed(tmp_path_factory, campaign):
    "Both stages, each trained once without interruption and once with kills: the folder, what each life was doing at its end, steps."
    folder = tmp_path_factory.mktemp("kills")
    data = prepare("synthetic", folder / "data", 32, limit=60, progress=False)
    kills = campaign.share(KILLS)
    command = [sys.executable, "tests/campaigns/kills.py", data.folder, folder, str(campaign.seed), str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads(done.stdout.splitlines()[-1]), STEPS_PER_KILL * kills


def same(a, b):
    "Whether two states are equal in every tensor and number."
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def lines(folder):
    "The lines of metrics.jsonl as they stand there, without the minutes."
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name != "minutes"} for record in records]


PARTS = {"autoencoder": {"autoencoder", "disc", "rollbacks"}, "prior": {"prior", "rollbacks"}}
stages = pytest.mark.parametrize("stage", ["autoencoder", "prior"])


@stages
def test_every_life_but_the_last_was_killed_and_some_inside_a_save(killed, stage, campaign):
    counts, kills = killed[1][stage], campaign.share(KILLS)
    assert counts["saving"] + counts["training"] == kills and counts["saving"] >= kills // 5 and counts["training"] >= kills // 5, counts


@stages
def test_weights_averages_optimizers_scalers_codebook_and_usage_are_equal_to_the_bit(killed, stage):
    whole, other = (load_checkpoint(Run(killed[0] / f"{kind}-{stage}")) for kind in ("whole", "killed"))
    assert whole["step"] == other["step"] == killed[2] and PARTS[stage] <= whole["stage"].keys()
    assert [part for part in whole["stage"] if not same(whole["stage"][part], other["stage"][part])] == []
    assert same(whole["log"]["means"], other["log"]["means"]) and whole["log"]["sampled"] == other["log"]["sampled"]
    assert same(load_snapshot(killed[0] / f"whole-{stage}")[0], load_snapshot(killed[0] / f"killed-{stage}")[0])


@stages
def test_no_line_of_metrics_is_doubled_missing_or_different(killed, stage):
    whole, other = (lines(killed[0] / f"{kind}-{stage}") for kind in ("whole", "killed"))
    trained, evaluated = ([line for line in other if ("progress" in line) == kind] for kind in (True, False))
    assert trained == [line for line in whole if "progress" in line]
    assert [line["step"] for line in trained] == list(range(5, killed[2] + 1, 5))
    assert [line["step"] for line in evaluated] == list(range(1, killed[2] + 1)), "one evaluation for each checkpoint"
    assert evaluated[-1] == whole[-1]


@stages
def test_pictures_and_kept_averages_are_the_same_files(killed, stage):
    whole, other = ({path.relative_to(place).as_posix(): path.read_bytes() for place in [killed[0] / f"{kind}-{stage}"]
                     for path in place.glob("*/*step_*") if path.parent.name in ("samples", "averages")} for kind in ("whole", "killed"))
    assert whole and whole == other
