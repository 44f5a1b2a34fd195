"""Rates in Lightning's logs: `LearningRateMonitor` of nexus.integrations, and Lightning's own, and its `log`."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
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
    JsonLogger,
    Regression,
    csv_column,
    fit,
    inside,
    pl,
    quiet,
)
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import nexus.training
from nexus.backends import native
from nexus.integrations import lightning as nexus_lightning
from nexus.integrations.lightning import LearningRateMonitor
from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine, CosineRestarts, Linear

pytestmark = quiet
each_way = pytest.mark.parametrize("way", EVERY_WAY)

BATCHES = [(epoch, batch) for epoch in range(5) for batch in range(5)]


def name_of(way: str) -> str:
    return "lr-AdamW" if "AdamW" in way else "lr-FusedAdamW"


def floats(lrs: dict[str, list[Any]]) -> dict[str, list[float]]:
    assert all(type(rate) is float for rates in lrs.values() for rate in rates)
    return lrs


@pytest.mark.parametrize("accumulated", [1, 2])
@each_way
def test_every_rate_is_the_float_that_its_update_uses(tmp_path: Path, way: str, accumulated: int) -> None:
    loggers, monitor = [JsonLogger(), pl.loggers.CSVLogger(tmp_path)], LearningRateMonitor("step")
    options = {"logger": loggers, "callbacks": [monitor], "accumulate_grad_batches": accumulated}
    module = fit(tmp_path, EVERY_WAY[way], **options)
    name = name_of(way)
    assert loggers[0].column(name) == RATES
    assert csv_column(loggers[1], name) == dict(enumerate(RATES))
    updates = [epoch * -(-5 // accumulated) + batch // accumulated for epoch, batch in BATCHES]
    assert floats(monitor.lrs) == {name: [SCHEDULE(t) for t in updates if t < STEPS]}  # one for each batch
    assert json.loads(json.dumps(monitor.lrs)) == monitor.lrs
    assert module.trainer.callback_metrics[name] == torch.tensor(RATES[-1])


@each_way
@pytest.mark.parametrize("interval", ["epoch", None])
def test_rates_at_the_start_of_epochs(tmp_path: Path, way: str, interval: str | None) -> None:
    logger, monitor = JsonLogger(), LearningRateMonitor(interval)
    fit(tmp_path, EVERY_WAY[way], logger=logger, callbacks=[monitor], accumulate_grad_batches=2)
    name, updates = name_of(way), [3 * epoch + batch // 2 for epoch, batch in BATCHES]
    if interval == "epoch":
        starts = range(0, STEPS, 3)
        expected = [SCHEDULE(t) for t in starts]
        assert {step: row[name] for step, row in logger.rows.items()} == {t: SCHEDULE(t) for t in starts}
    else:  # without a scheduler, which says which of the two it is: both
        again = {epoch * 5 for epoch in range(5)} if way == "inside" else set()
        expected = [SCHEDULE(t) for i, t in enumerate(updates) for _ in range(1 + (i in again)) if t < STEPS]
        assert logger.column(name) == RATES
    assert floats(monitor.lrs) == {name: expected}


# Lightning hands a rate that is a tensor to torch.tensor(), which says that it copies.
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_lightnings_own_monitor_logs_what_is_in_the_group(tmp_path: Path, way: str) -> None:
    """Where that is a tensor, so is the rate: CSVLogger reads it, and JSON refuses it."""
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(tmp_path, WAYS[way], logger=logger, callbacks=[pl.callbacks.LearningRateMonitor("step")])
    late = way == "inside"  # without a scheduler, the rate of the step before is there when a batch begins
    assert csv_column(logger, "lr-FusedAdamW") == {t: SCHEDULE(max(0, t - late)) for t in range(STEPS)}
    logger, monitor = JsonLogger(), pl.callbacks.LearningRateMonitor("step", True, True)
    if way == "torch's scheduler":
        fit(tmp_path, WAYS[way], logger=logger, callbacks=[monitor])
        assert logger.column("lr-FusedAdamW") == RATES
        assert monitor.lrs == {"lr-FusedAdamW": RATES}
        assert logger.column("lr-FusedAdamW-momentum") == [0.9] * STEPS
        assert logger.column("lr-FusedAdamW-weight_decay") == [0.1] * STEPS
    else:
        with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
            fit(tmp_path, WAYS[way], logger=logger, callbacks=[monitor])


def test_it_is_lightnings_monitor_and_logs_what_that_logs_of_torchs_adamw(tmp_path: Path) -> None:
    def grouped(module: Regression) -> list[Any]:
        first, last = module.net[0], module.net[2]
        groups = [
            {"params": first.parameters(), "lr": 0.5, "name": "first"},
            {"params": [last.weight], "betas": (0.8, 0.9), "weight_decay": 0.3},
        ]
        optimizer = torch.optim.AdamW(groups, lr=1.0)
        return [optimizer], [{"scheduler": LambdaLR(optimizer, SCHEDULE), "interval": "step", "name": "mine"}]

    kept = []
    for kind in (LearningRateMonitor, pl.callbacks.LearningRateMonitor):
        logger, monitor = JsonLogger(), kind("step", log_momentum=True, log_weight_decay=True)
        module = fit(tmp_path, grouped, logger=logger, callbacks=[monitor])
        assert isinstance(monitor, pl.callbacks.LearningRateMonitor)
        metrics = {name: value.item() for name, value in module.trainer.callback_metrics.items()}
        values = (floats(monitor.lrs), monitor.last_momentum_values, monitor.last_weight_decay_values)
        kept.append((logger.rows, metrics, *values))
    assert kept[0] == kept[1]
    assert kept[0][0][STEPS - 1] == {
        "mine/first": 0.5 * RATES[-1],
        "mine/first-momentum": 0.9,
        "mine/first-weight_decay": 0.01,
        "mine/pg2": RATES[-1],
        "mine/pg2-momentum": 0.8,
        "mine/pg2-weight_decay": 0.3,
    }


def test_options_of_torchs_adamw_that_are_float32_tensors(tmp_path: Path) -> None:
    def tensors(module: Regression) -> torch.optim.AdamW:
        betas = (torch.tensor(0.7), torch.tensor(0.9))
        return torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.3), betas=betas, foreach=False)

    logger = JsonLogger()
    monitor = LearningRateMonitor(log_momentum=True, log_weight_decay=True)
    fit(tmp_path, tensors, logger=logger, callbacks=[monitor])
    assert logger.column("lr-AdamW") == [torch.tensor(0.3).item()] * STEPS
    assert logger.column("lr-AdamW-momentum") == [torch.tensor(0.7).item()] * STEPS
    assert logger.column("lr-AdamW-weight_decay") == [0.01] * STEPS


# Groups, and what changes in mid-run.

RESTARTS = CosineRestarts(peak_lr=0.1, cycle_length=4)
DECAYS = Cosine(peak_lr=0.2, total_steps=12, min_lr=0.01)


class LoggedByItself(Regression):
    """With Lightning's `log`, the rates that its steps have used."""

    def on_train_batch_end(self, *args: Any) -> None:
        for group, name in zip(self.trainer.optimizers[0].param_groups, ("first", "second"), strict=True):
            self.log(name, group["lr"])


