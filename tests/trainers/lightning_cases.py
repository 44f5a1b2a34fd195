"""What Lightning's Trainer trains in the tests, and torch's AdamW in the same Trainer beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from references import MOMENT, MOMENTS, PARAMS, assert_close
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from nexus.optim import FusedAdamW
from nexus.schedules import WSD
from nexus.training.schedulers import WSDScheduler

pl = pytest.importorskip("lightning.pytorch")


SCHEDULE = WSD(warmup_steps=4, stable_steps=6, decay_steps=8, peak_lr=0.05, min_lr=1e-3)
STEPS = 14  # in epochs of 5 batches: the last one ends early
Configure = Callable[["Regression"], Any]


def scheduled(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def inside(module: Regression, **options: Any) -> FusedAdamW:
    return FusedAdamW(module.parameters(), lr=SCHEDULE, weight_decay=0.1, **options)


def own_scheduler(module: Regression) -> dict[str, Any]:
    optimizer = FusedAdamW(module.parameters(), weight_decay=0.1)
    return scheduled(optimizer, WSDScheduler(optimizer, 4, 6, 8, 0.05, 1e-3))


def torchs_scheduler(module: Regression) -> dict[str, Any]:
    optimizer = FusedAdamW(module.parameters(), lr=1.0, weight_decay=0.1)
    return scheduled(optimizer, LambdaLR(optimizer, SCHEDULE))


def torchs_scheduler_over_a_tensor(module: Regression) -> dict[str, Any]:
    optimizer = FusedAdamW(module.parameters(), lr=torch.tensor(1.0, dtype=torch.float64), weight_decay=0.1)
    return scheduled(optimizer, LambdaLR(optimizer, SCHEDULE))


def torchs(module: Regression) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1.0, weight_decay=0.1, foreach=False)
    return scheduled(optimizer, LambdaLR(optimizer, SCHEDULE))


WAYS: list[Configure] = [inside, own_scheduler, torchs_scheduler, torchs_scheduler_over_a_tensor]


class Regression(pl.LightningModule):
    def __init__(self, configure: Configure) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GELU(), torch.nn.Linear(5, 1))
        self.configure = configure

    def configure_optimizers(self) -> Any:
        return self.configure(self)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        x = batch.to(next(self.parameters()).dtype)
        return 3 * (self.net(x) - x.sin().sum(1, keepdim=True)).square().mean()


class Overflowing(Regression):
    """The gradients of its sixth step are not finite."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * torch.inf if self.trainer.fit_loop.total_batch_idx == 5 else loss


class Batches:
    """Batches in memory. Lightning takes any iterable, and of a DataLoader says that it has few workers."""

    def __init__(self, count: int = 5, features: int = 3) -> None:
        generator = torch.Generator().manual_seed(1)
        self.batches = torch.randn(count, 8, features, generator=generator).unbind()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def trainer_in(folder: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if not any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in options.get("callbacks", [])):
        quiet["enable_checkpointing"] = False
    options = {"max_steps": STEPS, "log_every_n_steps": 1, **quiet, **options}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **options)


def fit(
    folder: Path, configure: Configure, kind: type[Regression] = Regression, resume: Any = None, **options: Any
) -> Regression:
    """A module after training. `resume` are arguments of `fit`."""
    torch.manual_seed(0)
    module = kind(configure)
    trainer_in(folder, **options).fit(module, Batches(), **(resume or {}))
    return module


def optimizer_of(module: Regression) -> Any:
    return module.trainer.optimizers[0]


def assert_same_float64_run(module: Regression, expected: Regression) -> None:
    optimizer, reference = optimizer_of(module), optimizer_of(expected)
    assert isinstance(optimizer, FusedAdamW)
    assert type(reference) is torch.optim.AdamW
    for (name, param), other in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert param.dtype == torch.float64
        assert_close(param, other, PARAMS[torch.float64], name)
        for moment in MOMENTS[:2]:
            assert_close(
                optimizer.state[param][moment], reference.state[other][moment], MOMENT[torch.float64], name + moment
            )
        assert int(optimizer.state[param]["step"]) == int(reference.state[other]["step"])


class JsonLogger(pl.loggers.Logger):
    """Refuses what is no plain number, as json does."""

    name, version = "json", "0"

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, Any]] = {}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.setdefault(step, {}).update(json.loads(json.dumps(metrics)))

    def column(self, name: str) -> list[float]:
        return [self.rows[step][name] for step in range(len(self.rows))]


class Rates(pl.Callback):
    """Logs the rates that the steps have used, with Lightning's `log`."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *args: Any) -> None:
        for index, group in enumerate(trainer.optimizers[0].param_groups):
            module.log(f"lr/{index}", group["lr"])
