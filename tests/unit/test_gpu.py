"""On a GPU: networks compute what they do on the CPU, both stages learn in its precisions, and runs go on and move between machines.

Where there is none, all of this is skipped.
"""
import signal
from dataclasses import replace

import pytest
import torch
from conftest import SIZE
from image_diffusion.autoencoder import make_autoencoder
from image_diffusion.data import prepare
from image_diffusion.evaluate import evaluate_run
from image_diffusion.generate import LatentDiffusion, class_labels, generate, img2img, inpaint, interpolate, load_photo, panorama
from image_diffusion.latents import cache_latents
from image_diffusion.perceptual import LPIPS
from image_diffusion.runs import Run, final_metrics, read_metrics
from image_diffusion.train_autoencoder import PRESETS as AUTOENCODERS
from image_diffusion.train_autoencoder import INIT_BATCHES, AutoencoderStage, autoencoder_step_cost, load_autoencoder, train_autoencoder
from image_diffusion.train_diffusion import PRESETS as PRIORS
from image_diffusion.train_diffusion import DiffusionStage, train_diffusion
from image_diffusion.fitting import Interrupted, fit
from image_diffusion.training import Budget, Precision
from image_diffusion.unet import UNet

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
T4, PICKED = Precision("cuda", torch.float16), Precision("cuda", torch.bfloat16)    # what `Precision.pick` takes


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    "Convolutions in full float32 where no autocast is asked for, as on a T4, and in the same order each time."
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


@pytest.fixture(scope="module")
def landscapes(tmp_path_factory):
    "A prepared set of 640 synthetic landscapes at the size of the tiny preset."
    return prepare("synthetic", tmp_path_factory.mktemp("gpu") / "data", SIZE, limit=640, progress=False)


@pytest.fixture(scope="module")
def runs(landscapes, tmp_path_factory):
    "The folders of an autoencoder and a prior, both trained on the GPU for a few hundred steps."
    folder = tmp_path_factory.mktemp("gpu-runs")
    train_autoencoder(landscapes, folder / "kl", "tiny-kl", steps=400)
    train_diffusion(landscapes, folder / "kl", folder / "prior", "tiny", steps=400)
    return folder


def unfolded(net):
    "Random numbers for the zeros that a network starts from, so that a comparison of outputs means something."
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return net.eval()


