"""How much faster is a training step in the precision that `Precision.pick` chooses than in fp32, on this machine?

    python tests/benchmarks/precision.py

Prints the ratio for one step of each stage of preset `photos64` (medians of alternating repeats in one process).
"""
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch

from image_diffusion.autoencoder import make_autoencoder
from image_diffusion.train_autoencoder import PRESETS as AUTOENCODERS
from image_diffusion.train_diffusion import PRESETS as PRIORS
from image_diffusion.training import Precision
from image_diffusion.unet import UNet

REPEATS = 7


def autoencoder_step():
    "A step of the photos64 autoencoder, L1 only, as a function of a precision."
    recipe = AUTOENCODERS["photos64-kl"]
    model, x = make_autoencoder(recipe.model), torch.rand(recipe.batch_size, 3, recipe.size, recipe.size) * 2 - 1
    return lambda precision: backward(precision, lambda: (model(x)[0] - x).abs().mean())


def prior_step():
    "A step of the photos64 UNet, as a function of a precision."
    recipe = PRIORS["photos64"]
    config = replace(recipe.model, num_classes=4)
    net, z = UNet(config), torch.randn(recipe.batch_size, config.in_ch, config.size, config.size)
    label, c_noise = torch.zeros(len(z), dtype=torch.long), torch.rand(len(z)) * 1000
    return lambda precision: backward(precision, lambda: net(z, c_noise, label).square().mean())


def backward(precision, loss):
    "Forward in the precision, and backward."
    with precision.autocast():
        value = loss()
    value.backward()


def seconds(step, precision):
    "Duration of one step."
    start = perf_counter()
    step(precision)
    return perf_counter() - start


if __name__ == "__main__":
    picked, full = Precision("cpu", Precision.pick().dtype), Precision()
    print(f"picked on this machine: {picked.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, step in (("autoencoder", autoencoder_step()), ("prior", prior_step())):
        seconds(step, full), seconds(step, picked)                                          # warm up
        pairs = [(seconds(step, full), seconds(step, picked)) for _ in range(REPEATS)]
        slow, fast = (median(times) for times in zip(*pairs))
        print(f"{name}: fp32 {slow * 1e3:.0f} ms, picked {fast * 1e3:.0f} ms, ratio {slow / fast:.2f}")
