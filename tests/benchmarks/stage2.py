"""Which prior is better after the same minutes on the same latents?

    python tests/benchmarks/stage2.py data/photos64 runs/kl --minutes 60 ours baseline

Each variant is trained for the same minutes from the same seed on the latents of one autoencoder, one after the other, and draws the same
number of samples (classes in the proportions of the train split, EMA weights, DPM-Solver++(2M), 20 evaluations, guidance 2 or `--guidance`), which are
compared with the dev photos: FD-lite0, FD-random, KID, and class accuracy. With `--one-core` each trains on one core and for minutes
of that core's time, whatever else the machine does. The same command again resumes. Without names it lists the variants.
"""
import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from stage1 import on_one_core
from stage2_step import Baseline

from image_diffusion.autoencoder import count_parameters
from image_diffusion.data import load_prepared, to_bytes
from image_diffusion.diffusion import Denoiser, sigma_range
from image_diffusion.features import Lite0Features, RandomFeatures, in_batches
from image_diffusion.fid import collect_stats, frechet_distance, kid, photo_stats
from image_diffusion.evaluate import class_accuracy
from image_diffusion.generate import LatentDiffusion, class_grid, generate, labels_of
from image_diffusion.latents import cache_latents
from image_diffusion.plots import save_png
from image_diffusion.runs import Run, load_checkpoint
from image_diffusion.train_autoencoder import load_autoencoder
from image_diffusion.train_diffusion import PRESETS, DiffusionStage
from image_diffusion.ema import make_ema
from image_diffusion.fitting import fit
from image_diffusion.training import Budget, Precision
from image_diffusion.unet import UNet

OURS = PRESETS["photos64"]
BASELINE = replace(PRESETS["original"], model=OURS.model, batch_size=OURS.batch_size, power_emas=())
TINY = PRESETS["tiny"]                                                              # for the demo's data and autoencoder
WIDE = replace(TINY, model=replace(TINY.model, ch=48, head_ch=48, num_groups=16))   # the demo's prior before
F8 = replace(OURS, model=replace(OURS.model, size=8, ch=128, ch_mult=(1, 2)))       # for an f = 8 autoencoder's latents; a step costs 0.8 of ours


class BaselineStage(DiffusionStage):
    "Our steps around the baseline's network, of about as many parameters as ours."
    def __init__(self, latents, recipe, *args):
        super().__init__(latents, recipe, *args)
        torch.manual_seed(recipe.seed)
        wanted = count_parameters(UNet(recipe.model))
        nets = (Baseline((a, 16 * round(1.9 * a / 16), 16 * round(3.6 * a / 16)), latents.shape[0], max(1, len(self.classes))) for a in range(32, 161, 16))
        net = min(nets, key=lambda net: abs(count_parameters(net) - wanted))
        denoiser = self.precision.place(Denoiser(net, recipe.parameterization)).train()
        self.prior.denoiser, self.prior.ema = denoiser, make_ema(denoiser, recipe.ema_decay)
        self.prior.optimizer = torch.optim.AdamW(denoiser.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01)


VARIANTS = {   # name -> (recipe, stage)
    "ours": (OURS, DiffusionStage),
    "baseline": (BASELINE, BaselineStage), "baseline-lr1e-3": (replace(BASELINE, lr=1e-3), BaselineStage),
    "eps-linear": (replace(OURS, parameterization="eps", noise_levels="linear", weighting="uniform"), DiffusionStage),
    "v-zero_snr": (replace(OURS, noise_levels="zero_snr"), DiffusionStage),
    "v-cosine-edm": (replace(OURS, weighting="edm"), DiffusionStage),
    "flow": (replace(OURS, parameterization="flow", noise_levels="flow", weighting="uniform"), DiffusionStage),
    "edm": (replace(OURS, parameterization="edm", noise_levels="lognormal", weighting="edm"), DiffusionStage),
    "x0-cosine": (replace(OURS, parameterization="x0"), DiffusionStage),
    "f8": (F8, DiffusionStage), "tiny": (TINY, DiffusionStage), "tiny-wide": (WIDE, DiffusionStage),
    **{f"ours-lr{lr:g}": (replace(OURS, lr=lr), DiffusionStage) for lr in (5e-4, 2e-3)},
    **{f"ours-batch{batch}": (replace(OURS, batch_size=batch), DiffusionStage) for batch in (16, 64)},
}


