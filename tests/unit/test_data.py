"""A set is prepared whole and the same every time: interruptions, other settings, packing, batches."""
import io
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SIZE, contents, type_in
from image_diffusion import data, photos, pipeline
from image_diffusion.data import load_prepared, pack, unpack
from image_diffusion.files import UserError, file_sha256
from image_diffusion.landscapes import CLASSES, synthetic_landscapes
from PIL import Image
from test_photos import jpeg, made, reasons, same
from torch.utils.data import DataLoader, Subset


# Settings

@pytest.mark.parametrize("setting", [{"size": 0}, {"size": 10**6}, {"seed": -1}, {"limit": 0}, {"labels": __file__ + ".csv"}])
def test_settings_that_make_no_sense(tmp_path, setting):
    with pytest.raises(UserError, match="must be"):
        made("synthetic:10", tmp_path / "out", **setting)
    assert list(tmp_path.iterdir()) == []


def test_drawn_landscapes_bring_their_own_classes(tmp_path):
    (tmp_path / "labels.csv").write_text("000000,sea\n")
    with pytest.raises(UserError, match="for photos, a CSV"):
        made("synthetic:10", tmp_path / "out", labels=tmp_path / "labels.csv")
    assert (made("synthetic:10", tmp_path / "none", labels="none").labels == -1).all()


def test_a_long_word_is_a_mistyped_folder_and_no_file_of_google_drive(tmp_path):
    with pytest.raises(UserError, match="my_landscape_photos_2019_norway' was not found"):
        made("my_landscape_photos_2019_norway", tmp_path / "out")


# Interruptions

@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "A zip of 2,000 files, every fiftieth broken, and the set that an undisturbed run makes of it."
    folder = tmp_path_factory.mktemp("many")
    photos = [jpeg(k, 64) for k in range(40)]
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for k in range(2000):
            archive.writestr(f"{CLASSES[k % 5]}/{k:04d}.jpg", photos[k % 40] if k % 50 else b"broken")
    return folder / "photos.zip", made(folder / "photos.zip", folder / "set")


