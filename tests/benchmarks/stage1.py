"""Which autoencoder is better after the same minutes on the same photos?

    python tests/benchmarks/stage1.py photos.zip --minutes 45 kl original diffusers

Each variant is trained for the same minutes from the same seed, one after the other, and measured on the held-out photos: PSNR, SSIM,
FD-lite0 of the reconstructions, codes used. With `--one-core` each trains on one core and for minutes of that core's time, whatever else
the machine does; two such runs can go side by side. `--seed 1` is another draw of weights and order. Without names it lists the variants.
"""
import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from image_diffusion import training
from image_diffusion.autoencoder import count_parameters, make_autoencoder
from image_diffusion.bottleneck import GaussianBottleneck
from image_diffusion.data import load_batch, load_prepared, prepare, to_bytes
from image_diffusion.features import Lite0Features, in_batches
from image_diffusion.fid import collect_stats, frechet_distance
from image_diffusion.perceptual import FeatureDistance, load_lite0
from image_diffusion.runs import Run, load_checkpoint
from image_diffusion.train_autoencoder import PRESETS, AutoencoderStage, reconstruct
from image_diffusion.ema import make_ema
from image_diffusion.fitting import fit
from image_diffusion.training import Budget, Precision

KL, VQ, BASELINE = PRESETS["photos64-kl"], PRESETS["photos64-vq"], PRESETS["original-kl"]
F8 = replace(KL, model=replace(KL.model, z_channels=4 * KL.model.z_channels, patch=8, ch=192, ch_mult=(1,), enc_blocks=2, dec_blocks=3))
WIDE = replace(KL, model=replace(KL.model, ch=64, enc_blocks=2, dec_blocks=3))
PIXELS = dict(perceptual_weight=0.0, disc=replace(KL.disc, weight=0.0))      # only L1 and MSE