def as_prior(stage, recipe, step):
    "A model of a stage's EMA weights."
    return LatentDiffusion(stage.prior.ema.module.eval(), stage.scale, stage.autoencoder, stage.classes, stage.latents.shape,
                           *sigma_range(recipe.noise_levels), step, stage.precision)


def measure(prior, data, samples, guidance, seed=1):
    "The distances of samples to the dev photos, and their class accuracy."
    labels = labels_of(prior, data, np.random.default_rng(seed).choice(data.train, samples))
    images = to_bytes(generate(prior, labels, seed, guidance=guidance)).numpy()
    lite0 = Lite0Features()
    stats = {features.name: (collect_stats(in_batches(images), features, keep=True), photo_stats(data, "dev", features)) for features in (lite0, RandomFeatures())}
    distance, error = kid(*(side.features for side in stats["FD-lite0"]))
    return {"guidance": guidance, "samples": samples, **{name: frechet_distance(*sides) for name, sides in stats.items()}, "KID-lite0": distance, "KID-error": error,
            "class_accuracy": class_accuracy(stats["FD-lite0"][0].features, labels.cpu(), prior, data, lite0)["value"] if prior.classes else None}


def train(name, data, latents, autoencoder, minutes, samples, guidances, out):
    "Train one variant as a run in out/name, and print its numbers as a line of JSON for each guidance."
    recipe, stage_class = VARIANTS[name]
    recipe = replace(recipe, model=replace(recipe.model, in_ch=latents.shape[0], num_classes=data.num_classes))
    stage = stage_class(latents, recipe, autoencoder, data.classes, Precision.pick())
    run = Run.open(out / name, {"stage": "diffusion", "preset": name, "recipe": asdict(recipe), "minutes": minutes, "autoencoder": latents.autoencoder_sha256})
    finished = fit(stage, run, Budget(minutes=minutes), name)
    stage.load_state_dict(load_checkpoint(run)["stage"])      # where the run was finished before, too
    prior = as_prior(stage, recipe, finished["step"])
    save_png(class_grid(prior)[0], out / f"{name}.png", nrow=8)
    facts = {"name": name, "parameters": count_parameters(stage.prior.denoiser), "minutes": minutes, "threads": torch.get_num_threads(), "steps": finished["step"],
             "images": finished["step"] * recipe.batch_size, "lr": recipe.lr, "dev_loss": finished["dev_loss"]}
    for guidance in guidances:
        print(json.dumps(facts | measure(prior, data, samples, guidance)), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared photos, of 64 px for most variants")
    parser.add_argument("autoencoder", type=Path, help="run folder of a trained autoencoder")
    parser.add_argument("names", nargs="*", help="variants")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0], help="strengths, each measured (1 = none; photos without classes know no other)")
    parser.add_argument("--one-core", action="store_true", help="one thread, and minutes of processor time")
    parser.add_argument("--out", type=Path, default=Path("runs/stage2"), help="a run folder for each variant")
    args = parser.parse_intermixed_args()
    if not args.names or set(args.names) - set(VARIANTS):
        sys.exit("variants: " + ", ".join(VARIANTS))
    if args.one_core:
        on_one_core()
    data, autoencoder = load_prepared(args.data), load_autoencoder(args.autoencoder)
    latents = cache_latents(autoencoder, data)
    for name in args.names:
        train(name, data, latents, autoencoder, args.minutes, args.samples, args.guidance, args.out)


if __name__ == "__main__":
    main()
