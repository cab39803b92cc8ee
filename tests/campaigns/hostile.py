"""Damaged and hostile files for every loader of the package: `python tests/campaigns/hostile.py FOLDER SEED COUNT` tries COUNT of them and prints what happened.

Each loader must give a result that works, or one sentence of the package's own errors. A file is a function of (seed, loader, number), so that
`python tests/campaigns/hostile.py FOLDER SEED LOADER:NUMBER` tries one again. It runs in a process of its own, with bounded memory and time, so that a crash
or a hang is seen as one.
"""
import faulthandler
import gzip
import io
import json
import math
import pickle
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tarfile
import time
import traceback
import warnings
import zipfile
import zlib
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from image_diffusion.autoencoder import AutoencoderConfig
from image_diffusion.data import Progress, load_batch, load_prepared, pack, prepare, unpack
from image_diffusion.download import Download
from image_diffusion.files import UserError, file_sha256
from image_diffusion.landscapes import synthetic_landscapes
from image_diffusion.photos import csv_labels, open_source, try_photo
from image_diffusion.features import RandomFeatures
from image_diffusion.fid import collect_stats, frechet_distance, reference_stats
from image_diffusion.diagnostics import diagnose_runs
from image_diffusion.generate import LatentDiffusion, class_labels, generate, load_mask, load_photo
from image_diffusion.runs import name_runs
from image_diffusion.latents import cache_latents, load_latents
from image_diffusion.perceptual import WeightsFile
from image_diffusion.runs import Run, load_checkpoint, read_metrics
from image_diffusion.train_autoencoder import AutoencoderRecipe, AutoencoderStage, DiscriminatorRecipe, load_autoencoder
from image_diffusion.train_diffusion import DiffusionRecipe, DiffusionStage
from image_diffusion.diagnostics import diagnose
from image_diffusion.ema import reconstruct_ema
from image_diffusion.fitting import Checkpointer, MetricsLogger, fit
from image_diffusion.training import Budget, Precision
from image_diffusion.unet import UNetConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

SECONDS = 10                                                     # of computing that one file may take
MEGABYTES = {"photo": 1000, "mask": 1000}                        # of memory; all others 400. A whole photo of 64 megapixels needs the most
SIZE = 16                        # px


class Code:
    "What a pickle must not be able to do: leave a file behind."

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return exec, (f"open({self.marker!r}, 'w')",)


# Damage of bytes

def damage(rng, content):
    "Cut, flip, overwrite, insert, repeat or splice."
    content, n = bytearray(content), len(content)
    place, length = rng.randrange(n), rng.choice([1, 2, 4, 8, 64, 512])
    filler = rng.choice([bytes(length), b"\xff" * length, rng.randbytes(length), bytes(content[rng.randrange(n):][:length])])
    early = rng.randrange(min(n, 600))                       # headers are the interesting part
    how = rng.choice(["cut", "flip", "flip", "overwrite", "overwrite early", "number", "insert", "remove", "append", "empty"])
    if how == "cut": del content[place:]
    elif how == "flip":
        for _ in range(rng.choice([1, 1, 3, 30])): content[rng.choice([early, rng.randrange(n)])] ^= 1 << rng.randrange(8)
    elif how == "overwrite": content[place:place + length] = filler
    elif how == "overwrite early": content[early:early + length] = filler
    elif how == "number": content[early:early + 8] = struct.pack(rng.choice("<>") + "q", rng.choice([-1, 2**31, 2**40, 2**62, 2**63 - 1, -2**63]))
    elif how == "insert": content[place:place] = filler
    elif how == "remove": del content[place:place + length]
    elif how == "append": content += filler * 20
    elif how == "empty": content = bytearray()
    return bytes(content)


# Damage of values

def wrong_value(rng):
    "A value that nobody expects."
    return rng.choice([None, True, -1, 0, 1, 3, 7.5, 2**31, 2**62, 10**30, -2**63, 1e308, math.nan, math.inf, "", "nonsense", "../../outside", "/etc/passwd",
                       "<script>alert(1)</script>", "\0", "a" * 5000, [], {}, [1], [[]], [None, None], [1, 2, 3, 4], {"a": 1}, [10**9] * 3, ["x", "y"]])


def places(tree, at=()):
    "Every place of a tree of dicts and lists."
    yield at
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree[:8]) if isinstance(tree, list) else ():
        yield from places(value, (*at, key))


