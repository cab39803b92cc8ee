"""What a user can get wrong ends in one clear sentence, and nothing that was there changes."""
import json
import resource
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import BRIEF, SIZE, contents, type_in, write_photos
from hypothesis import given
from hypothesis import strategies as st
from image_diffusion import pipeline, fitting
from image_diffusion.data import from_bytes, prepare, to_bytes
from image_diffusion.files import UserError
from image_diffusion.runs import Run, config_difference, read_metrics
from image_diffusion.train_autoencoder import PRESETS as AUTOENCODERS
from image_diffusion.train_diffusion import PRESETS as PRIORS
from image_diffusion.training import batch_indices
from PIL import Image


def sentence(output):
    "The answer to a mistake: the last line, which must be one sentence (perhaps with a question for a slip of the pen) and no traceback."
    assert "Traceback" not in output, output
    last = output.strip().splitlines()[-1]
    assert last.startswith("Error: ") and last.endswith((".", "?")) and len(last) < 700, output
    return last


def refused(*words, keep, says, code=1):
    "Type a command that must be refused with the words `says` and leave the folder `keep` as it is; code 2 is click's for a bad option."
    before = contents(keep)
    result = type_in(*words)
    assert result.exit_code == code and isinstance(result.exception, SystemExit), repr(result.exception) + result.output
    assert all(word in sentence(result.output) for word in says), result.output
    assert contents(keep) == before


def run(source, folder, *more):
    "The words of a short run."
    return ["run", source, "--run", folder, "--preset", "tiny", "--hours", 0.002, *more]


@pytest.fixture
def old(tmp_path):
    "A folder with something in it that must stay."
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "thesis.txt").write_text("ten years of work")
    return tmp_path / "old"


# Sources

def test_a_source_that_is_not_there(tmp_path):
    refused(*run(tmp_path / "nowhere", tmp_path / "run"), keep=tmp_path, says=["nowhere", "was not found", "synthetic"])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_source(old, tmp_path):
    refused(*run(old / "thesis.txt", tmp_path / "run"), keep=tmp_path, says=["thesis.txt", "neither a folder nor a .zip"])


@pytest.mark.parametrize("command", ["run", "prepare"])
def test_a_folder_without_photos(old, tmp_path, command):
    (tmp_path / "empty").mkdir()
    for source in (old, tmp_path / "empty"):
        words = run(source, tmp_path / "run" / source.name) if command == "run" else ["prepare", source, "--out", tmp_path / "data"]
        refused(*words, keep=source, says=[source.name, "holds no image files"])
    assert not (tmp_path / "data").exists()


