"""Trains a small stage again and again, each time in a fork, and kills it with `kill -9` at random moments.

`python tests/campaigns/kills.py DATA FOLDER SEED KILLS` leaves the runs `whole-...` (never interrupted) and `killed-...` in FOLDER, and
prints counts as JSON.
"""
import json
import mmap
import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from tqdm.auto import tqdm

from image_diffusion import fitting
from image_diffusion.data import load_prepared
from image_diffusion.latents import cache_latents
from image_diffusion.runs import Run
from image_diffusion.train_autoencoder import PRESETS, AutoencoderStage, load_autoencoder
from image_diffusion.train_diffusion import DiffusionRecipe, DiffusionStage, sample_strip
from image_diffusion.fitting import fit
from image_diffusion.training import Budget
from image_diffusion.unet import UNetConfig

STEPS_PER_KILL = 5
import_module("image_diffusion.train_diffusion").sample_strip = partial(sample_strip, steps=2)   # few, as sampling is most of the time
tqdm.set_lock(threading.RLock())   # a life that is killed with tqdm's own lock, which forks share, would keep it forever
SHARED = mmap.mmap(-1, 2)    # of a life and the process that kills it: steps of this life, and whether it is saving
TINY = PRESETS["tiny-vq"]
AUTOENCODER = replace(TINY, model=replace(TINY.model, ch=8, num_groups=4, codebook_size=32), batch_size=2, warmup_steps=10,
                      disc=replace(TINY.disc, ch=8, start=0.3, warmup=0.1, ramp=0.2, lecam_weight=0.1))
PRIOR = DiffusionRecipe(UNetConfig(size=8, ch=8, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), num_groups=4),
                        batch_size=4, warmup_steps=10, ema_decay=0.99)


def autoencoder_stage(data, folder):
    "A VQ autoencoder with a discriminator, and gradient scalers that move."
    stage = AutoencoderStage(data, AUTOENCODER)
    for trainer, interval in ((stage.autoencoder, 7), (stage.disc, 11)):
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=interval)
    return stage


def prior_stage(data, folder):
    "A prior on the latents of the autoencoder that was never interrupted."
    autoencoder = load_autoencoder(folder / "whole-autoencoder")
    latents = cache_latents(autoencoder, data, folder / "latents")
    recipe = replace(PRIOR, model=replace(PRIOR.model, in_ch=latents.shape[0], size=latents.shape[1], num_classes=data.num_classes))
    return DiffusionStage(latents, recipe, autoencoder, data.classes)


STAGES = {"autoencoder": autoencoder_stage, "prior": prior_stage}


def live(stage, folder, steps):
    "Train to the end, or until killed, with a checkpoint after each step; tell the killer where we are."
    save, train_step = fitting.save_checkpoint, stage.train_step
    def told_save(*words):
        SHARED[1] = 1
        path = save(*words)
        SHARED[1] = 0
        return path
    def told_step(step, progress):
        SHARED[0] += 1
        return train_step(step, progress)
    fitting.save_checkpoint, stage.train_step = told_save, told_step
    fit(stage, Run.open(folder, {}), Budget(steps=steps), save_every_minutes=0.0, log_every=5, samples=3)


def wait_for(true, child):
    "Wait for something that a life does; False if it ended before."
    while not true():
        if os.waitpid(child, os.WNOHANG)[0]: return False
        time.sleep(0.0005)
    return True


def one_life(stage, folder, steps, in_save, chance):
    "Fork a life, which has a stage of its own, and kill it; returns what it was doing: 'saving', 'training', or 'finished'."
    SHARED[0] = SHARED[1] = 0
    child = os.fork()
    if child == 0:
        code = 1
        try:
            live(stage, folder, steps)
            code = 0
        finally:
            os._exit(code)
    least = chance.randint(1, STEPS_PER_KILL - 1)
    if not (wait_for(lambda: SHARED[0] >= least, child) and (not in_save or wait_for(lambda: SHARED[1], child))):
        return "finished"
    time.sleep(chance.uniform(0, 0.004 if in_save else 0.04))
    saving = SHARED[1]
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "saving" if saving else "training"


def main(data, folder, seed, kills):
    "Both stages: once without interruption, once killed `kills` times."
    steps = STEPS_PER_KILL * int(kills)
    torch.set_num_threads(1)
    data, folder, chance, counts = load_prepared(data), Path(folder), random.Random(int(seed)), {}
    sys.stderr = open(os.devnull, "w")                                            # progress bars
    for name, make in STAGES.items():
        run = Run.open(folder / f"whole-{name}", {})
        fit(make(data, folder), run, Budget(steps=steps), save_every_minutes=1000, log_every=5, samples=3)
        stage = make(data, folder)
        ends = [one_life(stage, folder / f"killed-{name}", steps, k % 5 < 2, chance) for k in range(int(kills))]
        live(stage, folder / f"killed-{name}", steps)                                # undisturbed at last
        counts[name] = {end: ends.count(end) for end in ("saving", "training", "finished")}
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
