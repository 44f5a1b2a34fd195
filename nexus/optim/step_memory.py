"""The memory that a step of a `FusedAdamW` writes, for who wants a step to leave no trace."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from torch import Tensor

from nexus.backends.sharding import local
from nexus.optim.engine import attributes_of, engine_of

if TYPE_CHECKING:
    from nexus.optim.fused_adamw import FusedAdamW


def step_memory(optimizer: FusedAdamW) -> dict[tuple[Hashable, ...], Tensor]:
    """Every tensor that the kernels of a step write, by what it is: kernels tell torch nothing of what they do.

    What is not there yet is zero before the first step that writes to it.
    """
    engine = engine_of(optimizer)
    engine.settle(attributes_of(optimizer))
    found: dict[tuple[Hashable, ...], Tensor] = {}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        found["param", index] = local(param).detach()
        for name, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor):
                found["state", index, name] = local(value)
    for device, state in engine.states.items():
        for name in ("completed", "skipped", "sum_of_squares", "grad_norm"):
            found[device, name] = getattr(state, name)
    for index, group in enumerate(optimizer.param_groups):
        for name, output in group.outputs.items():
            found["rate", index, name] = output.data  # whose versions do not count as the user's
    if engine.history is not None:
        found["history",] = engine.history.block
    return found
