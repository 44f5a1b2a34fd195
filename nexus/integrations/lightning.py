"""Rates for Lightning's loggers. Imports `lightning`, or where that is not installed `pytorch_lightning`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from nexus.optim import FusedAdamW
from nexus.optim.engine import attributes_of, devices_of, engine_of
from nexus.optim.settings import BETAS
from nexus.schedules import Schedule

try:
    from lightning.pytorch.callbacks import LearningRateMonitor as LightningsMonitor
except ModuleNotFoundError as error:
    try:
        from pytorch_lightning.callbacks import LearningRateMonitor as LightningsMonitor
    except ModuleNotFoundError:
        raise ImportError(f"nexus.integrations.lightning needs Lightning ({error}): pip install lightning") from error

__all__ = ["LearningRateMonitor"]

# The one method of Lightning's monitor that reads a group: all that it logs and keeps comes from there. It is not
# public, so a later Lightning may be without it, and would then log tensors again.
if not hasattr(LightningsMonitor, "_get_optimizer_stats"):
    raise ImportError(
        "nexus.integrations.lightning overrides LearningRateMonitor._get_optimizer_stats, which this version of "
        "Lightning does not have: use one that does, such as 2.6, or log float(group['lr']) in on_train_batch_end"
    )


class LearningRateMonitor(LightningsMonitor):  # type: ignore[misc]
    """Lightning's `LearningRateMonitor`, with floats: exactly the rates that the updates use.

    Lightning's own hands loggers and `monitor.lrs` whatever `group["lr"]` is. Where a schedule or a scheduler of
    nexus is in force, that is one tensor, which every step writes anew; and with a schedule in the optimizer it is
    the rate of the step before. This one logs, at the start of a batch or an epoch, the rate of the next update,
    wherever it comes from, and of any optimizer. Names, options and the steps at which it logs are Lightning's. It
    reads the device when it logs, as its loggers would, and at no other time.

    Args:
        logging_interval: `"step"`, `"epoch"`, or None: as each scheduler's own `"interval"` says.
        log_momentum: also log the momentum, or the first of `betas`.
        log_weight_decay: also log the weight decay, as exactly as the rate.

    Raises:
        MisconfigurationException: Lightning's: another `logging_interval`, or a Trainer without a logger.

    >>> from lightning.pytorch import Trainer
    >>> from lightning.pytorch.loggers import CSVLogger
    >>> from nexus.integrations.lightning import LearningRateMonitor
    >>> monitor = LearningRateMonitor(logging_interval="step")
    >>> trainer = Trainer(logger=CSVLogger("logs"), callbacks=[monitor])
    >>> monitor in trainer.callbacks
    True
    """

    def _get_optimizer_stats(self, optimizer: Optimizer, names: list[str]) -> dict[str, float]:
        logged = ["lr"]
        if self.log_weight_decay:
            logged.append("weight_decay")
        if self.log_momentum:
            logged += ["betas", "momentum"]
        groups = _coming(optimizer, logged) if isinstance(optimizer, FusedAdamW) else optimizer.param_groups
        groups = [{**group, **{name: _plain(group[name]) for name in logged if name in group}} for group in groups]
        plain = SimpleNamespace(param_groups=groups, defaults=optimizer.defaults)
        stats: dict[str, float] = super()._get_optimizer_stats(plain, names)
        return stats


def _coming(optimizer: FusedAdamW, names: list[str]) -> list[dict[str, Any]]:
    """Its groups, with what their schedules will give the next update, as its kernels evaluate them."""
    engine = engine_of(optimizer)
    engine.settle(attributes_of(optimizer))  # a Schedule may have been assigned since the last step
    device = devices_of(attributes_of(optimizer))[0]
    wanted = {*names, "lr_scale", *(BETAS if "betas" in names else ())}
    values: dict[Schedule, float] = {}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        groups.append(dict(group))
        rates: dict[str, float] = {}
        for name, schedule in group.schedules():
            if name not in wanted:
                continue
            if schedule not in values:
                rows = engine.table(schedule, device).rows
                now = engine.clock_of(schedule, device)
                values[schedule] = optimizer.evaluator.evaluate(rows, now).item()
            rates[name] = values[schedule]
        if "lr" in rates:
            rates["lr"] *= rates["lr_scale"] if "lr_scale" in rates else _plain(group["lr_scale"])
        betas = tuple(rates.get(name, beta) for name, beta in zip(BETAS, group["betas"], strict=True))
        groups[-1] |= {"betas": betas} | {name: rate for name, rate in rates.items() if name in names}
    return groups


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):  # betas
        return tuple(_plain(item) for item in value)
    return float(value.item() if isinstance(value, Tensor) else value)