def two_groups(module: Regression) -> FusedAdamW:
    first, last = module.net[0], module.net[2]
    groups = [
        {"params": first.parameters(), "lr_scale": 0.3, "name": "first"},
        {"params": last.parameters(), "lr": RESTARTS, "weight_decay": 0.05},
    ]
    return FusedAdamW(groups, lr=SCHEDULE, weight_decay=DECAYS)


def test_every_group_has_its_own_rate_and_weight_decay(tmp_path: Path) -> None:
    loggers = [JsonLogger(), pl.loggers.CSVLogger(tmp_path)]
    monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    fit(tmp_path, two_groups, LoggedByItself, logger=loggers, callbacks=[monitor])
    first, second = [0.3 * rate for rate in RATES], [RESTARTS(t) for t in range(STEPS)]
    expected = {"lr-FusedAdamW/first": first, "lr-FusedAdamW/pg2": second}
    assert floats(monitor.lrs) == expected
    expected |= {
        "lr-FusedAdamW/first-weight_decay": [DECAYS(t) for t in range(STEPS)],
        "lr-FusedAdamW/pg2-weight_decay": [0.05] * STEPS,
        "lr-FusedAdamW/first-momentum": [0.9] * STEPS,
        "lr-FusedAdamW/pg2-momentum": [0.9] * STEPS,
        "first": first,
        "second": second,
    }
    names = set(loggers[0].rows[0]) - {"epoch"}
    assert {name: loggers[0].column(name) for name in names} == expected
    assert {name: list(csv_column(loggers[1], name).values()) for name in names} == expected
    assert monitor.last_weight_decay_values["lr-FusedAdamW/first-weight_decay"] == DECAYS(STEPS - 1)


def test_betas_and_scales_that_move_are_logged_as_the_update_uses_them(tmp_path: Path) -> None:
    momenta, scales = (
        Linear(start_lr=0.95, end_lr=0.8, total_steps=10),
        Linear(start_lr=0.2, end_lr=1.0, total_steps=9),
    )

    def moving(module: Regression) -> FusedAdamW:
        first, last = module.net[0], module.net[2]
        groups = [
            {"params": first.parameters(), "lr_scale": scales},
            {"params": last.parameters(), "lr_scale": torch.tensor(0.5), "betas": (torch.tensor(0.75), 0.9)},
        ]
        return FusedAdamW(groups, lr=SCHEDULE, betas=(momenta, 0.99))

    logger, monitor = JsonLogger(), LearningRateMonitor("step", log_momentum=True)
    fit(tmp_path, moving, logger=logger, callbacks=[monitor])
    assert floats(monitor.lrs) == {
        "lr-FusedAdamW/pg1": [scales(t) * rate for t, rate in enumerate(RATES)],
        "lr-FusedAdamW/pg2": [0.5 * rate for rate in RATES],
    }
    assert logger.column("lr-FusedAdamW/pg1-momentum") == [momenta(t) for t in range(STEPS)]
    assert logger.column("lr-FusedAdamW/pg2-momentum") == [0.75] * STEPS


