"""Distances against other people's code, and statistics in little memory."""
import subprocess
import sys
import warnings
from unittest.mock import patch

import numpy as np
import pytest
import torch
from cleanfid.fid import frechet_distance as cleanfid_distance
from cleanfid.fid import kernel_distance as cleanfid_kernel
from cleanfid.resize import build_resizer
from image_diffusion.data import prepare
from image_diffusion.landscapes import synthetic_landscapes
from image_diffusion.features import INCEPTION, InceptionFeatures, ModuleFeatures, RandomFeatures, as_uint8, resized
from image_diffusion.fid import FeatureStats, collect_samples, collect_stats, frechet_distance, kid, load_stats, photo_stats, prdc
from image_diffusion.files import UserError
from image_diffusion.perceptual import WeightsError, WeightsFile
from pytorch_fid.fid_score import calculate_frechet_distance as pytorch_fid_distance
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance


def clouds(n, dim, seed=0):
    "Two correlated clouds of vectors with a common shape, (n,dim) float64 each."
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=rng, dtype=torch.float64) / dim ** 0.5
    a, b = (torch.randn(n, dim, generator=rng, dtype=torch.float64) @ mix for _ in range(2))
    return a.relu(), (1.1 * b + 0.1).relu()            # like features behind a ReLU


def as_is(dim):
    "A network that hands vectors on, for torchmetrics."
    same = nn.Identity()
    same.num_features = dim
    return same


def torchmetrics_distance(a, b):
    metric = FrechetInceptionDistance(feature=as_is(a.shape[1]))
    metric.update(a, real=True)
    metric.update(b, real=False)
    return metric.compute().item()


def by_moments(distance):
    "A distance of two means and covariances as one of two clouds."
    return lambda a, b: distance(*(moment for f in (a, b) for moment in (f.mean(0).numpy(), torch.cov(f.T).numpy())))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("n, dim, tolerance", [(1000, 64, 1e-6), (600, 256, 1e-6), (50, 64, 1e-4), (100, 256, 1e-4)])
@pytest.mark.parametrize("theirs", [by_moments(pytorch_fid_distance), by_moments(cleanfid_distance), torchmetrics_distance], ids=["pytorch-fid", "clean-fid", "torchmetrics"])
def test_the_distance_is_that_of_other_libraries(n, dim, tolerance, theirs):
    a, b = clouds(n, dim)
    ours = frechet_distance(FeatureStats(dim).update(a), FeatureStats(dim).update(b))
    assert abs(ours / theirs(a, b) - 1) < tolerance
    stats = FeatureStats(dim).update(a)
    assert frechet_distance(stats, stats) < 1e-9 * ours                              # the same set: zero


