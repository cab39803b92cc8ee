"""A run on a Drive that truncates, forgets, reorders, fills up, disconnects and is slow: no good checkpoint is lost, and no half file is taken for a whole one."""
import errno
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, start
from image_diffusion import drive as drive_module
from image_diffusion import files as files_module
from image_diffusion import fitting, training
from image_diffusion.drive import BackgroundMirror, Drive, Mirror, local_copy, open_run, runs_root
from image_diffusion.files import UserError, write_json
from image_diffusion.runs import Run, append_metrics, list_checkpoints, load_checkpoint, read_metrics, save_checkpoint, truncate_after
from image_diffusion.fitting import Interrupted, fit
from image_diffusion.training import Budget, Stage

SEQUENCES, IN_THREADS = 210, 20   # of random faults: pass by pass, and with a thread in the background
ERRORS = [OSError(errno.ENOTCONN, "Transport endpoint is not connected"), OSError(errno.EIO, "Input/output error"),
          OSError(errno.ENOSPC, "No space left on device"), OSError(errno.ESTALE, "Stale file handle"),
          OSError(errno.EDQUOT, "Disk quota exceeded"), OSError(errno.EIO, "A Google Drive quota has been exceeded")]


class Treacherous(Drive):
    "A Drive in memory. `view` is what this machine sees, `cloud` is what outlives it; changes reach the cloud later, and in any order."

    def __init__(self, seed, faults=0.0):
        super().__init__(Path("Drive"))
        self.random, self.faults, self.outage = random.Random(seed), faults, 0
        self.view, self.cloud, self.pending, self.seen = {}, {}, [], set()
        self.checks = lambda: None      # called after every change of the cloud

    # faults

    def fault(self, kind, share=1.0):
        "Whether a fault of this kind happens now."
        if self.random.random() < self.faults * share:
            self.seen.add(kind)
            return True

    def answer(self):
        "Fails with one of Drive's errors: once, or for a stretch."
        if self.outage == 0 and self.fault("outage", 0.1):
            self.outage = self.random.randint(5, 60)
        if self.outage or self.fault("error", 0.5):
            self.outage = max(0, self.outage - 1)
            error = self.random.choice(ERRORS)
            self.seen.add(error.errno)
            raise error

    def settle(self, all_of_it=False):
        "Time passes: what was waiting before reaches the cloud, then some of the rest, or all of it."
        self.arrive([change for change in self.pending if change[0]])
        now, wait = [], []
        for change in [(True, *change[1:]) for change in self.pending if not change[0]]:
            late = not all_of_it and (self.random.random() < 0.5 or change[1] in {name for _, name, _ in wait})
            (wait if late else now).append(change)
        self.arrive(now)
        self.pending = wait

    def arrive(self, changes):
        "Changes reach the cloud in any order, but for those of one name."
        names = sorted({name for _, name, _ in changes})
        for name in self.random.sample(names, len(names)):
            for content in [content for _, n, content in changes if n == name]:
                self.commit(name, content)

    def commit(self, name, content):
        "A change reaches the cloud; None: a file is deleted."
        self.cloud.pop(name, None) if content is None else self.cloud.update({name: content})
        self.checks()

    def change(self, name, content):
        "A change that this machine sees at once."
        self.view.pop(name, None) if content is None else self.view.update({name: content})
        self.pending.append((False, name, content))

    def machine_dies(self):
        "Another machine sees what the cloud has; what was on its way may be lost or arrive."
        self.arrive([change for change in self.pending if self.random.random() < 0.5])
        self.pending, self.view, self.outage = [], dict(self.cloud), 0

    # what a mirror asks

    def sizes(self):
        self.answer()
        return {name: len(content) for name, content in self.view.items()}

    def read(self, name):
        self.answer()
        if name not in self.view: raise FileNotFoundError(errno.ENOENT, "gone", name)
        return self.view[name]

    def sha256(self, name):
        return hashlib.sha256(self.read(name)).hexdigest()

    def fetch(self, name, path):
        content = self.read(name)
        path.write_bytes(content[:len(content) // 2] if self.fault("truncated on the way here", 0.3) else content)

    def write(self, name, file):
        content = file.read()
        if self.fault("slow"): time.sleep(0.003)
        if self.fault("truncated copy"):
            self.change(name, content[:self.random.randrange(len(content))])
            self.answer()                                    # perhaps it says so, perhaps not
        else:
            self.answer()
            self.change(name, content)
        return hashlib.sha256(content).hexdigest()

    def rename(self, old, new):
        if self.fault("failed rename"):
            if self.random.random() < 0.5: self.change(old, None)
            raise self.random.choice(ERRORS)
        content = self.read(old)
        self.change(old, None)
        self.change(new, content)
        if self.fault("rename done and failed"): raise self.random.choice(ERRORS)

    def remove(self, name):
        self.answer()
        self.change(name, None)

    # what the test asks

    def good(self, files):
        "Steps of the checkpoints that are whole in `files`."
        steps = set()
        for name in [name for name in files if name.endswith(".json") and name.startswith("checkpoints/")]:
            metadata, content = json.loads(files[name]), files.get(name.replace(".json", ".pt"), b"")
            if hashlib.sha256(content).hexdigest() == metadata["sha256"]:
                steps.add(metadata["step"])
        return steps


class Machine:
    "A machine that trains a run on a treacherous Drive; it dies now and then, and another takes its place."

    def __init__(self, drive, folder):
        self.drive, self.folder, self.lives, self.true, self.newest = drive, folder, 0, {}, -1
        drive.checks = self.check
        self.born()

    def born(self):
        "A new machine, with an empty disk."
        self.lives += 1
        self.run = Run(self.folder / str(self.lives))
        write_json(self.run.folder / "config.json", {})
        self.mirror = Mirror(self.run, self.drive)
        while True:
            try:
                self.mirror.pull()
                break
            except OSError: pass                             # somebody sits there and tries again,
            except UserError:                                 # and starts over where nothing whole ever reached the cloud
                assert not self.drive.good(self.drive.view)
                for name in [name for name in self.drive.view if name.startswith("checkpoints/")]:
                    del self.drive.view[name], self.drive.cloud[name]
        state = load_checkpoint(self.run)
        self.step = state["step"] if state else 0
        truncate_after(self.run, self.step)
        if state:
            assert state["weights"].tolist() in self.true[self.step], "half a file was taken for a whole one"
        expected = max(self.drive.good(self.drive.view), default=0)
        assert self.step == expected, f"resumed at {self.step}, and {expected} is whole on Drive"

    def check(self):
        "What the mirror does never takes the newest good checkpoint away."
        newest = max(self.drive.good(self.drive.cloud), default=-1)
        assert newest >= self.newest, f"the newest good checkpoint was {self.newest} and is {newest}"
        self.newest = newest

    def train(self):
        "A stretch of training, and its checkpoint."
        self.step += 1
        append_metrics(self.run, {"step": self.step, "loss": 1 / self.step})
        weights = torch.rand(50, generator=torch.Generator().manual_seed(self.drive.random.randrange(2**31)))
        self.true.setdefault(self.step, []).append(weights.tolist())
        save_checkpoint(self.run, self.step, {"step": self.step, "weights": weights}, self.drive.random.random())

    def push(self):
        "A pass of the mirror, while time passes for Drive."
        try:
            self.mirror.push()
        except OSError: pass
        self.drive.settle()

    def vanish(self):
        "A file is gone, or only half there. (Of checkpoints one at a time, with another good one left: else nobody could help.)"
        files = sorted(self.drive.cloud.keys() & self.drive.view.keys())
        good = self.drive.good(self.drive.cloud)
        if len(good) < 2 or not files: return
        name, half = self.drive.random.choice(files), self.drive.random.random() < 0.5
        self.drive.seen.add("vanished file")
        for files in (self.drive.cloud, self.drive.view):
            if half and name.endswith(".pt"): files[name] = files[name][:len(files[name]) // 2]
            else: del files[name]
        self.newest = max(self.drive.good(self.drive.cloud), default=-1)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    "No disk flushes, no waiting: what is tested is the order of things."
    monkeypatch.setattr(files_module.os, "fsync", lambda handle: None)
    if Path("/dev/shm").is_dir(): monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    monkeypatch.setattr(drive_module, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(drive_module, "RETRY_SECONDS", 0.005)


def as_it_should_be(drive, run):
    "At the end Drive has the newest two and the best, whole, all metrics, no debris, and little else."
    here = {checkpoint["step"] for checkpoint in list_checkpoints(run)}
    assert here <= drive.good(drive.cloud) and len(drive.good(drive.cloud)) <= 5
    assert not [name for name in drive.cloud if name.endswith(".part")]
    if (run.folder / "metrics.jsonl").exists():
        assert drive.cloud["metrics.jsonl"] == (run.folder / "metrics.jsonl").read_bytes()


def seeds(campaign, count):
    "Seeds of as many sequences as this run plays."
    return range(campaign.seed, campaign.seed + campaign.share(count))


@pytest.mark.campaign
def test_random_faults_lose_no_good_checkpoint_and_make_no_half_one(tmp_path, campaign, capsys):
    seen = set()
    for seed in seeds(campaign, SEQUENCES):
        print(f"seed {seed}")
        drive = Treacherous(seed, faults=random.Random(seed).choice([0.02, 0.1, 0.3]))
        machine = Machine(drive, tmp_path / str(seed))
        for _ in range(8):
            machine.train()
            machine.push()
            if drive.random.random() < 0.15: machine.vanish()
            if drive.random.random() < 0.15:
                drive.machine_dies()
                machine.born()
        drive.faults, drive.outage = 0.0, 0                  # Drive is back
        for _ in range(3):
            machine.mirror.push()
            drive.settle(all_of_it=True)
        as_it_should_be(drive, machine.run)
        seen |= drive.seen
        shutil.rmtree(tmp_path / str(seed))
    assert not campaign.whole or seen >= {"outage", "error", "truncated copy", "truncated on the way here", "failed rename",
                                          "rename done and failed", "vanished file",
                                          "slow", errno.ENOTCONN, errno.EIO, errno.ENOSPC, errno.ESTALE, errno.EDQUOT}


@pytest.mark.campaign
def test_random_faults_in_the_background(tmp_path, campaign, capsys):
    for seed in seeds(campaign, IN_THREADS):
        drive = Treacherous(seed, faults=0.15)
        run = Run.open(tmp_path / str(seed), {})
        background = BackgroundMirror(Mirror(run, drive))
        background.start()
        for step in range(1, 9):
            append_metrics(run, {"step": step})
            save_checkpoint(run, step, {"step": step}, random.Random(step).random())
            time.sleep(0.002)
        drive.faults, drive.outage = 0.0, 0
        assert background.close(seconds=30)
        drive.settle(all_of_it=True)
        as_it_should_be(drive, run)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Google Drive")]
    assert told, "each trouble is told once, and its end"
    assert all(("does not take files" if i % 2 == 0 else "is back") in line for i, line in enumerate(told)), told


# A whole training in Colab

class Line(Stage):
    "A stage that fits a line."
    parts = ("model", "optimizer")

    def __init__(self, pause=0.0):
        torch.manual_seed(0)
        self.pause, self.model = pause, torch.nn.Linear(1, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)

    def train_step(self, step, progress):
        time.sleep(self.pause)
        training.seed_step(0, step)
        x = torch.randn(16, 1)
        loss = (self.model(x) - 2 * x).square().mean()
        return {"loss": loss.detach()} | training.optimizer_step(loss, self.optimizer, training.Precision().scaler(), 10.0)

    def snapshot(self): return self.model.state_dict(), {}
    def evaluate(self): return {"dev_loss": self.model.bias.abs().item()}
    def score(self, evaluation): return -evaluation["dev_loss"]
    def sample(self, path): path.write_bytes(b"a picture")


@pytest.fixture
def colab(tmp_path, monkeypatch):
    "The folder of Drive, mounted, on a machine that looks like Colab's."
    monkeypatch.setattr(drive_module, "in_colab", lambda: True)
    monkeypatch.setattr(drive_module, "DRIVE", tmp_path / "drive")
    monkeypatch.setattr(drive_module, "SCRATCH", tmp_path / "machine")
    (tmp_path / "drive/MyDrive").mkdir(parents=True)
    return tmp_path / "drive/MyDrive"


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_on_drive_trains_on_the_machine_and_ends_on_drive(colab, tmp_path):
    run = open_run(colab / "run", {"lr": 1})
    numbers = fit(Line(), run, Budget(steps=60), save_every_minutes=0.0005)
    assert run.finished == numbers and numbers["step"] == 60
    first = {"checkpoints/step_0000000.pt", "checkpoints/step_0000000.json"}
    assert files(colab / "run") >= files(tmp_path / "machine/MyDrive/run") - first
    assert load_checkpoint(run)["step"] == 60 and [r["step"] for r in read_metrics(run) if "loss" in r] == [25, 50, 60]
    assert fit(Line(), run, Budget(steps=60)) == numbers


def test_another_machine_resumes_from_drive_to_the_same_weights(colab, tmp_path):
    whole = Line()
    fit(whole, Run.open(tmp_path / "whole", {}), Budget(steps=60))
    run = open_run(colab / "run", {})
    with pytest.raises(Interrupted, match="with everything saved"):
        fit(Line(pause=0.005), run, Budget(steps=60), end=time.monotonic() + 60 * fitting.SPARE_MINUTES + 0.15)
    step = load_checkpoint(run)["step"]
    assert 0 < step < 60 and run.finished is None
    shutil.rmtree(tmp_path / "machine")
    (colab / "run/config.json").unlink()                     # written at the start, and it never reached the cloud
    other = Line()
    fit(other, open_run(colab / "run", {}), Budget(steps=60))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), other.model.parameters()))
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == [25, 50, 60]


class ThirtySeconds(Drive):
    "A Drive that takes 30 seconds for each file."
    def write(self, name, file):
        time.sleep(30)
        return super().write(name, file)


def test_training_never_waits_for_a_drive_that_takes_30_seconds_a_file(colab, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "local_copy", partial(local_copy, drive=ThirtySeconds))
    monkeypatch.setattr(drive_module, "WAIT_SECONDS", 0.5)
    moments = []
    class Watched(Line):
        def train_step(self, step, progress):
            moments.append(time.monotonic())
            return super().train_step(step, progress)
    with pytest.raises(UserError, match="has not taken everything yet.*run is whole on this machine"):
        fit(Watched(pause=0.01), open_run(colab / "run", {}), Budget(steps=150), save_every_minutes=0.002)
    pause = max(b - a for a, b in zip(moments, moments[1:]))
    assert pause < 1, f"training waited {pause:.2f} s"
    print(f"longest pause between two steps, saving every 0.12 s: {pause:.3f} s")


def test_drive_goes_away_and_comes_back_while_training(colab, tmp_path, monkeypatch, capsys):
    calls = []
    class Away(Drive):
        def sizes(self):
            calls.append(time.monotonic())
            if 2 <= len(calls) < 6: raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
            return super().sizes()
    monkeypatch.setattr(fitting, "local_copy", partial(local_copy, drive=Away))
    run = open_run(colab / "run", {})
    fit(Line(pause=0.002), run, Budget(steps=60), save_every_minutes=0.0005)
    said = capsys.readouterr().out
    assert said.count("it is not connected. Training continues") == 1 and said.count("Google Drive is back") == 1
    assert run.finished["step"] == 60


def test_drive_that_stays_away_leaves_the_run_on_the_machine_and_the_next_call_copies_it(colab, monkeypatch, capsys):
    class Full(Drive):
        def write(self, name, file): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(drive_module, "WAIT_SECONDS", 0.1)
    run = open_run(colab / "run", {})
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "local_copy", partial(local_copy, drive=Full))
        with pytest.raises(UserError, match="has not taken everything yet"):
            fit(Line(), run, Budget(steps=30))
    assert run.finished is None and "it is full. Training continues" in capsys.readouterr().out
    monkeypatch.setattr(drive_module, "WAIT_SECONDS", 30)
    class Untrained(Line):
        def train_step(self, step, progress): raise AssertionError("it is trained already")
    assert fit(Untrained(), run, Budget(steps=30))["step"] == 30 and run.finished["step"] == 30


