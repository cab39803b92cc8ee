"""How long does a training step of stage 2 take, beside its peers, and what does guidance cost?

    python tests/benchmarks/stage2_step.py --threads 2 --rounds 5 --batch 2

Prints medians of ratios within a round, turns taken in one process on the CPU (forwards and backwards in alternate rounds, so that
the load of the machine cancels), on random latents:
1. a full step (forward, backward, AdamW) of `lhq128`'s network against diffusers' `UNet2DModel` with the same weights, and against the
   graph of the baseline jklimmek/image-diffusion with as many parameters (one skip per level, attention written out at 32x32, additive time);
2. sampling with `photos64`'s network, 20 steps of DPM-Solver++(2M): guidance everywhere and inside an interval against none;
3. with `--grid`: 27 guided images by the default settings against the baseline's way, 1,000 steps of DDPM with a pass with and a
   pass without the class at each, on the same network of `photos64`; one round, which takes minutes.
"""
import argparse
import math
from dataclasses import replace
from functools import partial
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import nn

from image_diffusion.autoencoder import count_macs, count_parameters
from image_diffusion.blocks import Downsample, ResBlock, Upsample, group_norm
from image_diffusion.diffusion import Denoiser, sigma_range
from image_diffusion.guidance import guided
from image_diffusion.sampling import SAMPLERS, log_snr_sigmas, sample_dpmpp_2m, sample_noise, sigma_schedule, step_noise
from image_diffusion.train_diffusion import PRESETS, sample_latents
from image_diffusion.unet import UNet, diffusers_config, diffusers_state_dict, noise_embedding

CLASSES = 3
WIDTHS = (160, 304, 576)        # of the baseline's graph: as many parameters as ours, and within 2% of its 11.4 GMAC
INTERVALS = {"everywhere": (0.0, math.inf), "0.1 to 10": (0.1, 10.0), "0.3 to 5": (0.3, 5.0), "0.2 to 3": (0.2, 3.0)}
STEPS, GUIDANCE, SIGMA_MIN, SIGMA_MAX = 20, 2.0, 0.01, 80.0


class WrittenOutAttention(nn.Module):
    "Self-attention of 8 heads that writes down its (H*W)**2 weights."
    def __init__(self, ch, heads=8):
        super().__init__()
        self.heads, self.norm, self.qkv, self.out = heads, group_norm(ch, 16), nn.Linear(ch, 3 * ch), nn.Linear(ch, ch)

    def forward(self, x):
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x).flatten(2).transpose(1, 2))                              # (B, H*W, 3*ch)
        q, k, v = qkv.reshape(b, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)            # each (B, heads, H*W, ch/heads)
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)                   # (B, heads, H*W, H*W)
        y = self.out((weights @ v).transpose(1, 2).reshape(b, h * w, c))                     # (B, H*W, ch)
        return x + y.transpose(1, 2).reshape(b, c, h, w)


class Level(nn.Module):
    "Two rounds of residual block (time is added) and attention."
    def __init__(self, in_ch, ch, emb_ch):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c, ch, emb_ch, num_groups=16, scale_shift=False) for c in (in_ch, ch))
        self.attn = nn.ModuleList(WrittenOutAttention(ch) for _ in range(2))

    def forward(self, x, emb):
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x, emb))
        return x


class Baseline(nn.Module):
    "The baseline's graph: three levels, one skip for each."
    def __init__(self, widths=WIDTHS, in_ch=3, classes=CLASSES):
        super().__init__()
        a, b, c = widths
        self.ch, emb_ch = a, 4 * a
        self.emb = nn.Sequential(nn.Linear(a, emb_ch), nn.SiLU(), nn.Linear(emb_ch, emb_ch))
        self.class_emb, self.conv_in = nn.Embedding(classes + 1, emb_ch), nn.Conv2d(in_ch, a, 3, padding=1)
        self.down = nn.ModuleList([Level(a, a, emb_ch), Level(a, b, emb_ch), Level(b, c, emb_ch)])
        self.halve, self.mid = nn.ModuleList([Downsample(a), Downsample(b)]), Level(c, c, emb_ch)
        self.up = nn.ModuleList([Level(c + c, c, emb_ch), Level(c + b, b, emb_ch), Level(b + a, a, emb_ch)])
        self.grow = nn.ModuleList([Upsample(c), Upsample(b)])
        self.norm_out, self.conv_out = group_norm(a, 16), nn.Conv2d(a, in_ch, 3, padding=1)

    def forward(self, x, c_noise, label=None):
        label = torch.full(c_noise.shape, -1) if label is None else label
        emb = self.emb(noise_embedding(c_noise, self.ch)) + self.class_emb(label % self.class_emb.num_embeddings)
        h, skips = self.conv_in(x), []
        for level, halve in zip(self.down, [*self.halve, nn.Identity()]):
            h = level(h, emb)
            skips.append(h)
            h = halve(h)
        h = self.mid(h, emb)
        for level, grow in zip(self.up, [*self.grow, nn.Identity()]):
            h = grow(level(torch.cat([h, skips.pop()], dim=1), emb))
        return self.conv_out(F.silu(self.norm_out(h)))                                       # (B, in_ch, H, W)


def compare(actions, rounds):
    "For each action the median of its seconds, and of its share of the first one's in the same round, after one round to warm up."
    times = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name in list(actions)[::1 if turn % 2 else -1]:
            start = perf_counter()
            actions[name]()
            times[name].append(perf_counter() - start)
    base = next(iter(times.values()))[1:]
    return {name: (median(t[1:]), median(mine / first for mine, first in zip(t[1:], base))) for name, t in times.items()}


