"""Is the memory that `image_diffusion plan` foretells what training takes?

    python tests/benchmarks/memory.py

For `photos64` in a few settings, each in a fresh process: the plan's gigabytes, and what the system counts (the peak of resident memory
over three steps with everything switched on, less what was resident when all was imported). The system counts pages: also
those that the allocator keeps after a tensor is freed, scratch of the convolutions, and library code that is loaded at first use.
"""
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import torch

from image_diffusion.perceptual import LPIPS, FeatureDistance, load_lite0
from image_diffusion.train_autoencoder import PRESETS, AutoencoderStage, autoencoder_step_cost
from image_diffusion.cost import planned_bytes
from image_diffusion.training import Precision

PERCEPTUAL = {"none": lambda: None, "lpips": LPIPS, "lite0": lambda: FeatureDistance(load_lite0())}
SETTINGS = [("photos64-kl", 8, "none"), ("photos64-kl", 8, "lite0"), ("photos64-vq", 8, "lite0"), ("photos64-kl", 32, "lite0"), ("photos64-kl", 32, "lpips")]


def resident(field):
    "A line of /proc/self/status, in megabytes."
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024 / 1e6


def warm_up():
    "Load the libraries that any network uses, so that they count as imported."
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.zeros(1, 3, 8, 8)).sum().backward()
    optimizer.step()


def planned(preset, batch, perceptual):
    "Megabytes by the plan."
    cost = autoencoder_step_cost(replace(PRESETS[preset], batch_size=batch), Precision(), PERCEPTUAL[perceptual]())
    return sum(planned_bytes(cost, on_gpu=False).values()) / 1e6


def measured(preset, batch, perceptual):
    "Megabytes by the system."
    warm_up()
    before, recipe = resident("VmRSS"), replace(PRESETS[preset], batch_size=batch)
    stage = AutoencoderStage(SimpleNamespace(train=range(100 * batch)), recipe, Precision(), PERCEPTUAL[perceptual]())
    stage.batch = lambda step: torch.zeros(batch, 3, recipe.size, recipe.size)
    for step in range(1, 5):
        if step == 2:
            open("/proc/self/clear_refs", "w").write("5")            # forget the peak of the first step, in which all is made
        stage.train_step(step, 1.0)
    return resident("VmHWM") - before


if __name__ == "__main__":
    if len(sys.argv) > 1:
        kind, preset, batch, perceptual = sys.argv[1:]
        print({"planned": planned, "measured": measured}[kind](preset, int(batch), perceptual))
        sys.exit()
    print(f"{'preset':12} batch perceptual  planned MB  measured MB  ratio")
    for setting in SETTINGS:
        words = [str(word) for word in setting]
        plan, real = (float(subprocess.run([sys.executable, __file__, kind, *words], capture_output=True, text=True, check=True).stdout)
                      for kind in ("planned", "measured"))
        print(f"{words[0]:12} {words[1]:>5} {words[2]:10} {plan:11.0f} {real:12.0f} {plan / real:6.2f}", flush=True)
