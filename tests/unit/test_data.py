"""Photos of every kind and in every wrapping, prepared whole, alike and safely."""
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import MAIN, SIZE, contents, type_in, write_photos
from image_diffusion import cli, data
from image_diffusion.data import load_prepared, pack, prepare, unpack
from image_diffusion.files import UserError
from image_diffusion.landscapes import CLASSES, synthetic_landscapes
from PIL import Image


def jpeg(index=0, size=48, **options):
    "A drawn landscape as a JPEG file, in memory."
    file = io.BytesIO()
    Image.fromarray(synthetic_landscapes([index], size)[0][0]).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def made(source, out, **options):
    "A prepared set; without a bar, on two threads."
    return prepare(source, out, options.pop("size", SIZE), progress=False, workers=options.pop("workers", 2), **options)


def same(a, b):
    "Whether two sets hold the same images with the same labels, and their manifests tell the truth."
    assert all(data.file_sha256(prepared.folder / "images.npy") == prepared.manifest["sha256"] for prepared in (a, b))
    return a.manifest["sha256"] == b.manifest["sha256"] and (a.labels == b.labels).all() and a.classes == b.classes


def reasons(prepared):
    "Name of each file that was left out -> why."
    return {skipped["name"]: skipped["reason"] for skipped in prepared.manifest["skipped"]}


# Wrappings

FILES = {f"set/{CLASSES[i % 5]}/{i:02d}.jpg": jpeg(i) for i in range(20)} | {"set/sea/notes.jpg": b"buy milk"}


def write_tar(file, members, mode="w"):
    "A tar with the given (TarInfo or name, bytes)."
    with tarfile.open(file, mode) as archive:
        for member, content in members:
            member = tarfile.TarInfo(member) if isinstance(member, str) else member
            if member.isreg():
                member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file


