"""The step of stage 1: each loss reaches the parameters it is meant for and no others, broken steps harm nothing, every option acts."""
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from image_diffusion import fitting
from image_diffusion.runs import Run, load_checkpoint, read_metrics
from image_diffusion.train_autoencoder import PRESETS, AutoencoderStage
from image_diffusion.diagnostics import diagnose
from image_diffusion.fitting import fit
from image_diffusion.training import Budget, Precision

TINY = PRESETS["tiny-kl"]
SMALL = replace(TINY, model=replace(TINY.model, ch=16, codebook_size=32), batch_size=4, disc=replace(TINY.disc, ch=8))
NO_PIXELS = {"rec_loss": 0.0, "mse_loss": 0.0, "perceptual_loss": 0.0}


def make(data, bottleneck="kl", precision=Precision(), **changes):
    "A small stage whose optimizers are plain descent, so that a step shows the gradient."
    recipe = replace(SMALL, model=replace(SMALL.model, bottleneck=bottleneck), grad_clip=1e9, **changes)
    stage = AutoencoderStage(data, recipe, precision)
    for trainer, net in ((stage.autoencoder, stage.autoencoder.model), (stage.disc, stage.disc.net)):
        trainer.optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    return stage


def moved(module, action):
    "Which first parts of parameter names an action changes."
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    action()
    return {name.partition(".")[0] for name, p in module.named_parameters() if not torch.equal(p, before[name])}


def only(stage, **losses):
    "The stage's loss with only some terms: the gradients of the others become zero."
    def loss(*args):
        grads, numbers = stage.loss(*args)
        return {name: grad * losses.get(name, 0.0) for name, grad in grads.items()}, numbers
    return loss


EVERYWHERE = {"encoder", "quant_conv", "post_quant_conv", "decoder"}


@pytest.mark.parametrize("term", ["rec_loss", "mse_loss", "g_loss"])
def test_every_loss_moves_the_whole_autoencoder_and_not_the_discriminator(prepared, term):
    stage = make(prepared, kl_weight=0.0)
    step = lambda: stage.autoencoder.step(stage.batch(0), only(stage, **{term: 1.0}), gan_share=1.0)
    def step_moves_everything():
        assert moved(stage.autoencoder.model, step) == EVERYWHERE
    assert moved(stage.disc.net, step_moves_everything) == set()


@pytest.mark.parametrize("bottleneck", ["kl", "vq"])
def test_the_bottlenecks_loss_moves_the_encoder_alone(prepared, bottleneck):
    stage = make(prepared, bottleneck, kl_weight=1.0)
    assert moved(stage.autoencoder.model, lambda: stage.autoencoder.step(stage.batch(0), only(stage), 0.0)) == {"encoder", "quant_conv"}


def test_the_discriminators_loss_moves_the_discriminator_alone(prepared):
    stage, x = make(prepared), None
    x = stage.batch(0)
    x_rec = stage.autoencoder.forward(x)[1].detach()
    assert moved(stage.autoencoder.model, lambda: stage.disc.step(x, x_rec)) == set()
    assert moved(stage.disc.net, lambda: stage.disc.step(x, x_rec)) == {"layers"}


def test_nothing_leaks_from_one_step_into_the_other(prepared):
    clean, soiled = make(prepared), make(prepared)
    for p in [*soiled.autoencoder.model.parameters(), *soiled.disc.net.parameters()]:
        p.grad = torch.full_like(p, 1e3)
    for stage in (clean, soiled):
        torch.manual_seed(3)
        x, x_rec, _ = stage.autoencoder.step(stage.batch(0), stage.loss, 1.0, check=True)
        stage.disc.step(x, x_rec)
    for one, other in ((clean.autoencoder.model, soiled.autoencoder.model), (clean.disc.net, soiled.disc.net)):
        for a, b in zip(one.parameters(), other.parameters()):
            assert torch.equal(a, b) and a.grad is None and b.grad is None


def test_saturated_pixels_get_gradients(prepared):
    stage = make(prepared)
    bias = stage.autoencoder.model.decoder.conv_out.bias
    bias.data.fill_(3.0)                                     # every pixel is far beyond white
    _, x_rec, numbers = stage.autoencoder.step(stage.batch(0), stage.loss, 0.0, check=True)
    assert numbers["saturated"] == 1 and x_rec.min() > 1
    assert (bias < 3.0).all()


def test_ema_weights_are_what_is_evaluated_and_shared(prepared):
    stage = make(prepared)
    stage.train_step(0, 0.0)
    before = stage.evaluate()
    for p in stage.autoencoder.model.parameters():
        p.data.fill_(torch.nan)
    assert stage.evaluate() == before
    assert all(value.isfinite().all() for value in stage.snapshot()[0].values())


class Squares(torch.nn.Module):
    "A perceptual loss that needs no weights."
    def forward(self, x, y): return (x - y).square().mean((1, 2, 3))


@pytest.mark.parametrize("start", [0.5, 2], ids=["share", "step"])
def test_the_perceptual_loss_is_used_from_its_start_on(prepared, start):
    stage = AutoencoderStage(prepared, replace(SMALL, perceptual_weight=1.0, perceptual_start=start), perceptual=Squares())
    used = ["perceptual_loss" in stage.train_step(step, progress) for step, progress in enumerate((0.1, 0.4, 0.5, 0.9))]
    assert used == [False, False, True, True]


def nan_batches(stage, first):
    "Let a stage see broken images from a step on, unless it was rolled back."
    batch = stage.batch
    stage.batch = lambda step: batch(step) * (torch.nan if step >= first and not stage.rollbacks else 1.0)
    return stage


