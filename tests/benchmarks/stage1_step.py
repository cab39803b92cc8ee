"""How long does a training step of stage 1 take, beside its peers and beside the bare step?

    python tests/benchmarks/stage1_step.py

Prints ratios of medians, turns taken in one process on the CPU, on synthetic landscapes:
1. a full step (both optimizers, discriminator on) of `lhq128-kl` and `lhq128-fast-kl` against `original-kl`, with and without LPIPS
   (VGG16 with random weights: the time is the same);
2. our classic network (`patch=1`) against diffusers' `AutoencoderKL` with the same weights, losses and step;
3. the step of `photos64-kl` and `photos64-vq` as it is, against the same without check-ups, records, EMA and code counts.
"""
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from stage1 import theirs

from image_diffusion.autoencoder import AutoencoderConfig, diffusers_state_dict
from image_diffusion.data import prepare
from image_diffusion.perceptual import LPIPS
from image_diffusion.runs import Run
from image_diffusion.train_autoencoder import PRESETS, AutoencoderStage
from image_diffusion.fitting import MetricsLogger
from image_diffusion.training import Precision, Tick

LATE = 0.9    # of the budget: the discriminator is on


def seconds(actions, turns):
    "The median duration of each action, taken in turns after one round to warm up."
    times = {name: [] for name in actions}
    for turn in range(turns + 1):
        for name, action in actions.items():
            start = perf_counter()
            action(turn)
            times[name].append(perf_counter() - start)
    return {name: median(values[1:]) for name, values in times.items()}


def compare(title, actions, turns):
    "Print the seconds of each action and how many times as fast as the first it is."
    times = seconds(actions, turns)
    base = next(iter(times.values()))
    print(title, *(f"  {name:28s} {1e3 * t:8.1f} ms   {base / t:5.2f} times as fast" for name, t in times.items()), sep="\n", flush=True)
    return times


def step_of(stage):
    "A full step, never one with a check-up."
    return lambda turn: stage.train_step(turn + 1, LATE)


def presets(folder):
    "1. Presets of 128 px, at batch 2."
    data = prepare("synthetic", folder / "data128", 128, limit=40, progress=False)
    for perceptual in (None, LPIPS()):
        stages = {name: AutoencoderStage(data, replace(PRESETS[name], batch_size=2), Precision(), perceptual)
                  for name in ("original-kl", "lhq128-kl", "lhq128-fast-kl")}
        compare(f"a step at 128 px, batch 2, fp32, {'LPIPS' if perceptual else 'no perceptual loss'}", {n: step_of(s) for n, s in stages.items()}, turns=3)


def classic(folder):
    "2. The same network twice."
    data = prepare("synthetic", folder / "data64", 64, limit=200, progress=False)
    model = AutoencoderConfig(z_channels=PRESETS["photos64-kl"].model.z_channels, ch=32, ch_mult=(1, 2, 4), num_groups=16)
    recipe = replace(PRESETS["photos64-kl"], model=model)
    ours, peer = AutoencoderStage(data, recipe), theirs(32, 64, 128)(data, recipe)
    peer.autoencoder.model.net.load_state_dict(diffusers_state_dict(ours.autoencoder.model))
    x = ours.batch(0)
    with torch.no_grad():
        models = [stage.autoencoder.model for stage in (ours, peer)]
        both = [model.decode_latent(model.latent(model.encode(x))[0]) for model in models]
    print(f"largest difference of the two reconstructions: {(both[0] - both[1]).abs().max():.1e}")
    compare("a step at 64 px, batch 8, fp32, patch=1", {"diffusers AutoencoderKL": step_of(peer), "ours": step_of(ours)}, turns=25)


def overhead(folder):
    "3. What the care costs: 25 steps with one check-up and one record, against 25 bare ones."
    data = prepare("synthetic", folder / "data64", 64, limit=200, progress=False)
    for name in ("photos64-kl", "photos64-vq"):
        bare, careful = AutoencoderStage(data, PRESETS[name]), AutoencoderStage(data, PRESETS[name])
        bare.autoencoder.ema.update_parameters = lambda model: None
        if hasattr(bare.autoencoder, "usage"):
            bare.autoencoder.usage.update = lambda counts: None
        log = MetricsLogger(Run.open(folder / name, {}), careful, every=25, samples=0)

        def bare_steps(turn):
            for i in range(1, 25):
                bare.train_step(25 * turn + i, LATE)
            bare.train_step(25 * turn + 1, LATE)

        def careful_steps(turn):
            for i in range(25):
                log.means.add(careful.train_step(25 * turn + i, LATE))
            log.record(Tick(25 * turn, LATE, 0.0))

        times = compare(f"25 steps of {name}, batch 8", {"with diagnostics, EMA and records": careful_steps, "bare": bare_steps}, turns=3)
        print(f"  the care costs {times['with diagnostics, EMA and records'] / times['bare'] - 1:.1%}")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        for part in (presets, classic, overhead):
            part(Path(folder))
