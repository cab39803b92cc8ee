"""The presets of both stages fit each other."""
import pytest
import torch
from image_diffusion.autoencoder import count_parameters, make_autoencoder
from image_diffusion.train_autoencoder import PRESETS as AUTOENCODERS
from image_diffusion.train_diffusion import PRESETS as PRIORS


@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("name", PRIORS)
def test_the_prior_draws_latents_of_the_size_that_the_autoencoder_makes(name, kind):
    autoencoder = AUTOENCODERS[f"{name}-{kind}"]
    assert autoencoder.size // autoencoder.model.factor == PRIORS[name].model.size


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_the_networks_of_lhq128_have_the_sizes_of_the_design(kind):
    recipe = AUTOENCODERS[f"lhq128-{kind}"]
    model = make_autoencoder(recipe.model).eval()
    x = torch.zeros(1, 3, 128, 128)
    with torch.no_grad():
        mean, _ = model.latent(model.encode(x))
        assert mean.shape == (1, 3, 32, 32) and model.reconstruct(x).shape == x.shape
    assert 36e6 < count_parameters(model) < 38e6
    assert count_parameters(model.decoder) > count_parameters(model.encoder)
