"""Numbers that go wrong: the run continues, or stops in one sentence with its last good state, and `diagnose` names the problem."""
import signal
from dataclasses import replace

import pytest
import torch
from image_diffusion import fitting
from image_diffusion.files import UserError
from image_diffusion.runs import Run, load_checkpoint, read_metrics
from image_diffusion.diagnostics import diagnose
from image_diffusion.fitting import MAX_SKIPPED_STEPS, MAX_ROLLBACKS, Interrupted, fit
from image_diffusion.training import SCALE_FLOOR, Budget, batch_indices
from kills import STAGES, AUTOENCODER, autoencoder_stage

STEPS, SKIPPED = 30, 6


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    "Fewer skipped steps before training goes back to a checkpoint, and no disk flushes."
    monkeypatch.setattr(fitting, "MAX_SKIPPED_STEPS", SKIPPED)
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture(scope="module")
def home(prepared, tmp_path_factory):
    "A folder with an autoencoder for the prior."
    home = tmp_path_factory.mktemp("numbers")
    fit(autoencoder_stage(prepared, home), Run.open(home / "whole-autoencoder", {}), Budget(steps=5), samples=1)
    return home


@pytest.fixture(params=STAGES)
def stage(request, prepared, home):
    "A stage of each kind."
    return STAGES[request.param](prepared, home)


def broken(stage, when):
    "Let the batches of some steps be NaN: those for which `when(step, rows)` is true."
    batch_rows, batch, bad = stage.batch_rows, stage.batch, []
    def rows_of(step, rows):
        chosen = batch_rows(step, rows)
        bad[:] = [when(step, chosen)]
        return chosen
    def batch_of(*words):
        found = batch(*words)
        x, *rest = found if isinstance(found, tuple) else (found,)
        x = x * torch.nan if bad[0] else x
        return (x, *rest) if rest else x
    stage.batch_rows, stage.batch = rows_of, batch_of
    return stage


def train(stage, folder, steps=STEPS, **words):
    "Train and return the run, with a record for each step."
    run = Run.open(folder, {})
    fit(stage, run, Budget(steps=steps), log_every=1, samples=1, **words)
    return run


def ema_of(state):
    "The EMA weights in a checkpoint."
    return (state["stage"].get("autoencoder") or state["stage"]["prior"])["ema"]


def sound(run):
    "Whether everything in the newest checkpoint is finite. (One that is not could not even be read.)"
    return load_checkpoint(run)["step"] > 0


def test_one_nan_batch_is_skipped_and_named(stage, tmp_path):
    run = train(broken(stage, lambda step, rows: step == STEPS - 4), tmp_path / "run")
    records = [record for record in read_metrics(run) if "skipped" in record]
    assert [record["step"] for record in records if record["skipped"]] == [STEPS - 3] and len(records) == STEPS and stage.rollbacks == 0
    assert sound(run) and run.finished["step"] == STEPS
    assert any("The loss was not finite on" in words and "broken images" in words for words in diagnose(records))


def test_broken_images_that_come_again_and_again_end_in_a_sentence(stage, tmp_path, capsys):
    run = Run.open(tmp_path / "run", {})
    with pytest.raises(UserError, match=rf"diverged {MAX_ROLLBACKS + 1} times.*lower lr, and look for broken images.*are as they were"):
        fit(broken(stage, lambda step, rows: step >= 3), run, Budget(steps=200), log_every=1, samples=1, save_every_minutes=0.0)
    state = load_checkpoint(run)
    assert state["step"] > 0 and run.finished is None
    assert all(value.isfinite().all() for value in ema_of(state).values())


def test_a_rollback_takes_the_photos_in_another_order(stage, tmp_path, capsys):
    "Broken from the first step on, before any step was saved: training goes back to the beginning and takes another order."
    seen = []
    def when(step, rows):
        seen.append((step, stage.rollbacks, rows.tolist()))
        return not stage.rollbacks
    run = train(broken(stage, when), tmp_path / "run", steps=SKIPPED + 2)
    assert f"Training diverged at step {SKIPPED}: going back to step 0, with half the learning rate." in capsys.readouterr().out
    first, again = ([rows for step, rollbacks, rows in seen if step == 1 and rollbacks == n][0] for n in (0, 1))
    assert first != again
    assert run.finished["step"] == SKIPPED + 2 and load_checkpoint(run)["stage"]["rollbacks"] == 1
    assert any("Training diverged and was rolled back" in words for words in diagnose(read_metrics(run)))