def test_text_files_that_call_themselves_photos(tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_text("no photo")
    says = ["none of the 2 files", "a.jpg", "not an image"]
    refused("prepare", tmp_path, "--out", tmp_path / "data", "--size", SIZE, keep=tmp_path, says=says)


def test_a_zip_cut_in_half(photos, tmp_path):
    whole, half = tmp_path / "whole.zip", tmp_path / "half.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        for path in sorted(photos.glob("sea/*.jpg")):
            archive.write(path, path.name)
    half.write_bytes(whole.read_bytes()[:whole.stat().st_size // 2])
    refused("prepare", half, "--out", tmp_path / "data", "--size", SIZE, keep=tmp_path, says=["half.zip", "not a whole .zip", "again"])


def test_a_photo_of_one_pixel(tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    refused("prepare", tmp_path, "--out", tmp_path / "data", "--size", SIZE, keep=tmp_path, says=["dot.png", "smaller than 8 pixels"])
    write_photos(tmp_path, 10, by_class=False)
    data = prepare(tmp_path, tmp_path / "data", SIZE, progress=False)
    assert len(data.images) == 10 and data.manifest["skipped"] == [{"name": "dot.png", "reason": "smaller than 8 pixels on a side"}]


@pytest.mark.parametrize("count", [1, 3])
def test_too_few_photos(tmp_path, count):
    write_photos(tmp_path / "photos", count, by_class=False)
    refused(*run(tmp_path / "photos", tmp_path / "run"), keep=tmp_path / "photos", says=[f"holds {count} photos", "at least 20"])


# Presets, budgets and folders

@pytest.mark.parametrize("words, presets", [(["run", "synthetic"], PRIORS), (["train-autoencoder", "--data", "data"], AUTOENCODERS),
                                            (["train-diffusion", "--data", "data", "--autoencoder", "kl"], PRIORS)],
                         ids=["run", "train-autoencoder", "train-diffusion"])
def test_an_unknown_preset_is_answered_with_the_known_ones(prepared, whole_run, tmp_path, words, presets):
    words = [{"data": prepared.folder, "kl": whole_run / "autoencoder-kl"}.get(word, word) for word in words]
    refused(*words, "--run", tmp_path / "run", "--preset", "lhq129", keep=tmp_path, says=["lhq129", *presets])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command, budget", [("run", ["--hours", 0]), ("run", ["--hours", -1]), ("demo", ["--minutes", 0]),
                                             ("train-autoencoder", ["--steps", 0]), ("train-autoencoder", ["--steps", -5]),
                                             ("train-autoencoder", ["--hours", 0])], ids=str)
def test_a_length_of_none_is_refused(prepared, tmp_path, monkeypatch, command, budget):
    monkeypatch.setattr(fitting, "training_loop", lambda *words: pytest.fail(f"{command} {budget} trains as if nothing had been given"))
    words = {"run": run("synthetic:50", tmp_path / "run"), "demo": ["demo", "--run", tmp_path / "run"],
             "train-autoencoder": ["train-autoencoder", "--data", prepared.folder, "--preset", "tiny-kl", "--run", tmp_path / "run"]}
    result = type_in(*words[command], *budget)
    assert result.exit_code in (1, 2) and budget[0] in result.output and not (tmp_path / "run").exists(), result.output


def test_a_run_of_other_settings(whole_run, photos):
    says = ["other settings", "samples: 24 there, 99 now", "another --run folder"]
    refused("run", photos, "--run", whole_run, "--preset", "tiny", "--samples", 99, keep=whole_run, says=says)
    refused("train-autoencoder", "--data", whole_run / "data", "--preset", "tiny-vq", "--run", whole_run / "autoencoder-kl", "--steps", 7,
            keep=whole_run, says=['recipe.model.bottleneck: "kl" there, "vq" now', "steps: null there, 7 now"])


@pytest.mark.parametrize("stage, number", [("autoencoder-kl", "dev_psnr"), ("prior", "dev_loss")])
def test_final_numbers_that_lack_one(whole_run, photos, tmp_path, stage, number):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    (folder / "finished.json").unlink()
    path = folder / stage / "finished.json"
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != number}))
    with pytest.raises(UserError, match=f"{stage}/finished.json is damaged"):
        pipeline.run(str(photos), folder, "tiny", hours=BRIEF, bottlenecks=("kl", "vq"), samples=24)


def test_a_folder_that_holds_something_else(old, prepared):
    for words in (run("synthetic:50", old), run("synthetic:50", old, "--fresh"), ["demo", "--run", old, "--fresh"],
                  ["train-autoencoder", "--data", prepared.folder, "--preset", "tiny-kl", "--run", old]):
        refused(*words, keep=old, says=[str(old)])
    refused("prepare", "synthetic:50", "--out", old, "--size", SIZE, keep=old, says=["something else than prepared photos"])


def test_fresh_deletes_nothing_but_runs_of_this_package(tmp_path):
    (tmp_path / "website").mkdir()
    (tmp_path / "website" / "config.json").write_text('{"theme": "dark"}')
    refused(*run("synthetic:50", tmp_path / "website", "--fresh"), keep=tmp_path, says=["website"])


@pytest.mark.parametrize("words", ["nowhere", "synthetic:50 --preset lhq129", "synthetic:50 --labels tabel.csv"])
def test_fresh_with_a_mistake_elsewhere_deletes_nothing(whole_run, tmp_path, words):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    refused("run", *words.split(), "--run", folder, "--fresh", keep=folder, says=[words.split()[-1]])


def test_a_file_in_the_place_of_the_run_folder(old, prepared):
    file = old / "thesis.txt"
    refused(*run("synthetic:50", file), keep=old, says=["thesis.txt"])
    refused("train-autoencoder", "--data", prepared.folder, "--preset", "tiny-kl", "--run", file / "run", keep=old, says=["thesis.txt"])


def test_prepared_data_of_other_settings_or_size(prepared, tmp_path):
    says = [f"size {SIZE}, not {SIZE // 2}"]
    refused("prepare", "synthetic", "--out", prepared.folder, "--size", SIZE // 2, keep=prepared.folder, says=says)
    refused("train-autoencoder", "--data", prepared.folder, "--preset", "lhq128-kl", "--run", tmp_path / "run", keep=tmp_path,
            says=["lhq128-kl", "128 px", f"{SIZE} px", "--size 128"])
    words = ["train-autoencoder", "--data", tmp_path, "--preset", "tiny-kl", "--run", tmp_path / "run"]
    refused(*words, keep=tmp_path, says=["no manifest.json"])
    assert list(tmp_path.iterdir()) == []


def test_damaged_prepared_data(prepared, tmp_path):
    data = Path(shutil.copytree(prepared.folder, tmp_path / "data"))
    (data / "images.npy").write_bytes((data / "images.npy").read_bytes()[:-1000])
    words = ["train-autoencoder", "--data", data, "--preset", "tiny-kl", "--run", tmp_path / "run"]
    refused(*words, keep=tmp_path, says=["damaged", "prepare again"])


# Runs that are not there, not finished, or of the wrong kind

def test_sampling_without_a_finished_model(whole_run, old, tmp_path):
    refused("generate", "--run", tmp_path / "nowhere", keep=tmp_path, says=["no run in", "nowhere"])
    refused("generate", "--run", old, keep=tmp_path, says=["no run in", "old"])
    refused("generate", "--run", whole_run / "autoencoder-kl", keep=whole_run, says=["not the run of a diffusion model"])
    unfinished = Path(shutil.copytree(whole_run, tmp_path / "unfinished")) / "prior"
    shutil.rmtree(unfinished / "snapshots")
    refused("generate", "--run", unfinished, keep=tmp_path, says=["no snapshot", "training command"])


def test_a_diffusion_model_of_another_autoencoder(whole_run, prepared, tmp_path):
    folder = Path(shutil.copytree(whole_run, tmp_path / "run"))
    shutil.rmtree(folder / "autoencoder-kl")
    (folder / "autoencoder-vq").rename(folder / "autoencoder-kl")
    refused("generate", "--run", folder / "prior", keep=folder, says=["not the one that this model was trained with"])
    words = ["train-diffusion", "--data", prepared.folder, "--autoencoder", tmp_path, "--preset", "tiny", "--run", tmp_path / "prior"]
    refused(*words, keep=tmp_path, says=[str(tmp_path), "train"])


def test_sampling_what_cannot_be_sampled(whole_run):
    sample = ["generate", "--run", whole_run / "prior"]
    refused(*sample, "--class", "city", keep=whole_run, says=["city", "desert, forest, lake, mountains, sea"])
    refused(*sample, "--sampler", "magic", keep=whole_run, says=["magic", "dpmpp_2m"])
    refused(*sample, "--steps", 0, keep=whole_run, says=["--steps"], code=2)
    refused(*sample, "--n", 0, keep=whole_run, says=["--n"], code=2)


def test_damaged_files_of_a_run(whole_run, tmp_path):
    folder = Path(shutil.copytree(whole_run, tmp_path / "run"))
    snapshot = next((folder / "prior" / "snapshots").iterdir())
    snapshot.write_bytes(snapshot.read_bytes()[:1000])
    refused("generate", "--run", folder / "prior", keep=folder, says=[snapshot.name])
    (folder / "prior" / "config.json").write_text('{"stage": "dif')
    refused("generate", "--run", folder / "prior", keep=folder, says=["damaged"])


def test_damaged_facts_of_a_checkpoint_lead_to_the_older_one(prepared, tmp_path, capsys):
    from image_diffusion.runs import load_checkpoint, save_checkpoint
    run = Run.open(tmp_path / "run", {})
    for step in (1, 2):
        save_checkpoint(run, step, {"step": step})
    (run.folder / "checkpoints" / "step_0000002.json").write_text('{"step": 2, "sc')
    assert load_checkpoint(run) == {"step": 1} and "step_0000002" in capsys.readouterr().out


# A disk that takes no more

def with_small_files(size, *words):
    "Type a command that can write no file larger than `size` bytes: every larger write fails, as on a full disk. Returns its sentence."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        result = type_in(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.exit_code == 1, result.output
    return sentence(result.output)


def test_a_disk_that_fills_up_while_preparing(tmp_path):
    said = with_small_files(100_000, "prepare", "synthetic:200", "--out", tmp_path / "data", "--size", SIZE)
    assert "make room" in said and "data.part" in said and [path.name for path in tmp_path.iterdir()] == ["data.part"]
    assert type_in("prepare", "synthetic:200", "--out", tmp_path / "data", "--size", SIZE).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_too_little_room_is_told_before_preparing(tmp_path):
    refused("prepare", "synthetic:2000000", "--out", tmp_path / "data", "--size", 4096, keep=tmp_path, says=["MB are free", "make room"])


def test_a_disk_that_fills_up_while_training(prepared, tmp_path):
    words = ["train-autoencoder", "--data", prepared.folder, "--preset", "tiny-kl", "--run", tmp_path / "run", "--steps", 2]
    assert "Could not write" in with_small_files(300_000, *words)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert type_in(*words).exit_code == 0                                     # there is room again: it goes on


def test_a_disk_that_fills_up_while_encoding(whole_run, tmp_path):
    folder = Path(shutil.copytree(whole_run, tmp_path / "run"))
    shutil.rmtree(next((folder / "autoencoder-kl").glob("latents-*")))
    words = ["train-diffusion", "--data", folder / "data", "--autoencoder", folder / "autoencoder-kl", "--preset", "tiny", "--run",
             folder / "new"]
    assert "Could not write the latents" in with_small_files(20_000, *words)
    assert not list((folder / "autoencoder-kl").glob("latents-*/latents.json"))


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 2 MB, where the system lets us make one."
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk, prepared):
    refused("prepare", "synthetic:2000", "--out", small_disk / "data", "--size", SIZE, keep=small_disk, says=["MB are free"])
    words = ["train-autoencoder", "--data", prepared.folder, "--preset", "tiny-kl", "--run", small_disk / "run", "--steps", 2]
    result = type_in(*words)
    assert result.exit_code == 1 and "Could not write" in sentence(result.output), result.output
    filler = small_disk / "filler"
    try:
        filler.write_bytes(bytes(4_000_000))
    except OSError:
        pass                                                                   # not a byte is left
    result = type_in(*words)
    assert result.exit_code == 1 and "No space left" in sentence(result.output), result.output
    assert Run.load(small_disk / "run").config["steps"] == 2 and not read_metrics(Run.load(small_disk / "run"))    # told before it trained