def baseline_recipe(z_channels=KL.model.z_channels):
    "The baseline's network, channels 1:2:3, at 64 px and with about the parameters of photos64; its losses, lr and batch."
    model = replace(BASELINE.model, ch=32, num_groups=8, z_channels=z_channels)
    wanted = count_parameters(make_autoencoder(KL.model))
    model = min((replace(model, ch=ch) for ch in range(16, 129, 8)), key=lambda m: abs(count_parameters(make_autoencoder(m)) - wanted))
    return replace(BASELINE, model=model, size=KL.size, kl_weight=5e-6 * z_channels * (KL.size // 4) ** 2)


class Theirs(nn.Module):
    "diffusers' AutoencoderKL behind the methods that a stage calls."
    def __init__(self, channels):
        super().__init__()
        from diffusers import AutoencoderKL
        levels = len(channels)
        self.net = AutoencoderKL(3, 3, ("DownEncoderBlock2D",) * levels, ("UpDecoderBlock2D",) * levels, channels, 2, "silu",
                                 KL.model.z_channels, norm_num_groups=16)
        self.bottleneck = GaussianBottleneck(KL.model.z_channels)

    @property
    def last_layer(self):
        return self.net.decoder.conv_out.weight

    def initialize(self, x): pass                                          # it has neither principal components nor codes
    def encode(self, x): return self.net.quant_conv(self.net.encoder(x))
    def decode(self, z): return self.net.decoder(self.net.post_quant_conv(z))
    def latent(self, h): return self.bottleneck.latent(h)
    def decode_latent(self, z): return self.decode(z)


class TheirStage(AutoencoderStage):
    "Our losses and steps around diffusers' network."
    channels = None

    def __init__(self, *args):
        super().__init__(*args)
        torch.manual_seed(self.recipe.seed)
        model = self.precision.place(Theirs(self.channels)).train()
        self.autoencoder.model, self.autoencoder.ema = model, make_ema(model, self.recipe.ema_decay)
        self.autoencoder.optimizer = torch.optim.AdamW(model.parameters(), lr=self.recipe.lr, betas=(0.9, 0.99), weight_decay=0.0)


def theirs(*channels):
    return type("TheirStage", (TheirStage,), {"channels": channels})


VARIANTS = {   # name -> (recipe, stage)
    "kl": (KL, AutoencoderStage), "vq": (VQ, AutoencoderStage), "original": (baseline_recipe(), AutoencoderStage),
    "f8": (F8, AutoencoderStage), "f8-pixels": (replace(F8, **PIXELS), AutoencoderStage),
    "f8-lr0.0007": (replace(F8, lr=7e-4), AutoencoderStage), "wide": (WIDE, AutoencoderStage),
    "kl-early": (replace(VQ, model=KL.model), AutoencoderStage), "vq-late": (replace(KL, model=VQ.model), AutoencoderStage),   # each with the other's losses
    **{f"kl-features{weight}": (replace(KL, perceptual_weight=weight, perceptual_start=0.25), AutoencoderStage) for weight in (2.0, 4.0)},
    "kl-disc0.5": (replace(KL, disc=replace(KL.disc, weight=0.5, start=0.6)), AutoencoderStage),
    "kl-equivariance0.25": (replace(KL, equivariance=0.25), AutoencoderStage),
    "kl-batch4": (replace(KL, batch_size=4), AutoencoderStage),
    "kl-pixels": (replace(KL, **PIXELS), AutoencoderStage), "vq-pixels": (replace(VQ, **PIXELS), AutoencoderStage),
    **{f"diffusers-{ch}": (KL, theirs(ch, 2 * ch, 4 * ch)) for ch in (16, 32, 64)},
    **{f"diffusers-{ch}-pixels": (replace(KL, **PIXELS), theirs(ch, 2 * ch, 4 * ch)) for ch in (16, 32, 64)},
    **{f"diffusers-{ch}-pixels-lr{lr}": (replace(KL, **PIXELS, lr=lr), theirs(ch, 2 * ch, 4 * ch)) for ch in (16, 32, 64) for lr in (5e-4, 1e-3)},
}


def measure(stage, data):
    "PSNR, SSIM, codes, and the Frechet distance of dev reconstructions to the dev photos."
    numbers, features, images = stage.evaluate(), Lite0Features(), []
    for rows in torch.as_tensor(data.dev).split(64):
        x = load_batch(data.images, rows.numpy(), stage.precision.device)
        images.append(to_bytes(reconstruct(stage.autoencoder.ema.module, x, stage.precision)[0]).numpy())
    reference = collect_stats(in_batches(data.images, data.dev), features)
    return numbers | {"rFD-lite0": frechet_distance(collect_stats(images, features), reference)}


def train(name, data, minutes, seed, out):
    "Train one variant as a run in out/name, which resumes when the command is run again, and print its numbers as a line of JSON."
    recipe, stage_class = VARIANTS[name]
    recipe, name = replace(recipe, seed=seed), f"{name}-seed{seed}" if seed else name
    perceptual = FeatureDistance(load_lite0()) if recipe.perceptual_weight else None
    stage = stage_class(data, recipe, Precision.pick(), perceptual, "lite0" if perceptual else None)
    run = Run.open(out / name, {"stage": "autoencoder", "preset": name, "recipe": asdict(recipe), "minutes": minutes, "data": data.manifest["sha256"]})
    finished = fit(stage, run, Budget(minutes=minutes), name)
    stage.load_state_dict(load_checkpoint(run)["stage"])      # where the run was finished before, too
    facts = {"name": name, "parameters": count_parameters(stage.autoencoder.model), "minutes": minutes, "threads": torch.get_num_threads(), "seed": recipe.seed,
             "precision": str(stage.precision.dtype), "steps": finished["step"], "images": finished["step"] * recipe.batch_size, "lr": recipe.lr}
    print(json.dumps(facts | {key: round(value, 4) for key, value in measure(stage, data).items()}), flush=True)


def on_one_core():
    "One thread, and this process's own time as the clock of `training_loop`."
    torch.set_num_threads(1)
    training.time = SimpleNamespace(monotonic=time.process_time, perf_counter=time.perf_counter)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="photos: anything that `image_diffusion prepare` takes")
    parser.add_argument("names", nargs="*", help="variants")
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--one-core", action="store_true", help="one thread, and minutes of processor time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/stage1"), help="prepared photos, and a run folder for each variant")
    args = parser.parse_intermixed_args()
    if not args.names or set(args.names) - set(VARIANTS):
        sys.exit("variants: " + ", ".join(VARIANTS))
    if args.one_core:
        on_one_core()
    folder = args.out / f"data{KL.size}"
    data = load_prepared(folder) if folder.exists() else prepare(args.source, folder, KL.size)
    for name in args.names:
        train(name, data, args.minutes, args.seed, args.out)


if __name__ == "__main__":
    main()
