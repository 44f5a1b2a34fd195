"""FusedAdamW in Lightning's own Trainer: whole runs, precisions, several optimizers, checkpoints, callbacks."""

from __future__ import annotations

import functools
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_cases import (
    EVERY_WAY,
    RATES,
    SCHEDULE,
    STEPS,
    WAYS,
    Batches,
    Configure,
    JsonLogger,
    Regression,
    assert_same_float64_run,
    clipping,
    fit,
    inside,
    optimizer_of,
    pl,
    quiet,
    torchs,
    trainer_in,
)
from low_memory_cases import IN_TRAINERS, stored_dtypes
from references import Float64AdamW, assert_same_run, same_bits, snapshot
from torch import Tensor

from nexus.integrations.lightning import LearningRateMonitor
from nexus.optim import FusedAdamW
from nexus.schedules import WSD

ROOT = Path(__file__).resolve().parents[2]
pytestmark = quiet

# The whole training run, beside torch's AdamW in the same Trainer in float64.


@functools.cache
def torchs_run(**options: Any) -> Regression:
    """Once for each set of the Trainer's options; it writes nothing."""
    return fit(Path(), torchs, precision="64-true", **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.7},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    ],
    ids=str,
)
def test_a_run_is_that_of_torchs_adamw(tmp_path: Path, way: str, options: dict[str, Any]) -> None:
    module = fit(tmp_path, WAYS[way], precision="64-true", **options)
    assert_same_float64_run(module, torchs_run(**options))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_max_grad_norm_is_the_trainers_clipping(tmp_path: Path, accumulated: int) -> None:
    module = fit(tmp_path, clipping, precision="64-true", accumulate_grad_batches=accumulated)
    assert_same_float64_run(module, torchs_run(accumulate_grad_batches=accumulated, gradient_clip_val=0.7))


# Precisions: the gradients of each step, as Lightning makes them, given to the reference as well.


class Shadow(pl.Callback):
    """Steps the reference beside the optimizer; with gradients over `loss_scale`, where none overflows."""

    def __init__(self, loss_scale: Callable[[], float] = lambda: 1.0) -> None:
        self.loss_scale = loss_scale
        self.reference: Float64AdamW | None = None

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        params = list(module.parameters())
        if self.reference is None:
            self.reference = Float64AdamW(params, lr=SCHEDULE, weight_decay=0.1, max_grad_norm=0.7)
        grads = [param.grad.double() / self.loss_scale() for param in params]
        if all(bool(grad.isfinite().all()) for grad in grads):
            self.reference.step(grads)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_every_precision(tmp_path: Path, precision: str) -> None:
    shadow = Shadow()
    module = fit(tmp_path, clipping, precision=precision, callbacks=[shadow])
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {param.dtype for param in module.parameters()} == {dtype}
    assert_same_run(optimizer_of(module), shadow.reference)
    assert shadow.reference.completed == STEPS


class Overflowing(Regression):
    """The gradients of its sixth step are not finite."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.trainer.fit_loop.total_batch_idx == 5 else loss


def test_a_grad_scaler_unscales_clips_and_skips_in_the_step(tmp_path: Path) -> None:
    """The monitor logs the rate of the skipped step again: that of the step which comes in its place."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    shadow, monitor = Shadow(scaler.get_scale), LearningRateMonitor("step")
    plugins = [pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler)]
    module = fit(tmp_path, clipping, Overflowing, plugins=plugins, logger=JsonLogger(), callbacks=[shadow, monitor])
    optimizer = optimizer_of(module)
    assert scaler.get_scale() == 2.0**9
    assert int(optimizer.skipped_steps) == 1
    assert shadow.reference.completed == STEPS - 1
    assert_same_run(optimizer, shadow.reference)
    assert float(optimizer.param_groups[0]["lr"]) == SCHEDULE(STEPS - 2)  # a skipped step does not advance it
    assert monitor.lrs == {"lr-FusedAdamW": [SCHEDULE(t - (t > 5)) for t in range(STEPS)]}


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_the_trainers_clipping_under_mixed_precision_is_refused(tmp_path: Path, precision: str) -> None:
    """By Lightning, as for torch's AdamW(fused=True); max_grad_norm is there instead."""
    scaler = torch.amp.GradScaler("cpu") if precision == "16-mixed" else None
    plugin = pl.plugins.precision.MixedPrecision(precision, "cpu", scaler)
    for configure in (inside, lambda module: torch.optim.AdamW(module.parameters(), fused=True)):
        with pytest.raises(RuntimeError, match="AdamW, does not allow for gradient clipping"):
            fit(tmp_path, configure, plugins=[plugin], gradient_clip_val=0.7)


# Several optimizers, and Lightning's wrappers of them.


