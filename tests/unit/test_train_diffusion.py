"""Stage 2 across modules: recipes, averages chosen afterward, and the commands that sample."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import type_in
from image_diffusion.data import prepare
from image_diffusion.diffusion import LOSS_WEIGHTS, NOISE_LEVELS, PARAMETERIZATIONS
from image_diffusion.files import UserError
from image_diffusion.evaluate import class_accuracy, show_nearest
from image_diffusion.features import available_features
from image_diffusion.fid import collect_stats
from image_diffusion.generate import LatentDiffusion, class_labels, generate, img2img, inpaint, labels_of, panorama
from image_diffusion.latents import load_latents
from image_diffusion.runs import Run, read_metrics
from image_diffusion.train_autoencoder import load_autoencoder, train_autoencoder
from image_diffusion.train_diffusion import PRESETS, DiffusionRecipe, DiffusionStage, train_diffusion
from image_diffusion.ema import reconstruct_ema
from image_diffusion.training import Precision
from image_diffusion.unet import UNetConfig
from PIL import Image


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A prepared set, an autoencoder and a prior of a few steps, in one folder."
    home = tmp_path_factory.mktemp("stage2")
    data = prepare("synthetic", home / "data", size=32, limit=200)
    train_autoencoder(data, home / "kl", "tiny-kl", steps=10)
    train_diffusion(data, home / "kl", home / "prior", "tiny", steps=12)
    return home


@pytest.fixture(scope="module")
def data(home):
    return prepare("synthetic", home / "data", size=32, limit=200)


@pytest.fixture(scope="module")
def prior(home):
    return LatentDiffusion.from_pretrained(home / "prior", precision=Precision())


@pytest.fixture(scope="module")
def stage_of(home, data):
    "A function that makes a stage with a small network."
    autoencoder = load_autoencoder(home / "kl")
    latents = load_latents(autoencoder, data)
    model = UNetConfig(in_ch=latents.shape[0], size=latents.shape[1], ch=8, ch_mult=(1, 2), num_res_blocks=1,
                       attn_resolutions=(), num_groups=4,
                       num_classes=data.num_classes)
    recipe = DiffusionRecipe(model, batch_size=8, lr=1e-3, warmup_steps=1)
    return lambda **changes: DiffusionStage(latents, replace(recipe, **changes), autoencoder, data.classes)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_every_combination_trains_or_is_refused(stage_of, parameterization):
    for noise_levels in NOISE_LEVELS:
        if (parameterization, noise_levels) == ("eps", "zero_snr"):
            with pytest.raises(UserError, match="zero_snr"):
                stage_of(parameterization=parameterization, noise_levels=noise_levels)
            continue
        for weighting in LOSS_WEIGHTS:
            stage = stage_of(parameterization=parameterization, noise_levels=noise_levels, weighting=weighting)
            before = stage.prior.denoiser.net.conv_in.weight.detach().clone()
            numbers = [stage.train_step(step, 0.5) for step in range(2)]           # the first moves the zero-initialized end only
            assert not any(n["skipped"] for n in numbers) and all(np.isfinite(float(n["loss"])) for n in numbers), (noise_levels, weighting)
            assert not torch.equal(before, stage.prior.denoiser.net.conv_in.weight), (noise_levels, weighting)


def test_dev_loss_is_one_measure_for_all_recipes(stage_of):
    "The same function of the same network, whatever it was trained with."
    one, other = (stage_of(noise_levels=levels, weighting=weighting) for levels, weighting in (("cosine", "min_snr"), ("flow", "uniform")))
    other.prior.ema.load_state_dict(one.prior.ema.state_dict())
    assert one.evaluate() == other.evaluate()


def test_averages_are_kept_and_mixed(home):
    files = sorted((home / "prior/averages").glob("*.safetensors"))
    assert {path.stem.split("-")[1] for path in files} == {"0.05", "0.1"} and max(int(path.stem[5:12]) for path in files) == 12
    mixed, own = reconstruct_ema(home / "prior", 0.1), LatentDiffusion.from_pretrained(home / "prior", ema=0.1, precision=Precision())
    from safetensors.torch import load_file
    last = load_file(home / "prior/averages/step_0000012-0.1.safetensors")
    for name, tensor in last.items():                                              # a width that was kept comes back as it was
        torch.testing.assert_close(mixed[name], tensor.float(), atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(own.denoiser.net.conv_in.weight, mixed["net.conv_in.weight"])
    with pytest.raises(UserError, match="between 0.01 and 0.25"):
        reconstruct_ema(home / "prior", 0.5)
    with pytest.raises(UserError, match="kept no averages"):
        reconstruct_ema(home / "kl", 0.1)


def test_fp16_with_a_scaler_on_the_cpu(stage_of):
    stage = stage_of()
    half = DiffusionStage(stage.latents, stage.recipe, stage.autoencoder, stage.classes, Precision("cpu", torch.float16))
    numbers = [half.train_step(step, 0.1) for step in range(6)]
    assert half.prior.scaler.is_enabled() and not numbers[-1]["skipped"] and torch.isfinite(half.prior.denoiser.net.conv_in.weight).all()


def test_sampling_refuses_what_cannot_be(prior, home, data):
    labels = class_labels(prior, prior.classes[:1], 1)
    for wrong, words in ((lambda: generate(prior, labels, steps=0), "at least one step"),
                         (lambda: img2img(prior, torch.zeros(1, 3, 8, 8), labels), "not \\(3, 8, 8\\)"),
                         (lambda: img2img(prior, torch.zeros(1, 3, 32, 32), labels, 500.0), "at most"),
                         (lambda: img2img(prior, torch.zeros(1, 3, 32, 32), labels, strength=1.5), "strength"),
                         (lambda: inpaint(prior, torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 8, 8), labels), "mask"),
                         (lambda: panorama(prior, 0, 33), "multiple of 2"),
                         (lambda: class_labels(prior, ["moon"], 1), prior.classes[0])):
        with pytest.raises(UserError, match=words):
            wrong()
    plain = replace(prior, classes=[])
    with pytest.raises(UserError, match="without classes"):
        generate(plain, class_labels(plain, None, 1), guidance=3.0)
    assert generate(plain, class_labels(plain, None, 1), steps=2).shape == (1, 3, 32, 32)


def test_class_accuracy_is_high_for_photos_and_low_for_other_labels(prior, data):
    features, labels = available_features()[-2:][0], labels_of(prior, data, data.dev)
    vectors = collect_stats(data.images[data.dev], features, keep=True).features
    right, wrong = (class_accuracy(vectors, asked, prior, data, features) for asked in (labels, (labels + 1) % len(prior.classes)))
    assert right["value"] == right["baseline"] > 0.8 and wrong["value"] < 0.2


def test_a_copied_photo_is_its_own_nearest(data):
    tiles = np.asarray(show_nearest(data.images[data.train[3:4]], data, count=1).axes[0].images[0].get_array())
    sample, nearest = tiles[2:98, 2:98], tiles[2:98, -98:-2]                       # 32 px, three times as large, in a frame of 2 px
    assert np.array_equal(sample, nearest) and sample.std() > 10


def test_any_number_of_pictures_in_pieces(prior):
    labels = class_labels(prior, [prior.classes[0]] * 5, 5)
    whole, pieces = generate(prior, labels, steps=2), generate(prior, labels, steps=2, batch_size=2)
    torch.testing.assert_close(whole, pieces, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "ddpm"])
def test_noisy_samplers_depend_on_seed_and_number_alone(prior, sampler):
    labels = class_labels(prior, [prior.classes[0]] * 3, 3)
    together, alone = generate(prior, labels, steps=4, sampler=sampler), generate(prior, labels[2:], first=2, steps=4, sampler=sampler)
    torch.testing.assert_close(together[2:], alone, atol=1e-3, rtol=1e-3)


def test_commands_draw_and_note_their_settings(home, data, prior, tmp_path):
    photo, mask, run = tmp_path / "photo.png", tmp_path / "mask.png", str(home / "prior")
    Image.fromarray(np.repeat(np.repeat(data.images[0], 2, 0), 2, 1)).convert("L").save(photo)          # another size and mode
    Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16)).save(mask)
    out, (some, other) = tmp_path / "out.png", (prior.classes[0], prior.classes[-1])
    for words, size in ((["generate", "--n", "2"], None), (["generate", "--n", "2", "--class", "none"], None),
                        (["generate", "--n", "1", "--guidance", "1", "--guidance", "3"], None),
                        (["generate", "--n", "1", "--ema", "0.1"], None),
                        (["interpolate", "--to", other, "--n", "3"], None), (["img2img", str(photo), "--n", "2", "--class", some], None),
                        (["inpaint", str(photo), str(mask), "--n", "2"], None), (["panorama", "--width", "96"], (96, 32)),
                        (["panorama", "--width", "64", "--wrap"], (64, 32))):
        result = type_in(*words, "--run", run, "--steps", "2", "--out", str(out))
        assert result.exit_code == 0 and ("To be filled: 25.0%" in result.output) == (words[0] == "inpaint"), result.output
        with Image.open(out) as picture:
            assert json.loads(picture.text["steps"]) == 2 and json.loads(picture.text["seed"]) == 0
            assert json.loads(picture.text["guidance"]) == ([1, 3] if "3" in words and words[0] == "generate" else 2.5)      # never None
            assert size is None or picture.size == size
        out.unlink()


@pytest.mark.parametrize("words, answer", [
    (["generate", "--class", "moon"], "classes are"),
    (["generate", "--class", "sea", "--guidance", "1", "--guidance", "2"], "leave --class out"),
    (["generate", "--sampler", "magic"], "known ones are"), (["generate", "--ema", "3"], "between"),
    (["img2img", "nowhere.jpg"], "no image"), (["img2img", "TEXT"], "cannot be used"), (["img2img", "ONE"], "smaller than"),
    (["inpaint", "PHOTO", "ONE"], "cannot be used"),
    (["inpaint", "PHOTO", "WIDE"], "photo's size"),
    (["inpaint", "PHOTO", "BLACK"], "leaves 0%"), (["inpaint", "PHOTO", "CLEAR"], "leaves 100%"),
    (["panorama", "--width", "31"], "multiple"), (["generate", "--autoencoder", "nowhere"], "nowhere")])
def test_commands_answer_mistakes_in_one_sentence(home, data, tmp_path, words, answer):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.fromarray(data.images[0]).save(tmp_path / "photo.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    Image.new("L", (64, 32)).save(tmp_path / "wide.png")
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    Image.new("RGBA", (32, 32)).save(tmp_path / "clear.png")
    places = {name.upper(): f"{name}.png" for name in ("photo", "one", "wide", "black", "clear")} | {"TEXT": "text.jpg"}
    words = [str(tmp_path / places[word]) if word in places else word for word in words]
    result = type_in(*words, "--run", str(home / "prior"), "--steps", "2")
    assert result.exit_code != 0 and answer in result.output and "Traceback" not in result.output, result.output
    assert not list((home / "prior").glob("*.png"))


def test_a_network_that_answers_nan_is_named(prior):
    broken = replace(prior, denoiser=lambda x, sigma, label=None: x * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        generate(broken, class_labels(prior, prior.classes[:1], 1), steps=2)


def test_the_recipe_of_the_baseline_is_a_preset():
    recipe = PRESETS["original"]
    assert (recipe.parameterization, recipe.noise_levels, recipe.weighting) == ("eps", "linear", "uniform")
    assert (recipe.ema_decay, recipe.power_emas) == (0.0, ())


def test_strips_and_samples_are_drawn_while_training(home):
    names = {path.name for path in (home / "prior/samples").glob("*.png")}
    assert "step_0000012.png" in names and "denoising_step_0000012.png" in names
    assert any("dev_loss_band0" in record for record in read_metrics(Run.load(home / "prior")))