def test_the_kernel_distance_is_that_of_other_libraries():
    a, b = clouds(200, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = KernelInceptionDistance(feature=as_is(64), subsets=1, subset_size=200)
    metric.update(a, real=True)
    metric.update(b, real=False)
    value, error = kid(a, b)
    assert value == pytest.approx(metric.compute()[0].item(), rel=1e-9) and error > 0
    assert value == pytest.approx(cleanfid_kernel(a.numpy(), b.numpy(), num_subsets=1, max_subset_size=200), rel=1e-6)


def test_precision_and_recall_are_those_of_torch_fidelity():
    real, new = clouds(150, 8)
    shares, theirs = prdc(new, real), calculate_precision_recall_full(new, real, neighborhood=3)
    assert [shares["precision"], shares["recall"]] == pytest.approx([float(share) for share in theirs[:2]])


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    "torch-fidelity's Inception with seeded random weights, and a file of them."
    torch.manual_seed(0)
    with patch("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"), patch.object(nn.Module, "load_state_dict"):
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("weights") / INCEPTION.cache_path().name
    torch.save(net.state_dict(), path)
    return net, path


def test_inception_gives_torch_fidelitys_features(untrained):
    net, path = untrained
    images = torch.from_numpy(synthetic_landscapes(range(1), 64)[0])
    any_file = WeightsFile(INCEPTION.what, INCEPTION.url, "", INCEPTION.env, INCEPTION.megabytes)
    legacy, clean = (InceptionFeatures(path, resize, any_file) for resize in ("legacy", "clean"))
    wanted = net(images.permute(0, 3, 1, 2))[0]
    torch.testing.assert_close(legacy(images), wanted, atol=1e-4, rtol=1e-4)
    resize = build_resizer("clean")                                                  # clean-fid's own, then torch-fidelity's network without a resize of its own
    small = torch.from_numpy(np.stack([resize(image) for image in images.numpy()])).permute(0, 3, 1, 2)
    with patch("torch_fidelity.feature_extractor_inceptionv3.vassert"):
        torch.testing.assert_close(clean(images), net(small)[0], atol=1e-4, rtol=1e-4)
    assert legacy.detail != clean.detail and (legacy(images) - clean(images)).abs().max() > 0.01


def test_without_weights_the_sentence_says_where_to_put_them():
    with pytest.raises(WeightsError, match=r"download https://\S+ \(96 MB\) and put it at \S+inception\S+, or name the file in \$IMAGE_DIFFUSION_INCEPTION"):
        InceptionFeatures()


@pytest.mark.parametrize("size", [(48, 64), (700, 500)])
def test_clean_resizing_is_clean_fids(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    ours = resized(torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), 299, "clean")
    np.testing.assert_allclose(ours[0].permute(1, 2, 0), build_resizer("clean")(pixels), atol=0.02)


@pytest.mark.parametrize("wrong, words", [
    (torch.rand(16, 3, 8, 8), r"in \[0,1\]"), (torch.rand(2, 3, 8, 8) * 255, r"not in \[-1,1\]"), (torch.full((2, 3, 8, 8), torch.nan), "nan"),
    (torch.zeros(2, 8, 8, 3), "float"), (np.zeros((2, 8, 8, 1), np.uint8), "uint8")], ids=["unit", "bytes as floats", "nan", "channels last", "gray"])
def test_wrong_pictures_are_told(wrong, words):
    with pytest.raises(UserError, match=words):
        as_uint8(wrong)


@pytest.mark.parametrize("wrong, words", [(torch.zeros(4, 8, dtype=torch.float16), "half precision"), (torch.zeros(4, 8, dtype=torch.bfloat16), "half precision"),
                                          (torch.full((4, 8), torch.inf), "nan or infinite"), (torch.zeros(4, 7), r"\(B,8\)"), (torch.zeros(8), r"\(B,8\)")])
def test_wrong_features_are_told(wrong, words):
    with pytest.raises(UserError, match=words):
        FeatureStats(8).update(wrong)


def test_too_few_and_unlike_statistics_are_told():
    one, ten = FeatureStats(8).update(torch.zeros(1, 8)), FeatureStats(8).update(torch.randn(10, 8))
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(one, ten)
    with pytest.raises(UserError, match="cannot be compared"):
        frechet_distance(ten, FeatureStats(9).update(torch.randn(10, 9)))


MEMORY = r"""
import re, torch
from image_diffusion.fid import FeatureStats
rng, kilobytes = torch.Generator().manual_seed(0), lambda name: int(re.search(name + r":\s+(\d+)", open("/proc/self/status").read())[1])
before, peak = kilobytes("VmRSS"), lambda: kilobytes("VmHWM")       # not ru_maxrss, which begins with that of the parent
stats, peaks = FeatureStats(2048), []
for batch in range(30):
    stats.update(torch.randn(64, 2048, generator=rng))
    peaks.append(peak() - before)
stats.update(torch.randn(2**12, 2048, generator=rng))          # a batch that is large in itself: 32 MB, and no copy of it all in float64
print(peaks[9], peaks[-1], peak() - before)
"""


def test_statistics_stream_in_little_memory():
    "The whole of 50,000 vectors is in tests/benchmarks/fid.py; a tenth of it tells whether memory grows."
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    early, late, large = (int(kilobytes) / 1024 for kilobytes in done.stdout.split())
    assert late < 400 and late - early < 20 and large < 500


def test_reference_statistics_are_refused_if_anything_differs(prepared, tmp_path):
    data = prepare("synthetic", tmp_path / "data", 32, limit=40, progress=False)
    features = RandomFeatures()
    first, again = photo_stats(data, "train", features), photo_stats(data, "train", features)
    path, = (tmp_path / "data/stats").iterdir()
    assert torch.equal(first.cov, again.cov) and torch.equal(first.features, again.features)
    for other in (photo_stats(data, "dev", features), photo_stats(data, "train", features, 20), photo_stats(data, "train", RandomFeatures(1))):
        assert not torch.equal(other.mean, first.mean)
    theirs, = (p for p in (tmp_path / "data/stats").iterdir() if load_stats(p).num_images == len(data.dev))
    path.unlink()
    theirs.rename(path)                                                              # another's statistics under the name of ours
    with pytest.raises(UserError, match="was made from"):
        photo_stats(data, "train", features)


def test_samples_are_drawn_once_though_the_process_dies(tmp_path):
    images, drawn = synthetic_landscapes(range(60), 32)[0], []

    def sample(indices):
        drawn.extend(indices)
        if len(drawn) == 40:
            raise MemoryError
        return images[indices.start:indices.stop]
    networks = [ModuleFeatures(nn.Conv2d(3, 4, 3), "FD-conv", 16), RandomFeatures()]
    collect = lambda: collect_samples(sample, 60, networks, tmp_path / "part.npz", {"seed": 0}, batch_size=10, save_every=10)
    with pytest.raises(MemoryError):
        collect()
    stats = collect()["FD-random"]
    assert len(drawn) == 70 and frechet_distance(stats, collect_stats(images, RandomFeatures())) < 1e-6
