"""What Lightning's Trainer trains in the tests, and torch's AdamW in the same Trainer beside it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from side_by_side import assert_same
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from nexus.optim import FusedAdamW
from nexus.schedules import WSD
from nexus.training.schedulers import FollowingScheduler, WSDScheduler

pl = pytest.importorskip("lightning.pytorch")

# Lightning asks torch's pytree for a class that torch 2.13 calls deprecated.
quiet = pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")

SCHEDULE = WSD(warmup_steps=4, stable_steps=6, decay_steps=8, peak_lr=0.05, min_lr=1e-3)
STEPS = 14  # in epochs of 5 batches: the last one ends early
RATES = [SCHEDULE(t) for t in range(STEPS)]
Configure = Callable[["Regression"], Any]


def inside(module: Regression, **options: Any) -> FusedAdamW:
    return FusedAdamW(module.parameters(), lr=SCHEDULE, weight_decay=0.1, **options)


def clipping(module: Regression) -> FusedAdamW:
    return inside(module, max_grad_norm=0.7)


def scheduled(optimizer: torch.optim.Optimizer, scheduler: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def followed(module: Regression) -> dict[str, Any]:
    optimizer = inside(module)
    return scheduled(optimizer, FollowingScheduler(optimizer))


def own_scheduler(module: Regression) -> dict[str, Any]:
    optimizer = FusedAdamW(module.parameters(), weight_decay=0.1)
    return scheduled(
        optimizer, WSDScheduler(optimizer, warmup_steps=4, stable_steps=6, decay_steps=8, peak_lr=0.05, min_lr=1e-3)
    )


def by_torchs_scheduler(kind: Callable[..., torch.optim.Optimizer], *, tensor: bool = False) -> Configure:
    def configure(module: Regression) -> dict[str, Any]:
        rate = torch.tensor(1.0, dtype=torch.float64) if tensor else 1.0
        optimizer = kind(module.parameters(), lr=rate, weight_decay=0.1, foreach=False)
        return scheduled(optimizer, LambdaLR(optimizer, SCHEDULE))

    return configure


torchs = by_torchs_scheduler(torch.optim.AdamW)
WAYS: dict[str, Configure] = {
    "inside": inside,
    "own scheduler": own_scheduler,
    "torch's scheduler": by_torchs_scheduler(FusedAdamW),
    "torch's scheduler, over a tensor": by_torchs_scheduler(FusedAdamW, tensor=True),
}
EVERY_WAY: dict[str, Configure] = {
    **WAYS,
    "followed": followed,
    "torch's AdamW": torchs,
    "torch's AdamW, over a tensor": by_torchs_scheduler(torch.optim.AdamW, tensor=True),
}


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
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    if not any(isinstance(callback, pl.callbacks.ModelCheckpoint) for callback in options.get("callbacks", [])):
        silent["enable_checkpointing"] = False
    options = {"max_steps": STEPS, "log_every_n_steps": 1, **silent, **options}
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
    """That of torch's AdamW: parameters, moments and counts."""
    found, wanted = optimizer_of(module), optimizer_of(expected)
    assert (type(found), type(wanted)) == (FusedAdamW, torch.optim.AdamW)
    assert {param.dtype for param in module.parameters()} == {torch.float64}
    assert_same(wanted, found)


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


def csv_column(logger: pl.loggers.CSVLogger, name: str) -> dict[int, float]:
    """By step."""
    logger.save()
    with open(Path(logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}
