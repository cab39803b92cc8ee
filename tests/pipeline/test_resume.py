"""A run that is killed or stopped resumes, and ends where it would have ended. (`kill -9` at random moments: campaigns/test_kills.py.)"""
import json
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import MAIN, contents, start, type_in

from image_diffusion import training
from image_diffusion.runs import Run, load_snapshot, read_metrics
from image_diffusion.train_autoencoder import PRESETS, AutoencoderStage, train_autoencoder
from image_diffusion.train_diffusion import DiffusionStage, train_diffusion

STEPS, KILLED_AT = 20, 16    # the discriminator has a state by then


class Killed(BaseException):
    "What nothing catches, like `kill -9`."


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
def train(prepared, tmp_path_factory):
    "A function that trains a stage in a folder; both stages lie in the same folder."
    home = tmp_path_factory.mktemp("resume")
    with pytest.MonkeyPatch.context() as patch:
        small = replace(PRESETS["tiny-vq"], model=replace(PRESETS["tiny-vq"].model, ch=8, num_groups=4), batch_size=4)
        patch.setitem(PRESETS, "tiny-vq", small)
        patch.setattr(DiffusionStage, "sample", lambda self, path: None)         # sampling takes longer than the rest

        def train(stage, name, save_every_minutes=1000):
            patch.setattr(training, "faster_in_bf16", lambda: name in ("again", "damaged"))   # whoever resumes measures otherwise
            folder, words = home / f"{stage}-{name}", {"steps": STEPS, "save_every_minutes": save_every_minutes}
            if stage == "autoencoder":
                train_autoencoder(prepared, folder, "tiny-vq", **words)
            else:
                train_diffusion(prepared, home / "autoencoder-whole", folder, "tiny", **words)
            return folder

        yield train


@pytest.fixture(scope="module", params=["autoencoder", "prior"])
def runs(request, train):
    "A stage's name, the folder of a run that was never interrupted (and never saved on the way), and one of a run that was killed."
    cls = {"autoencoder": AutoencoderStage, "prior": DiffusionStage}[request.param]
    if request.param == "prior":
        train("autoencoder", "whole")                                            # returns at once where it is there
    whole = train(request.param, "whole")
    with pytest.MonkeyPatch.context() as patch:
        train_step = cls.train_step

        def killed_step(stage, step, *words):
            if step == KILLED_AT: raise Killed
            return train_step(stage, step, *words)

        patch.setattr(cls, "train_step", killed_step)
        with pytest.raises(Killed):
            train(request.param, "killed", 0)
    return request.param, whole, whole.with_name(f"{request.param}-killed")


def assert_same_weights(folder, other):
    (a, config_a), (b, config_b) = (load_snapshot(run)[:2] for run in (folder, other))
    assert config_a["step"] == config_b["step"] == STEPS and a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_killed_and_run_again_ends_with_the_same_weights(runs, train):
    stage, whole, killed = runs
    folder = shutil.copytree(killed, killed.with_name(f"{stage}-again"))
    (folder / "checkpoints" / f"step_{STEPS:07d}.pt.part").write_bytes(b"half a checkpoint")        # killed while it was written
    (folder / "checkpoints" / f"step_{STEPS:07d}.pt").write_bytes(b"a checkpoint without metadata")  # killed between the two files
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(f'{{"step": {STEPS - 1}, "los')                                                    # killed while a line was written
    newest, before = saved(folder)[-1], logged(folder)
    assert not (folder / "finished.json").exists() and newest >= KILLED_AT - 1
    train(stage, "again")
    after = logged(folder)[len(before):]
    assert after[0]["step"] > newest and after[0]["minutes"] > before[0]["minutes"], "it did not resume from the checkpoint"
    steps = [record["step"] for record in read_metrics(Run(folder))]
    assert steps == sorted(steps) and steps[-1] == STEPS and steps[0] == before[0]["step"]
    assert_same_weights(folder, whole)


def test_a_damaged_checkpoint_is_told_and_the_older_one_used(runs, train, capsys):
    stage, whole, killed = runs
    folder = shutil.copytree(killed, killed.with_name(f"{stage}-damaged"))
    older, newest = saved(folder)[-2:]
    path = folder / "checkpoints" / f"step_{newest:07d}.pt"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    lines = len(logged(folder))
    train(stage, "damaged")
    assert f"{path.name} is damaged" in capsys.readouterr().out
    assert older < logged(folder)[lines]["step"]
    assert_same_weights(folder, whole)


def test_finished_and_run_again_changes_nothing(runs, train):
    stage, whole, _ = runs
    before = contents(whole)
    train(stage, "whole")
    assert contents(whole) == before


def test_stopped_by_signals_it_saves_and_says_how_to_resume(prepared, tmp_path, monkeypatch):
    train_step, steps = AutoencoderStage.train_step, [0]
    for number in (signal.SIGINT, signal.SIGTERM):
        def stopped_step(stage, step, *words):
            if step == steps[-1] + 2: signal.raise_signal(number)
            return train_step(stage, step, *words)
        monkeypatch.setattr(AutoencoderStage, "train_step", stopped_step)
        result = type_in("train-autoencoder", "--data", prepared.folder, "--preset", "tiny-kl", "--run", tmp_path / "run", "--steps", 1000)
        assert result.exit_code == 1, result.output
        steps.append(saved(tmp_path / "run")[-1])
        assert f"Error: Stopped at step {steps[-1]}," in result.output and "run the same command again" in result.output
    assert steps == [0, 3, 6]


def test_stopped_while_preparing_leaves_nothing_half_made(tmp_path):
    process = start([*MAIN, "prepare", "synthetic:20000", "--out", tmp_path / "data", "--size", 64])
    wait_until(lambda: (tmp_path / "data.part" / "images.npy").exists(), process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in output and "Stopped" in output.splitlines()[-1], output
    assert [path.name for path in tmp_path.iterdir()] == ["data.part"]                # where the same command resumes