def test_drive_that_is_not_mounted_is_said_and_its_folder_not_made(colab, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "drive")
    monkeypatch.delenv("IMAGE_DIFFUSION_HOME")
    for act in (runs_root, lambda: open_run(colab / "run", {})):
        with pytest.raises(UserError, match="Google Drive is not mounted"): act()
    assert not (tmp_path / "drive").exists()


def test_drive_unmounted_while_training_is_not_made_on_the_machine(colab, tmp_path, monkeypatch):
    monkeypatch.setattr(drive_module, "WAIT_SECONDS", 0.1)
    run = open_run(colab / "run", {})
    class Unmounts(Line):
        def train_step(self, step, progress):
            if step == 5: (tmp_path / "drive").rename(tmp_path / "unmounted")
            return super().train_step(step, progress)
    with pytest.raises(UserError, match="has not taken everything yet"):
        fit(Unmounts(), run, Budget(steps=30), save_every_minutes=0.0)
    assert not (tmp_path / "drive").exists()


def test_a_run_deleted_on_drive_starts_anew_and_what_the_machine_had_is_moved_aside(colab, tmp_path, capsys):
    fit(Line(), open_run(colab / "run", {}), Budget(steps=30))
    shutil.rmtree(colab / "run")
    fit(Line(), open_run(colab / "run", {}), Budget(steps=20))
    assert "it was moved to" in capsys.readouterr().out
    assert load_checkpoint(Run(tmp_path / "machine/MyDrive/run.aside"))["step"] == 30 and load_checkpoint(Run(colab / "run"))["step"] == 20


# Two processes

HOLDS = """import sys, time
from pathlib import Path
from image_diffusion.files import lock
with lock(Path(sys.argv[1]), "busy"):
    print("held", flush=True)
    time.sleep(60)"""


def test_two_processes_in_one_run_folder_are_kept_apart_and_kill_9_frees_it(tmp_path):
    run = Run.open(tmp_path / "run", {})
    other = start([sys.executable, "-c", HOLDS, run.folder], cwd=ROOT)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="Another process trains in"):
        fit(Line(), run, Budget(steps=5))
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert fit(Line(), run, Budget(steps=5))["step"] == 5
