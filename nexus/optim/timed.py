"""What moves the clocks of an optimizer while its run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from nexus.arguments import MAX_STEP, check_count, shown
from nexus.backends import sharding
from nexus.optim.engine import Engine, attributes_of, devices_of
from nexus.schedules.clock import Clock

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Timed:
    """The part of an optimizer that moves its clocks."""

    _engine: Engine

    @_disable_dynamo
    def advance(self, clock: Clock, n: int | Tensor, *, process_group: ProcessGroup | None = None) -> None:
        """Add `n` to a clock's count, after `step()`: the next update uses the rates of the new count.

        Where all steps since the last `advance` were skipped, as by `skip_nonfinite` or a `GradScaler`, the clock
        stays. Reads nothing back from the device, and may be captured: a graph adds the `n` of its capture if that
        is a number, and what is in the tensor at each replay if it is one.

        Args:
            clock: of a schedule of this optimizer.
            n: what is to be counted, such as the tokens of this batch: an int >= 0; or a 0-dim tensor of integers on
                the device of the parameters, where a negative number counts as 0.
            process_group: add the sum of the `n` of these processes, all of which call this
                (`torch.distributed.group.WORLD`: of all processes). None: `n` is the same in each.

        Raises:
            TypeError: `clock` is no clock, or `n` neither an int nor a 0-dim tensor of integers.
            ValueError: `n` is a negative int, or no schedule of this optimizer is at the clock.
            RuntimeError: `n` is a tensor on the CPU, and a graph is being captured. In each case nothing is changed.

        >>> import torch
        >>> from nexus.optim import FusedAdamW
        >>> from nexus.schedules import WSD, Clock
        >>> tokens = Clock()
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> schedule = WSD(warmup_steps=2_000_000, stable_steps=None, decay_steps=9_000_000, peak_lr=1e-3)
        >>> optimizer = FusedAdamW([weight], lr=schedule.at(tokens))
        >>> weight.grad = torch.ones(2)
        >>> optimizer.step()
        >>> optimizer.advance(tokens, torch.tensor(1_000_000))
        >>> tokens.count
        1000000
        """
        if not isinstance(clock, Clock):
            raise TypeError(f"clock must be a nexus.schedules.Clock, got {shown(clock)}")
        attributes = attributes_of(self)  # type: ignore[arg-type]  # this is a part of one
        if clock not in self._engine.clocks:
            self._engine.settle(attributes)  # a schedule may have been assigned since the last step
        if clock not in self._engine.clocks:
            raise ValueError(
                "no schedule of this optimizer is at this clock: give it lr=schedule.at(clock). A copy of an "
                "optimizer has clocks of its own, as optimizer.param_groups[0]['lr_schedule'].clock"
            )
        devices = devices_of(attributes)
        count = _checked_count(n, devices[0])
        if process_group is not None:
            count = _summed(count, devices[0], process_group)
        for device in devices:
            state = self._engine.state_on(device)
            on_device = sharding.brought(count, device) if isinstance(count, Tensor) else count
            self._engine.clocks.on(clock, state).advance(on_device, state)
        self._engine.clocks.keep(devices)  # parameters may have moved since the last step


def _checked_count(n: int | Tensor, device: torch.device) -> int | Tensor:
    if not isinstance(n, Tensor):
        return check_count("n", n, also="a 0-dim tensor of integers on the device")
    if n.dim() != 0 or n.dtype.is_floating_point or n.dtype.is_complex or n.dtype == torch.bool:
        raise TypeError(
            f"n must be an int >= 0 or a 0-dim tensor of integers, got a tensor of the shape {tuple(n.shape)} of "
            f"{n.dtype}; tensor.sum() adds the counts of several sequences up"
        )
    if n.device.type == "cpu" and device.type != "cpu":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"n is a tensor on the CPU, and a graph would hold the number that it has now: make it on {device}"
            )
        return min(max(int(n), 0), MAX_STEP)
    return n.detach().to(torch.int64).clamp(min=0, max=MAX_STEP)


def _summed(count: int | Tensor, device: torch.device, process_group: ProcessGroup) -> Tensor:
    """The sum over processes, in a new tensor."""
    if isinstance(count, Tensor):
        total = sharding.brought(count, device).clone()
    else:
        total = torch.full((), count, dtype=torch.int64, device=device)
    torch.distributed.all_reduce(total, group=process_group)
    return total
