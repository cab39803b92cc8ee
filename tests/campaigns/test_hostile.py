"""Files of strangers and of broken disks: every loader gives something that works, or says what is wrong, and runs no code."""
import json
import os
import subprocess
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_photos
from image_diffusion.data import validate_settings, load_prepared, pack, prepare, source_name
from image_diffusion.download import fetch
from image_diffusion.files import UserError
from image_diffusion.plots import save_png, show_images
from image_diffusion.report import Section, write_report
from PIL import Image
from urllib3.util import Retry

FILES = 2100


@pytest.mark.campaign
def test_damaged_and_hostile_files_load_or_are_refused_in_a_sentence(tmp_path, campaign):
    "See hostile.py; a crash, a hang or too much memory ends its process, and with it this test."
    command = [sys.executable, Path(__file__).with_name("hostile.py"), tmp_path / "hostile", str(campaign.seed), str(campaign.share(FILES))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "agg"})
    assert done.returncode == 0, f"seed {campaign.seed}: {done.stderr[-3000:]}"
    result = json.loads(done.stdout)
    assert result["problems"] == [], "\n".join(f"seed {campaign.seed}, {name}: {words[-600:]}" for name, words in result["problems"][:10])
    assert sum(loaded + refused for loaded, refused, _ in result["counts"].values()) >= campaign.share(FILES)
    if campaign.whole:
        skip_damage = ("metrics", "note", "progress")
        assert all(refused for name, (_, refused, _) in result["counts"].items() if name not in skip_damage), result["counts"]
        assert all(loaded for loaded, _, _ in result["counts"].values()), result["counts"]


# What is shown

class Tags(HTMLParser):
    "The tags of a page, and its text."

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, *(name for name, _ in attributes)))

    def handle_data(self, text):
        self.text += text


SCRIPT = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


def test_a_report_shows_what_it_is_given_as_text(tmp_path):
    sections = [Section(SCRIPT, SCRIPT, (b"png",), ({SCRIPT: SCRIPT, "value": 1}, {SCRIPT: None, "value": SCRIPT}))]
    page = Tags()
    page.feed(write_report(tmp_path / "report.html", SCRIPT, sections).read_text(encoding="utf-8"))
    assert page.text.count(SCRIPT) == 7        # title twice, heading, text, a key and two values
    assert {tag for tag in page.tags if "script" in tag or "onerror" in tag} == set()
    assert [tag for tag in page.tags if tag[0] == "img"] == [("img", "alt", "src")]


@pytest.mark.parametrize("name", [SCRIPT, "$\\frac{", "50% $", "a_b^c", "\\", "новый лес", "\x1b[2J"])
def test_a_figure_shows_a_class_of_any_name(name):
    assert show_images(np.zeros((2, 8, 8, 3), "uint8"), nrow=1, row_labels=[name, name], col_labels=[name], title=name)


# Secrets and places

SECRET = "https://ann:pass-word@example.org/sets/photos.zip?token=k3y#k3y"


def test_a_link_is_named_without_its_keys(tmp_path):
    for link in (SECRET, "https://ann:pass-word@example.org", "HTTPS://ann:pass-word@example.org?token=k3y"):
        for text in (source_name(link), json.dumps(validate_settings(link, 32, None, 0, "none"))):
            assert not any(secret in text for secret in ("pass-word", "k3y", "ann")), text


def test_a_download_that_fails_names_no_keys(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("image_diffusion.download.RETRY", Retry(1))
    with pytest.raises(UserError) as error:                                                # there is no network in tests
        fetch(SECRET, tmp_path / "downloads")
    said = str(error.value) + capsys.readouterr().out + "".join(path.name for path in tmp_path.rglob("*"))
    assert "example.org/sets/photos.zip" in said and not any(secret in said for secret in ("pass-word", "k3y"))
    assert error.value.__cause__ is None and error.value.__suppress_context__   # a notebook would print the cause, with the link in it


def test_a_set_does_not_tell_where_it_was_made_or_by_whom(tmp_path, monkeypatch):
    write_photos(tmp_path / "ann" / "photos", 12, by_class=True)
    bad = tmp_path / "ann" / "photos" / "sea" / "bad.jpg"
    bad.write_bytes(b"x")

    def refuse(path, *args, _open=open):
        if str(path) == str(bad): raise PermissionError(13, "Permission denied", str(bad))
        return _open(path, *args)

    monkeypatch.setattr("image_diffusion.photos.open", refuse, raising=False)
    data = prepare(tmp_path / "ann" / "photos", tmp_path / "set", 32, progress=False)
    assert data.manifest["skipped"] == [{"name": "sea/bad.jpg", "reason": "cannot be read: Permission denied"}]
    assert str(tmp_path) not in (data.folder / "manifest.json").read_text()
    with tarfile.open(pack(data, tmp_path / "set.tar", progress=False)) as archive:
        assert {(member.uname, member.gname, member.uid, member.gid) for member in archive} == {("", "", 0, 0)}


def test_a_png_holds_what_made_it_and_no_place(tmp_path):
    settings = {"source": source_name(tmp_path / "ann" / "photos"), "labels": "folders"}
    with Image.open(save_png(np.zeros((1, 8, 8, 3), "uint8"), tmp_path / "x.png", info=settings)) as image:
        assert image.info == {"source": "photos", "labels": "folders"}


# What users would not expect

def test_photos_that_were_enlarged_are_counted(tmp_path, capsys):
    write_photos(tmp_path / "photos", 10, by_class=False)                                  # 72 px
    data = prepare(tmp_path / "photos", tmp_path / "large", 96)
    assert data.manifest["enlarged"] == 10
    assert "10 of 10 photos have fewer than 96 px on a side and were enlarged" in capsys.readouterr().out
    assert prepare(tmp_path / "photos", tmp_path / "small", 64).manifest["enlarged"] == 0 and "were enlarged" not in capsys.readouterr().out
    assert load_prepared(tmp_path / "large").manifest == data.manifest


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_archive_that_may_not_be_read_is_not_called_damaged(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    (tmp_path / "photos.zip").chmod(0)
    with pytest.raises(UserError, match="cannot be read .*permissions"):
        prepare(tmp_path / "photos.zip", tmp_path / "set", 32, progress=False)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_disk_that_fails_is_not_a_damaged_archive(tmp_path, monkeypatch, kind):
    from image_diffusion import photos
    def fails(*args, **options): raise OSError(5, "Input/output error")
    monkeypatch.setattr(photos.zipfile if kind == "zip" else photos.tarfile, "ZipFile" if kind == "zip" else "open", fails)
    (tmp_path / "photos").write_bytes(b"x" * 600)
    with pytest.raises(UserError, match="cannot be read .Input/output error.; check its permissions and its disk"):
        (photos.ZipSource if kind == "zip" else photos.TarSource)(tmp_path / "photos")


def test_room_is_looked_for_before_lhq_comes_image_by_image(tmp_path, monkeypatch):
    from types import SimpleNamespace
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10**9))
    with pytest.raises(UserError, match="9,300.0 MB .* 1,000.0 MB are free"):
        fetch("lhq-huggingface", tmp_path)
    assert list(tmp_path.iterdir()) == []
