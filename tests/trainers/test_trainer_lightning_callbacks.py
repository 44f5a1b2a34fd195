"""Lightning's loggers, checkpoints and callbacks with FusedAdamW."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_cases import (
    SCHEDULE,
    STEPS,
    WAYS,
    Batches,
    Configure,
    JsonLogger,
    Rates,
    Regression,
    assert_same_float64_run,
    fit,
    inside,
    optimizer_of,
    own_scheduler,
    pl,
    torchs,
    torchs_scheduler,
    torchs_scheduler_over_a_tensor,
    trainer_in,
)
from references import same_bits, snapshot
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import CosineRestarts

# Lightning asks torch's pytree for a class that torch 2.13 calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

# Rates in loggers.


def csv_column(logger: pl.loggers.CSVLogger, name: str) -> list[float]:
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def two_groups(module: Regression) -> FusedAdamW:
    first, last = module.net[0], module.net[2]
    groups = [
        {"params": first.parameters()},
        {"params": last.parameters(), "lr": CosineRestarts(0.1, cycle_length=4)},
    ]
    groups[0]["lr_scale"] = 0.5
    return FusedAdamW(groups, lr=SCHEDULE)


def test_rates_of_the_optimizer_alone_reach_loggers_as_floats(tmp_path: Path) -> None:
    loggers = [JsonLogger(), pl.loggers.CSVLogger(tmp_path)]
    fit(tmp_path, two_groups, logger=loggers, callbacks=[Rates()])
    expected = (
        [0.5 * SCHEDULE(t) for t in range(STEPS)],
        [CosineRestarts(0.1, cycle_length=4)(t) for t in range(STEPS)],
    )
    for index, rates in enumerate(expected):
        assert loggers[0].column(f"lr/{index}") == rates
        assert csv_column(loggers[1], f"lr/{index}") == rates


def test_the_monitor_logs_what_torchs_scheduler_has_written(tmp_path: Path) -> None:
    loggers = [JsonLogger(), pl.loggers.CSVLogger(tmp_path)]
    monitor = pl.callbacks.LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    fit(tmp_path, torchs_scheduler, logger=loggers, callbacks=[monitor])
    rates = [SCHEDULE(t) for t in range(STEPS)]
    assert loggers[0].column("lr-FusedAdamW") == rates
    assert csv_column(loggers[1], "lr-FusedAdamW") == rates
    assert monitor.lrs == {"lr-FusedAdamW": rates}
    assert loggers[0].column("lr-FusedAdamW-momentum") == [0.9] * STEPS
    assert loggers[0].column("lr-FusedAdamW-weight_decay") == [0.1] * STEPS


# Lightning hands a rate that is a tensor to torch.tensor(), which says that it copies.
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize("configure", [inside, own_scheduler, torchs_scheduler_over_a_tensor])
def test_the_monitor_reads_rates_that_are_tensors(tmp_path: Path, configure: Configure) -> None:
    """Lightning's own: it gives loggers the tensor. CSVLogger reads it, and JSON refuses it."""
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(tmp_path, configure, logger=logger, callbacks=[pl.callbacks.LearningRateMonitor("step")])
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        fit(tmp_path, configure, logger=JsonLogger(), callbacks=[pl.callbacks.LearningRateMonitor("step")])
    late = configure is inside  # without a scheduler, the rate of the step before is there when a batch begins
    assert csv_column(logger, "lr-FusedAdamW") == [SCHEDULE(max(0, t - late)) for t in range(STEPS)]


# Checkpoints.


class NumberedBatches(Regression):
    """What a step sees depends on its number alone: Lightning does not go on in the middle of an iterable's data."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        torch.manual_seed(self.global_step)
        return super().training_step(torch.randn_like(batch), batch_idx)


def saved_every_7(folder: Path) -> pl.callbacks.ModelCheckpoint:
    return pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=7, save_top_k=-1)


def run_rates(configure: Configure, folder: Path, **options: Any) -> tuple[Regression, list[float]]:
    logger = JsonLogger()
    module = fit(
        folder, configure, NumberedBatches, logger=logger, callbacks=[Rates(), saved_every_7(folder)], **options
    )
    return module, [row["lr/0"] for _, row in sorted(logger.rows.items())]


def resuming(test: Callable[..., None]) -> Callable[..., None]:
    """Without what Lightning says of a run that goes on in the middle of an epoch, in the folder that it was in."""
    for message in ("You're resuming from a checkpoint that ended before", "Checkpoint directory .* is not empty"):
        test = pytest.mark.filterwarnings(f"ignore:{message}:UserWarning")(test)
    return test


@resuming
@pytest.mark.parametrize("configure", WAYS)
@pytest.mark.parametrize("resume", [{}, {"weights_only": True}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, configure: Configure, resume: dict[str, Any]
) -> None:
    whole, rates = run_rates(configure, tmp_path)
    resume = {"ckpt_path": tmp_path / "step=7.ckpt", **resume}
    resumed, later = run_rates(configure, tmp_path, resume=resume)
    assert resumed.global_step == STEPS
    assert later == rates[7:]
    assert len(later) == STEPS - 7
    assert same_bits(snapshot(optimizer_of(whole)), snapshot(optimizer_of(resumed)))
    assert len(snapshot(optimizer_of(whole))) == 4 * 4  # a parameter, two moments and a count


class InFloat64(NumberedBatches):
    """From the start: with 64-true, Lightning loads the weights first and makes the module float64 after it."""

    def __init__(self, configure: Configure) -> None:
        super().__init__(configure)
        self.double()


@resuming
@pytest.mark.parametrize("configure", [inside, torchs_scheduler])
def test_a_run_of_torchs_adamw_goes_on(tmp_path: Path, configure: Configure) -> None:
    options = {"precision": "64-true", "callbacks": [saved_every_7(tmp_path)]}
    whole = fit(tmp_path, torchs, InFloat64, **options)
    resume = {"ckpt_path": tmp_path / "step=7.ckpt"}
    assert_same_float64_run(fit(tmp_path, configure, InFloat64, resume, **options), whole)


# Callbacks that touch weights or rates.


def constant(kind: Callable[..., Any]) -> Configure:
    return lambda module: kind(module.parameters(), lr=0.02, weight_decay=0.1, foreach=False)


def test_averages_are_those_of_torchs_run(tmp_path: Path) -> None:
    options = {"precision": "64-true"}
    runs = [
        fit(tmp_path, configure, callbacks=[pl.callbacks.EMAWeightAveraging(decay=0.8)], **options)
        for configure in (inside, torchs)
    ]
    assert_same_float64_run(*runs)
    last = fit(tmp_path, inside, **options)
    assert not torch.equal(last.net[0].weight, runs[0].net[0].weight)


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
    found = []
    for configure in (constant(FusedAdamW), constant(torch.optim.AdamW), inside):
        torch.manual_seed(0)
        module = Regression(configure)
        trainer = trainer_in(tmp_path, precision="64-true", max_epochs=1)
        tuner = pl.tuner.Tuner(trainer)
        if configure is inside:
            with pytest.raises(RuntimeError, match=r"group\['lr'\] was set to 1e-08 \(float\) while WSD"):
                tuner.lr_find(module, Batches(20), num_training=20, update_attr=False)
        else:
            found.append(tuner.lr_find(module, Batches(20), num_training=20, update_attr=False).results)
    assert found[0]["lr"] == found[1]["lr"]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-12)
