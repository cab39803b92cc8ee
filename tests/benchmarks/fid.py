"""How long does a Frechet distance take beside pytorch-fid's, and how much memory do statistics of 50,000 pictures need?

    python tests/benchmarks/fid.py

Prints, for vectors of 2,048 numbers: the agreement with pytorch-fid, clean-fid and torchmetrics on the same vectors (more and fewer than 2,048 of them), the
ratio of pytorch-fid's time to ours (turns taken in one process), and the peak memory of streaming statistics beyond the process before them.
"""
import argparse
import resource
import warnings
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from cleanfid.fid import frechet_distance as cleanfid_distance
from pytorch_fid.fid_score import calculate_frechet_distance as pytorch_fid_distance
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from image_diffusion.fid import FeatureStats, frechet_distance

DIM = 2048


def resident():
    "Memory that the process has now, MB (Linux)."
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak():
    "Most memory that the process has had, MB."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stream(count, batch=64):
    "Statistics of so many random vectors, as they would come from a network."
    before, start, rng = resident(), perf_counter(), torch.Generator().manual_seed(0)
    stats = FeatureStats(DIM)
    for i in range(0, count, batch):
        stats.update(torch.randn(min(batch, count - i), DIM, generator=rng))
    print(f"streaming {count:,} x {DIM:,}: {peak() - before:.0f} MB beyond the process before, {perf_counter() - start:.0f} s", flush=True)


def clouds(count):
    "Two clouds of correlated vectors, like features behind a ReLU, (count,DIM) float64 each."
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(DIM, DIM, generator=rng, dtype=torch.float64) / DIM ** 0.5
    a, b = (torch.randn(count, DIM, generator=rng, dtype=torch.float64) @ mix for _ in range(2))
    return a.relu(), (1.1 * b + 0.1).relu()


def torchmetrics_distance(a, b):
    "torchmetrics' distance of vectors."
    same = nn.Identity()
    same.num_features = DIM
    metric = FrechetInceptionDistance(feature=same)
    metric.update(a, real=True)
    metric.update(b, real=False)
    return metric.compute().item()


def timed(action):
    "What an action returns, and how many seconds it took."
    start = perf_counter()
    return action(), perf_counter() - start


def compare(count, turns):
    "Agreement and time of distances on the same vectors."
    a, b = clouds(count)
    stats, moments = [FeatureStats(DIM).update(f) for f in (a, b)], [m for f in (a, b) for m in (f.mean(0).numpy(), torch.cov(f.T).numpy())]
    actions = {"ours": lambda: frechet_distance(*stats), "pytorch-fid": lambda: pytorch_fid_distance(*moments)}
    found = {name: [] for name in actions}
    for _ in range(turns):
        for name, action in actions.items():
            found[name].append(timed(action))
    found["clean-fid"], found["torchmetrics"] = [timed(lambda: cleanfid_distance(*moments))], [timed(lambda: torchmetrics_distance(a, b))]
    ours, times = found["ours"][0][0], {name: median(seconds for _, seconds in runs) for name, runs in found.items()}
    for name, runs in found.items():
        print(f"n = {count:,}  {name:12s} {runs[0][0]:.9f}  {times[name]:6.2f} s  relative difference to ours {abs(runs[0][0] / ours - 1):.0e}")
    print(f"n = {count:,}  pytorch-fid's time / ours: {times['pytorch-fid'] / times['ours']:.1f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000, help="vectors that are streamed")
    parser.add_argument("--turns", type=int, default=3, help="0: memory alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    stream(args.count)
    for count in (5000, 500) if args.turns else ():
        compare(count, args.turns)


if __name__ == "__main__":
    main()