LATER = WSD(warmup_steps=0, stable_steps=30, decay_steps=5, peak_lr=0.2)
LAST = Cosine(peak_lr=0.3, total_steps=20)


class Changing(Regression):
    """Between its steps, schedules and groups change."""

    def on_train_batch_end(self, *args: Any) -> None:
        wrapper = self.optimizers()
        assert wrapper is not self.trainer.optimizers[0]
        if self.global_step == 3:
            wrapper.param_groups[0]["lr"] = LATER
        if self.global_step == 6:
            wrapper.begin_decay()
        if self.global_step == 9:
            self.other = torch.nn.Parameter(torch.zeros(2))
            self.trainer.optimizers[0].add_param_group({"params": [self.other], "lr": LAST, "lr_scale": 0.7})
        if self.global_step == 12:
            wrapper.param_groups[0]["lr_schedule"] = None
            wrapper.param_groups[0]["lr"] = 0.125


def test_what_has_changed_between_steps_is_what_the_next_step_uses(tmp_path: Path) -> None:
    monitor, history = LearningRateMonitor("step"), []

    def configure(module: Regression) -> FusedAdamW:
        optimizer = inside(module)
        history.append(optimizer.history(STEPS))
        return optimizer

    fit(tmp_path, configure, Changing, logger=JsonLogger(), callbacks=[monitor])
    decayed = LATER.begin_decay(6)
    first = [*RATES[:3], *(LATER(t) for t in range(3, 6)), *(decayed(t) for t in range(6, 12)), 0.125, 0.125]
    assert floats(monitor.lrs) == {
        "lr-FusedAdamW/pg1": pytest.approx(first, rel=1e-15),
        "lr-FusedAdamW/pg2": [0.7 * LAST(t) for t in range(9, STEPS)],
    }
    assert history[0].read().lr[:, 0].tolist() == monitor.lrs["lr-FusedAdamW/pg1"]


def test_the_device_is_asked_once_for_each_schedule_and_only_when_something_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    evaluate = native.evaluate
    monkeypatch.setattr(native, "evaluate", lambda rows, steps: asked.append(int(steps)) or evaluate(rows, steps))
    monitor = LearningRateMonitor("step")

    def configure(module: Regression) -> FusedAdamW:
        return FusedAdamW([{"params": [param]} for param in module.parameters()], lr=SCHEDULE, weight_decay=DECAYS)

    fit(tmp_path, configure, logger=JsonLogger(), callbacks=[monitor], log_every_n_steps=5)
    assert floats(monitor.lrs) == {f"lr-FusedAdamW/pg{i}": [SCHEDULE(4), SCHEDULE(9)] for i in (1, 2, 3, 4)}
    assert asked == [4, 9]


# Which Lightning it is for.


@pytest.fixture
def without_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch.callbacks", None)


@pytest.mark.usefixtures("without_lightning")
def test_pytorch_lightning_will_do(tmp_path: Path) -> None:
    older = pytest.importorskip("pytorch_lightning")
    monitor = runpy.run_path(nexus_lightning.__file__)["LearningRateMonitor"]("step")
    assert isinstance(monitor, older.callbacks.LearningRateMonitor)
    assert not isinstance(monitor, pl.callbacks.LearningRateMonitor)

    class Module(older.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.net(batch).square().mean()

        configure_optimizers = inside

    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options |= {"max_epochs": 1, "log_every_n_steps": 1, "logger": older.loggers.CSVLogger(tmp_path)}
    trainer = older.Trainer(accelerator="cpu", callbacks=[monitor], **options)
    trainer.fit(Module(), Batches(STEPS))
    assert floats(monitor.lrs) == {"lr-FusedAdamW": RATES}


@pytest.mark.usefixtures("without_lightning")
def test_without_either_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pytorch_lightning.callbacks", None)
    with pytest.raises(ImportError, match=r"needs Lightning .* pip install lightning"):
        runpy.run_path(nexus_lightning.__file__)


def test_a_lightning_that_reads_groups_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pl.callbacks.LearningRateMonitor, "_get_optimizer_stats")
    with pytest.raises(ImportError, match=r"LearningRateMonitor\._get_optimizer_stats, which this version"):
        runpy.run_path(nexus_lightning.__file__)


def test_the_old_path_has_the_same_class_and_no_package_imports_lightning_unasked() -> None:
    assert importlib.import_module("nexus.training.lightning").LearningRateMonitor is LearningRateMonitor
    for package in (nexus.training, nexus.integrations):
        assert "lightning" not in Path(package.__file__).read_text("utf-8")