@pytest.fixture
def wrapped(tmp_path):
    "The same files as a folder, a zip and tars, in the order of their names."
    for name, content in FILES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in reversed(FILES.items()):
            archive.writestr(name, content)
    for suffix, mode in (("tar", "w"), ("tar.gz", "w:gz"), ("tgz", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz")):
        write_tar(tmp_path / f"photos.{suffix}", sorted(FILES.items()), mode)
    return tmp_path


def test_every_wrapping_and_any_number_of_threads_give_the_same_set(wrapped, tmp_path):
    sources = [wrapped / "folder", *sorted(wrapped.glob("photos.*"))]
    sets = [made(source, tmp_path / "out" / f"{source.name}-{workers}", workers=workers) for source in sources for workers in (1, 5)]
    assert len(sets) == 14 and all(same(sets[0], other) for other in sets)
    assert len(sets[0].images) == 20 and sets[0].classes == sorted(CLASSES)
    assert list(reasons(sets[-1])) == ["set/sea/notes.jpg"]


def test_a_seeded_choice_is_the_same_from_every_wrapping(wrapped, tmp_path):
    sets = [made(wrapped / name, tmp_path / "out" / name, limit=7, seed=3) for name in ("folder", "photos.zip", "photos.tar", "photos.tar.gz")]
    assert all(same(sets[0], other) for other in sets) and 6 <= len(sets[0].images) <= 7
    assert not same(sets[0], made(wrapped / "folder", tmp_path / "other", limit=7, seed=4))


@pytest.mark.parametrize("suffix", ["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"])
def test_an_archive_cut_in_half(wrapped, tmp_path, suffix):
    whole, half = wrapped / f"photos.{suffix}", tmp_path / f"half.{suffix}"
    half.write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    with pytest.raises(UserError, match=f"half.{suffix}' is not a whole .* download or copy it again"):
        made(half, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["a header in the middle", "cut between two files", "cut inside a header"])
def test_a_damaged_tar_is_not_taken_for_a_short_one(wrapped, tmp_path, damage):
    with tarfile.open(wrapped / "photos.tar") as archive:
        offset = archive.getmembers()[7].offset
    content = bytearray((wrapped / "photos.tar").read_bytes())
    content[offset + 150] ^= 0xFF
    cut = {"a header in the middle": len(content), "cut between two files": offset, "cut inside a header": offset + 200}[damage]
    (tmp_path / "damaged.tar").write_bytes(content[:cut])
    with pytest.raises(UserError, match="damaged.tar' is not a whole .tar file"):
        made(tmp_path / "damaged.tar", tmp_path / "out")


def test_a_text_that_calls_itself_an_archive(tmp_path):
    for name in ("photos.zip", "photos.tar", "photos.tar.gz"):
        (tmp_path / name).write_text("no archive")
        with pytest.raises(UserError, match="is not a whole"):
            made(tmp_path / name, tmp_path / "out")


def test_hostile_names_write_nothing_outside(tmp_path):
    link, hard = tarfile.TarInfo("set/link.jpg"), tarfile.TarInfo("set/hard.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../secret.jpg"
    device = tarfile.TarInfo("set/device.jpg")
    device.type = tarfile.CHRTYPE
    names = ["../../escape.jpg", "/absolute/path.jpg", "a/../../b/dots.jpg", "C:\\windows\\back.jpg"]
    tar = write_tar(tmp_path / "in" / "hostile.tar" if (tmp_path / "in").mkdir() is None else None,
                    [(name, jpeg(k)) for k, name in enumerate(names)] + [(link, b""), (hard, b""), (device, b"")])
    with zipfile.ZipFile(tmp_path / "in" / "hostile.zip", "w") as archive:
        for k, name in enumerate(names):
            archive.writestr(name, jpeg(k))
    for source in (tar, tmp_path / "in" / "hostile.zip"):
        before = contents(tmp_path / "in")
        prepared = made(source, tmp_path / "out" / source.name)
        assert len(prepared.images) == 4 and prepared.classes == ["absolute", "b", "windows"]
        assert contents(tmp_path / "in") == before and sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    assert not Path("/absolute/path.jpg").exists() and not (tmp_path.parent / "escape.jpg").exists()
    assert set(reasons(load_prepared(tmp_path / "out" / "hostile.tar"))) == {"set/link.jpg", "set/hard.jpg", "set/device.jpg"}


def test_links_of_a_folder_are_followed_once(tmp_path):
    write_photos(tmp_path / "real", 4, by_class=False)
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "real", tmp_path / "set" / "linked")
    os.symlink(tmp_path / "set", tmp_path / "set" / "loop")
    os.symlink(tmp_path / "nowhere.jpg", tmp_path / "set" / "dead.jpg")
    os.mkfifo(tmp_path / "set" / "pipe.jpg")
    prepared = made(tmp_path / "set", tmp_path / "out")
    assert len(prepared.images) == 4 and set(reasons(prepared)) == {"dead.jpg", "pipe.jpg"}


def test_two_folders_that_link_to_each_other_are_listed_alike_in_any_order(tmp_path):
    listed = []
    for first, second in ("ab", "ba"):
        root = tmp_path / first
        for name in (first, second):
            write_photos(root / name, 2, by_class=False)
        os.symlink(root / "b", root / "a" / "l")
        os.symlink(root / "a", root / "b" / "l")
        listed.append([photo.name for photo in data.FolderSource(root).photos])
    assert listed[0] == listed[1] and len(listed[0]) == 4


def test_a_folder_that_cannot_be_listed_stops_the_work(tmp_path, monkeypatch):
    write_photos(tmp_path / "set", 10, by_class=True)
    scan = os.scandir

    def fails(path):
        if str(path).endswith("sea"):
            raise OSError(5, "Input/output error", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", fails)
    with pytest.raises(UserError, match="sea' cannot be read .Input/output error"):
        made(tmp_path / "set", tmp_path / "out")


def test_zips_that_cannot_be_opened(tmp_path):
    with zipfile.ZipFile(tmp_path / "new.zip", "w") as archive:
        for k in range(3):
            archive.writestr(f"{k}.jpg", jpeg(k))
    content, directory = (tmp_path / "new.zip").read_bytes(), b"PK\x01\x02"
    (tmp_path / "future.zip").write_bytes(content.replace(directory + content[content.index(directory) + 4:][:4], directory + b"\x63\0\x63\0"))
    with pytest.raises(UserError, match="future.zip' is not a whole .zip file .*version"):
        made(tmp_path / "future.zip", tmp_path / "out")
    secret = bytearray(content)
    secret[content.index(directory) + 8] |= 1                                          # the flag that asks for a password
    (tmp_path / "secret.zip").write_bytes(secret)
    assert reasons(made(tmp_path / "secret.zip", tmp_path / "out")) == {"0.jpg": "needs a password"}


# Pictures of every kind

def png_header(width, height, depth=8, color=2):
    "A PNG that claims to be of this size and holds next to nothing."
    def part(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    body = zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)) + part(b"IDAT", body) + part(b"IEND", b"")


def test_what_cannot_be_used_is_left_out_with_its_reason(tmp_path):
    write_photos(tmp_path / "set", 5, by_class=False)
    whole = jpeg(size=200)
    bad = {"half.jpg": whole[:len(whole) // 2], "text.jpg": b"buy milk", "empty.jpg": b"", "huge.png": png_header(40_000, 40_000),
           "phone.heic": b"\0\0\0\x18ftypheic", "cut.png": png_header(100, 100)}
    for name, content in bad.items():
        (tmp_path / "set" / name).write_bytes(content)
    Image.new("RGB", (1, 1)).save(tmp_path / "set" / "dot.png")
    (tmp_path / "set" / "readme.txt").write_text("not even called a photo")
    prepared = made(tmp_path / "set", tmp_path / "out")
    found = reasons(prepared)
    assert len(prepared.images) == 5 and set(found) == {*bad, "dot.png"}
    assert "truncated" in found["half.jpg"] and "not an image" in found["text.jpg"] and "not an image" in found["empty.jpg"]
    assert "decompression bomb" in found["huge.png"] and "not an image" in found["phone.heic"] and "smaller than 8 pixels" in found["dot.png"]


def test_a_real_bomb_takes_no_memory(tmp_path):
    "40,000 x 40,000 black pixels in 200 kB."
    pack_rows, rows = zlib.compressobj(1), b"\0" * 5001 * 100
    body = b"".join(pack_rows.compress(rows) for _ in range(400)) + pack_rows.flush()
    empty = png_header(40_000, 40_000, 1, 0)
    start, end = empty.index(b"IDAT") - 4, empty.index(b"IEND") - 4
    part = struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    (tmp_path / "bomb.png").write_bytes(empty[:start] + part + empty[end:])
    code = """if True:
        import re, sys
        from pathlib import Path
        from image_diffusion.data import *
        def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
        before = peak()
        print(try_photo(lambda: open(sys.argv[1], "rb"), 64)[1])
        assert peak() - before < 50_000, peak() - before"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "bomb.png"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "bomb" in done.stdout, done.stdout + done.stderr


def test_every_mode_becomes_rgb(tmp_path):
    drawing = Image.fromarray(synthetic_landscapes([3], 64)[0][0])
    gray, folder = drawing.convert("L"), tmp_path / "set"
    folder.mkdir()
    drawing.convert("CMYK").save(folder / "cmyk.jpg", quality=98)
    drawing.save(folder / "rgb.png")
    gray.save(folder / "gray.png")
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(folder / "gray16.png")
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(folder / "gray16.tif")
    drawing.quantize(256).save(folder / "palette.png")
    drawing.save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", (64, 64))] * 3)
    drawing.convert("1").save(folder / "bits.png")
    drawing.save(folder / "webp.webp", lossless=True)
    clear = drawing.copy()
    clear.putalpha(0)
    clear.save(folder / "clear.png")
    Image.new("LA", (64, 64), (0, 0)).save(folder / "clear_gray.png")
    Image.fromarray(np.random.rand(64, 64).astype(np.float32)).save(folder / "floats.tif")
    prepared = made(folder, tmp_path / "out", size=64)
    names = sorted(p.name for p in folder.iterdir() if p.name != "floats.tif")
    image = dict(zip(names, prepared.images.astype(int), strict=True))
    assert list(reasons(prepared)) == ["floats.tif"]
    rgb, wanted_gray = np.asarray(drawing).astype(int), np.repeat(np.asarray(gray).astype(int)[..., None], 3, 2)
    assert (image["rgb.png"] == rgb).all() and (image["webp.webp"] == rgb).all()
    assert all((image[name] == wanted_gray).all() for name in ("gray.png", "gray16.png", "gray16.tif"))
    assert np.abs(image["cmyk.jpg"] - rgb).mean() < 3 and np.abs(image["palette.png"] - rgb).mean() < 12
    assert np.abs(image["moving.gif"] - rgb).mean() < 12 and set(np.unique(image["bits.png"])) <= {0, 255}
    assert (image["clear.png"] == 255).all() and (image["clear_gray.png"] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation):
    upright = synthetic_landscapes([0], 64)[0][0]
    image, exif, file = Image.fromarray(upright), Image.Exif(), io.BytesIO()
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]         # the transposition that undoes it
    turned = {None: image}.get(back) or image.transpose({2: Image.Transpose.ROTATE_90, 4: Image.Transpose.ROTATE_270}.get(back, Image.Transpose(back)))
    exif[0x0112] = orientation
    turned.save(file, "PNG", exif=exif)
    assert (data.photo_array(io.BytesIO(file.getvalue()), 64) == upright).all()


def test_a_damaged_exif_note_does_not_cost_the_photo():
    "The orientation is well, but the width is a text: Pillow cannot write such a note back."
    entries = struct.pack("<HHHII", 2, 0x0100, 2, 4, 0x65646977) + struct.pack("<HHII", 0x0112, 3, 1, 6)
    note, file = b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4), io.BytesIO()
    upright = synthetic_landscapes([0], 64)[0][0]
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(file, "JPEG", quality=98, exif=note)
    assert np.abs(data.photo_array(io.BytesIO(file.getvalue()), 64).astype(int) - upright).mean() < 3
    broken = file.getvalue().replace(b"II*\0", b"\xff\xff\xff\xff", 1)
    assert data.try_photo(lambda: io.BytesIO(broken), 32)[1] is None


def test_large_jpegs_are_shrunk_while_they_are_decoded(monkeypatch):
    large = synthetic_landscapes([7], 1024)[0][0]
    file = jpeg(7, 1024)
    quick = data.photo_array(io.BytesIO(file), 128).astype(int)
    assert np.abs(quick - data.square(large, 128)).mean() < 1.5
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    assert np.abs(quick - data.photo_array(io.BytesIO(file), 128)).mean() < 1.5


def test_names_in_other_scripts(tmp_path):
    names = ["гора/снег и лёд.jpg", "海/波 1.jpg", "sea side/a b.jpg", "sea side/naïve ☀.jpg", "forest/same.jpg", "sea side/same.jpg"]
    for k, name in enumerate(names):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(jpeg(k))
    with open(os.fsencode(tmp_path / "set") + b"/forest/\xff\xfe.jpg", "wb") as file:                     # no text in any encoding
        file.write(b"not a photo either")
    from_folder = made(tmp_path / "set", tmp_path / "out")
    assert len(from_folder.images) == 6 and from_folder.classes == sorted(["гора", "海", "sea side", "forest"])
    result = type_in("prepare", tmp_path / "set", "--out", tmp_path / "typed", "--size", SIZE)
    assert result.exit_code == 0 and "1 skipped" in result.output, result.output
    assert json.loads((tmp_path / "typed" / "manifest.json").read_text())["skipped"][0]["name"].startswith("forest/")


def test_a_name_that_the_terminal_cannot_show(tmp_path):
    write_photos(tmp_path / "set", 3, by_class=False)
    (tmp_path / "set" / "фото.jpg").write_text("no photo")
    words = [*MAIN, "prepare", tmp_path / "set", "--out", tmp_path / "out", "--size", SIZE]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "1 skipped" in done.stdout and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_a_picture_large_enough_to_wait_its_turn(tmp_path):
    (tmp_path / "set").mkdir()
    for k in range(2):
        Image.new("L", (4200, 4200), 90 * k).save(tmp_path / "set" / f"{k}.png")
    assert made(tmp_path / "set", tmp_path / "out").images.mean((1, 2, 3)).tolist() == [0, 90]


# Wishes

@pytest.mark.parametrize("wish", [{"size": 0}, {"size": 10**6}, {"seed": -1}, {"limit": 0}, {"labels": __file__ + ".csv"}])
def test_wishes_that_make_no_sense(tmp_path, wish):
    with pytest.raises(UserError, match="must be"):
        made("synthetic:10", tmp_path / "out", **wish)
    assert list(tmp_path.iterdir()) == []


def test_drawn_landscapes_bring_their_own_classes(tmp_path):
    (tmp_path / "labels.csv").write_text("000000,sea\n")
    with pytest.raises(UserError, match="for photos, a CSV"):
        made("synthetic:10", tmp_path / "out", labels=tmp_path / "labels.csv")
    assert (made("synthetic:10", tmp_path / "none", labels="none").labels == -1).all()


def test_a_long_word_is_a_mistyped_folder_and_no_file_of_google_drive():
    with pytest.raises(UserError, match="my_landscape_photos_2019_norway' was not found"):
        data.fetch("my_landscape_photos_2019_norway")


# Labels

def test_labels_from_folders_a_table_or_none(wrapped, tmp_path):
    (tmp_path / "labels.csv").write_text("name,class\n" + "\n".join(f"{k:02d}.jpg,{'even' if k % 2 == 0 else 'odd'}" for k in range(19)))
    by_table = made(wrapped / "photos.zip", tmp_path / "by_table", labels=tmp_path / "labels.csv")
    assert by_table.classes == ["even", "odd"] and sorted(np.bincount(by_table.labels + 1)) == [1, 9, 10]
    none = made(wrapped / "photos.zip", tmp_path / "none", labels="none")
    assert none.classes == [] and (none.labels == -1).all()
    with pytest.raises(UserError, match="labels 'none', not 'folders'"):
        made(wrapped / "photos.zip", tmp_path / "none")
    (tmp_path / "labels.csv").write_text("other.jpg,sea\n")
    with pytest.raises(UserError, match="names none of the 21 photos"):
        made(wrapped / "photos.zip", tmp_path / "new", labels=tmp_path / "labels.csv")
    (tmp_path / "quote.csv").write_text('00.jpg,"sea\n01.jpg,lake\n')
    with pytest.raises(UserError, match="quote.csv' cannot be read"):
        made(wrapped / "photos.zip", tmp_path / "new", labels=tmp_path / "quote.csv")
    with pytest.raises(UserError, match="labels must be .*magic"):
        made(wrapped / "photos.zip", tmp_path / "new", labels="magic")
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe\x00\x01,\x00")
    with pytest.raises(UserError, match="cannot be read|names none"):
        made(wrapped / "photos.zip", tmp_path / "new", labels=tmp_path / "labels.csv")
    assert not (tmp_path / "new").exists()


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
    monkeypatch.setattr(data.tqdm, "_lock", threading.RLock(), raising=False)     # a fork that is killed with tqdm's own, which processes share, would keep it forever
    out, dice, far, kills = tmp_path / "set", random.Random(0), [0], 0
    while kills < 10 or far[-1] < 2 and kills < 200 and not out.exists():         # a busy machine needs more than ten to get anywhere
        kills += 1
        process = multiprocessing.get_context("fork").Process(target=made, args=(zip_file, out))
        process.start()
        time.sleep(dice.uniform(0.02, 0.12))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if out.exists():                                                          # it was quicker than we: then it must be whole
            assert same(load_prepared(out), whole)
            continue
        notes = (tmp_path / "set.part" / "progress.jsonl")
        far.append(len(notes.read_text().splitlines()) if notes.exists() else 0)
    assert far == sorted(far) and (far[-1] > 1 or out.exists()), far              # it went on, each time
    assert same(made(zip_file, out), whole) and reasons(load_prepared(out)) == reasons(whole)
    assert sorted(p.name for p in out.iterdir()) == ["images.npy", "labels.npy", "manifest.json"]
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("damage", ["torn line", "images cut", "first line", "no notes", "images longer"])
def test_whatever_a_dead_machine_left_the_set_is_right(many, tmp_path, monkeypatch, damage):
    zip_file, whole = many
    monkeypatch.setattr(data, "SAVE_SECONDS", 0)
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
    notes, images = part / "progress.jsonl", part / "images.npy"
    lines = notes.read_text().splitlines()
    assert len(lines) == 61 and not out.exists()
    if damage == "torn line":
        notes.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    if damage == "images cut":
        os.truncate(images, images.stat().st_size // 2)
    if damage == "first line":
        notes.write_text("{\n" + "\n".join(lines[1:]))
    if damage == "no notes":
        notes.unlink()
    if damage == "images longer":
        images.write_bytes(images.read_bytes() + b"x" * 100_000)
    assert same(made(zip_file, out), whole) and reasons(load_prepared(out)) == reasons(whole)


def test_unfinished_work_of_other_settings_or_another_owner_is_not_touched(many, tmp_path, monkeypatch):
    def unplugged(jobs, workers):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "in_order", unplugged)
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
    broken, calls = data.photo_array, []

    def unmounted(file, size):
        calls.append(1)
        if len(calls) > 500:
            raise OSError(107, "Transport endpoint is not connected")
        return broken(file, size)

    with monkeypatch.context() as patch:
        patch.setattr(data, "photo_array", unmounted)
        with pytest.raises(UserError, match="Transport endpoint is not connected.*kept in .*set.part.*same call goes on"):
            made(many[0], tmp_path / "set")
    with monkeypatch.context() as patch:
        patch.setattr(data, "photo_array", lambda *_: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(UserError, match="out of memory"):
            made(many[0], tmp_path / "set")
    assert same(made(many[0], tmp_path / "set"), many[1]) and reasons(load_prepared(tmp_path / "set")) == reasons(many[1])


@pytest.mark.parametrize("moment", ["before it is named", "just after"])
def test_a_machine_that_dies_at_the_very_end(many, tmp_path, monkeypatch, moment):
    def die(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*{"before it is named": (data.os, "replace", die), "just after": (data.Path, "unlink", die)}[moment])
        made(many[0], tmp_path / "set")
    assert (tmp_path / "set").exists() == (moment == "just after")
    assert same(made(many[0], tmp_path / "set"), many[1])
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["images.npy", "labels.npy", "manifest.json"]


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
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, -1)); from image_diffusion import data; data.SAVE_SECONDS = 0; " \
            "from image_diffusion.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", limit, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "set.part" in done.stderr and "make room" in done.stderr and len((tmp_path / "set.part" / "progress.jsonl").read_text().splitlines()) > 5
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
    monkeypatch.setattr(data, "run_plan", None)                                         # nothing may be prepared anew
    assert same(made(many[0], tmp_path / "empty", packed="~/set.tar"), many[1])
    os.symlink(tmp_path / "disk", tmp_path / "link")
    (tmp_path / "disk").mkdir()
    assert same(made(many[0], tmp_path / "link", packed="~/set.tar"), many[1]) and (tmp_path / "link").is_symlink()
    monkeypatch.undo()
    made(many[0], tmp_path / "twice", packed=tmp_path / "set.tar")
    shutil.copy(many[0], tmp_path / "photos.zip")
    with zipfile.ZipFile(tmp_path / "photos.zip", "a") as archive:
        archive.writestr("sea/new.jpg", jpeg(3))
    with pytest.raises(UserError, match="set.tar' already holds .*files of the source were others"):
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
    with pytest.raises(UserError, match="the files of the source were others"):
        made(tmp_path / "one.zip", tmp_path / "set")


def test_a_packed_file_that_is_damaged(many, tmp_path):
    packed = pack(many[1], tmp_path / "set.tar", progress=False)
    content = bytearray(packed.read_bytes())
    content[len(content) // 2] ^= 1
    cases = {"flipped": bytes(content), "half": packed.read_bytes()[:len(content) // 2], "text": b"no archive", "empty": b""}
    for name, damaged in cases.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match="damaged|could not copy|no packed set"):
            unpack(tmp_path / name, tmp_path / "out", progress=False)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_a_place_that_fills_up_while_packing(many, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="could not pack .*No space left.*make room"):
        patch.setattr(data.os, "replace", full)
        pack(many[1], tmp_path / "set.tar", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_run_in_colab_keeps_its_set_on_the_machine_and_one_file_on_drive(tmp_path, monkeypatch):
    class ImageDataset(Exception):
        "Far enough."

    def stop(*_):
        raise ImageDataset

    drive, content = tmp_path / "drive", tmp_path / "content"
    monkeypatch.setattr("image_diffusion.runs.in_colab", lambda: True)
    monkeypatch.setattr(cli, "train_both_stages", stop)
    for day in (1, 2):
        content.mkdir()
        monkeypatch.chdir(content)
        with pytest.raises(ImageDataset):
            cli.run("synthetic:40", drive / "first", "tiny", 0.01)
        assert (content / "data" / "first" / "images.npy").exists() and (drive / "first" / "data.tar").exists()
        assert not (drive / "first" / "data").exists()
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(content)
        monkeypatch.setattr(data, "run_plan", None)                                     # on the next day nothing is prepared anew


# Batches

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
