"""Photos of every kind, in folders, zips and tars: listed, decoded, labeled, safely."""
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import MAIN, SIZE, contents, type_in, write_photos
from image_diffusion import photos
from image_diffusion.data import load_prepared, prepare
from image_diffusion.files import UserError, file_sha256
from image_diffusion.landscapes import CLASSES, synthetic_landscapes
from PIL import Image


def jpeg(index=0, size=48, **options):
    "A drawn landscape as a JPEG file, in memory."
    file = io.BytesIO()
    Image.fromarray(synthetic_landscapes([index], size)[0][0]).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def decode(content, size):
    "The square that a photo file in memory becomes."
    return photos.photo_array(Image.open(io.BytesIO(content)), size)


def made(source, out, **options):
    "A prepared set; without a bar, on two threads."
    return prepare(source, out, options.pop("size", SIZE), progress=False, workers=options.pop("workers", 2), **options)


def same(a, b):
    "Whether two sets hold the same images with the same labels, and their manifests tell the truth."
    assert all(file_sha256(prepared.folder / "images.npy") == prepared.manifest["sha256"] for prepared in (a, b))
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
    names = ("folder", "photos.zip", "photos.tar", "photos.tar.gz")
    sets = [made(wrapped / name, tmp_path / "out" / name, limit=7, seed=3) for name in names]
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
        listed.append([photo.name for photo in photos.FolderSource(root).photos])
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
    versions = content[content.index(directory) + 4:][:4]
    (tmp_path / "future.zip").write_bytes(content.replace(directory + versions, directory + b"\x63\0\x63\0"))
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
    header, body = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0), zlib.compress(b"\0" * 10_000)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", body) + part(b"IEND", b"")


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
    assert "decompression bomb" in found["huge.png"] and "not an image" in found["phone.heic"]
    assert "smaller than 8 pixels" in found["dot.png"]


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
        from image_diffusion.photos import try_photo
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


@pytest.mark.parametrize("format", ["PNG", "TIFF"])                                # Pillow turns a TIFF by itself: twice would be wrong
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(orientation, format):
    upright = synthetic_landscapes([0], 64)[0][0]
    image, exif, file = Image.fromarray(upright), Image.Exif(), io.BytesIO()
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]         # the transposition that undoes it
    inverse = {2: Image.Transpose.ROTATE_90, 4: Image.Transpose.ROTATE_270}
    turned = image if back is None else image.transpose(inverse.get(back, Image.Transpose(back)))
    exif[0x0112] = orientation
    turned.save(file, format, exif=exif)
    assert (decode(file.getvalue(), 64) == upright).all()


def test_a_damaged_exif_note_does_not_cost_the_photo():
    "The orientation is well, but the width is a text: Pillow cannot write such a note back."
    entries = struct.pack("<HHHII", 2, 0x0100, 2, 4, 0x65646977) + struct.pack("<HHII", 0x0112, 3, 1, 6)
    note, file = b"Exif\0\0II*\0\x08\0\0\0" + entries + bytes(4), io.BytesIO()
    upright = synthetic_landscapes([0], 64)[0][0]
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(file, "JPEG", quality=98, exif=note)
    assert np.abs(decode(file.getvalue(), 64).astype(int) - upright).mean() < 3
    broken = file.getvalue().replace(b"II*\0", b"\xff\xff\xff\xff", 1)
    assert photos.try_photo(lambda: io.BytesIO(broken), 32)[1] is None


def test_large_jpegs_are_shrunk_while_they_are_decoded(monkeypatch):
    large = synthetic_landscapes([7], 1024)[0][0]
    file = jpeg(7, 1024)
    quick = decode(file, 128).astype(int)
    assert np.abs(quick - photos.crop_and_resize(large, 128)).mean() < 1.5
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    assert np.abs(quick - decode(file, 128)).mean() < 1.5


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
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=60,
                          env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "1 skipped" in done.stdout and "Traceback" not in done.stderr, done.stdout + done.stderr


def test_a_picture_large_enough_to_wait_its_turn(tmp_path):
    (tmp_path / "set").mkdir()
    for k in range(2):
        Image.new("L", (4200, 4200), 90 * k).save(tmp_path / "set" / f"{k}.png")
    assert made(tmp_path / "set", tmp_path / "out").images.mean((1, 2, 3)).tolist() == [0, 90]


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
