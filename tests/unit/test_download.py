"""Photos come from anywhere, through connections that break; what fails ends in one sentence, and nothing is fetched twice."""
import _socket
import hashlib
import io
import json
import os
import random
import re
import shutil
import socket
import sys
import tarfile
import threading
import time
import types
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from conftest import contents, start
from hypothesis import given
from hypothesis import strategies as st
from image_diffusion import download
from image_diffusion.download import archive_kind, fetch
from image_diffusion.files import UserError, file_sha256
from urllib3.util import Retry

BODY = b"PK\x03\x04" + random.Random(0).randbytes(300_000)    # begins as a zip does
OTHER = b"PK\x03\x04" + random.Random(1).randbytes(300_000)
SHORT = BODY[:250_000]
HALF = 150_001


# A server that misbehaves as it is told

class Request(BaseHTTPRequestHandler):
    "One question to the server; who answers it is looked up by its path."
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.place, self.query = urlsplit(self.path).path, {k: v[0] for k, v in parse_qs(urlsplit(self.path).query).items()}
        self.first = int(self.headers.get("Range", "bytes=0-")[len("bytes="):-1])
        self.close_connection = True
        self.server.asked.append(self)
        self.server.answers[self.place](self)

    def reply(self, code, body=b"", length=None, **headers):
        "Send head and body; `length` tells another length than the body has, -1 tells none."
        self.send_response(code)
        headers = {"Content-Length": len(body) if length is None else length, "Connection": "close"} | headers
        for name, value in headers.items():
            if value not in (None, -1):
                self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.send(body)

    def send(self, body):
        self.wfile.write(body)
        self.server.sent += len(body)

    def log_message(self, *args):
        pass


class Host(ThreadingHTTPServer):
    "The server: who answers at which path, what was asked, and how many bytes of files went out."
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Request)
        self.answers, self.asked, self.sent, self.url = defaultdict(lambda: status(404)), [], 0, f"http://127.0.0.1:{self.server_port}"
        self.over, self.errors = threading.Event(), []                         # the first ends what hangs

    def handle_error(self, request, address):
        self.errors.append(sys.exc_info()[1])

    def serve(self, path, answer):
        "Let `answer` speak at a path; returns the address."
        self.answers[path] = answer
        return self.url + path

    @property
    def firsts(self):
        "The first byte that each question asked for."
        return [request.first for request in self.asked]


def status(code, body=b"", **headers):
    "An answer that never changes."
    return lambda request: request.reply(code, body, **headers)


def page(text, code=200):
    "A web page."
    return status(code, text.encode(), Content_Type="text/html; charset=utf-8")


def redirect(place):
    return status(302, Location=place)


class Served:
    "A file on the server; each fault spoils one answer: a number cuts it, ('stall', n) lets it hang, a function answers in its place."

    def __init__(self, body, *faults, ranges=True, if_range=True, length=None, **headers):
        self.body, self.faults, self.ranges, self.if_range, self.length = body, list(faults), ranges, if_range, length
        self.headers = {"ETag": '"1"', "Last_Modified": None, "Content_Type": "application/octet-stream"} | headers

    def __call__(self, request):
        fault = self.faults.pop(0) if self.faults else None
        if callable(fault):
            return fault(request)
        first, total, headers = request.first, self.length or len(self.body), dict(self.headers)
        marks = (None, self.headers["ETag"], self.headers["Last_Modified"])
        if not self.ranges or (self.if_range and request.headers.get("If-Range") not in marks):
            first = 0
        if first >= len(self.body):
            return request.reply(416, Content_Range=f"bytes */{total}")
        if first:
            headers["Content_Range"] = f"bytes {first}-{total - 1}/{total}"
        rest, hang = self.body[first:], isinstance(fault, tuple)
        request.reply(206 if first else 200, rest[:fault[1] if hang else fault], length=total - first, **headers)
        if hang:
            request.wfile.flush()
            request.server.over.wait(5)


def chunked(body, cut=None):
    "A file whose length is not told: it comes in numbered chunks, the last of which may be missing."
    def answer(request):
        request.reply(200, Transfer_Encoding="chunked", length=-1)
        for at in range(0, len(body[:cut]), 50_000):
            piece = body[at:at + 50_000]
            request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        if cut is None:
            request.wfile.write(b"0\r\n\r\n")
    return answer


@pytest.fixture
def host():
    "A running server."
    server = Host()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    assert all(isinstance(error, ConnectionError) for error in server.errors), server.errors    # who asked may hang up


@pytest.fixture(autouse=True)
def near(monkeypatch):
    "This machine can be reached, no other; and nobody waits long."
    def connect(self, address):
        if address[0] != "127.0.0.1":
            raise OSError(101, "Network is unreachable")
        return _socket.socket.connect(self, address)
    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port, *rest, **more: [(2, 1, 6, "", (name, port))])   # no DNS either
    monkeypatch.setenv("NO_PROXY", "*")
    for name, value in {"TIMEOUT": (1, 0.2), "RETRY": Retry(2, backoff_factor=0.001)}.items():
        monkeypatch.setattr(download, name, value)