class TwoOptimizers(pl.LightningModule):
    """Manual optimization: each net has its own optimizer, schedule and rhythm."""

    SCHEDULES = SCHEDULE, WSD(warmup_steps=2, stable_steps=None, decay_steps=4, peak_lr=0.1)
    EDITED = SCHEDULE.extend_stable(3), SCHEDULES[1].begin_decay(6)
    CLIPS = None, 0.5

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)
        self.references = [
            Float64AdamW(list(net.parameters()), lr=schedule, max_grad_norm=clip)
            for net, schedule, clip in zip((self.first, self.second), self.EDITED, self.CLIPS, strict=True)
        ]

    def configure_optimizers(self) -> list[FusedAdamW]:
        return [
            FusedAdamW(net.parameters(), lr=schedule, max_grad_norm=clip)
            for net, schedule, clip in zip((self.first, self.second), self.SCHEDULES, self.CLIPS, strict=True)
        ]

    def on_fit_start(self) -> None:
        self.histories = [optimizer.history(100) for optimizer in self.optimizers()]

    def backward_of(self, index: int, batch: Tensor) -> Tensor:
        self.optimizers()[index].zero_grad()
        loss = self.second(self.first(batch)).square().mean()
        self.manual_backward(loss)
        self.references[index].step([param.grad for param in (self.first, self.second)[index].parameters()])
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        first, second = self.optimizers()
        number = self.trainer.fit_loop.total_batch_idx
        if number == 3:
            first.extend_stable(3)
        if number == 6:
            second.begin_decay()
        first.step(closure=lambda: self.backward_of(0, batch))
        self.backward_of(1, batch)
        second.step()


def test_two_optimizers_in_manual_optimization(tmp_path: Path) -> None:
    module = TwoOptimizers()
    trainer_in(tmp_path, max_steps=2 * STEPS).fit(module, Batches())
    for index, schedule in enumerate(module.EDITED):
        assert_same_run(module.trainer.optimizers[index], module.references[index])
        rows = module.histories[index].read()
        assert rows.step.tolist() == list(range(STEPS))
        assert rows.lr[:, 0].tolist() == pytest.approx([schedule(t) for t in range(STEPS)], rel=1e-15)


def test_a_wrapper_that_has_loaded_and_synchronised_leaves_the_optimizer_as_it_should_be(tmp_path: Path) -> None:
    class Loading(Regression):
        wrapped = True

        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
            if self.global_step == 3:
                optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.sync_hyperparameters()
                optimizer.param_groups[0]["weight_decay"] = 0.9

    class LoadingItself(Loading):
        wrapped = False

    runs = [fit(tmp_path, inside, kind) for kind in (Loading, LoadingItself, Regression)]
    expected = snapshot(optimizer_of(runs[1]))
    assert same_bits(snapshot(optimizer_of(runs[0])), expected)
    assert not same_bits(snapshot(optimizer_of(runs[2])), expected)


# Checkpoints.


