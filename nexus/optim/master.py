"""Float32 weights for parameters that are the upper halves of such."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nexus.arguments import shown
from nexus.backends import codecs
from nexus.backends.codecs import flat
from nexus.backends.sharding import local, respread
from nexus.optim.parameters import has_memory, is_dense, is_trained, named_parameters
from nexus.optim.state import check_streams, complete_states, fit_master, is_complete
from nexus.optim.storage import storage_of

if TYPE_CHECKING:
    from nexus.optim.fused_adamw import FusedAdamW
    from nexus.optim.groups import ParamGroup


@torch.no_grad()
def load_master(optimizer: FusedAdamW, weights: Mapping[str, Tensor] | Iterable[Tensor]) -> None:
    """See `FusedAdamW.load_master`."""
    chosen = []
    for (index, param, name), weight in zip(
        named_parameters(optimizer.param_groups), _in_order(optimizer.param_groups, weights), strict=True
    ):
        if not is_trained(param):
            continue
        storage = storage_of(param, optimizer.param_groups[index], name)
        if weight.shape != param.shape or weight.dtype not in (torch.float32, param.dtype):
            raise ValueError(
                f"the weight of {name} must be of shape {tuple(param.shape)} and of float32, got "
                f"{tuple(weight.shape)} of {weight.dtype}"
            )
        if not has_memory(param) or not has_memory(weight):
            given = f"{weight.layout} on {weight.device} for a parameter on {param.device}"
            raise ValueError(f"the weight of {name} must be dense, and both must have memory, got {given}")
        if storage.master_low is None and weight.dtype != param.dtype:
            raise ValueError(
                f"{name} is of {param.dtype} and has no master weight, which a float32 weight would go to: give its "
                "group master_weight_bits=24 or 32, or a weight of its own type"
            )
        chosen.append((param, weight, storage, name))
    for param, _, storage, name in chosen:
        if is_complete(optimizer.state.get(param)):
            check_streams(optimizer.state[param], storage, param, name)
    states = [(optimizer.state.setdefault(param, {}), param, name, storage) for param, _, storage, name in chosen]
    complete_states(states)
    for (state, param, _, storage), (_, weight, _, _) in zip(states, chosen, strict=True):
        part, weight = local(param).detach(), respread(weight.detach(), param)
        if storage.master_low is None:
            part.copy_(weight)
            continue
        target = part if is_dense(part) else torch.empty_like(part, memory_format=torch.contiguous_format)
        fit_master(state, storage, param, target)
        low = local(state["master_low"])
        value = torch.empty_like(low, dtype=torch.float32).copy_(weight)
        upper, lower = codecs.split(flat(value), low.dtype)
        part.copy_(upper.as_strided(low.shape, low.stride()))
        flat(low).copy_(lower)


def _in_order(groups: list[ParamGroup], weights: Mapping[str, Tensor] | Iterable[Tensor]) -> list[Tensor]:
    """One for each parameter of the groups."""
    count = sum(len(group["params"]) for group in groups)
    if isinstance(weights, Mapping):
        names = [name for group in groups for name in group.get("param_names", ())]
        if len(names) != count:
            raise ValueError(
                "the parameters have no names here, by which weights could be found: make the optimizer with "
                "model.named_parameters(), or give a list of weights in the order of its parameters"
            )
        missing = [name for name in names if name not in weights]
        if missing:
            raise ValueError(f"weights has no {shown(missing[0])}, and {len(missing)} of {count} names are missing")
        weights = [weights[name] for name in names]
    listed = list(weights)
    if len(listed) != count or not all(isinstance(each, Tensor) for each in listed):
        raise ValueError(f"weights must be {count} tensors, one for each parameter here, got {shown(weights)}")
    return listed