def change(rng, tree, new):
    "Replace or remove one value of a tree; `new(old)` makes the replacement. The tree itself may be replaced."
    at = rng.choice(list(places(tree)) + ([(key,) for key in tree] * 3 if isinstance(tree, dict) else []))
    if not at:
        return new(tree)
    parent = tree
    for key in at[:-1]: parent = parent[key]
    if rng.random() < 0.2 and isinstance(parent, dict): del parent[at[-1]]
    elif rng.random() < 0.1: parent[at[-1]] = [parent[at[-1]]]
    else: parent[at[-1]] = new(parent[at[-1]])
    return tree


def wrong_json(rng, text):
    "A JSON text that is damaged, or whole and wrong."
    how = rng.random()
    if how < 0.15: return damage(rng, text.encode()).decode("latin-1")
    if how < 0.2: return rng.choice(["[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "null", "[]", "{}", "", "\ufeff{}", '"text"', "1e999"])
    tree = json.loads(text)
    for _ in range(rng.choice([1, 1, 1, 3])):
        tree = change(rng, tree, lambda old: wrong_value(rng))
        if not isinstance(tree, (dict, list)): break
    return json.dumps(tree)


def wrong_tensor(rng, x):
    "A tensor of another shape or type, or with other numbers; anything for what is no tensor."
    if not isinstance(x, torch.Tensor) or rng.random() < 0.1: return wrong_value(rng)
    makers = [lambda: x.flatten(), lambda: x[None], lambda: torch.cat([x[None], x[None]]), lambda: x.new_zeros(0), lambda: torch.zeros((1,)).expand(2**20, 2**20),
              lambda: x.double(), lambda: x.half(), lambda: x.to(torch.complex64), lambda: x.bool(), lambda: x.to(torch.int8), lambda: x.clone() * math.nan,
              lambda: torch.full_like(x.float(), math.inf), lambda: x.float() * 1e30, lambda: x.to("meta"), lambda: x.to_sparse(), lambda: x.T if x.ndim == 2 else x[..., None]]
    return rng.choice(makers)()


def wrong_array(rng, array, marker):
    "The bytes of a .npy file that is damaged, or whole and wrong."
    def saved(array, **options):
        file = io.BytesIO()
        np.save(file, array, **options)
        return file.getvalue()

    def claims(shape, descr, order=False):
        file = io.BytesIO()
        file.write(b"\x93NUMPY\x01\0")
        header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
        header += b" " * (-(len(header) + 11) % 64) + b"\n"
        file.write(struct.pack("<H", len(header)) + header)
        return file.getvalue() + array.tobytes()

    descr = repr(array.dtype.str)
    with np.errstate(all="ignore"):
        makers = [lambda: damage(rng, saved(array)), lambda: damage(rng, saved(array)[:200]) + saved(array)[200:],
                  lambda: claims((2**60,), descr), lambda: claims((2**31, *array.shape[1:]), descr), lambda: claims((-1, *array.shape[1:]), descr),
                  lambda: claims((2**62, 4), descr), lambda: claims(array.shape, "'|O'"), lambda: claims(array.shape, "[('a', '<f4'), ('b', '<i8')]"),
                  lambda: claims(array.shape, descr, True), lambda: claims("(" * 500, descr), lambda: claims(array.shape, "'<U9'"), lambda: claims("'x'", descr),
                  lambda: claims(array.shape + (1.5,), descr), lambda: claims(array.shape, "'" + "(" * 300 + "'"),
                  lambda: saved(np.array([Code(marker)] * len(array) if array.ndim else [Code(marker)], object), allow_pickle=True), lambda: pickle.dumps(Code(marker)),
                  lambda: saved(array[:-1] if array.ndim else array), lambda: saved(array.astype(rng.choice(["f8", "i1", "c8", "?", "M8[s]"]))), lambda: saved(array.ravel()),
                  lambda: saved(np.full_like(array, rng.choice([-5, 0, 77, 127]))), lambda: saved(array.astype("f4") * math.nan), lambda: zip_of({"a.npy": saved(array)})]
        try:
            return rng.choice(makers)()
        except (ValueError, OverflowError):                              # a text is not made into numbers
            return damage(rng, saved(array))


def zip_of(files, packing=zipfile.ZIP_STORED):
    "The bytes of a zip."
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as archive:
        for name, content in files.items(): archive.writestr(name, content)
    return file.getvalue()


# The good files, made once

def make_samples(home):
    "A prepared set, a run of each stage, and every other kind of file, all small."
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        data = prepare("synthetic", home / "data", SIZE, limit=40, progress=False)
        pack(data, home / "packed" / "data.tar", progress=False)
        recipe = AutoencoderRecipe(AutoencoderConfig(ch=8, ch_mult=(1,), enc_blocks=1, dec_blocks=1, mid_blocks=0, patch=2, num_groups=4, codebook_size=16, bottleneck="vq"), size=SIZE,
                                   disc=DiscriminatorRecipe(ch=8, layers=1, start=0.0, warmup=0.0), batch_size=4, perceptual_weight=0.0)
        ae = AutoencoderStage(data, recipe)
        run = Run.open(home / "kl", {"stage": "autoencoder", "recipe": asdict(recipe), "minutes": 1.0, "data": data.manifest["sha256"]})
        fit(ae, run, Budget(steps=3), save_every_minutes=0, log_every=1)
        latents = cache_latents(load_autoencoder(home / "kl"), data, home / "latents")
        model = UNetConfig(in_ch=latents.shape[0], size=latents.shape[1], ch=8, ch_mult=(1,), num_res_blocks=1, attn_resolutions=(), num_groups=4, head_ch=8,
                           num_classes=data.num_classes)
        recipe = DiffusionRecipe(model, batch_size=4, power_emas=(0.1,))
        prior = DiffusionStage(latents, recipe, load_autoencoder(home / "kl"), data.classes)
        run = Run.open(home / "prior", {"stage": "diffusion", "recipe": asdict(recipe), "minutes": 1.0, "autoencoder": "../kl"})
        fit(prior, run, Budget(steps=3), save_every_minutes=0, log_every=1)
        for stage in ("kl", "prior"): shutil.rmtree(home / stage / "samples")
    photo_files(home / "photos")
    return data, ae, prior, latents


def photo_files(folder):
    "A photo in every format, and an archive of every kind with three of them in it."
    folder.mkdir()
    image = Image.fromarray(synthetic_landscapes([1], 48)[0][0])
    for suffix in ("jpg", "png", "webp", "gif", "tif", "bmp", "ppm", "jp2", "avif"):
        with suppress(KeyError, OSError, ValueError): image.save(folder / f"photo.{suffix}")      # what this Pillow can write
    image.save(folder / "packed.tif", compression="tiff_deflate")
    image.convert("P").save(folder / "palette.png")
    image.save(folder / "frames.gif", save_all=True, append_images=[image.rotate(90)])
    three = {f"set/{k}.{suffix}": (folder / f"photo.{suffix}").read_bytes() for k, suffix in enumerate(("jpg", "png", "gif"))}
    (folder / "stored.zip").write_bytes(zip_of(three))
    (folder / "deflated.zip").write_bytes(zip_of(three, zipfile.ZIP_DEFLATED))
    for mode in ("", "gz", "bz2", "xz"):
        with tarfile.open(folder / f"photos.tar{'.' + mode if mode else ''}", f"w:{mode}") as archive:
            for name, content in three.items():
                member = tarfile.TarInfo(name if mode else "long/" * 30 + name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


# Whole files that no honest program writes

def png_part(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def huge_photo(rng):
    "A picture that claims far more pixels than it holds."
    side = rng.choice([8_000, 30_000, 60_000, 2**31 - 1])
    rows = zlib.compress(bytes(3 * 8000 + 1) * 100)
    return rng.choice([
        b"\x89PNG\r\n\x1a\n" + png_part(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + png_part(b"IDAT", rows) + png_part(b"IEND", b""),
        b"P6\n%d %d\n255\n" % (side, side) + bytes(1000), b"BM" + struct.pack("<IHHIIiiHHIIiiII", 999, 0, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(1000),
        b"GIF89a" + struct.pack("<HHBBB", 60_000, 60_000, 0xF0, 0, 0) + bytes(6) + b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02L\x01\0;"])


def text_bomb():
    "A PNG whose note unpacks to 100 MB."
    note = zlib.compress(bytes(10**8), 9)
    return b"\x89PNG\r\n\x1a\n" + png_part(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)) + png_part(b"zTXt", b"a\0\0" + note) + png_part(
        b"IDAT", zlib.compress(bytes(49 * 16))) + png_part(b"IEND", b"")


def tar_header(name, size, kind=b"0"):
    "A header block of a tar with a right sum; `size` is what stands in its field."
    field = b"%011o\0" % size if 0 <= size < 8**11 else (size + (0 if size >= 0 else 256**12)).to_bytes(12, "big")
    if size >= 8**11: field = bytes([field[0] | 0x80]) + field[1:]
    block = bytearray(name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + field + b"%011o\0" % 0 + b" " * 8 + kind + bytes(100) + b"ustar\x0000")
    block = block.ljust(512, b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def hostile_tar(rng):
    "A tar that lies about sizes, goes back, goes deep, or holds links."
    pax = lambda line: b"%d %s" % (len(line) + 3, line)
    negative = pax(b"size=-1024\n")
    kind = rng.choice([b"x", b"g", b"L", b"K", b"S"])
    makers = [
        lambda: tar_header(b"a.jpg", rng.choice([2**40, 2**62, 2**80])), lambda: tar_header(b"a.jpg", 0) + tar_header(b"b.jpg", rng.choice([-512, -1024])),
        lambda: tar_header(b"x", rng.choice([2**23, 2**33, 2**62, -512]), kind) + bytes(1024), lambda: tar_header(b"x", 0, kind) * 3000,
        lambda: tar_header(b"x", len(negative), b"x") + negative.ljust(512, b"\0") + tar_header(b"a.jpg", 10) + bytes(512),
        lambda: b"".join(tar_header(b"%d.jpg" % k, 0) for k in range(5000)),
        lambda: tar_header(b"../../outside.jpg", 0) + tar_header(b"link.jpg", 0, b"2") + tar_header(b"d.jpg", 0, b"3") + tar_header(b"s.jpg", 2**40, b"S")]
    return rng.choice(makers)() + bytes(1024)


@lru_cache
def tar_bomb(kind):
    "A packed tar of 600 MB zeros, in a member that is a photo (b\"0\") or what extends a header (b\"x\", b\"L\")."
    file = io.BytesIO()
    with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as packed:
        packed.write(tar_header(b"a.jpg", 600 * 2**20, kind))
        for _ in range(600): packed.write(bytes(2**20))
        packed.write(bytes(1024))
    return file.getvalue()


@lru_cache
def zip_bomb(name):
    "A zip of 600 kB that unpacks to 600 MB."
    return zip_of({name: bytes(600 * 2**20)}, zipfile.ZIP_DEFLATED)


def hostile_zip(rng):
    "A zip that lies about sizes, or unpacks to far more than it should."
    how = rng.choice(["bomb", "claims", "many", "same", "nested", "outside"])
    if how == "bomb": return zip_bomb("a.jpg")
    if how == "many": return zip_of({f"{k}.jpg": b"" for k in range(5000)})
    if how == "outside": return zip_of({"../../outside.jpg": b"x", "/etc/outside.jpg": b"x", "C:\\outside.jpg": b"x"})
    content = bytearray(zip_of({"a.jpg": bytes(50 * 2**20)} if how == "same" else {"a.jpg": b"x" * 100}, zipfile.ZIP_DEFLATED))
    place = content.index(b"PK\x01\x02")
    if how == "claims": content[place + 20:place + 28] = struct.pack("<II", *rng.choice([(1, 0), (100, 2**32 - 2), (2**32 - 2, 100), (2**32 - 1, 2**32 - 1)]))
    if how == "same": content[place + 24:place + 28] = struct.pack("<I", 100)                        # unpacks to more than it says
    return bytes(content)


# The loaders: each entry damages a file in its place, and calls the loader and what comes next

class Bench:
    "Good files, and what is tried on copies of them."

    def __init__(self, home):
        self.home, self.work, self.marker = home, home / "work", home / "marker"
        self.data, self.ae, self.prior, self.latents = make_samples(home)
        self.features = RandomFeatures()
        images = self.data.images[:20]
        self.stats = collect_stats([images], self.features)
        reference_stats(home / "stats", [images], self.features, {"data": "x"})

    def copy(self, name):
        return Path(shutil.copytree(self.home / name, self.work / name))

    # checkpoints

    def checkpoint(self, rng):
        "The newest checkpoint or its facts are damaged: an older one is taken, or it is said that there is none."
        run = Run(self.copy(rng.choice(["kl", "prior"])))
        for file in rng.sample(sorted((run.folder / "checkpoints").iterdir()), rng.choice([1, 1, 2, 4])):
            content = file.read_bytes()
            file.write_bytes(wrong_json(rng, content.decode()).encode("utf-8", "surrogatepass") if file.suffix == ".json" else damage(rng, content))
        state = load_checkpoint(run)
        assert state is None or state["step"] in range(4)

    def stranger(self, rng):
        "A checkpoint whose facts fit, made by a stranger."
        name = rng.choice(["kl", "prior"])
        run, stage = Run(self.copy(name)), {"kl": self.ae, "prior": self.prior}[name]
        path = sorted((run.folder / "checkpoints").glob("*.pt"))[-1]
        self.rewrite_checkpoint(rng, path)
        facts = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps(facts | {"size": path.stat().st_size, "sha256": file_sha256(path)}))
        log = MetricsLogger(run, stage, every=25, samples=6)
        step, seconds = Checkpointer(run, stage, log, every_minutes=5).begin()
        assert type(step) is int and step >= 0 and 0 <= seconds < math.inf and 0 <= stage.rollbacks <= 3, (step, seconds)
        stage.train_step(step, 0.5)
        assert all(map(math.isfinite, log.means.pop().values()))

    def rewrite_checkpoint(self, rng, path):
        how = rng.choice(["tensor"] * 6 + ["bytes"] * 2 + ["code", "code in", "packed", "other", "legacy", "deep"])
        state = torch.load(path, weights_only=True)
        if how == "tensor":
            for _ in range(rng.choice([1, 1, 4])):
                if isinstance(state, dict): state = change(rng, state, lambda old: wrong_tensor(rng, old))
        if how == "code in": state["stage"]["rollbacks"] = Code(self.marker)
        if how == "deep":
            deep = []
            for _ in range(400): deep = [deep]
            state["stage"] = deep
        if how == "other": state = torch.load(sorted((self.home / rng.choice(["kl", "prior"]) / "checkpoints").glob("*.pt"))[0], weights_only=True)["stage"]
        torch.save(state, path, _use_new_zipfile_serialization=how != "legacy")
        if how == "code": path.write_bytes(pickle.dumps(Code(self.marker)))
        if how == "bytes": path.write_bytes(damage(rng, path.read_bytes()))
        if how == "packed":
            with zipfile.ZipFile(path) as archive: files = {name: archive.read(name) for name in archive.namelist()}
            files[max(files, key=lambda name: len(files[name]))] = bytes(20 * 2**20)
            path.write_bytes(zip_of(files, zipfile.ZIP_DEFLATED))

    # snapshots and averages

    def rewrite_tensors(self, rng, path):
        with safe_open(path, framework="pt") as file:
            metadata, tensors = dict(file.metadata() or {}), {name: file.get_tensor(name).clone() for name in file.keys()}
        how = rng.choice(["bytes", "bytes", "header", "config", "config", "config", "metadata", "tensor", "tensor", "missing", "none"])
        if how == "bytes": return path.write_bytes(damage(rng, path.read_bytes()))
        if how == "header":
            content = path.read_bytes()
            length = struct.unpack("<Q", content[:8])[0]
            header = rng.choice([wrong_json(rng, content[8:8 + length].decode()).encode("utf-8", "surrogatepass"), b"{" * 1000, b'{"a":' * 100_000])
            return path.write_bytes(struct.pack("<Q", rng.choice([len(header), len(header), 2**62])) + header + content[8 + length:])
        if how == "config" and "config" in metadata: metadata["config"] = wrong_json(rng, metadata["config"])
        if how == "metadata": metadata = rng.choice([{}, {"config": metadata.get("config", "")}, metadata | {"step": rng.choice(["x", "-1", "1" * 5000, "1.5"])}])
        name = rng.choice(sorted(tensors))
        if how == "tensor":
            with suppress(Exception): tensors[name] = torch.as_tensor(wrong_tensor(rng, tensors[name])).contiguous()         # what can be written
        if how == "missing": del tensors[name]
        try:
            save_file(tensors, path, {key: value for key, value in metadata.items() if key != "sha256"})      # who means harm leaves the checksum out
        except Exception:                                                    # what safetensors itself will not write
            path.write_bytes(b"")

    def autoencoder(self, rng):
        folder = self.copy("kl")
        self.rewrite_tensors(rng, next((folder / "snapshots").iterdir()))
        net = load_autoencoder(folder)
        x = net.reconstruct(torch.zeros(1, 3, 4 * net.factor, 4 * net.factor))
        absurd = any(tensor.float().abs().max() > 1e6 for tensor in net.state_dict().values())    # who means harm can make a weight 1e38, and nothing tells
        assert x.shape[1] == 3 and (absurd or x.isfinite().all())

    def snapshot(self, rng):
        folder, autoencoder = self.copy("prior"), self.home / "kl"
        self.rewrite_tensors(rng, next((folder / "snapshots").iterdir()))
        self.draw(folder, autoencoder)

    def draw(self, folder, autoencoder=None, ema=None):
        prior = LatentDiffusion.from_pretrained(folder, autoencoder, Precision(), ema)
        names = prior.classes[:1] or [None]
        x = generate(prior, class_labels(prior, names, 1), steps=2)
        assert x.isfinite().all() and x.shape == (1, 3, prior.size, prior.size)

    def averages(self, rng):
        folder = self.copy("prior")
        files = sorted((folder / "averages").iterdir())
        if rng.random() < 0.8: self.rewrite_tensors(rng, rng.choice(files))
        else: files[0].rename(files[0].with_name(rng.choice(["step_.safetensors", "step_1-x.safetensors", "step_x-0.1.safetensors", "step_1-nan.safetensors", "step_-5-9.safetensors"])))
        assert all(tensor.isfinite().all() for tensor in reconstruct_ema(folder, 0.1).values())
        self.draw(folder, self.home / "kl", 0.1)

    # the texts of a run

    def config(self, rng):
        folder = self.copy("prior")
        self.copy("kl")
        path = folder / "config.json"
        good = json.loads(path.read_text())
        path.write_text(wrong_json(rng, path.read_text()), encoding="utf-8")
        rng.choice([lambda: Run.open(folder, good), lambda: self.draw(folder), lambda: name_runs([folder, self.home / "kl"])])()

    def finished(self, rng):
        run = Run(self.copy(rng.choice(["kl", "prior"])))
        path = run.folder / "finished.json"
        path.write_text(wrong_json(rng, path.read_text()), encoding="utf-8")
        numbers = fit({"kl": self.ae, "prior": self.prior}[run.folder.name], run, Budget(steps=3))
        f"{numbers['step']} {numbers['minutes']:.1f}"

    def metrics(self, rng):
        run = Run(self.copy("kl"))
        path = run.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() * 5
        how = rng.random()
        if how < 0.3: path.write_bytes(damage(rng, path.read_bytes()))
        elif how < 0.35: path.write_text("".join(json.dumps({"step": k}) + "\n" for k in range(10_000)))
        else: path.write_text("\n".join(wrong_json(rng, line) if rng.random() < 0.3 else line for line in lines), encoding="utf-8")
        records = read_metrics(run)
        assert [record["step"] for record in records] == sorted(record["step"] for record in records)
        diagnose(records)
        if rng.random() < 0.05: diagnose_runs([run.folder])

    # data

    def wrong_set(self, rng, folder, kinds):
        name = rng.choice(kinds)
        path = folder / name
        if path.suffix == ".json": path.write_text(wrong_json(rng, path.read_text()), encoding="utf-8")
        elif path.suffix == ".jsonl": path.write_text("\n".join(wrong_json(rng, line) if rng.random() < 0.6 else line for line in path.read_text().splitlines()), encoding="utf-8")
        elif rng.random() < 0.05: path.unlink()
        else: path.write_bytes(wrong_array(rng, np.load(path), self.marker))

    def prepared(self, rng):
        folder = self.copy("data")
        self.wrong_set(rng, folder, ["manifest.json", "manifest.json", "images.npy", "labels.npy"])
        self.use_set(load_prepared(folder))

    def use_set(self, data):
        x = load_batch(data.images, data.train[:2])
        assert x.shape == (2, 3, data.size, data.size) and len(data.train) + len(data.dev) == len(data.images) and len(data.dev) > 0
        assert all(isinstance(data.classes[label], str) for label in data.labels if label >= 0)
        assert re.fullmatch("[0-9a-f]{64}", data.manifest["sha256"]) and data.manifest.get("seconds", 0.0) / 60 >= 0 and len(data.manifest["skipped"]) >= 0

    def packed(self, rng):
        file, folder = self.work / "data.tar", self.work / "out"
        if rng.random() < 0.4:
            file.write_bytes(damage(rng, (self.home / "packed" / "data.tar").read_bytes()))
        elif rng.random() < 0.15:
            file.write_bytes(rng.choice([hostile_tar(rng), self.home.joinpath("photos", "photos.tar").read_bytes()]))
        else:
            source = self.copy("data")
            self.wrong_set(rng, source, ["manifest.json", "images.npy", "labels.npy"])
            with tarfile.open(file, rng.choice(["w", "w:gz"])) as archive:
                for path in sorted(source.iterdir(), reverse=True):
                    member = tarfile.TarInfo(path.name)
                    if rng.random() < 0.1: member.type, member.linkname = rng.choice([(tarfile.SYMTYPE, "/etc/passwd"), (tarfile.DIRTYPE, ""), (tarfile.LNKTYPE, "../../x"), (tarfile.CHRTYPE, "")])
                    else: member.size = path.stat().st_size
                    archive.addfile(member, io.BytesIO(path.read_bytes()))
        self.use_set(unpack(file, folder, progress=False))

    def progress(self, rng):
        "A set in the making whose progress or images are cut off."
        source, part = self.home / "photos" / "stored.zip", self.work / "out.part"
        if not (self.home / "made").exists(): prepare(source, self.home / "made", SIZE, progress=False)
        part.mkdir(parents=True)
        manifest = json.loads((self.home / "made" / "manifest.json").read_text())
        settings = {key: manifest[key] for key in ("format_version", "source", "labels", "size", "limit", "split_seed", "source_id")}
        (part / "progress.json").write_text(json.dumps(vars(Progress(settings, 3, [-1, -1, -1]))))
        shutil.copy(self.home / "made" / "images.npy", part)
        for path in part.iterdir(): path.write_bytes(path.read_bytes()[:rng.choice([None, rng.randrange(path.stat().st_size)])])
        self.use_set(prepare(source, self.work / "out", SIZE, progress=False))

    def latent_cache(self, rng):
        folder = self.copy("latents")
        self.wrong_set(rng, folder, ["latents.json", "latents.json", "mean.npy"])
        latents = load_latents(load_autoencoder(self.home / "kl"), self.data, folder)
        z = latents.scale.normalize(latents.raw(latents.train[:2], [False, True]))
        assert z.shape == (2, *latents.shape) and len(latents.mean[0]) == len(self.data.images)

    def statistics(self, rng):
        file = next((self.home / "stats").iterdir())
        with np.load(file) as members: arrays = {name: members[name] for name in members.files}
        folder = self.work / "stats"
        folder.mkdir(parents=True)
        how = rng.random()
        if how < 0.3: content = damage(rng, file.read_bytes())
        elif how < 0.4: content = rng.choice([lambda: pickle.dumps(Code(self.marker)), bytes, lambda: zip_bomb("mean.npy")])()
        else:
            npy = {}
            wrong = rng.choice(sorted(arrays))
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.save(buffer, array)
                npy[f"{name}.npy"] = wrong_array(rng, array, self.marker) if name == wrong else buffer.getvalue()
            if rng.random() < 0.2: npy.pop(f"{wrong}.npy")
            content = zip_of(npy, rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
        (folder / file.name).write_bytes(content)
        stats = reference_stats(folder, [], self.features, {"data": "x"})
        assert math.isfinite(frechet_distance(self.stats, stats)) and stats.num_images > 1

    def weights(self, rng):
        path = self.work / "weights.pth"
        state = {"features.0.weight": torch.ones(4, 3), "features.0.bias": torch.ones(4)}
        how = rng.choice(["bytes", "bytes", "bytes", "code", "code in", "tensor", "jit"])
        torch.save(change(rng, state, lambda old: wrong_tensor(rng, old)) if how == "tensor" else state, path, _use_new_zipfile_serialization=rng.random() < 0.7)
        if how == "bytes": path.write_bytes(damage(rng, path.read_bytes()))
        if how == "code": path.write_bytes(pickle.dumps(Code(self.marker)))
        if how == "code in": torch.save(state | {"x": Code(self.marker)}, path)
        if how == "jit": torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
        loaded = WeightsFile("test weights", "https://example.org/weights.pth", "", "NO_SUCH_VARIABLE", 1).load(path)
        assert all(torch.is_tensor(tensor) for tensor in loaded.values())

    # photos and archives

    def photo_bytes(self, rng):
        good = [path for path in sorted((self.home / "photos").iterdir()) if path.suffix not in (".zip", ".tar", ".gz", ".bz2", ".xz")]
        if rng.random() < 0.12: return rng.choice([lambda: huge_photo(rng), text_bomb, lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])()
        return damage(rng, rng.choice(good).read_bytes())

    def photo(self, rng):
        content = self.photo_bytes(rng)
        array, reason = try_photo(lambda: io.BytesIO(content), SIZE)
        if reason: raise UserError(f"left out: {reason}.")
        assert array.shape == (SIZE, SIZE, 3) and array.dtype == np.uint8

    def mask(self, rng):
        photo, mask = self.work / "photo", self.work / "mask"
        for path in (photo, mask): path.write_bytes(self.photo_bytes(rng) if rng.random() < 0.6 else (self.home / "photos" / "photo.png").read_bytes())
        assert load_mask(mask, photo, SIZE).shape == (1, 1, SIZE, SIZE)
        assert load_photo(photo, SIZE).isfinite().all()

    def read_archive(self, file):
        source = open_source(file)
        good = [photo for photo in source.photos if not photo.reason]
        for _, open_file in source.open_each(good): try_photo(open_file, SIZE)
        assert not any("outside" in str(path) and path.is_file() for path in file.parent.parent.iterdir())

    def zip_file(self, rng):
        file = self.work / "photos.zip"
        file.write_bytes(hostile_zip(rng) if rng.random() < 0.15 else damage(rng, (self.home / "photos" / rng.choice(["stored.zip", "deflated.zip"])).read_bytes()))
        self.read_archive(file)

    def tar_file(self, rng):
        file = self.work / "photos.tar"
        content = hostile_tar(rng) if rng.random() < 0.35 else damage(rng, (self.home / "photos" / "photos.tar").read_bytes())
        if rng.random() < 0.2: content = zlib.compress(content, wbits=31)
        file.write_bytes(content)
        self.read_archive(file)

    def packed_tar(self, rng):
        file = self.work / "photos.tar.gz"
        if rng.random() < 0.02: file.write_bytes(tar_bomb(rng.choice([b"0", b"x", b"L"])))
        else: file.write_bytes(damage(rng, (self.home / "photos" / f"photos.tar.{rng.choice(['gz', 'bz2', 'xz'])}").read_bytes()))
        self.read_archive(file)

    def table(self, rng):
        file = self.work / "labels.csv"
        good = "file,class\n" + "".join(f"set/{k}.jpg,sea\n" for k in range(3))
        file.write_bytes(rng.choice([damage(rng, good.encode()), b'"' + bytes(10**6), b"a," * 10**5, rng.randbytes(300), b"set/0.jpg,\x1b[2J\n" * 3]))
        names, numbers = csv_labels(file, open_source(self.home / "photos" / "stored.zip").photos)
        assert len(numbers) == 3 and all(name.isprintable() for name in names), names

    def note(self, rng):
        file = Download("https://example.org/photos.zip", self.work / "photos.zip")
        file.write_record(size=10, validator="x", sha256=None)
        file.part.write_bytes(bytes(5))
        file.record.write_text(wrong_json(rng, file.record.read_text()), encoding="utf-8")
        note = file.read_record()
        assert note == {} or (note["size"] is None or note["size"] >= 0) and isinstance(note["validator"], str)
        assert file.num_received in (0, 5)


LOADERS = ["checkpoint", "stranger", "autoencoder", "snapshot", "averages", "config", "finished", "metrics", "prepared", "packed", "progress", "latent_cache",
           "statistics", "weights", "photo", "mask", "zip_file", "tar_file", "packed_tar", "table", "note"]


# One file after another

def peak_megabytes():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def forget_peak():
    with suppress(OSError): Path("/proc/self/clear_refs").write_text("5")


class Hang(BaseException):
    "A loader took too long."


def ring(number, frame):
    raise Hang


def is_sentence(text):
    return "\n" not in text and len(text) < 700 and text.endswith(".")


def attempt(bench, seed, loader, number):
    "Damage one file and load it: None if it loaded, else the sentence; a `problem: ...` if neither."
    rng = random.Random(f"{seed} {loader} {number}")
    torch.manual_seed(0)
    shutil.rmtree(bench.work, ignore_errors=True)
    bench.work.mkdir()
    forget_peak()
    before = peak_megabytes()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)                            # of this process's own time: a busy machine is no hang
    faulthandler.dump_traceback_later(30 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        getattr(bench, loader)(rng)
        answer = None
    except UserError as error:
        answer = str(error) if is_sentence(str(error)) else f"problem: no sentence: {error}"
    except Hang:
        answer = "problem: hang: " + traceback.format_exc(limit=-4)
    except BaseException:
        answer = "problem: " + traceback.format_exc(limit=-6)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        faulthandler.cancel_dump_traceback_later()
    if bench.marker.exists():
        bench.marker.unlink()
        answer = "problem: code was run"
    if (grown := peak_megabytes() - before) > MEGABYTES.get(loader, 400): answer = f"problem: took {grown:.0f} MB; {answer}"
    return answer


def main(folder, seed, what):
    "Try many files, or one; print a JSON object: loader -> [loaded, refused, seconds], and the problems."
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    bench = Bench(home)
    if hasattr(resource, "RLIMIT_AS"):
        virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (virtual + 8 * 2**30,) * 2)
    signal.signal(signal.SIGPROF, ring)
    chosen, problems, counts = [what.partition(":")[::2]], [], {}
    if what.isdigit(): chosen = [(loader, number) for loader in LOADERS for number in range(-(-int(what) // len(LOADERS)))]
    elif not chosen[0][1]: chosen = [(what, number) for number in range(200)]
    for loader, number in chosen:
        start, silent = time.process_time(), io.StringIO()
        with redirect_stdout(silent), redirect_stderr(silent): answer = attempt(bench, seed, loader, number)
        count = counts.setdefault(loader, [0, 0, 0.0])
        count[answer is not None] += 1
        count[2] = round(count[2] + time.process_time() - start, 2)
        if answer and answer.startswith("problem"): problems.append([f"{loader}:{number}", answer])
        elif answer and "-v" in sys.argv: print(f"{loader}:{number}", answer, file=sys.stderr)
    print(json.dumps({"counts": counts, "problems": problems}))


if __name__ == "__main__":
    main(*sys.argv[1:4])
