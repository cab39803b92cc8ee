"""The walkthroughs, run as Colab runs them: a fresh kernel and an empty `/content` for each notebook, and a Drive that stays.

By default the step of the autoencoder alone, on a machine that is killed and on another one; `pytest -m campaign` runs every cell of every
walkthrough, twice.
"""
import json
import os
import re
import threading
import time
from textwrap import indent

import nbformat
import pytest
from colab_cells import FORM, ROOT, SETUP, WALKTHROUGHS, setup
from colab_machine import Machine, choose, walkthrough, skip_reason
from conftest import NARROW
from nbclient.exceptions import DeadKernelError

AUTOENCODER = "50_train_autoencoder"
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


def cells_of(name, whole, twice=False, change=lambda source: source):
    "The code cells of a walkthrough without its exercises, or of its step alone, with the hours filled in."
    cells = nbformat.read(ROOT / f"nbs/{name}.ipynb", as_version=4).cells
    cells = [cell for cell in (cells if whole else walkthrough(cells)) if cell.cell_type == "code"]
    cells = [cell for cell in cells if "#| eval: false" not in cell.source or cell.source.startswith(SETUP)]
    for cell in cells:
        cell.source = change(choose(cell.source, hours=HOURS))
        if name == "65_train_diffusion" and cell.source.startswith(FORM):
            cell.source += f"\n{NARROW}"      # all that the step needs is defined by now
    return [nbformat.v4.new_code_cell(cell.source) for cell in cells for _ in range(1 + twice)]


def printed(notebook, streams=("stdout", "stderr")):
    "All that the cells printed."
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name in streams)


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
def first_pass(tmp_path_factory, campaign):
    "Drive after the walkthroughs, each on its own machine, the autoencoder's on two: what they printed, how often an image was replaced."
    folder = tmp_path_factory.mktemp("first")
    drive, said, updates = new_drive(folder), {}, {}
    there = drive / "MyDrive/image_diffusion/notebooks/synthetic"

    def run(name, cells):
        machine = Machine(folder / name, drive)
        if name == "killed":
            kill_while_it_trains(machine, there / "tiny-kl")
        try:
            said[name] = printed(machine.run(cells))
        except DeadKernelError:
            said[name] = "killed"
        updates[name] = machine.updates

    def saves_often(source):
        return source.replace("steps) for kind", "steps, save_every_minutes=0.005) for kind")

    if campaign.whole:
        run("13_data", cells_of("13_data", whole=True))
    run("killed", cells_of(AUTOENCODER, campaign.whole, change=saves_often))
    assert said["killed"] == "killed" and not (there / "tiny-kl/finished.json").exists()
    run(AUTOENCODER, cells_of(AUTOENCODER, campaign.whole, twice=not campaign.whole))
    for name in WALKTHROUGHS[2:] if campaign.whole else ():
        run(name, cells_of(name, whole=True))
    return there, said, updates


@pytest.mark.campaign
def test_a_pass_leaves_everything_on_drive_and_shows_it_live(first_pass, campaign):
    there, said, updates = first_pass
    left = files(there)
    assert "data-32.tar" in left
    for stage in ("kl", "vq", "prior") if campaign.whole else ("kl", "vq"):
        assert {f"tiny-{stage}/{name}" for name in ("config.json", "finished.json", "metrics.jsonl")} <= left.keys()
    assert not campaign.whole or {"tiny-samples.png", "tiny-report.html"} <= left.keys()
    assert not [name for name in left if ".part" in name or "latents" in name]      # latents are read at random: on the machine's own disk
    for name in said.keys() - {"killed"}:
        assert "Mounted at /content/drive" in said[name] and (campaign.whole or "already mounted" in said[name])
        assert name[:2] not in ("50", "65") or updates[name] >= 2    # curves and samples, for each training that was not resumed
    assert "Copying 512 images" in said[AUTOENCODER]                                # the set comes back from Drive


@pytest.mark.campaign
def test_a_machine_killed_while_it_trains_resumes_from_drive(first_pass):
    there, said, _ = first_pass
    assert int(re.search(r"autoencoder tiny-kl: +(\d+)%", said[AUTOENCODER])[1]) > 0      # not from the beginning
    steps = [json.loads(line)["step"] for line in (there / "tiny-kl/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == json.loads((there / "tiny-kl/finished.json").read_text())["step"]


@pytest.mark.campaign
def test_a_second_pass_trains_nothing_again_and_every_cell_may_be_run_twice(first_pass, tmp_path, campaign):
    if not campaign.whole:
        pytest.skip("the first pass has run each cell twice")
    there, _, _ = first_pass
    before = files(there)
    for name in WALKTHROUGHS:
        said = printed(Machine(tmp_path / name, there.parents[3]).run(cells_of(name, whole=True, twice=True)))
        assert "Mounted at /content/drive" in said and "already mounted" in said and "Copying 512 images" in said
    after = files(there)
    assert {name for name in after if after[name] != before.get(name)} <= {"tiny-samples.png", "tiny-report.html"}

TELL = "from image_diffusion.drive import runs_root\ntry: print(runs_root())\nexcept Exception as error: print(type(error).__name__, error)"
SET_UP = f"try:\n{indent(setup(AUTOENCODER), '    ')}\nexcept ValueError as error: print(error)"


def test_a_drive_that_is_not_there_is_told_and_the_set_up_cell_mounts_it(tmp_path):
    drive = new_drive(tmp_path)
    refused = str(tmp_path / "refused")
    cells = [TELL, f"open({refused!r}, 'w').close()", SET_UP, TELL, f"import os; os.remove({refused!r})",
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
