"""The presets of both stages fit each other."""
from dataclasses import replace

import pytest
import torch
from conftest import type_in
from image_diffusion.autoencoder import count_macs, count_parameters, make_autoencoder
from image_diffusion.train_autoencoder import PRESETS as AUTOENCODERS
from image_diffusion.train_autoencoder import INIT_BATCHES, AutoencoderStage
from image_diffusion.train_diffusion import PRESETS as PRIORS


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("name", PRIORS)
def test_the_prior_draws_latents_of_the_size_that_the_autoencoder_makes(name, kind):
    autoencoder = AUTOENCODERS[f"{name}-{kind}"]
    assert autoencoder.size // autoencoder.model.factor == PRIORS[name].model.size


SIZES = {   # preset -> smallest and largest millions of weights, most GMAC per image, shape of a latent
    "lhq128": (36, 38, 45, (3, 32, 32)), "lhq128-fast": (0, 36, 16, (3, 32, 32)), "lhq128-f8": (36, 38, 45, (12, 16, 16)),
    "original": (36.2, 36.4, 103.7, (3, 32, 32)), "photos64": (0, 2, 1, (4, 16, 16)), "tiny": (0, 1, 1, (3, 16, 16))}


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("name", SIZES)
def test_the_networks_have_the_sizes_of_the_design(name, kind):
    recipe, (least, most, gmacs, shape) = AUTOENCODERS[f"{name}-{kind}"], SIZES[name]
    model = make_autoencoder(recipe.model).eval()
    image = (1, 3, recipe.size, recipe.size)
    assert least < count_parameters(model) / 1e6 < most
    assert count_parameters(model.decoder) > count_parameters(model.encoder) or name == "original"
    assert count_macs(model.reconstruct, image) / 1e9 <= gmacs
    with torch.no_grad():
        assert model.latent(model.encode(torch.zeros(image)))[0].shape == (1, *shape)


def test_every_preset_belongs_to_a_tested_family():
    assert {name.rpartition("-")[0] for name in AUTOENCODERS} == set(SIZES)


@pytest.mark.parametrize("name, texts", [("tiny", 3), ("lhq128-fast-kl", 1)])
def test_a_plan_says_weights_compute_memory_time_and_where(name, texts):
    result = type_in("plan", "--preset", name)
    assert result.exit_code == 0, result.output
    for word in ("weights ", "compute ", "memory ", "time "):
        assert sum(line.strip().startswith(word) for line in result.output.splitlines()) == texts
    assert ("on a T4" in result.output) == name.startswith("lhq128") and ("assumed" in result.output or "measured" in result.output)


def test_a_plan_for_an_unknown_preset_lists_the_known_ones():
    result = type_in("plan", "--preset", "huge")
    assert result.exit_code == 1 and "There is no preset 'huge'" in result.output and "lhq128-kl" in result.output


def test_the_autoencoder_starts_from_principal_components_where_the_preset_says_so(prepared):
    recipe = replace(AUTOENCODERS["tiny-kl"], model=replace(AUTOENCODERS["tiny-kl"].model, linear=True))
    initialized, bare = AutoencoderStage(prepared, recipe), AutoencoderStage(prepared, AUTOENCODERS["tiny-kl"])
    for stage in (initialized, bare):
        stage.autoencoder.initialize(torch.cat([stage.batch(step) for step in range(INIT_BATCHES)]))
        stage.autoencoder.ema.update_parameters(stage.autoencoder.model)
    assert initialized.evaluate()["dev_psnr"] > bare.evaluate()["dev_psnr"] + 8