@pytest.mark.parametrize("bottleneck", ["kl", "vq", "vq-gradient", "fsq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_broken_batch_changes_nothing(prepared, bottleneck, dtype):
    stage = make(prepared, bottleneck, Precision("cpu", dtype), disc=replace(SMALL.disc, lecam_weight=0.1))
    for step in range(3):
        stage.train_step(step, 0.9)
    keep = {"model": stage.autoencoder.model, "ema": stage.autoencoder.ema, "disc": stage.disc.net, "lecam": stage.disc.lecam}
    before = {name: deepcopy(module.state_dict()) for name, module in keep.items()}
    numbers = nan_batches(stage, 3).train_step(3, 0.9)
    assert numbers["skipped"] == numbers["d_skipped"] == 1
    for name, module in keep.items():
        changed = [key for key, value in module.state_dict().items() if not torch.equal(value, before[name][key])]
        assert not changed, (name, changed)
    stage.rollbacks = 1
    assert all(torch.as_tensor(value).isfinite().all() for value in stage.train_step(4, 0.9).values())


def test_after_too_many_broken_steps_training_goes_back_to_the_checkpoint(prepared, tmp_path, monkeypatch, capsys):
    "From before the first checkpoint, and again and again: campaigns/test_numbers_go_wrong.py."
    monkeypatch.setattr(fitting, "MAX_SKIPPED_STEPS", 6)
    run = Run.open(tmp_path / "run", {})
    stage = nan_batches(AutoencoderStage(prepared, SMALL), 6)
    fit(stage, run, Budget(steps=4), save_every_minutes=0.0)
    (run.folder / "finished.json").unlink()
    fit(stage, run, Budget(steps=20), save_every_minutes=1000.0)
    assert "diverged at step 12: going back to step 4" in capsys.readouterr().out
    assert stage.rollbacks == 1 and load_checkpoint(run)["step"] == 20 and load_checkpoint(run)["stage"]["rollbacks"] == 1
    assert [r["step"] for r in read_metrics(run) if "grad_norm" in r][-1] == 20


@pytest.mark.parametrize("change", [dict(loss="bce"), dict(loss="ls"), dict(norm="spectral"), dict(lecam_weight=1.0), dict(r1_weight=1.0),
                                    dict(adaptive=False, weight=0.1), dict(lr_ratio=0.5)], ids=str)
def test_every_option_of_the_discriminator_acts(prepared, change):
    usual, other = (AutoencoderStage(prepared, replace(SMALL, disc=replace(SMALL.disc, **c))) for c in ({}, change))
    for step in range(3):
        numbers = [stage.train_step(step, 0.9) for stage in (usual, other)][1]
    assert all(torch.as_tensor(value).isfinite() for value in numbers.values()) and not numbers["skipped"] + numbers["d_skipped"]
    assert any(not torch.equal(a, b) for stages in [(usual.disc.net, other.disc.net), (usual.autoencoder.model, other.autoencoder.model)]
               for a, b in zip(stages[0].parameters(), stages[1].parameters()) if a.shape == b.shape)


def test_the_discriminator_starts_by_share_or_by_step_after_its_warmup(prepared):
    def used(disc, moments):
        stage = AutoencoderStage(prepared, replace(SMALL, disc=replace(SMALL.disc, **disc)))
        numbers = [stage.train_step(step, progress) for step, progress in moments]
        return ["g_loss" in n for n in numbers], ["d_loss" in n for n in numbers]
    shares = [(0, 0.5), (1, 0.72), (2, 0.9)]
    assert used(dict(start=0.75, warmup=0.05, ramp=0.0), shares) == ([False, False, True], [False, True, True])
    assert used(dict(start=2, warmup=1, ramp=0), shares) == ([False, False, True], [False, True, True])
    assert used(dict(weight=0.0), shares) == ([False] * 3, [False] * 3)


def test_half_size_steps_train_the_decoder_on_half_size_photos(prepared):
    stage = AutoencoderStage(prepared, replace(SMALL, equivariance=1.0))
    x, x_rec, *_ = stage.autoencoder.forward(stage.batch(0))
    assert x.shape == x_rec.shape == (4, 3, 16, 16)
    assert stage.train_step(1, 0.9)["skipped"] == 0


@pytest.mark.parametrize("bottleneck", ["vq", "vq-gradient", "fsq"])
def test_the_codebook_is_counted_over_an_epoch(prepared, bottleneck):
    stage = AutoencoderStage(prepared, replace(SMALL, batch_size=16, model=replace(SMALL.model, bottleneck=bottleneck)))
    epoch = len(prepared.train) // 16
    records = [stage.train_step(step, 0.0) for step in range(epoch)]
    assert [step for step, r in enumerate(records) if "perplexity" in r] == [epoch - 1]
    assert records[-1]["codes_share"] > 0.1 and stage.autoencoder.usage.counts.sum() == 0 and "dead_codes" in records[0]


def test_diagnostic_metrics_reach_the_log_and_the_diagnosis(prepared, tmp_path):
    recipe = replace(SMALL, grad_clip=1e-3, model=replace(SMALL.model, bottleneck="vq"), disc=replace(SMALL.disc, start=0.1, warmup=0.1))
    run = Run.open(tmp_path / "run", {})
    fit(AutoencoderStage(prepared, recipe), run, Budget(steps=36), log_every=12, samples=1)   # an epoch
    records = read_metrics(run)
    wanted = {"grad_norm_rec_loss", "grad_norm_mse_loss", "grad_norm_g_loss", "grad_norm", "applied_norm", "clipped", "skipped", "saturated",
              "d_accuracy",
              "logit_margin", "gan_weight", "max_activation", "dead_codes", "perplexity", "codes_used"}
    assert wanted <= set().union(*records)
    assert any("are clipped on 100% of steps" in words and "raise grad_clip above" in words for words in diagnose(records))