def step_of(net, x, c_noise, label):
    "A full training step of one network."
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-4)

    def step():
        output = net(x, c_noise, label)
        loss = (getattr(output, "sample", output) - x).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def unfold_zeros(net):
    "Random weights instead of the zeros a network starts from, so that a comparison of outputs means something."
    for p in net.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.02)


def training(args):
    "1. A step of three networks."
    config = replace(PRESETS["lhq128"].model, num_classes=CLASSES)
    ours, theirs, baseline = UNet(config), UNet2DModel(**diffusers_config(config)), Baseline()
    unfold_zeros(ours)
    theirs.load_state_dict(diffusers_state_dict(ours))
    x, c_noise, label = torch.randn(args.batch, 3, config.size, config.size), torch.rand(args.batch) * 1000, torch.arange(args.batch) % CLASSES
    with torch.no_grad():
        difference = (ours.eval()(x, c_noise, label) - theirs.eval()(x, c_noise, label).sample).abs().max()
    print(f"largest difference between ours and diffusers': {difference:.1e}")
    nets = {"ours, lhq128": ours, "diffusers UNet2DModel": theirs, "the baseline's graph": baseline}
    inputs = torch.zeros(1, dtype=torch.long)
    for name, net in nets.items():
        macs = count_macs(lambda x, c_noise, net=net: net(x, c_noise, inputs), (1, 3, config.size, config.size), (1,))
        print(f"  {name:28s} {count_parameters(net) / 1e6:6.2f} M parameters, {macs / 1e9:5.2f} GMAC")
    times = compare({name: step_of(net, x, c_noise, label) for name, net in nets.items()}, args.rounds)
    print(f"a training step, batch {args.batch}, fp32")
    for name, (t, ratio) in times.items():
        print(f"  {name:28s} {t:8.2f} s   ours is {ratio:5.2f} times as fast", flush=True)


def guidance(args):
    "2. Sampling with and without guidance."
    config = replace(PRESETS["photos64"].model, num_classes=CLASSES)
    denoiser = Denoiser(UNet(config)).eval()
    images = []                                                                              # seen by the network, call by call
    denoiser.net.register_forward_pre_hook(lambda net, inputs: images.append(len(inputs[0])))
    sigmas, label = log_snr_sigmas(STEPS, SIGMA_MIN, SIGMA_MAX), torch.arange(args.batch) % CLASSES
    start = sample_noise(0, range(args.batch), (3, config.size, config.size)) * sigmas[0]
    denoisers = {"no guidance": guided(denoiser, label, 1.0)}
    denoisers |= {name: guided(denoiser, label, GUIDANCE, interval) for name, interval in INTERVALS.items()}
    actions = {name: partial(sample_dpmpp_2m, denoise, start, sigmas) for name, denoise in denoisers.items()}
    seen = {}
    for name, action in actions.items():
        images.clear()
        action()
        seen[name] = sum(images)
    times = compare(actions, args.rounds)
    print(f"sampling with photos64's network, {STEPS} steps, batch {args.batch}, noise levels {SIGMA_MAX} to {SIGMA_MIN}")
    for name, (t, ratio) in times.items():
        counted = seen[name] / seen["no guidance"]
        print(f"  {name:28s} {t:8.2f} s   {counted:5.2f} times the evaluations, {ratio:5.2f} times the time", flush=True)


def grid(args):
    "3. Two ways to 27 guided images."
    config = replace(PRESETS["photos64"].model, num_classes=CLASSES)
    denoiser, labels, calls = Denoiser(UNet(config)).eval(), torch.arange(27) % CLASSES, []
    shape, levels = (config.in_ch, config.size, config.size), sigma_range("linear")
    denoiser.net.register_forward_pre_hook(lambda net, inputs: calls.append(len(inputs[0])))

    def two_passes(x, sigma):
        none, asked = denoiser(x, sigma, torch.full_like(labels, -1)), denoiser(x, sigma, labels)
        return none + GUIDANCE * (asked - none)

    def baseline():
        sigmas = sigma_schedule("log_snr", 1000, *levels)
        return SAMPLERS["ddpm"](two_passes, sample_noise(0, range(27), shape) * sigmas[0], sigmas, step_noise(0, range(27), shape))

    seconds, evaluations = {}, {}
    for name, draw in {"ours": lambda: sample_latents(denoiser, shape, labels, range(27)), "the baseline's way": baseline}.items():
        calls.clear()
        start = perf_counter()
        draw()
        seconds[name], evaluations[name] = perf_counter() - start, sum(calls) / 27
    print("27 guided latents with photos64's network")
    for name in seconds:
        print(f"  {name:28s} {seconds[name]:8.2f} s   {evaluations[name]:7.1f} evaluations a picture; ours needs {evaluations[name] / evaluations['ours']:.0f} times fewer, "
              f"and is {seconds[name] / seconds['ours']:.0f} times as fast", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant, after one to warm up")
    parser.add_argument("--batch", type=int, default=2, help="images in a step or a sampling")
    parser.add_argument("--grid", action="store_true", help="the third comparison alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds")
    torch.manual_seed(0)
    if args.grid:
        grid(args)
    else:
        training(args)
        guidance(args)
