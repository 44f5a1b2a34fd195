"""Arguments that `torch.optim.AdamW` has, and that say how it is to run."""

from __future__ import annotations

from torch import Tensor

from nexus.arguments import shown
from nexus.schedules import Schedule


def check_torch_options(
    *, betas: object, capturable: object, differentiable: object, **implementations: object
) -> None:
    """Check what `torch.optim.AdamW` is told of how to run. Of these, only `differentiable` would change anything.

    Raises:
        TypeError: an option that is no bool.
        ValueError: one of the betas is a tensor, one a number. In a group, schedulers of momenta make such pairs.
        RuntimeError: two implementations at once; `differentiable=True`. As in torch.
    """
    given = [beta for beta in betas if not isinstance(beta, Schedule)] if isinstance(betas, (tuple, list)) else []
    if len({isinstance(beta, Tensor) for beta in given}) > 1:
        raise ValueError(f"betas must be either both floats or both Tensors, got {shown(betas)}")
    for name, value in implementations.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool or None, got {shown(value)}")
    if all(implementations.values()):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together; leave both out, FusedAdamW is fused")
    if not isinstance(capturable, bool):
        raise TypeError(f"capturable must be a bool, got {shown(capturable)}")
    if not isinstance(differentiable, bool):
        raise TypeError(f"differentiable must be a bool, got {shown(differentiable)}")
    refuse_differentiable(differentiable)


def refuse_differentiable(value: object) -> None:
    """Raise where an update is asked for that gradients go through."""
    if value:
        raise RuntimeError(
            "`fused` does not support `differentiable`, and FusedAdamW is fused: use "
            "torch.optim.AdamW(differentiable=True) where gradients are to go through the update"
        )
