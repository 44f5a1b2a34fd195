"""Metrics that an optimizer is told, for the schedules that listen to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from nexus.arguments import as_real, shown
from nexus.backends.sharding import brought
from nexus.optim.engine import Engine, attributes_of
from nexus.optim.groups import ParamGroup

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Listening:
    """The part of an optimizer that hears metrics, on the device."""

    _engine: Engine
    param_groups: list[dict[str, Any]]

    @_disable_dynamo
    @torch.no_grad()
    def report(self, metric: Tensor | float, *, process_group: ProcessGroup | None = None) -> None:
        """Tell every `ReduceOnPlateau` of this optimizer a metric, such as the loss of a validation.

        The decision is made on the device, in a captured step too: nothing is read back. Where
        `torch.distributed` is initialised, the mean of the metric over the processes is what counts, so that all
        decide alike: each of them is to report.

        Args:
            metric: a 0-dim tensor, on the device of the parameters or on the CPU; or a number, but not in a step
                that is captured.
            process_group: the processes whose mean is taken; all by default.

        Raises:
            RuntimeError: no group has a `ReduceOnPlateau`; or a step is being captured, and the metric is a number
                or on another device, which the graph would freeze.
            TypeError, ValueError: `metric` is neither. Nothing is changed.

        >>> import torch
        >>> from nexus.optim import FusedAdamW
        >>> from nexus.schedules import Constant, ReduceOnPlateau
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> optimizer = FusedAdamW([weight], lr=ReduceOnPlateau(Constant(0.5), factor=0.5, patience=1))
        >>> for loss in (3.0, 2.0, 2.5, 2.5):  # two bad ones are one too many
        ...     optimizer.report(loss)
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> float(optimizer.param_groups[0]["lr"])
        0.25
        """
        _check_metric(metric)
        engine = self._engine
        if not all(isinstance(group, ParamGroup) and group.is_settled() for group in self.param_groups):
            engine.settle(attributes_of(self))  # type: ignore[arg-type]  # this is a part of one
        tables = {key: table for key, table in engine.tables.items() if table.is_plateau}
        if not tables:
            raise RuntimeError(
                "no parameter group has a ReduceOnPlateau to report to; give FusedAdamW "
                "lr=ReduceOnPlateau(schedule, ...)"
            )
        devices = list(dict.fromkeys(device for _, device in tables))
        heard = {devices[0]: _mean(_on_device(metric, devices[0]), process_group)}
        for device in devices[1:]:
            heard[device] = brought(heard[devices[0]], device)
        for (schedule, device), table in tables.items():
            now = engine.clock_of(schedule, device)
            rate = engine.backend.evaluate(table.of_schedule, now)
            table.report(heard[device], rate)


def _check_metric(metric: object) -> None:
    if isinstance(metric, Tensor):
        if metric.dim() != 0 or metric.dtype.is_complex or metric.is_meta:
            raise ValueError(
                f"metric must be a 0-dim tensor of real numbers, got the shape {tuple(metric.shape)} of "
                f"{metric.dtype} on {metric.device}; take its mean()"
            )
    elif as_real(metric) is None:
        raise TypeError(f"metric must be a 0-dim tensor or a number, got {shown(metric)}")


def _on_device(metric: Tensor | float, device: torch.device) -> Tensor:
    """A new 0-dim float64 tensor."""
    is_there = isinstance(metric, Tensor) and metric.device == device
    if not is_there and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        given = f"a tensor on {metric.device}" if isinstance(metric, Tensor) else shown(metric)
        raise RuntimeError(
            f"a step is being captured, and its graph would report the same number in each replay: metric is "
            f"{given}. Give report() a tensor that the step computes on {device}, or call it outside of the step"
        )
    if isinstance(metric, Tensor):
        return brought(metric, device).to(torch.float64, copy=True)
    return torch.full((), float(metric), dtype=torch.float64, device=device)


def _mean(metric: Tensor, process_group: ProcessGroup | None) -> Tensor:
    """Of all processes, where there are several."""
    if not (dist.is_available() and dist.is_initialized()):
        return metric
    count = dist.get_world_size(process_group)
    if count > 1:
        dist.all_reduce(metric, group=process_group)
        metric /= count
    return metric
