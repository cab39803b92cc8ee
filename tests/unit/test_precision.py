"""Precision follows the hardware, and both stages can train in each."""
from dataclasses import replace

import pytest
import torch
from image_diffusion import training
from image_diffusion.autoencoder import make_autoencoder
from image_diffusion.latents import LatentDataset, LatentScale
from image_diffusion.train_autoencoder import PRESETS as AUTOENCODERS
from image_diffusion.train_autoencoder import AutoencoderStage
from image_diffusion.train_diffusion import PRESETS as PRIORS
from image_diffusion.train_diffusion import DiffusionStage
from image_diffusion.training import Precision

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("card, capability, dtype", [("T4", (7, 5), torch.float16), ("A100", (8, 0), torch.bfloat16),
                                                     ("H100", (9, 0), torch.bfloat16)])
def test_on_a_gpu_the_capability_decides(monkeypatch, card, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)      # a T4 says so too, and emulates
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)              # put back afterward
    assert Precision.pick() == Precision("cuda", dtype)


@pytest.mark.parametrize("able, bf16_takes, dtype", [
    ({}, 0.1, torch.float32), ({"avx512_bf16": False, "amx_bf16": False}, 0.1, torch.float32), ({"avx512_bf16": True}, 0.5, torch.bfloat16),
    ({"amx_bf16": True}, 0.5, torch.bfloat16), ({"avx512_bf16": True}, 1.4, torch.float32)])
def test_on_a_cpu_its_instructions_and_their_speed_decide(monkeypatch, able, bf16_takes, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(training, "convolution_seconds", lambda dtype: bf16_takes if dtype == torch.bfloat16 else 1.0)
    monkeypatch.setattr(training, "faster_in_bf16", training.faster_in_bf16.__wrapped__)       # not what was measured before
    assert Precision.pick() == Precision("cpu", dtype)


def test_only_fp16_scales_its_gradients():
    dtypes = torch.float16, torch.bfloat16, torch.float32
    assert [Precision("cpu", dtype).scaler().is_enabled() for dtype in dtypes] == [True, False, False]


def autoencoder_stage(data, precision):
    return AutoencoderStage(data, replace(AUTOENCODERS["tiny-kl"], batch_size=4), precision)


def diffusion_stage(data, precision):
    "A stage on made-up latents."
    recipe, rng = PRIORS["tiny"], torch.Generator().manual_seed(0)
    autoencoder = make_autoencoder(AUTOENCODERS["tiny-kl"].model).eval()
    latents = torch.randn(2, len(data.images), recipe.model.in_ch, recipe.model.size, recipe.model.size, generator=rng).half().numpy()
    scale = LatentScale([0.0] * recipe.model.in_ch, [1.0] * recipe.model.in_ch)
    dataset = LatentDataset(latents, None, scale, data.labels, data.train, data.dev, "")
    recipe = replace(recipe, batch_size=4, model=replace(recipe.model, num_classes=data.num_classes))
    return DiffusionStage(dataset, recipe, autoencoder, data.classes, precision)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("make", [autoencoder_stage, diffusion_stage])
def test_a_step_in_half_precision_moves_finite_weights(prepared, make, dtype):
    stage = make(prepared, Precision("cpu", dtype))
    networks = [stage.autoencoder.model, stage.disc.net] if make == autoencoder_stage else [stage.prior.denoiser]
    before = [[p.detach().clone() for p in network.parameters()] for network in networks]
    for step in range(12):                       # a new scaler may skip some steps until its scale fits
        metrics = stage.train_step(step, 0.9)    # so late that the discriminator takes part
        if not metrics["skipped"]:
            break
    assert not metrics["skipped"] and metrics["grad_norm"] > 0
    for network, old in zip(networks, before):
        after = list(network.parameters())
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in after)
        assert any(not torch.equal(p, q) for p, q in zip(after, old))
    assert all(torch.as_tensor(value).isfinite() for value in metrics.values() if value is not None)