class NumberedBatches(Regression):
    """What a step sees depends on its number alone: Lightning does not go on in the middle of an iterable's data."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        torch.manual_seed(self.global_step)
        return super().training_step(torch.randn_like(batch), batch_idx)


class InFloat64(NumberedBatches):
    """From the start: with 64-true, Lightning loads the weights first and makes the module float64 after it."""

    def __init__(self, configure: Configure) -> None:
        super().__init__(configure)
        self.double()


def saved_every_7(folder: Path) -> pl.callbacks.ModelCheckpoint:
    return pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)


def resuming(test: Callable[..., None]) -> Callable[..., None]:
    """Without what Lightning says of a run that goes on in the middle of an epoch, in the folder that it was in."""
    for message in ("You're resuming from a checkpoint that ended before", "Checkpoint directory .* is not empty"):
        test = pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")(test)
    return test


@resuming
@pytest.mark.parametrize("way", EVERY_WAY)
@pytest.mark.parametrize("resume", [{}, {"weights_only": True}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, way: str, resume: dict[str, Any]) -> None:
    runs, rates = [], []
    for from_file in ({}, {"ckpt_path": tmp_path / "step=7.ckpt", **resume}):
        monitor = LearningRateMonitor("step")
        callbacks = [monitor, saved_every_7(tmp_path)]
        runs.append(
            fit(tmp_path, EVERY_WAY[way], NumberedBatches, from_file, logger=JsonLogger(), callbacks=callbacks)
        )
        rates += monitor.lrs.values()
    assert runs[1].global_step == STEPS
    assert rates == [RATES, RATES[7:]]
    whole, resumed = (snapshot(optimizer_of(run)) for run in runs)
    assert same_bits(whole, resumed)
    assert len(whole) == 4 * 4  # a parameter, two moments and a count


class Wide(NumberedBatches):
    """With a tensor that is large enough for fewer bits."""

    def __init__(self, configure: Configure) -> None:
        super().__init__(configure)
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 1))


@resuming
@pytest.mark.parametrize(("dtype", "options"), IN_TRAINERS)
def test_low_memory_state_is_resumed_bit_for_bit(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    precision = "bf16-true" if dtype == torch.bfloat16 else "bf16-mixed"
    configure = functools.partial(inside, **options)
    whole, resumed = (
        fit(tmp_path, configure, Wide, from_file, precision=precision, callbacks=[saved_every_7(tmp_path)])
        for from_file in ({}, {"ckpt_path": tmp_path / "step=7.ckpt", "weights_only": True})
    )
    expected = snapshot(optimizer_of(whole))
    assert {each.dtype for each in expected} >= {dtype, *stored_dtypes(options)}
    assert same_bits(snapshot(optimizer_of(resumed)), expected)


@resuming
@pytest.mark.parametrize("way", ["inside", "torch's scheduler"])
def test_a_run_of_torchs_adamw_goes_on(tmp_path: Path, way: str) -> None:
    options = {"precision": "64-true", "callbacks": [saved_every_7(tmp_path)]}
    whole = fit(tmp_path, torchs, InFloat64, **options)
    resume = {"ckpt_path": tmp_path / "step=7.ckpt"}
    assert_same_float64_run(fit(tmp_path, WAYS[way], InFloat64, resume, **options), whole)


# Callbacks that touch weights or rates.


def constant(kind: Callable[..., Any]) -> Configure:
    return lambda module: kind(module.parameters(), lr=0.02, weight_decay=0.1, foreach=False)


def test_averages_are_those_of_torchs_run(tmp_path: Path) -> None:
    run, expected = (
        fit(tmp_path, configure, precision="64-true", callbacks=[pl.callbacks.EMAWeightAveraging(decay=0.8)])
        for configure in (inside, torchs)
    )
    assert_same_float64_run(run, expected)
    last = fit(tmp_path, inside, precision="64-true")
    assert not torch.equal(last.net[0].weight, run.net[0].weight)


def test_stochastic_weight_averaging_drives_a_rate_that_is_a_number(tmp_path: Path) -> None:
    def average(configure: Configure) -> Regression:
        averaging = pl.callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2, annealing_epochs=2)
        return fit(tmp_path, configure, precision="64-true", max_steps=-1, max_epochs=4, callbacks=[averaging])

    run, expected = average(constant(FusedAdamW)), average(constant(torch.optim.AdamW))
    assert_same_float64_run(run, expected)
    assert optimizer_of(run).param_groups[0]["lr"] == optimizer_of(expected).param_groups[0]["lr"] != 0.02
    with pytest.raises(RuntimeError, match="evaluates its own schedule"):
        average(inside)


def test_the_rate_finder_drives_a_rate_that_is_a_number(tmp_path: Path) -> None:
    def find(configure: Configure) -> dict[str, Any]:
        torch.manual_seed(0)
        tuner = pl.tuner.Tuner(trainer_in(tmp_path, precision="64-true", max_epochs=1))
        return tuner.lr_find(Regression(configure), Batches(20), num_training=20, update_attr=False).results

    found, expected = find(constant(FusedAdamW)), find(constant(torch.optim.AdamW))
    assert found["lr"] == expected["lr"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-12)
    with pytest.raises(RuntimeError, match=r"group\['lr'\] was set to 1e-08 \(float\) while WSD"):
        find(inside)


# What users read.


def test_the_documented_module_logs_its_rates(tmp_path: Path) -> None:
    """tests/project/test_docs.py runs the page's code; this trains it."""
    page = (ROOT / "docs" / "trainers" / "lightning.md").read_text("utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {"__name__": "documented"}
    exec(compile(code, "lightning.md", "exec"), found)
    logger = JsonLogger()
    monitors = [each for each in found["trainer"].callbacks if isinstance(each, pl.callbacks.LearningRateMonitor)]
    trainer = trainer_in(tmp_path, max_steps=300, logger=logger, callbacks=monitors)
    trainer.fit(found["Regression"](), Batches(features=8))
    schedule = WSD(warmup_steps=20, stable_steps=180, decay_steps=100, peak_lr=1e-2)
    assert logger.column("lr-FusedAdamW") == [schedule(t) for t in range(300)]


def test_the_example_prints_the_rates_of_its_schedule(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restored_threads: None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(1)  # busy machines are not slow with it
    found = runpy.run_path(str(ROOT / "examples" / "with_lightning.py"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    plain = runpy.run_path(str(ROOT / "examples" / "plain_torch.py"))
    losses = [float(loss.rstrip(",")) for _, _, _, loss, _, _ in lines]
    assert losses == pytest.approx(plain["losses"], rel=1e-3)  # of 300 steps, each rounded in another order
    rates = [found["schedule"](step - 1) for step in range(50, 301, 50)]
    assert found["rates"] == rates
    assert [rate for *_, rate in lines] == [f"{rate:.4f}" for rate in rates]
