"""What can be said of an optimizer before a step is run: whether a graph of it would do what it does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from nexus.arguments import shown
from nexus.optim import FusedAdamW

_EAGER_BACKENDS = ("native", "reference")


def named_parameters(optimizer: Optimizer) -> list[tuple[str, Tensor]]:
    """All parameters, and their names in an error."""
    found = []
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for i, param in enumerate(group["params"]):
            found.append((f"parameter {names[i] if names else i} of group {index}", param))
    return found


def check_capturable(optimizer: Optimizer, device: torch.device) -> None:
    """Refuse an optimizer whose step a graph cannot hold.

    Raises:
        RuntimeError: with cause and remedy.
    """
    for name, param in named_parameters(optimizer):
        if param.device != device:
            raise RuntimeError(
                f"{name} is on {param.device}, and others are on {device}: a train step is captured on one device. "
                "Move the model there as a whole, before the optimizer is made"
            )
    if isinstance(optimizer, FusedAdamW):
        if optimizer.backend in _EAGER_BACKENDS:
            raise RuntimeError(
                f"a FusedAdamW with backend={optimizer.backend!r} cannot be captured: it takes hyperparameters from "
                "the host at each step. Use backend='cuda' or 'triton'; 'auto' finds them"
            )
    elif not all(group.get("capturable", False) for group in optimizer.param_groups):
        raise RuntimeError(
            f"this {type(optimizer).__name__} cannot be captured: it counts its steps on the host, or may. Make it "
            "with capturable=True, if it has that, or use nexus.optim.FusedAdamW"
        )
    if hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        for index, group in enumerate(optimizer.param_groups):
            if not isinstance(group["lr"], Tensor):
                raise RuntimeError(
                    f"group {index} has the rate {shown(group['lr'])}, a number, and a scheduler of torch that sets "
                    "it: a graph would go on with the number that it was captured with. Give FusedAdamW a Schedule "
                    "as lr, or use a scheduler of nexus.training.schedulers, or make lr a tensor "
                    f"(torch.tensor({float(group['lr'])!r}, device={str(device)!r})) and call the scheduler's step() "
                    "outside of the captured step"
                )