def test_kill_9_at_ten_random_moments(many, tmp_path, monkeypatch):
    zip_file, whole = many
    monkeypatch.setattr(data, "SAVE_SECONDS", 0.02)
    # a fork that is killed with tqdm's own lock, which processes share, would keep it forever
    monkeypatch.setattr(data.tqdm, "_lock", threading.RLock(), raising=False)
    out, dice, far, kills = tmp_path / "set", random.Random(0), [0], 0
    while kills < 10 or not far[-1] and kills < 100 and not out.exists():         # a busy machine needs more than ten to get anywhere
        kills += 1
        process = multiprocessing.get_context("fork").Process(target=made, args=(zip_file, out))
        process.start()
        time.sleep(dice.uniform(0.05, 0.5))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if out.exists():                                                          # it was quicker than we: then it must be whole
            assert same(load_prepared(out), whole)
            continue
        saved = tmp_path / "set.part" / "progress.json"
        far.append(json.loads(saved.read_text())["done"] if saved.exists() else 0)
    assert far == sorted(far) and (far[-1] or out.exists()), far              # it resumed, each time
    assert same(made(zip_file, out), whole) and reasons(load_prepared(out)) == reasons(whole)
    assert sorted(p.name for p in out.iterdir()) == ["images.npy", "labels.npy", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("damage", ["progress cut", "no progress", "images cut", "images longer", "no images"])
def test_whatever_a_dead_machine_left_the_set_is_right(many, tmp_path, monkeypatch, damage):
    zip_file, whole = many
    monkeypatch.setattr(data, "SAVE_SECONDS", -1)
    out, part, runner = tmp_path / "set", tmp_path / "set.part", data.in_order

    def unplugged(jobs, workers):
        for number, results in enumerate(runner(jobs, workers)):
            if number == 60:
                raise KeyboardInterrupt
            yield results

    monkeypatch.setattr(data, "in_order", unplugged)
    with pytest.raises(KeyboardInterrupt):
        made(zip_file, out)
    monkeypatch.setattr(data, "in_order", runner)
    saved, images = part / "progress.json", part / "images.npy"
    assert json.loads(saved.read_text())["done"] == 60 * 16 and not out.exists()
    if damage == "progress cut":
        os.truncate(saved, saved.stat().st_size // 2)
    if damage == "no progress":
        saved.unlink()
    if damage == "images cut":
        os.truncate(images, images.stat().st_size // 2)
    if damage == "images longer":
        images.write_bytes(images.read_bytes() + b"x" * 100_000)
    if damage == "no images":
        images.unlink()
    assert same(made(zip_file, out), whole) and reasons(load_prepared(out)) == reasons(whole)


def test_unfinished_work_of_other_settings_or_another_owner_is_not_touched(many, tmp_path, monkeypatch):
    def unplugged(jobs, workers):
        yield next(jobs)()
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "in_order", unplugged)
        patch.setattr(data, "SAVE_SECONDS", -1)
        made(many[0], tmp_path / "set")
    before = contents(tmp_path)
    for options in ({"size": 16}, {"limit": 9}, {"seed": 1}, {"labels": "none"}):
        with pytest.raises(UserError, match="set.part' already holds photos prepared with other settings"):
            made(many[0], tmp_path / "set", **options)
    monkeypatch.setattr(data, "FORMAT_VERSION", 3)
    with pytest.raises(UserError, match="format_version 2, not 3"):
        made(many[0], tmp_path / "set")
    assert contents(tmp_path) == before
    (tmp_path / "mine.part").mkdir()
    (tmp_path / "mine.part" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="mine.part' is in the way"):
        made(many[0], tmp_path / "mine")
    assert (tmp_path / "mine.part" / "diary.txt").exists()


def test_a_disk_that_fails_stops_the_work_and_loses_nothing(many, tmp_path, monkeypatch):
    "Drive goes away in the middle: its photos must not be left out for good."
    broken, calls = photos.photo_array, []

    def unmounted(image, size):
        calls.append(1)
        if len(calls) > 500:
            raise OSError(107, "Transport endpoint is not connected")
        return broken(image, size)

    with monkeypatch.context() as patch:
        patch.setattr(photos, "photo_array", unmounted)
        with pytest.raises(UserError, match="Transport endpoint is not connected.*kept in .*set.part.*same call resumes"):
            made(many[0], tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(photos, "photo_array", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(UserError, match="out of memory"):
            made(many[0], tmp_path / "set")
    assert same(made(many[0], tmp_path / "set"), many[1]) and reasons(load_prepared(tmp_path / "set")) == reasons(many[1])


@pytest.mark.parametrize("moment", ["before it is named", "just after"])
def test_a_machine_that_dies_at_the_very_end(many, tmp_path, monkeypatch, moment):
    def die(*_):
        raise KeyboardInterrupt

    def die_at_set(source, target, replace=os.replace):
        return die() if Path(target).name == "set" else replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*{"before it is named": (data.os, "replace", die_at_set), "just after": (data.Path, "unlink", die)}[moment])
        made(many[0], tmp_path / "set")
    assert (tmp_path / "set").exists() == (moment == "just after")
    assert same(made(many[0], tmp_path / "set"), many[1])
    assert {"images.npy", "labels.npy", "manifest.json"} <= {p.name for p in (tmp_path / "set").iterdir()}


def test_two_at_once(many, tmp_path, monkeypatch):
    runner = data.in_order

    def second(jobs, workers):
        with pytest.raises(UserError, match="another process is preparing"):
            made(many[0], tmp_path / "set")
        return runner(jobs, workers)

    monkeypatch.setattr(data, "in_order", second)
    assert same(made(many[0], tmp_path / "set"), many[1])


def test_a_full_disk_keeps_what_is_done(many, tmp_path):
    words = ["prepare", str(many[0]), "--out", str(tmp_path / "set"), "--size", str(SIZE)]
    limit = """if True:
        import resource
        from image_diffusion import data
        from image_diffusion.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, -1))
        data.SAVE_SECONDS = -1
        main()"""
    done = subprocess.run([sys.executable, "-c", limit, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "set.part" in done.stderr and "make room" in done.stderr
    assert json.loads((tmp_path / "set.part" / "progress.json").read_text())["done"] > 80
    result = type_in(*words)
    assert result.exit_code == 0 and "are there already" in result.output, result.output
    assert same(load_prepared(tmp_path / "set"), many[1])


def test_an_output_folder_that_cannot_be_written(many, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    if os.geteuid() == 0:                                                          # nothing is forbidden to root but what is no folder
        locked.rmdir()
        locked.write_text("a file")
    else:
        locked.chmod(0o500)
    with pytest.raises(UserError, match="write .*choose another folder"):
        made(many[0], locked / "set")


def test_a_set_of_an_older_format(many, tmp_path):
    folder = Path(shutil.copytree(many[1].folder, tmp_path / "set"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"format_version": 1}))
    before = contents(folder)
    for action in (lambda: load_prepared(folder), lambda: made(many[0], folder)):
        with pytest.raises(UserError, match="has format 1, this version reads 2"):
            action()
    assert contents(folder) == before


def test_a_set_that_an_earlier_version_made_is_still_opened_unpacked_and_found(tmp_path):
    "The files of format 2 as they were written before progress.json and before photos that are too small were counted."
    images, labels = synthetic_landscapes(range(20), 16)
    folder, packed = tmp_path / "set", tmp_path / "set.tar"
    folder.mkdir()
    with open(folder / "images.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": images.shape})
        file.write(images.tobytes())
    np.save(folder / "labels.npy", labels.astype(np.int16))
    manifest = {"format_version": 2, "source": "synthetic", "labels": "folders", "size": 16, "limit": 20, "split_seed": 0, "source_id": "1",
                "num_images": 20, "num_train": 18, "num_dev": 2, "classes": list(CLASSES), "sha256": file_sha256(folder / "images.npy"),
                "skipped": [], "seconds": 0.3}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    with tarfile.open(packed, "w") as archive:
        for name in ("manifest.json", "labels.npy", "images.npy"):
            archive.add(folder / name, name)
    before = contents(folder)
    opened = load_prepared(folder)
    assert opened.manifest == manifest and (opened.images == images).all() and (opened.labels == labels).all()
    assert same(made("synthetic:20", folder, size=16), opened) and same(unpack(packed, tmp_path / "back", progress=False), opened)
    assert contents(folder) == before and same(made("synthetic:20", tmp_path / "new", size=16), opened)


def test_the_source_may_be_gone_when_the_set_is_there(many, tmp_path):
    shutil.copy(many[0], tmp_path / "photos.zip")
    made(tmp_path / "photos.zip", tmp_path / "set")
    (tmp_path / "photos.zip").unlink()
    assert same(made(tmp_path / "photos.zip", tmp_path / "set"), many[1])
    with pytest.raises(UserError, match="size 32, not 16"):
        made(tmp_path / "photos.zip", tmp_path / "set", size=16)


# One file for Drive

def test_packed_and_back(many, tmp_path):
    packed = tmp_path / "drive" / "set.tar"
    first = made(many[0], tmp_path / "set", packed=packed)
    assert sorted(tarfile.open(packed).getnames()) == ["images.npy", "labels.npy", "manifest.json"]
    stamp = packed.stat().st_mtime_ns
    back = made(many[0], tmp_path / "next_day", packed=packed)
    assert back.manifest == first.manifest and packed.stat().st_mtime_ns == stamp
    assert same(unpack(packed, tmp_path / "third"), first)
    with pytest.raises(UserError, match="set.tar' already holds photos prepared with other settings .*size 32, not 16"):
        made(many[0], tmp_path / "other", size=16, packed=packed)
    with pytest.raises(UserError, match="holds another set"):
        pack(made("synthetic:30", tmp_path / "other"), packed)
    assert packed.stat().st_mtime_ns == stamp and same(unpack(packed, tmp_path / "third"), first)


def test_the_next_day(many, tmp_path, monkeypatch):
    "An empty folder, a home folder's short name, a set made twice, a source that has grown, a name that is taken."
    monkeypatch.setenv("HOME", str(tmp_path))
    made(many[0], tmp_path / "set", packed="~/set.tar")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(data, "make_set", None)                                         # nothing may be prepared anew
    assert same(made(many[0], tmp_path / "empty", packed="~/set.tar"), many[1])
    os.symlink(tmp_path / "disk", tmp_path / "link")
    (tmp_path / "disk").mkdir()
    assert same(made(many[0], tmp_path / "link", packed="~/set.tar"), many[1]) and (tmp_path / "link").is_symlink()
    monkeypatch.undo()
    made(many[0], tmp_path / "twice", packed=tmp_path / "set.tar")
    shutil.copy(many[0], tmp_path / "photos.zip")
    with zipfile.ZipFile(tmp_path / "photos.zip", "a") as archive:
        archive.writestr("sea/new.jpg", jpeg(3))
    with pytest.raises(UserError, match="set.tar' already holds .*source had other files"):
        made(tmp_path / "photos.zip", tmp_path / "grown", packed=tmp_path / "set.tar")
    assert not (tmp_path / "grown").exists()
    with pytest.raises(UserError, match="is a folder; the packed set needs the name of a file"):
        made(many[0], tmp_path / "new", packed=tmp_path)
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(UserError, match="thesis.txt' is no packed set .*choose another name"):
        made(many[0], tmp_path / "new", packed=tmp_path / "thesis.txt")
    assert not (tmp_path / "new").exists()


def test_files_of_the_same_size_with_other_contents_are_other_files(tmp_path):
    for k, name in enumerate(("one.zip", "two.zip")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for j in range(3):
                file = io.BytesIO()
                Image.fromarray(synthetic_landscapes([10 * k + j], 16)[0][0]).save(file, "BMP")
                archive.writestr(f"{j}.bmp", file.getvalue())
    made(tmp_path / "one.zip", tmp_path / "set")
    os.replace(tmp_path / "two.zip", tmp_path / "one.zip")
    with pytest.raises(UserError, match="the source had other files"):
        made(tmp_path / "one.zip", tmp_path / "set")


def test_a_packed_file_that_is_damaged(many, tmp_path):
    packed = pack(many[1], tmp_path / "set.tar", progress=False)
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 1
    cases = {"flipped": bytes(content), "half": packed.read_bytes()[:len(content) // 2], "text": b"no archive", "empty": b""}
    for name, damaged in cases.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match="damaged|could not copy|no packed set|not a whole"):
            unpack(tmp_path / name, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_a_place_that_fills_up_while_packing(many, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="set.tar.*No space left.*free some space"):
        patch.setattr(data.os, "replace", full)
        pack(many[1], tmp_path / "set.tar", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_colab_keeps_its_set_on_the_machine_and_one_file_on_drive(tmp_path, monkeypatch):
    class Prepared(Exception):
        "Far enough."

    def stop(*_):
        raise Prepared

    drive, content = tmp_path / "drive", tmp_path / "content"
    monkeypatch.setattr("image_diffusion.drive.in_colab", lambda: True)
    monkeypatch.setattr(pipeline, "train_both_stages", stop)
    for day in (1, 2):
        content.mkdir()
        monkeypatch.chdir(content)
        with pytest.raises(Prepared):
            pipeline.run("synthetic:40", drive / "first", "tiny", 0.01)
        assert (content / "data" / "first" / "images.npy").exists() and (drive / "first" / "data.tar").exists()
        assert not (drive / "first" / "data").exists()
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(content)
        monkeypatch.setattr(data, "make_set", None)                                     # on the next day nothing is prepared anew


# Batches

def test_a_set_goes_into_a_dataloader(many):
    prepared = many[1]
    loaded = list(DataLoader(Subset(prepared, prepared.dev), batch_size=50))
    x, labels = torch.cat([x for x, _ in loaded]), torch.cat([labels for _, labels in loaded])
    assert x.shape == (196, 3, SIZE, SIZE) and x.dtype == torch.float32 and torch.equal(x, data.load_batch(prepared.images, prepared.dev))
    assert labels.tolist() == prepared.labels[prepared.dev].tolist() and len(prepared) == len(prepared.images) == 1960


def test_a_worker_gets_the_folder_and_not_a_copy_of_the_images(many):
    sent = pickle.dumps(many[1])
    assert len(sent) < 1000 and same(pickle.loads(sent), many[1])


def test_a_set_that_is_cut_off_while_it_is_read(tmp_path):
    images = made("synthetic:40", tmp_path / "set").images
    os.truncate(tmp_path / "set" / "images.npy", 20_000)
    with pytest.raises(UserError, match="was cut off while it was in use"):
        data.load_batch(images, range(40))


def test_batches_leave_no_memory_behind(tmp_path):
    "Reading all rows of a set adds less than a tenth of it to the memory of the process."
    code = """if True:
        import re, sys, numpy as np
        from pathlib import Path
        from image_diffusion.data import *
        def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        images = np.lib.format.open_memmap(sys.argv[1], "w+", np.uint8, (6000, 128, 128, 3)); images.flush(); del images
        images = np.load(sys.argv[1], mmap_mode="r")
        load_batch(images, range(4))
        before = peak()
        for start in range(0, 6000, 4): load_batch(images, np.arange(start, start + 4))  # small: malloc keeps a few freed batches
        print(peak() - before)"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "images.npy"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and int(done.stdout) < 29_000, done.stdout + done.stderr               # of 295 MB