# The small functions that this rests on, for any input

settings = st.dictionaries(st.sampled_from("abc"), st.one_of(st.integers(0, 2), st.dictionaries(st.sampled_from("de"), st.integers(0, 1))))


@given(settings, settings)
def test_settings_differ_exactly_when_a_difference_is_named(a, b):
    assert bool(config_difference(a, b)) == (a != b)
    assert len(config_difference(a, b)) == len(config_difference(b, a))
    assert not config_difference(a, json.loads(json.dumps(a)))


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 70), st.integers(0, 3))
def test_an_epoch_visits_each_item_at_most_once(seed, n, batch_size, epoch):
    steps = max(1, n // batch_size)
    batches = [batch_indices(seed, epoch * steps + i, n, batch_size).tolist() for i in range(steps)]
    assert all(len(batch) == batch_size for batch in batches)
    visited = sum(batches, [])
    assert set(visited) <= set(range(n))
    assert len(set(visited)) == min(len(visited), n)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.randoms(use_true_random=False))
def test_images_come_back_from_the_networks_form_as_the_same_bytes(count, height, width, random):
    images = np.array([random.randrange(256) for _ in range(count * height * width * 3)], np.uint8).reshape(count, height, width, 3)
    x = from_bytes(images)
    assert x.shape == (count, 3, height, width) and x.abs().max() <= 1
    assert np.array_equal(to_bytes(x).numpy(), images)
