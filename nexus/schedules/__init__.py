r"""Learning-rate schedules as immutable values: the float64 oracle of every evaluator in this package.

Convention, stated here once: `t` is the number of completed updates, from 0, and update `t` uses
`schedule(t)`. That equals the usual loop `optimizer.step(); scheduler.step()` with torch's schedulers.

`layers()` lowers a schedule to the rows that the evaluators walk, or `segments()` where one layer will do. Calling a
schedule evaluates these in Python, in the one order of operations that every evaluator keeps to, in float64:
`low + weight * (high - low)`, with `weight` a function of `p = position / length`. The tests prove all of them
equal, and equal to the closed forms in the docstrings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexus.arguments import MAX_STEP
from nexus.schedules.arc import Arc
from nexus.schedules.base import Schedule
from nexus.schedules.clock import Clock
from nexus.schedules.compose import join, maximum, minimum
from nexus.schedules.constant import Constant
from nexus.schedules.cosine import Cosine, CosineRestarts
from nexus.schedules.curves import Curve, Segment
from nexus.schedules.cyclic import Cyclic, OneCycle
from nexus.schedules.exponential import Exponential, MultiStep, StepDecay
from nexus.schedules.linear import Linear, Piecewise
from nexus.schedules.plateau import ReduceOnPlateau
from nexus.schedules.powers import InverseSqrt, Polynomial, Tanh
from nexus.schedules.sampled import Sampled
from nexus.schedules.wsd import WSD
from nexus.schedules.wsds import WSDS

if TYPE_CHECKING:
    import torch

    from nexus.schedules.imports import from_optax, from_timm, from_torch, from_transformers

__all__ = [
    "MAX_STEP",
    "WSD",
    "WSDS",
    "Arc",
    "Clock",
    "Constant",
    "Cosine",
    "CosineRestarts",
    "Curve",
    "Cyclic",
    "Exponential",
    "InverseSqrt",
    "Linear",
    "MultiStep",
    "OneCycle",
    "Piecewise",
    "Polynomial",
    "ReduceOnPlateau",
    "Sampled",
    "Schedule",
    "Segment",
    "StepDecay",
    "Tanh",
    "evaluate",
    "from_optax",
    "from_timm",
    "from_torch",
    "from_transformers",
    "join",
    "maximum",
    "minimum",
]


def __getattr__(name: str) -> object:
    if name.startswith("from_") and name in __all__:
        from nexus.schedules import imports  # imports torch

        return getattr(imports, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def evaluate(
    schedule: Schedule,
    steps: torch.Tensor,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The rates at any steps, by the very evaluator that the optimizer's kernels use.

    Args:
        schedule: any `Schedule`.
        steps: int64 tensor of any shape: numbers of completed updates, from 0 to 2**53.
        device: where to evaluate; that of `steps` by default.
        backend: a backend's name, or `"auto"` for the one that the optimizer would choose there.

    Returns:
        float64 tensor of the shape of `steps`.

    Raises:
        TypeError, ValueError: `steps` of another dtype or out of range, or an unknown backend.
    """
    from nexus import backends  # imports torch, which the oracle does not need

    return backends.evaluate(schedule, steps, device, backend)