@pytest.fixture
def nobody(host):
    "An address at which nobody listens."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def get(tmp_path):
    "fetch into a folder of this test, without a bar."
    return lambda source, **options: fetch(source, tmp_path / "downloads", **{"progress": False} | options)


def refused(says, call, *words, **options):
    "The call must end in one sentence with all the words `says`."
    with pytest.raises(UserError) as caught:
        call(*words, **options)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 700, text
    assert all(word in text for word in says), text
    return text


def parts(folder):
    "What lies in a folder, by name without the first 9 letters."
    return sorted(path.name[9:] for path in Path(folder).glob("downloads/[!.]*"))   # a killed process leaves its lock file


# What is here already

def tar_of(name, body, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        info = tarfile.TarInfo(name)
        info.size = len(body)
        archive.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def zip_of(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, body in files.items():
            archive.writestr(name, body)
    return buffer.getvalue()


@pytest.mark.parametrize("body, kind", [(zip_of(a=b"1"), "zip"), (zip_of(), "zip"), *((tar_of("a", b"1", f"w:{packing}"), "tar")
                                        for packing in ("", "gz", "bz2", "xz"))], ids="zip empty-zip tar gz bz2 xz".split())
@pytest.mark.parametrize("name", ["photos", "photos.zip", "photos.tar", "photos.txt"])
def test_the_first_bytes_tell_the_kind(tmp_path, body, kind, name):
    (tmp_path / name).write_bytes(body)
    assert archive_kind(tmp_path / name) == kind and fetch(tmp_path / name) == tmp_path / name


@pytest.mark.parametrize("name, kind", [("a.zip", "zip"), ("A.ZIP", "zip"), *((f"a.{end}", "tar") for end in
                         "tar tar.gz tgz tar.bz2 tbz2 tar.xz txz TAR.GZ".split()), ("a.txt", None), ("zip", None), ("a.gz.txt", None)])
@pytest.mark.parametrize("body", [b"only text", b""])
def test_the_name_tells_the_kind_where_the_bytes_do_not(tmp_path, name, kind, body):
    (tmp_path / name).write_bytes(body)
    assert archive_kind(tmp_path / name) == kind


def test_what_is_no_source(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "my photos ").mkdir()
    assert fetch(tmp_path / "my photos ") == tmp_path / "my photos "
    assert fetch(tmp_path) == tmp_path and fetch("synthetic") == "synthetic" and fetch("synthetic:7") == "synthetic:7"
    refused(["thesis.txt", "neither a folder nor a .zip", "synthetic"], fetch, tmp_path / "thesis.txt")
    refused(["pipe", "neither a folder"], fetch, tmp_path / "pipe")
    for wrong in ("", " ", "no/such/folder", "synthetic:0", "ftp://example.com/a.zip", "~nobody-of-this-name/a.zip", "a\0b", "x" * 300 + "!", "ß" * 30, "LHQ"):
        refused(["was not found", "'synthetic'", "'lhq'", "Google Drive"], fetch, wrong)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.zip").write_bytes(BODY)
    def no(*_, **__): raise PermissionError(13, "Permission denied")
    monkeypatch.setattr("builtins.open", no)
    refused(["a.zip", "Permission denied"], fetch, tmp_path / "a.zip")


def test_the_checksum_of_a_local_file(tmp_path):
    (tmp_path / "a.zip").write_bytes(BODY)
    sum = file_sha256(tmp_path / "a.zip")
    assert fetch(tmp_path / "a.zip", sha256=sum.upper()) == tmp_path / "a.zip"
    refused(["a.zip", sum, "0" * 64], fetch, tmp_path / "a.zip", sha256="0" * 64)


# A plain address

def test_a_file_comes_once(host, get, tmp_path):
    url = host.serve("/set/photos.zip", Served(BODY))
    path = get(url)
    assert path.parent == tmp_path / "downloads" and path.name.endswith("-photos.zip") and path.read_bytes() == BODY
    assert parts(tmp_path) == ["photos.zip", "photos.zip.json"]
    facts = json.loads(path.with_name(path.name + ".json").read_text())
    assert facts["size"] == len(BODY) and facts["source"] == url and facts["sha256"] is None
    assert host.asked[0].headers["Accept-Encoding"] == "identity" and "Authorization" not in host.asked[0].headers
    assert get(url) == get(f" {url}\n") == path and len(host.asked) == 1 and host.sent == len(BODY)


def test_the_second_time_needs_no_network(host, get):
    url = host.serve("/photos.zip", Served(BODY))
    path = get(url)
    host.shutdown()
    host.server_close()
    assert get(url) == path
    path.write_bytes(BODY[:1000])                                              # somebody damaged it: it must come again
    refused(["could not download"], get, url)


@pytest.mark.parametrize("cut", [1, 4, 600, 65_536, HALF, len(BODY) - 1])
def test_a_cut_connection_resumes_where_it_broke(host, get, cut):
    url = host.serve("/photos.zip", Served(BODY, cut))
    assert get(url).read_bytes() == BODY
    if cut > 512:                                                              # enough to see what kind of file it is
        assert host.firsts == [0, cut] and host.sent == len(BODY)
        assert host.asked[1].headers["If-Range"] == '"1"'


def test_a_line_that_breaks_often_gets_there(host, get):
    url = host.serve("/photos.zip", Served(BODY, *[30_000] * 9))
    assert get(url).read_bytes() == BODY and host.firsts == list(range(0, 300_000, 30_000)) and host.sent == len(BODY)


def test_a_stall_is_a_cut(host, get):
    url = host.serve("/photos.zip", Served(BODY, ("stall", 2**17)))
    assert get(url).read_bytes() == BODY and host.firsts == [0, 2**17] and host.sent == len(BODY)


def test_silence_from_the_beginning(host, get):
    url = host.serve("/photos.zip", lambda request: host.over.wait(5))
    refused([url, "fell silent"], get, url)
    assert len(host.asked) == 3


def test_a_redirect_is_followed_and_resumed(host, get):
    url = host.serve("/latest", redirect("/v7/photos.zip"))
    host.serve("/v7/photos.zip", Served(BODY, HALF))
    assert get(url).read_bytes() == BODY and host.firsts == [0, 0, HALF, HALF]
    refused(["could not download"], get, host.serve("/circle", redirect("/circle")))


@pytest.mark.parametrize("code", [500, 503, 429, 408])
def test_a_busy_server_is_asked_again(host, get, code):
    url = host.serve("/photos.zip", Served(BODY, status(code), HALF, status(code), status(code), 100, status(code), status(code)))
    assert get(url).read_bytes() == BODY and host.sent == len(BODY)
    text = refused([str(code), "could not download", "try again later"], get, host.serve("/gone.zip", status(code)))
    assert "are kept" not in text and [r.place for r in host.asked].count("/gone.zip") == download.RETRY.total + 1


def test_a_server_that_stays_broken_costs_nothing_that_came(host, get, tmp_path):
    served = Served(BODY, HALF, *[status(500)] * 3)
    url = host.serve("/photos.zip", served)
    refused(["500", "0.2 MB that came are kept", "resumes"], get, url)
    assert parts(tmp_path) == ["photos.zip.json", "photos.zip.part"]
    assert get(url).read_bytes() == BODY and host.sent == len(BODY) and parts(tmp_path) == ["photos.zip", "photos.zip.json"]


@pytest.mark.parametrize("code, says", [(404, "no file at"), (410, "no file at"), (451, "no file at"), (401, "not open to everyone"),
                                        (403, "not open to everyone"), (204, "no file at")])
def test_a_refusal_is_final(host, get, tmp_path, code, says):
    url = host.serve("/photos.zip", status(code))
    refused([url, says, str(code)], get, url)
    assert len(host.asked) == 1 and parts(tmp_path) == []


def test_a_link_that_dies_on_the_way_keeps_what_came(host, get, tmp_path):
    served = Served(BODY, HALF, status(403))
    url = host.serve("/photos.zip", served)
    refused(["not open"], get, url)
    assert get(url).read_bytes() == BODY and host.sent == len(BODY)


@pytest.mark.parametrize("answer", [page("<p>Please log in</p>"), page(""), status(200, b"\n<!DOCTYPE html><html>"), status(200, b"<HTML>")])
def test_a_web_page_is_no_file(host, get, tmp_path, answer):
    url = host.serve("/photos.zip", answer)
    refused([url, "a web page, not a file"], get, url)
    assert parts(tmp_path) == []


def test_a_login_page_does_not_take_the_place_of_what_came(host, get):
    url = host.serve("/photos.zip", Served(BODY, HALF, page("<html>The hotel's network: please log in</html>")))
    refused(["a web page"], get, url)
    assert get(url).read_bytes() == BODY and host.firsts == [0, HALF, HALF]


def test_an_archive_that_is_announced_as_a_page_is_taken(host, get):
    assert get(host.serve("/get.php", Served(BODY, Content_Type="text/html"))).read_bytes() == BODY


def test_a_file_of_another_kind_is_refused_before_it_comes(host, get, tmp_path):
    url = host.serve("/film.mp4", Served(b"\0\0\0 ftypisom" + bytes(50_000_000)))
    refused([url, "neither a zip nor a tar"], get, url)
    assert parts(tmp_path) == [] and host.sent < 50_000_000


def test_a_tar_without_a_helpful_name(host, get):
    body = tar_of("a.jpg", b"1" * 5000, "w")
    assert archive_kind(get(host.serve("/download", Served(body, 100)))) == "tar" and host.sent == len(body) + 100


def test_a_server_without_ranges_starts_over(host, get):
    url = host.serve("/photos.zip", Served(BODY, HALF, ranges=False))
    assert get(url).read_bytes() == BODY and host.firsts == [0, HALF] and host.sent == HALF + len(BODY)


def test_a_server_without_ranges_that_always_breaks_is_given_up(host, get):
    url = host.serve("/photos.zip", Served(BODY, *[HALF] * 9, ranges=False))
    refused(["broke off"], get, url)
    assert len(host.asked) == 2 + download.RETRY.total


@pytest.mark.parametrize("marks", [{"ETag": '"2"'}, {"ETag": None, "Last_Modified": "Tue, 02 Jan 2024 00:00:00 GMT"},
                                   {"ETag": 'W/"2"', "Last_Modified": "Tue, 02 Jan 2024 00:00:00 GMT"}], ids=str)
@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changed_on_the_server_comes_anew(host, get, marks, if_range):
    old = {"ETag": marks["ETag"] and marks["ETag"].replace("2", "1"), "Last_Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
    url = host.serve("/photos.zip", Served(BODY, HALF, *[status(500)] * 3, **old))
    refused(["500"], get, url)
    host.serve("/photos.zip", Served(OTHER, if_range=if_range, **marks))       # a server may not know If-Range
    assert get(url).read_bytes() == OTHER


def test_without_any_mark_the_size_must_agree(host, get):
    url = host.serve("/photos.zip", Served(BODY, HALF, *[status(500)] * 3, ETag=None))
    refused(["500"], get, url)
    assert "If-Range" not in host.asked[1].headers
    host.serve("/photos.zip", Served(SHORT, ETag=None))
    assert get(url).read_bytes() == SHORT


def test_a_weak_mark_is_not_sent(host, get):                                   # RFC 9110: it would forbid every resumption
    url = host.serve("/photos.zip", Served(BODY, HALF, ETag='W/"1"'))
    assert get(url).read_bytes() == BODY and "If-Range" not in host.asked[1].headers and host.sent == len(BODY)


@pytest.mark.parametrize("body", [BODY[:HALF], BODY[:-1]])
def test_a_server_that_announces_more_than_it_has(host, get, body):
    url = host.serve("/photos.zip", Served(body, length=len(BODY)))
    refused(["could not download"], get, url)


def test_an_answer_from_another_place_of_the_file_is_not_appended(host, get):
    wrong = status(206, BODY[100:], Content_Range=f"bytes 100-{len(BODY) - 1}/{len(BODY)}")
    for strange in (wrong, status(206, BODY[HALF:]), status(206, BODY[HALF:], Content_Range="lines 3-4/5")):
        for faults in ([HALF, strange], [strange], [status(416)]):                # also where nothing came before
            url = host.serve("/photos.zip", Served(BODY, *faults))
            assert get(url).read_bytes() == BODY
            shutil.rmtree(get(url).parent)


def test_a_file_whose_length_is_not_told(host, get):
    assert get(host.serve("/a.zip", chunked(BODY))).read_bytes() == BODY
    answers = [chunked(BODY, HALF), chunked(BODY)]
    assert get(host.serve("/b.zip", lambda request: answers.pop(0)(request))).read_bytes() == BODY
    assert get(host.serve("/c.zip", status(200, BODY, length=-1))).read_bytes() == BODY          # it ends when the server hangs up


def test_a_packed_file_stays_packed(host, get):
    body = tar_of("a.jpg", random.Random(0).randbytes(100_000), "w:gz")
    path = get(host.serve("/photos.tar.gz", Served(body, 50_000, Content_Encoding="gzip")))     # as Apache marks a .tar.gz
    assert path.read_bytes() == body and host.sent == len(body)


def put_back(path, **facts):
    "As if the process had died just before the renaming."
    part, record = path.with_name(path.name + ".part"), path.with_name(path.name + ".json")
    path.rename(part)
    record.write_text(json.dumps(json.loads(record.read_text()) | facts))
    return part


def test_dead_before_the_renaming(host, get):
    url = host.serve("/photos.zip", Served(BODY))
    part = put_back(get(url))
    assert get(url).read_bytes() == BODY and not part.exists() and len(host.asked) == 1
    put_back(get(url), size=None)                                              # its length is not known: the server says that there is no more
    assert get(url).read_bytes() == BODY and host.firsts == [0, len(BODY)] and host.sent == len(BODY)


def test_a_part_longer_than_the_file(host, get):
    url = host.serve("/photos.zip", Served(BODY))
    put_back(get(url), size=None)
    host.serve("/photos.zip", Served(SHORT))
    assert get(url).read_bytes() == SHORT


@pytest.mark.parametrize("record", ["", "{", '{"size"', None])
def test_a_damaged_record_starts_over(host, get, record):
    url = host.serve("/photos.zip", Served(BODY))
    path = get(url).with_suffix(".zip.json")
    put_back(get(url))
    path.unlink() if record is None else path.write_text(record)
    assert get(url).read_bytes() == BODY and host.firsts == [0, 0]


def test_checksums(host, get, tmp_path):
    url = host.serve("/photos.zip", Served(BODY))
    refused([url, "0" * 64, "sha256"], get, url, sha256="0" * 64)
    assert parts(tmp_path) == ["photos.zip.json"]
    path = get(url)
    sum = file_sha256(path)
    assert get(url, sha256=sum) == path and get(url, sha256=sum.upper()) == path and len(host.asked) == 2
    refused([path.name, sum, "0" * 64], get, url, sha256="0" * 64)
    assert path.read_bytes() == BODY                                           # what is here is not thrown away for a slip of the pen
    shutil.rmtree(path.parent)
    assert get(url, sha256=sum).read_bytes() == BODY


NAMES = ["/../../../etc/passwd.zip", "/..%2F..%2Fescape.zip", "/%2e%2e/%2e%2e", "/..", "/.", "/a%00b.zip", "/c%5C..%5Cd.zip", "/%2Fetc%2Fpasswd", "/",
         "", "/.ssh", "/ß%F0%9F%8C%84%FF.zip", "/" + "long" * 200 + ".zip", "/" + "%E5%B1%B1" * 200 + ".zip", "/a.zip?x=../../y", "/a.zip#../../y",
         "/con.zip", "/a%0Ab.zip", "//", "/a b.zip"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_stay_in_the_folder(host, get, tmp_path, name):
    host.answers = defaultdict(lambda: Served(BODY, Content_Disposition='attachment; filename="../../evil.zip"'))
    path = get(host.url + name)
    assert path.read_bytes() == BODY and path.resolve().parent == (tmp_path / "downloads").resolve()
    assert re.fullmatch(r"[0-9a-f]{8}-[\w.-]{0,40}", path.name) and len(os.fsencode(path.name)) < 200
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [path.name, path.name + ".json"]


def test_two_addresses_with_one_name(host, get):
    one, two = host.serve("/1/photos.zip", Served(BODY)), host.serve("/2/photos.zip", Served(OTHER))
    assert get(one).read_bytes() == BODY and get(two).read_bytes() == OTHER and get(one) != get(two)


@pytest.mark.parametrize("wrong", ["http://", "https://:80/a.zip", "http://[::1/a.zip", "http://exa mple.com/a.zip", "http://" + "a" * 300 + ".com/a.zip",
                                   "http://.example.com/a.zip", "http://example.com:99999/a.zip", "http://*.org"])
def test_an_address_that_is_none(get, wrong):
    refused(["could not download", wrong], get, wrong)
    refused(["was not found"], get, wrong + "\udce4")


def test_an_address_that_is_none_is_not_asked_again(get, monkeypatch):
    monkeypatch.setattr(download, "RETRY", Retry(10**9))
    refused(["could not download", "this is no address"], get, "http://")


addresses = st.sampled_from(["{}", "https://{}", "https://drive.google.com/{}", "https://disk.yandex.ru/d/{}", "http://127.0.0.1:{}"])


@given(addresses, st.text(st.characters(exclude_categories=[])))
def test_any_text_is_a_source_or_ends_in_a_sentence(tmp_path_factory, address, text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "RETRY", Retry(0))
        try:
            assert isinstance(fetch(address.format(text), tmp_path_factory.getbasetemp() / "any", progress=False), (str, Path))
        except UserError as error:
            assert str(error)


def test_what_is_shown(host, get, capfd):
    url = host.serve("/photos.zip", Served(BODY, HALF))
    get(url)
    assert capfd.readouterr() == ("", "")
    url = host.serve("/more.zip", Served(BODY, HALF, status(503)))
    get(url, progress=True)
    out, bar = capfd.readouterr()
    assert "broke off" in out and "trying again in" in out and "503" in out and "-more.zip: 100%" in bar and "300k/300k" in bar


def test_two_at_once(host, get, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", (5, 5))
    asked, go = threading.Event(), threading.Event()
    url = host.serve("/photos.zip", lambda request: (asked.set(), go.wait(5), Served(BODY)(request)))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(get, url)
        assert asked.wait(5)
        refused(["another process", url, "wait for it"], get, url)
        go.set()
        assert first.result().read_bytes() == BODY and get(url) == first.result()


# A process that dies, a disk that takes no more

FETCH = "import sys; from image_diffusion import download; download.TIMEOUT = (5, 30); download.fetch(sys.argv[1], sys.argv[2])"


def test_kill_9_in_the_middle(host, get, tmp_path):
    url = host.serve("/photos.zip", Served(BODY, ("stall", 2**17)))
    process = start([sys.executable, "-c", FETCH, url, tmp_path / "downloads"])
    while process.poll() is None and sum(part.stat().st_size for part in tmp_path.glob("downloads/*.part")) < 2**17:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9 and parts(tmp_path) == ["photos.zip.json", "photos.zip.part"]
    assert get(url).read_bytes() == BODY
    assert host.firsts == [0, 2**17] and host.sent == len(BODY)                # not a byte was sent twice


FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY)); "   # as on a full disk
REPORT = FETCH.replace("download.fetch", "\ntry: download.fetch") + "\nexcept download.UserError as error: print('Error:', error)"


def test_a_disk_that_fills_up(host, get, tmp_path):
    url = host.serve("/photos.zip", Served(BODY))
    output, _ = start([sys.executable, "-c", FULL + REPORT, url, tmp_path / "downloads"]).communicate(timeout=60)
    assert "Traceback" not in output and re.search(r"Error: could not write '.*photos.zip'.*make room.*kept.*\.$", output), output
    assert parts(tmp_path) == ["photos.zip.json", "photos.zip.part"]
    assert get(url).read_bytes() == BODY and host.firsts == [0, 200_000]       # there is room again: it resumes


def test_too_little_room_is_told_before(host, get, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100_000))
    url = host.serve("/photos.zip", Served(BODY))
    refused(["0.3 MB", "0.1 MB are free", "make room"], get, url)
    assert parts(tmp_path) == []
    monkeypatch.undo()


def test_there_must_be_room_for_the_rest_alone(host, get, monkeypatch):
    url = host.serve("/photos.zip", Served(BODY, len(BODY) - 50_000))
    frees = [400_000, 60_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=frees.pop(0)))
    assert get(url).read_bytes() == BODY


def test_a_file_in_the_place_of_the_folder(host, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    before, url = contents(tmp_path), host.serve("/photos.zip", Served(BODY))
    refused(["could not write", "thesis.txt", "another folder"], fetch, url, tmp_path / "thesis.txt")
    refused(["could not write", "thesis.txt"], fetch, url, tmp_path / "thesis.txt" / "more")
    assert contents(tmp_path) == before


# Google Drive

ID = "1AbCdEfGhIjKlMnOpQrStUvWxYz_-0123"
FORM = ('<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body><p class="uc-warning-caption">Google Drive '
        'can\'t scan this file for viruses.</p><form id="download-form" action="{action}" method="get"><input type="submit" value="Download '
        'anyway"/><input type="hidden" name="id" value="{id}"><input type="hidden" name="export" value="download"><input type="hidden" '
        'name="confirm" value="t"><input type="hidden" name="uuid" value="{uuid}"></form></body></html>')
QUOTA = ('<html><head><title>Google Drive - Quota exceeded</title></head><body><p class="uc-error-caption">Sorry, you can&#39;t view or download '
         'this file at this time.</p><p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently. Please try '
         'accessing the file again later.</p></body></html>')
REFUSAL = '<html><body><p class="uc-error-subcaption">Only the owner can download this file.</p></body></html>'


@pytest.fixture
def drive(host, monkeypatch):
    "A Google Drive with one small file."
    monkeypatch.setattr(download, "DRIVE_URL", host.url + "/uc")
    host.serve("/uc", Served(BODY))
    return host


def warn_first(host, served):
    "Let Drive show its warning before the file; the link in it works once, and for who brings the cookie."
    links = []

    def warning(request):
        links.append(f"uuid-{len(links)}")
        request.reply(200, FORM.format(action=host.url + "/download", id=request.query["id"], uuid=links[-1]).encode(), Set_Cookie=f"pass={links[-1]}",
                      Content_Type="text/html; charset=utf-8")

    def file(request):
        right = request.query == {"id": ID, "export": "download", "confirm": "t", "uuid": links[-1]} and f"pass={links[-1]}" in request.headers["Cookie"]
        (served if right else status(403))(request)

    host.serve("/uc", warning)
    host.serve("/download", file)


LINKS = ["{}", "https://drive.google.com/file/d/{}/view", "https://drive.google.com/file/d/{}/view?usp=sharing", "https://drive.google.com/file/d/{}",
         "https://drive.google.com/file/d/{}/edit?usp=drive_link", "https://drive.google.com/file/d/{}/preview", "https://drive.google.com/open?id={}",
         "https://drive.google.com/file/u/1/d/{}/view", "https://drive.google.com/uc?id={}", "https://drive.google.com/uc?export=download&id={}",
         "https://docs.google.com/uc?export=download&id={}&confirm=t", "https://drive.usercontent.google.com/download?id={}&export=download&authuser=0",
         "https://drive.google.com/a/school.org/file/d/{}/view", "http://drive.google.com/open?authuser=0&id={}"]


def test_every_form_of_a_drive_link_is_one_file(drive, get):
    paths = {get(link.format(ID)) for link in LINKS}
    assert len(paths) == 1 and paths.pop().read_bytes() == BODY
    assert {request.query["id"] for request in drive.asked} == {ID} and len(drive.asked) == 2       # once to look, once to fetch


def test_a_drive_file_past_the_warning(drive, get):
    warn_first(drive, Served(BODY, None, HALF))                                # looked at, then fetched
    assert get(f"https://drive.google.com/file/d/{ID}/view").read_bytes() == BODY
    assert [r.first for r in drive.asked if r.first] == [HALF]


def test_a_small_file_on_drive_that_breaks_off(drive, get):
    drive.serve("/uc", Served(BODY, None, HALF))
    assert get(ID).read_bytes() == BODY and [r.first for r in drive.asked if r.first] == [HALF]


@pytest.mark.parametrize("link", ["https://drive.google.com/file/d/{}/view?usp=sharing&resourcekey=0-aBc_D-9", "https://drive.google.com/uc?id={}&resourcekey=0-aBc_D-9",
                                  "https://drive.google.com/open?resourceKey=0-aBc_D-9&id={}"])
def test_the_resourcekey_of_an_older_link_goes_along_in_every_request(drive, get, link):
    warning = page(FORM.format(action=drive.url + "/download", id=ID, uuid="1"))

    def with_key(served):
        return lambda request: (served if request.query.get("resourcekey") == "0-aBc_D-9" else status(404))(request)
    drive.serve("/uc", with_key(warning))
    drive.serve("/download", with_key(Served(BODY, None, HALF)))
    assert get(link.format(ID)).read_bytes() == BODY
    assert {request.query.get("resourcekey") for request in drive.asked} == {"0-aBc_D-9"}
    refused(["whole link", "resourcekey"], get, ID.replace("0123", "4567"))


@pytest.mark.parametrize("code", [200, 403, 429])
@pytest.mark.parametrize("after_the_warning", [False, True])
def test_a_drive_file_that_too_many_fetched(drive, get, tmp_path, code, after_the_warning):
    if after_the_warning:
        warn_first(drive, page(QUOTA, code))
    else:
        drive.serve("/uc", page(QUOTA, code))
    refused([ID, "too many people", "copy in your own Drive", "mount Drive", "tomorrow"], get, ID)
    assert parts(tmp_path) == []


@pytest.mark.parametrize("answer", [redirect("/accounts.google.com/ServiceLogin"), status(404), status(403, b"no"), page("sign in", 401), page(REFUSAL),
                                    page("<html>something new</html>"), page("")], ids="login 404 403 401 refusal new empty".split())
def test_a_drive_file_that_is_not_shared(drive, get, answer):
    drive.serve("/accounts.google.com/ServiceLogin", page("<html><title>Sign in</title></html>"))
    drive.serve("/uc", answer)
    refused([ID, "Anyone with the link", "mount Drive"], get, ID)


@pytest.mark.parametrize("link", ["https://drive.google.com/drive/folders/{}?usp=sharing", "https://drive.google.com/drive/u/0/folders/{}",
                                  "https://drive.google.com/folderview?id={}", "https://docs.google.com/document/d/{}/edit", "https://drive.google.com/",
                                  "https://docs.google.com/spreadsheets/d/{}/edit#gid=0", "https://drive.google.com/file/d/short/view"])
def test_a_drive_link_that_is_no_file(drive, get, link):
    refused(["one file", "one zip or tar", "mount Drive"], get, link.format(ID))
    assert drive.asked == []


def test_drive_in_trouble(drive, get):
    drive.serve("/uc", status(500))
    refused([ID, "500"], get, ID)
    assert len(drive.asked) == 3
    drive.serve("/uc", page(FORM.format(action=drive.url + "/uc", id=ID, uuid="again")))
    refused([ID, "page after page"], get, ID)


def test_a_path_that_looks_like_an_id_is_a_path(drive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ID).mkdir()
    assert fetch(ID) == Path(ID) and drive.asked == []


# Yandex Disk

LINK = "https://disk.yandex.ru/d/AbC-dEf_123"


@pytest.fixture
def yandex(host, monkeypatch):
    "A Yandex Disk with one file, whose real links work once."
    monkeypatch.setattr(download, "YANDEX_API", host.url + "/resources")
    host.facts = {"name": "../photos.zip", "type": "file", "size": len(BODY), "sha256": hashlib.sha256(BODY).hexdigest(), "md5": "?"}
    host.file, links = Served(BODY), []

    def link(request):
        links.append(f"/once/{len(links)}")
        host.serve(links[-1], lambda request: (host.answers.pop(request.place), host.file(request)))
        request.reply(200, json.dumps({"href": host.url + links[-1] + "?filename=photos.zip", "method": "GET", "templated": False}).encode())

    host.serve("/resources", lambda request: request.reply(200, json.dumps(host.facts).encode()))
    host.serve("/resources/download", link)
    return host


@pytest.mark.parametrize("link", [LINK, LINK.replace("/d/", "/i/"), LINK.replace(".ru", ".com.tr"), "https://yadi.sk/d/AbC-dEf_123",
                                  "https://disk.360.yandex.ru/d/AbC-dEf_123", LINK + "?w=1", LINK + "/"])
def test_a_yandex_link(yandex, get, link):
    path = get(link)
    assert path.read_bytes() == BODY and {r.query["public_key"] for r in yandex.asked[:2]} == {re.sub(r"\?.*|/$", "", link)}
    assert "path" not in yandex.asked[0].query and get(link) == path and len(yandex.asked) == 3


def test_a_yandex_link_is_found_anew_after_a_cut(yandex, get):
    yandex.file = Served(BODY, HALF, 10_000)
    assert get(LINK).read_bytes() == BODY
    assert [r.first for r in yandex.asked if r.place.startswith("/once")] == [0, HALF, HALF + 10_000]


def test_the_size_that_yandex_told_must_come(yandex, get):
    answers = [status(200, BODY[:HALF], length=-1, ETag='"1"'), Served(BODY)]    # the first hangs up without having told a length
    yandex.file = lambda request: answers.pop(0)(request)
    assert get(LINK).read_bytes() == BODY and answers == []


def test_a_file_in_a_folder_on_yandex(yandex, get):
    assert get(LINK + "/set/my%20photos.zip").read_bytes() == BODY
    assert yandex.asked[0].query == yandex.asked[1].query == {"public_key": LINK, "path": "/set/my photos.zip"}


def test_a_folder_on_yandex_comes_as_a_zip(yandex, get):
    yandex.facts = {"name": "photos", "type": "dir", "_embedded": {"items": []}}
    yandex.file = chunked(BODY)
    assert get(LINK).read_bytes() == BODY


def test_yandex_tells_another_sum_or_size(yandex, get, tmp_path):
    yandex.facts["sha256"] = "0" * 64
    refused([LINK, "0" * 64, "sha256"], get, LINK)
    assert parts(tmp_path) == ["AbC-dEf_123.json"]
    del yandex.facts["sha256"]
    yandex.facts["size"] = 299_999
    refused([LINK, "300,004", "299,999"], get, LINK)


@pytest.mark.parametrize("answer, says", [(status(404, b'{"error": "DiskNotFoundError"}'), "no file at"), (status(403), "not open to everyone"),
                                          (page("<html>captcha</html>"), "could not download"), (status(200, b"{}"), "could not download"),
                                          (status(503), "503")])
@pytest.mark.parametrize("place", ["/resources", "/resources/download"])
def test_yandex_refuses(yandex, get, place, answer, says):
    yandex.serve(place, answer)
    refused([LINK, says], get, LINK)


# LHQ by name, and no network at all

def test_lhq_comes_from_its_authors(yandex, get):
    path = get("lhq")
    assert path.read_bytes() == BODY and yandex.asked[0].query == {"public_key": download.LHQ_URL} and get("lhq") == path


def test_lhq_from_elsewhere_when_its_place_is_gone(yandex, get):
    yandex.serve("/resources", status(404))
    refused(["LHQ", "404", "lhq-kaggle", "lhq-huggingface", download.LHQ_URL, "by hand"], get, "lhq")


@pytest.mark.parametrize("source", ["{nobody}/photos.zip", "https://example.com/photos.zip", ID, LINK, "lhq"])
def test_no_network(nobody, get, tmp_path, monkeypatch, source):
    monkeypatch.setattr(download, "DRIVE_URL", nobody + "/uc")
    monkeypatch.setattr(download, "YANDEX_API", nobody)
    reason = "Network is unreachable" if "example" in source else "Connection refused"
    text = refused(["could not download", reason, "network"], get, source.format(nobody=nobody))
    assert ("lhq-kaggle" in text) == (source == "lhq") and parts(tmp_path) == []


@pytest.mark.parametrize("name, module", [("lhq-kaggle", "kagglehub"), ("lhq-huggingface", "datasets")])
def test_a_library_that_is_not_installed(get, tmp_path, monkeypatch, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    refused([f"pip install {module}"], get, name)
    assert list(tmp_path.iterdir()) == []


def test_lhq_from_kaggle(get, tmp_path, monkeypatch):
    kaggle = types.SimpleNamespace(dataset_download={"dimensi0n/lhq-1024": str(tmp_path)}.__getitem__)
    monkeypatch.setitem(sys.modules, "kagglehub", kaggle)
    assert get("lhq-kaggle") == tmp_path
    def fail(name): raise ConnectionError("no route to Kaggle")
    kaggle.dataset_download = fail
    refused(["Kaggle", "no route to Kaggle", "lhq-huggingface"], get, "lhq-kaggle")


class Rows(list):
    "A streamed data set; an exception among the rows is raised when its turn comes."

    def cast_column(self, column, kind):
        assert (column, kind) == ("image", ("Image", False))
        return self

    def __iter__(self):
        for row in super().__iter__():
            if isinstance(row, Exception):
                raise row
            yield {"image": row}


def fake_datasets(monkeypatch, *rows):
    "A library `datasets` with these images; returns the list of what was loaded."
    loads = []

    def load_dataset(name, split, streaming):
        loads.append((name, split, streaming))
        return Rows(rows)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: ("Image", decode)))
    return loads


def test_lhq_from_hugging_face(get, tmp_path, monkeypatch):
    loads = fake_datasets(monkeypatch, {"path": "0.png", "bytes": b"first"}, {"path": None, "bytes": b"second"})
    path = get("lhq-huggingface")
    with zipfile.ZipFile(path) as archive:
        assert {info.filename: archive.read(info) for info in archive.infolist()} == {"0000000.png": b"first", "0000001": b"second"}
        assert all(info.compress_type == zipfile.ZIP_STORED for info in archive.infolist())
    assert archive_kind(path) == "zip" and get("lhq-huggingface") == path and loads == [("larrygzlb1994/lhq_256", "train", True)]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_hugging_face_breaks_off(get, tmp_path, monkeypatch):
    fake_datasets(monkeypatch, {"path": "0.png", "bytes": b"first"}, ConnectionError("the hub is gone"))
    refused(["Hugging Face", "the hub is gone", "lhq-kaggle"], get, "lhq-huggingface")
    assert list((tmp_path / "downloads").iterdir()) == []
    (tmp_path / "thesis.txt").write_text("ten years of work")
    refused(["thesis.txt"], fetch, "lhq-huggingface", tmp_path / "thesis.txt")
