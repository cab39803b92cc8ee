"""The walkthroughs, run as Colab runs them: a fresh kernel and an empty `/content` for each notebook, and a Drive that stays.

Here the cells of the step alone are run (nbdev_test runs the others); `COLAB=whole pytest tests/test_colab.py` runs every cell, top to bottom.
"""
import json
import os
import re
import threading
import time
from textwrap import indent

import nbformat
import pytest
from colab_cells import FORM, ROOT, WALKTHROUGHS, setup
from colab_machine import Machine, choose, walkthrough, skip_reason
from conftest import NARROW
from nbclient.exceptions import DeadKernelError

WHOLE = os.environ.get("COLAB") == "whole"
HOURS = 0.0007    # of training each network: two and a half seconds


@pytest.fixture(scope="module", autouse=True)
def needs_a_namespace(tmp_path_factory):
    "Skip where this computer cannot play a Colab machine."
    if reason := skip_reason(tmp_path_factory.mktemp("root")):
        pytest.skip(reason)


def new_drive(folder):
    "An empty Google Drive under its two names."
    (folder / "drive/MyDrive").mkdir(parents=True)
    (folder / "drive/My Drive").symlink_to("MyDrive")
    return folder / "drive"


def cells_of(name, twice=False, change=lambda source: source):
    "The code cells of a walkthrough, with the budget filled in."
    cells = nbformat.read(ROOT / f"nbs/{name}.ipynb", as_version=4).cells
    cells = [cell for cell in (cells if WHOLE else walkthrough(cells)) if cell.cell_type == "code"]
    for cell in cells:
        cell.source = change(choose(cell.source, hours=HOURS))
        if name == "15_train_diffusion" and cell.source.startswith(FORM):
            cell.source += f"\n{NARROW}"      # all that the step needs is defined by now
    return [nbformat.v4.new_code_cell(cell.source) for cell in cells for _ in range(1 + twice)]


def printed(notebook, streams=("stdout", "stderr")):
    "All that the cells printed."
    return "".join(output.text for cell in notebook.cells for output in cell.outputs if output.output_type == "stream" and output.name in streams)


def files(folder):
    "Every file below a folder, and when it was last written."
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def kill_while_it_trains(machine, run):
    "Kill the machine as soon as Drive holds a checkpoint of a step that it has trained."
    def wait():
        while not [path for path in (run / "checkpoints").glob("step_*.json") if path.stem != "step_0000000"]:
            time.sleep(0.02)
        machine.die()
    threading.Thread(target=wait, daemon=True).start()


@pytest.fixture(scope="module")
def first_pass(tmp_path_factory):
    "Drive after the user ran all walkthroughs, each on a machine of its own, the autoencoder's on two: what they printed, and how often a picture was replaced."
    folder = tmp_path_factory.mktemp("first")
    drive, said, updates = new_drive(folder), {}, {}
    there = drive / "MyDrive/image_diffusion/notebooks/synthetic"

    def run(name, cells):
        start, machine = time.monotonic(), Machine(folder / name, drive)
        if name == "killed":
            kill_while_it_trains(machine, there / "tiny-kl")
        try:
            said[name] = printed(machine.run(cells))
        except DeadKernelError:
            said[name] = "killed"
        updates[name] = machine.updates
        print(f"first pass, {name}: {time.monotonic() - start:.0f} s")

    saves_often = cells_of("10_train_autoencoder", change=lambda source: source.replace("steps) for kind", "steps, save_every_minutes=0.005) for kind"))
    run("01_data", cells_of("01_data"))
    run("killed", saves_often)
    assert said["killed"] == "killed" and not (there / "tiny-kl/finished.json").exists()
    run("10_train_autoencoder", cells_of("10_train_autoencoder"))
    for name in ("15_train_diffusion", "16_generate"):
        run(name, cells_of(name))
    return there, said, updates


def test_a_pass_leaves_everything_on_drive_and_shows_it_live(first_pass):
    there, said, updates = first_pass
    left = files(there)
    assert {"data-32.tar", "tiny-samples.png", "tiny-report.html"} <= left.keys()
    for stage in ("kl", "vq", "prior"):
        assert {f"tiny-{stage}/{name}" for name in ("config.json", "finished.json", "metrics.jsonl")} <= left.keys()
    assert not [name for name in left if ".part" in name or "latents" in name]      # latents are read at random: on the machine's own disk
    assert all("Mounted at /content/drive" in said[name] for name in WALKTHROUGHS)
    assert updates["10_train_autoencoder"] >= 2 and updates["15_train_diffusion"] >= 2        # curves and samples, for each training that was not resumed


def test_a_machine_killed_while_it_trains_goes_on_from_drive(first_pass):
    there, said, _ = first_pass
    assert int(re.search(r"autoencoder tiny-kl: +(\d+)%", said["10_train_autoencoder"])[1]) > 0      # not from the beginning
    steps = [json.loads(line)["step"] for line in (there / "tiny-kl/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == json.loads((there / "tiny-kl/finished.json").read_text())["step"]


def test_a_second_pass_takes_up_what_the_first_left_and_every_cell_may_be_run_twice(first_pass, tmp_path):
    there, _, _ = first_pass
    before = files(there)
    for name in WALKTHROUGHS:
        start = time.monotonic()
        said = printed(Machine(tmp_path / name, there.parents[3]).run(cells_of(name, twice=not WHOLE)))
        print(f"second pass, {name}: {time.monotonic() - start:.0f} s")
        assert "Mounted at /content/drive" in said and (WHOLE or "already mounted" in said)
        assert "Copying 512 images" in said                                                   # the set comes back from Drive
    after = files(there)
    assert {name for name in after if after[name] != before.get(name)} == {"tiny-samples.png", "tiny-report.html"}


TELL = "from image_diffusion.runs import runs_root\ntry: print(runs_root())\nexcept Exception as error: print(type(error).__name__, error)"
SET_UP = f"try:\n{indent(setup('10_train_autoencoder'), '    ')}\nexcept ValueError as error: print(error)"


def test_a_drive_that_is_not_there_is_told_and_the_set_up_cell_mounts_it(tmp_path):
    drive = new_drive(tmp_path)
    cells = [TELL, f"open({str(tmp_path / 'refused')!r}, 'w').close()", SET_UP, TELL, f"import os; os.remove({str(tmp_path / 'refused')!r})",
             "os.makedirs('/content/drive/x')", SET_UP, TELL, "os.rmdir('/content/drive/x')", SET_UP, SET_UP, TELL]
    cells += ["drive.break_off()", TELL, SET_UP, TELL] if os.path.exists("/dev/fuse") else []
    said = printed(Machine(tmp_path / "machine", drive).run([nbformat.v4.new_code_cell(source) for source in cells]), ["stdout"])
    away, mounted = "not mounted: run the set-up cell", "Mounted at /content/drive"
    there = ["/content/drive/MyDrive/image_diffusion"]
    expected = [away, "mount failed", away, "Mountpoint must not already contain files", away, mounted, "already mounted", *there]
    expected += [away, mounted, *there] if os.path.exists("/dev/fuse") else []
    said = [line for line in said.splitlines() if line]
    assert len(said) == len(expected) and all(words in line for words, line in zip(expected, said)), said
    assert files(drive) == {}