def test_resume_after_a_rollback_is_exact(prepared, home, tmp_path, capsys):
    "The order after a rollback goes by the checkpoint's count of rollbacks."
    def make(stop_at=None):
        stage = broken(autoencoder_stage(prepared, home), lambda step, rows: step >= 2 and not stage.rollbacks)
        train_step = stage.train_step
        def stopped(step, progress):
            if step == stop_at and stage.rollbacks: signal.raise_signal(signal.SIGINT)
            return train_step(step, progress)
        stage.train_step = stopped
        return stage
    whole = train(make(), tmp_path / "whole")
    with pytest.raises(Interrupted, match="Stopped at step 12"):
        train(make(stop_at=11), tmp_path / "parts")
    parts = train(make(), tmp_path / "parts")
    whole, parts = (load_checkpoint(run)["stage"] for run in (whole, parts))
    assert whole["rollbacks"] == parts["rollbacks"] == 1
    assert all(torch.equal(value, parts["autoencoder"]["model"][name]) for name, value in whole["autoencoder"]["model"].items())


def test_an_exploding_loss_is_named_and_the_best_checkpoint_kept(prepared, home, tmp_path):
    stage = autoencoder_stage(prepared, home)
    train_step = stage.train_step
    def explode(step, progress):
        numbers = train_step(step, progress)
        if step >= STEPS - 10:
            with torch.no_grad(): stage.autoencoder.model.decoder.conv_out.weight.mul_(2)     # as if the rate were far too high
        return numbers
    stage.train_step = explode
    run = train(stage, tmp_path / "run", save_every_minutes=0.0)
    assert any("training has diverged: lower lr, and use the best checkpoint" in words for words in diagnose(read_metrics(run)))
    scores = {record["step"]: record["dev_psnr"] for record in read_metrics(run) if "dev_psnr" in record}
    kept = {int(path.stem[5:]) for path in (run.folder / "checkpoints").glob("*.pt")}
    assert max(scores, key=scores.get) in kept and scores[STEPS] < max(scores.values()) - 1


def test_a_rate_beyond_all_reason_ends_in_a_sentence_and_the_checkpoints_stay_sound(stage, tmp_path, capsys):
    stage.recipe = replace(stage.recipe, lr=1e30, warmup_steps=1)
    run = Run.open(tmp_path / "run", {})
    with pytest.raises(UserError, match="lower lr.*as they were"):
        fit(stage, run, Budget(steps=300), log_every=1, samples=1, save_every_minutes=0.0)
    assert all(value.isfinite().all() for value in ema_of(load_checkpoint(run)).values())


def test_a_scaler_at_its_minimum_is_named_and_training_goes_on(prepared, home, tmp_path):
    stage = broken(autoencoder_stage(prepared, home), lambda step, rows: step % 2)           # overflows at every other step
    run = train(stage, tmp_path / "run", steps=40)
    assert stage.autoencoder.scaler.get_scale() == SCALE_FLOOR and stage.rollbacks == 0 and sound(run)
    assert any("The fp16 loss scale is at its minimum (1)" in words for words in diagnose(read_metrics(run)))


def test_a_discriminator_that_wins_outright_is_named_and_training_goes_on(prepared, home, tmp_path):
    stage = autoencoder_stage(prepared, home)                   # an autoencoder that hardly learns, and a discriminator that does
    stage.recipe = replace(AUTOENCODER, lr=1e-6, disc=replace(AUTOENCODER.disc, start=0.0, warmup=0.0, ramp=0.0, lr_ratio=5e3))
    stage.disc.recipe = stage.recipe.disc
    run = train(stage, tmp_path / "run", steps=80)
    assert any("The discriminator is too strong" in words for words in diagnose(read_metrics(run)))
    assert sound(run) and run.finished["step"] == 80


def test_twenty_broken_steps_are_more_than_a_scaler_needs():
    scaler = torch.amp.GradScaler("cpu")                                                       # fp16's, at its first scale
    halvings = 0
    while scaler.get_scale() / 2**halvings > SCALE_FLOOR: halvings += 1
    assert halvings < MAX_SKIPPED_STEPS


def test_batches_of_different_seeds_differ():
    assert not torch.equal(batch_indices(0, 3, 100, 8), batch_indices(7919, 3, 100, 8))
