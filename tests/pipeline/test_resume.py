"""A run that is killed or stopped goes on where it was, and ends where it would have ended."""
import json
import shutil
import signal
import sys
import time

import pytest
import torch
from conftest import MAIN, NARROW_FIRST, contents, start
from image_diffusion.runs import Run, load_snapshot, read_metrics

STEPS = 56
OFTEN, NEVER = 0.005, 1000      # minutes between checkpoints
AUTOENCODER = """import sys
from image_diffusion import training
from image_diffusion.data import load_prepared
from image_diffusion.train_autoencoder import train_autoencoder
data, folder, steps, minutes = sys.argv[1:]
training.faster_in_bf16 = lambda: folder.endswith("again")     # whoever resumes measures otherwise
train_autoencoder(load_prepared(data), folder, "tiny-vq", steps=int(steps), save_every_minutes=float(minutes))"""
PRIOR = NARROW_FIRST + """import sys
from image_diffusion import training
from image_diffusion.data import load_prepared
from image_diffusion.train_diffusion import DiffusionStage, train_diffusion
DiffusionStage.sample = lambda self, path: None                # no pictures: they take longer than the rest
data, autoencoder, folder, steps, minutes = sys.argv[1:]
training.faster_in_bf16 = lambda: folder.endswith("again")
train_diffusion(load_prepared(data), autoencoder, folder, "tiny", steps=int(steps), save_every_minutes=float(minutes))"""


def finish(process):
    "Wait for the end of a process that must succeed; returns its output."
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


def wait_until(true, process, seconds=120):
    "Wait for something that a process does; fails if it ends or takes too long."
    end = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def saved(folder):
    "The steps of all complete checkpoints, in order."
    return [int(path.stem[5:]) for path in sorted((folder / "checkpoints").glob("step_*.json"))]


def logged(folder):
    "All lines of metrics.jsonl that are whole."
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


@pytest.fixture(scope="module")
def autoencoder(prepared, tmp_path_factory):
    "An autoencoder that was trained without interruption, and one that was killed on the way."
    folder = tmp_path_factory.mktemp("autoencoder")
    return two_runs([sys.executable, "-c", AUTOENCODER, prepared.folder], folder, kill_after=43)   # the discriminator has a state by then


@pytest.fixture(scope="module")
def prior(prepared, autoencoder, tmp_path_factory):
    "The same for a prior on the first autoencoder."
    folder = tmp_path_factory.mktemp("prior")
    return two_runs([sys.executable, "-c", PRIOR, prepared.folder, autoencoder[1]], folder, kill_after=10)


def two_runs(command, folder, kill_after):
    "Train with a kill, and beside it without (and without saving on the way); returns command and both folders."
    whole, killed = folder / "whole", folder / "killed"
    victim = start([*command, killed, STEPS, OFTEN])
    wait_until(lambda: len(saved(killed)) >= 1, victim)
    quiet = start([*command, whole, STEPS, NEVER])
    wait_until(lambda: len(saved(killed)) >= 2 and saved(killed)[-1] >= kill_after, victim)
    victim.kill()
    victim.wait()
    finish(quiet)
    assert not (killed / "finished.json").exists(), "it was not killed in time"
    return command, whole, killed


def assert_same_weights(folder, other):
    (a, config_a), (b, config_b) = load_snapshot(folder), load_snapshot(other)
    assert config_a["step"] == config_b["step"] == STEPS and a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


stages = pytest.mark.parametrize("stage", ["autoencoder", "prior"])


@stages
def test_killed_and_typed_again_ends_with_the_same_weights(stage, request):
    command, whole, killed = request.getfixturevalue(stage)
    folder = shutil.copytree(killed, whole.parent / "again")
    (folder / "checkpoints" / f"step_{STEPS:07d}.pt.part").write_bytes(b"half a checkpoint")     # killed while it was written
    (folder / "checkpoints" / f"step_{STEPS:07d}.pt").write_bytes(b"a checkpoint without facts")  # killed between the two files
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": {STEPS - 1}, "los')                                                 # killed while a line was written
    newest, before = saved(folder)[-1], logged(folder)
    assert len([r for r in before if "dev_images" in r and r["step"] > newest]) <= 1, "more than one save interval is lost"
    finish(start([*command, folder, STEPS, NEVER]))
    after = logged(folder)[len(before):]
    assert after[0]["step"] > newest and after[0]["minutes"] > before[0]["minutes"], "it did not go on from the checkpoint"
    steps = [record["step"] for record in read_metrics(Run(folder))]
    assert steps == sorted(steps) and steps[-1] == STEPS and steps[0] == before[0]["step"]
    assert_same_weights(folder, whole)


@stages
def test_a_damaged_checkpoint_is_told_and_the_older_one_used(stage, request):
    command, whole, killed = request.getfixturevalue(stage)
    folder = shutil.copytree(killed, whole.parent / "damaged")
    older, newest = saved(folder)[-2:]
    path = folder / "checkpoints" / f"step_{newest:07d}.pt"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    lines = len(logged(folder))
    output = finish(start([*command, folder, STEPS, NEVER]))
    assert f"{path.name} is damaged" in output
    assert older < logged(folder)[lines]["step"]
    assert_same_weights(folder, whole)


@stages
def test_finished_and_typed_again_changes_nothing(stage, request):
    command, whole, _ = request.getfixturevalue(stage)
    before = contents(whole)
    finish(start([*command, whole, STEPS, NEVER]))
    assert contents(whole) == before


def test_loss_falls_while_training(autoencoder, prior):
    for folder, key in ((autoencoder[1], "rec_loss"), (prior[1], "loss")):
        values = [record[key] for record in logged(folder) if key in record]
        assert values[-1] < values[0]


def test_stopped_by_signals_it_saves_and_says_how_to_go_on(prepared, tmp_path):
    command = [*MAIN, "train-autoencoder", "--data", prepared.folder, "--preset", "tiny-kl", "--run", tmp_path / "run", "--steps", 100_000]
    steps = [0]
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(command)
        metrics = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and logged(metrics.parent)[-1]["step"] > steps[-1], process)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 1 and "Traceback" not in output, output
        sentence = output.splitlines()[-1]
        assert sentence.startswith("Error: Stopped at step") and "run the same command again" in sentence
        steps.append(saved(tmp_path / "run")[-1])
        assert f"Stopped at step {steps[-1]}," in sentence
    assert 0 < steps[1] < steps[2]


def test_stopped_while_preparing_leaves_nothing_half_made(tmp_path):
    process = start([*MAIN, "prepare", "synthetic:20000", "--out", tmp_path / "data", "--size", 64])
    wait_until(lambda: (tmp_path / "data.part" / "progress.jsonl").exists(), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in output and "Stopped" in output.splitlines()[-1], output
    assert [path.name for path in tmp_path.iterdir()] == ["data.part"]                # where the same command goes on