@pytest.mark.parametrize("precision, tolerance", [(Precision("cuda"), 1e-3), (T4, 0.03), (PICKED, 0.2)], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("preset", ["lhq128-fast", "lhq128-f8", "photos64"])
def test_networks_compute_what_they_do_on_the_cpu(preset, precision, tolerance):
    torch.manual_seed(0)
    recipe, prior = AUTOENCODERS[f"{preset}-kl"], replace(PRIORS[preset].model, num_classes=3)
    autoencoder, net = unfolded(make_autoencoder(recipe.model)), unfolded(UNet(prior))
    x, z = torch.rand(2, 3, recipe.size, recipe.size) * 2 - 1, torch.randn(2, prior.in_ch, prior.size, prior.size)
    inputs = z, torch.tensor([3.0, 900.0]), torch.tensor([-1, 2])
    with torch.no_grad():
        expected = autoencoder.reconstruct(x), net(*inputs)
        with precision.autocast():
            autoencoder, net = precision.place(autoencoder), precision.place(net)
            found = autoencoder.reconstruct(x.cuda()), net(*(value.cuda() for value in inputs))
    for on_cpu, on_gpu in zip(expected, found):
        assert (on_gpu.float().cpu() - on_cpu).square().mean().sqrt() < tolerance * on_cpu.std()


def test_the_linear_path_is_initialized_as_well_as_on_the_cpu(landscapes):
    recipe = replace(AUTOENCODERS["tiny-kl"], model=replace(AUTOENCODERS["tiny-kl"].model, linear=True))
    found = []
    for precision in (Precision(), T4):
        stage = AutoencoderStage(landscapes, recipe, precision)
        stage.autoencoder.initialize(torch.cat([stage.batch(step) for step in range(INIT_BATCHES)]))
        stage.autoencoder.ema.update_parameters(stage.autoencoder.model)
        found.append(stage.evaluate()["dev_psnr"])
    assert found[1] == pytest.approx(found[0], abs=0.1)


def latents_of(landscapes, folder):
    "The cached latents of a trained autoencoder, and itself."
    autoencoder = load_autoencoder(folder, "cuda")
    return cache_latents(autoencoder, landscapes, device="cuda"), autoencoder


def make(kind, landscapes, runs, precision):
    "A new stage of one of four kinds."
    if kind != "prior":
        recipe = replace(AUTOENCODERS["tiny-vq" if kind == "vq" else "tiny-kl"], perceptual_weight=float(kind == "lpips"))
        return AutoencoderStage(landscapes, recipe, precision, LPIPS() if kind == "lpips" else None, "LPIPS" if kind == "lpips" else None)
    latents, autoencoder = latents_of(landscapes, runs / "kl")
    recipe = replace(PRIORS["tiny"], model=replace(PRIORS["tiny"].model, in_ch=latents.shape[0], num_classes=landscapes.num_classes))
    return DiffusionStage(latents, recipe, autoencoder, landscapes.classes, precision)


@pytest.mark.parametrize("precision", [T4, PICKED], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["kl", "vq", "lpips", "prior"])
def test_both_stages_learn(landscapes, runs, tmp_path, kind, precision):
    stage, run = make(kind, landscapes, runs, precision), Run.open(tmp_path / "run", {})
    before = stage.score(stage.evaluate())
    fit(stage, run, Budget(steps=200), log_every=25, samples=2)
    records = [record for record in read_metrics(run) if "skipped" in record]
    assert stage.score(final_metrics(run)) > before
    assert sum(record["skipped"] for record in records[1:]) == 0         # a new scaler may look for its scale, and then it has it
    assert all(record["grad_norm"] > 0 for record in records)
    assert ("scale" in records[0]) == (precision == T4)


@pytest.mark.parametrize("kind", ["kl", "vq", "prior"])
def test_a_stopped_training_goes_on_as_if_it_had_not_been(landscapes, runs, tmp_path, kind):
    whole, halves = Run.open(tmp_path / "whole", {}), Run.open(tmp_path / "halves", {})
    fit(make(kind, landscapes, runs, T4), whole, Budget(steps=60), samples=1)
    stage = make(kind, landscapes, runs, T4)
    train_step = stage.train_step
    def interrupted_train_step(step, progress):
        if step == 30:
            signal.raise_signal(signal.SIGINT)              # as by Ctrl-C
        return train_step(step, progress)
    stage.train_step = interrupted_train_step
    with pytest.raises(Interrupted):
        fit(stage, halves, Budget(steps=60), samples=1)
    fit(make(kind, landscapes, runs, T4), halves, Budget(steps=60), samples=1)
    steps = [record["step"] for record in read_metrics(halves) if "grad_norm" in record]
    assert steps == [record["step"] for record in read_metrics(whole) if "grad_norm" in record]
    numbers, expected = final_metrics(halves), final_metrics(whole)
    for name in ("dev_psnr", "dev_loss"):
        assert numbers.get(name) == pytest.approx(expected.get(name), rel=1e-3)


def test_a_prior_draws_the_same_pictures_on_gpu_and_cpu(runs):
    drawn = []
    for precision in (Precision(), T4):
        prior = LatentDiffusion.from_pretrained(runs / "prior", precision=precision)
        drawn.append(generate(prior, class_labels(prior, prior.classes, None), steps=10))
    assert drawn[1].device.type == "cpu"
    assert (drawn[0] - drawn[1]).abs().mean() < 0.05


def test_everything_one_can_do_with_a_prior(runs, photos):
    prior = LatentDiffusion.from_pretrained(runs / "prior")
    x, labels = load_photo(next((photos / "sea").glob("0*.jpg")), prior.size), class_labels(prior, ["sea"], 1)
    mask = torch.zeros(1, 1, prior.size, prior.size)
    mask[..., : prior.size // 2] = 1
    assert generate(prior, labels, sampler="dpmpp_2m_sde", steps=5).shape == x.shape
    assert img2img(prior, x, labels, strength=0.6, steps=5).shape == x.shape
    assert torch.equal(inpaint(prior, x, mask, labels, steps=5)[..., prior.size // 2:], x[..., prior.size // 2:])
    assert interpolate(prior, ("sea", "lake"), 0, 1, n=4, steps=5).shape == (4, *x.shape[1:])
    assert panorama(prior, 0, 3 * prior.size, wrap=True, steps=5).shape == (1, 3, prior.size, 3 * prior.size)


def test_a_run_is_evaluated(landscapes, runs):
    for folder in (runs / "kl", runs / "prior"):
        assert evaluate_run(folder, landscapes, count=64, allow_small_n=True)[1]["records"]


@pytest.mark.parametrize("preset", ["lhq128-fast-kl", "lhq128-kl"])
def test_the_plan_foretells_the_memory(preset, tmp_path):
    recipe = replace(AUTOENCODERS[preset], batch_size=8)
    planned = autoencoder_step_cost(recipe, Precision("cpu", torch.bfloat16), LPIPS())
    data = prepare("synthetic", tmp_path / "data", recipe.size, limit=40, progress=False)
    stage = AutoencoderStage(data, recipe, T4, LPIPS(), "LPIPS")
    for step in range(1, 5):
        if step == 3:
            torch.cuda.reset_peak_memory_stats()
        stage.train_step(step, 0.9)
    found = torch.cuda.max_memory_allocated() / sum(size for name, size in planned.items() if name != "macs")
    assert 0.75 < found < 1.25
