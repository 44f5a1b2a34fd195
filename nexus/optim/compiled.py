"""The step as one operator of torch's, which `torch.compile` takes into its graphs."""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor

from nexus.backends.shards import is_spread
from nexus.optim import tensor_list
from nexus.optim.param_group import SCHEDULABLE
from nexus.optim.step_memory import step_memory

if TYPE_CHECKING:
    from nexus.optim.fused_adamw import FusedAdamW

_optimizers: WeakValueDictionary[str, FusedAdamW] = WeakValueDictionary()
_numbers = itertools.count()


@dataclass
class Operands:
    """The tensors of an optimizer that `nexus::adamw_step` works on, besides parameters and gradients."""

    params: list[int]  # the ids of the parameters that they are for
    state: list[Tensor]  # what a step writes, each piece of memory once
    rates: list[Tensor]  # what it reads: rates that are the user's tensors

    def places(self) -> list[Any]:
        """What tells these tensors from others; `_place` of each is in it."""
        return [*self.params, *map(id, self.rates), *map(_place, [*self.state, *self.rates])]


class _Shelf:
    """Where a graph finds an optimizer's groups, as they are at each call, and operands, by their names.

    Not in the optimizer: of tensors that it finds there, Dynamo does not guard whether they are those of the model.
    """


_shelf = _Shelf()


class OperandsOf:
    """The present operands of an optimizer. There are none until a step is traced.

    A name stands for the very tensors: guards look at names, and see by them that a graph is out of date.
    """

    def __init__(self, optimizer: FusedAdamW) -> None:
        self.key = f"optimizer_{next(_numbers)}"
        self.name = ""
        self.traced = False  # whether there may be a graph that steps this optimizer
        self.in_graph = True  # whether the operator takes its tensors
        self.grad_norm: Tensor  # operands, (1,)
        self.skipped_steps: Tensor
        self._kept: dict[str, Operands] = {}  # the present; while the operator runs, also those of its graph
        self._running = ""
        _optimizers[self.key] = optimizer
        weakref.finalize(optimizer, _clear_shelf, self.key).atexit = False
        _mark_for_dynamo()

    def renew(self, optimizer: FusedAdamW) -> None:
        """Find the tensors as they are now."""
        for device in optimizer._devices():
            optimizer._state_on(device)
        found, before = _operands(optimizer), self._kept.get(self.name)
        self.in_graph = all(map(_is_operand, _params(optimizer)))
        if before is None or before.places() != found.places():
            self._kept = {name: kept for name, kept in self._kept.items() if name == self._running}
            self.name = f"{self.key}_{next(_numbers)}"
            self._kept[self.name] = found
        operand_at = {operand.data_ptr(): operand for operand in self._kept[self.name].state}
        results = optimizer._state_on(optimizer._devices()[0])
        self.grad_norm = operand_at[results.grad_norm.data_ptr()]
        self.skipped_steps = operand_at[results.skipped.data_ptr()]
        _clear_shelf(self.key)
        setattr(_shelf, f"{self.key}_groups", optimizer.param_groups)
        setattr(_shelf, self.name, self._kept[self.name])

    def step(
        self,
        name: str,
        params: list[Tensor],
        grads: dict[int, Tensor],
        state: list[Tensor],
        rates: list[Tensor],
        update: Callable[[], None],
    ) -> None:
        """Let `update` work on what a graph gives for the operands called `name`; `grads` by index of the parameter.

        What the graph gives are copies where the compiler wants to keep the old values, or has yet to write new ones
        back. Copies are what is read and written then; what they are copies of is left as it was.
        """
        optimizer = _optimizers[self.key]
        own, every = self._kept.get(name), _params(optimizer)
        groups = getattr(_shelf, f"{self.key}_groups")
        if own is None or own.params != list(map(id, every)) or groups is not optimizer.param_groups:
            self.renew(optimizer)  # which guards see
            raise RuntimeError("the optimizer has other parameters than when this was compiled: call it once more")
        self._running = name
        self._kept = {each: kept for each, kept in self._kept.items() if each in (name, self.name)}
        of_params = _copies(params, [every[index] for index in grads])
        written = of_params + _copies(state, own.state)
        read = _copies(rates, own.rates)
        kept = [(real, real.clone()) for _, real in written + read]
        now = set(self._kept[self.name].places() if kept else [])
        own_grads = [param.grad for param in every]
        try:
            for copy, real in of_params:
                real.copy_(copy)
            for copy, real in written[len(of_params) :] + read:
                if _place(real) in now:  # else it is not the optimizer's any more
                    real.copy_(copy)
            for index, param in enumerate(every):
                if grads.get(index) is not own_grads[index]:
                    param.grad = grads.get(index)
            update()
            for copy, real in written:
                copy.copy_(real)
        finally:
            for real, value in kept:
                real.copy_(value)
            for param, grad in zip(every, own_grads, strict=True):
                if param.grad is not grad:
                    param.grad = grad
            self._running = ""


def _clear_shelf(key: str) -> None:
    for name in [name for name in vars(_shelf) if name.startswith(f"{key}_")]:
        delattr(_shelf, name)


def _params(optimizer: FusedAdamW) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _is_operand(param: Tensor) -> bool:
    """Whether the operator takes this parameter.

    One on the meta device would make the whole operator a fake one. And of a number on the CPU, Inductor (torch 2.13)
    reads an old value after the operator that writes the new one.
    """
    return not (is_spread(param) or param.is_meta or (param.dim() == 0 and param.device.type == "cpu"))


def _operands(optimizer: FusedAdamW) -> Operands:
    rates = [
        group[name]
        for group in optimizer.param_groups
        for name in SCHEDULABLE
        if isinstance(group[name], Tensor) and group[name] is not group.outputs.get(name)
    ]
    parts: dict[int, list[Tensor]] = {}
    for (what, *_), tensor in step_memory(optimizer).items():
        if what != "param":
            parts.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    state = [_whole(same) for same in parts.values()]
    return Operands(list(map(id, _params(optimizer))), state, list({id(rate): rate for rate in rates}.values()))


def _whole(parts: list[Tensor]) -> Tensor:
    """One tensor for those that are pieces of one memory: the operands of a graph may not overlap."""
    base = parts[0]._base if parts[0]._is_view() else parts[0]
    if base is not None and base.dim() > 0 and (len(parts) == 1 or all(part._base is base for part in parts)):
        return base  # none without dimensions: see _is_operand
    storage = parts[0].untyped_storage()
    whole = torch.empty(0, dtype=parts[0].dtype, device=parts[0].device)
    return whole.set_(storage, 0, (storage.nbytes() // whole.element_size(),), (1,))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _copies(given: list[Tensor], own: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(copy, what it is a copy of), of those that are copies."""
    pairs = zip(given, own, strict=True)
    return [(copy, real.detach()) for copy, real in pairs if copy is not real and _place(copy) != _place(real)]


# What Dynamo traces.


def step(optimizer: FusedAdamW, closure: Callable[[], Any] | None) -> Any:
    """`FusedAdamW.step`. It reads nothing that moves with the rate."""
    if _is_hooked(optimizer):
        return _step_outside(optimizer, closure)
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    operands = optimizer._operands
    _find_operands(operands.key)
    if not operands.in_graph:
        _step_outside(optimizer, None)
        return loss
    every = [param for group in getattr(_shelf, f"{operands.key}_groups") for param in group["params"]]
    indices = [index for index, param in enumerate(every) if param.grad is not None]
    _add_moments(operands.key, indices)
    found = getattr(_shelf, operands.name)
    params = [every[index] for index in indices]
    # A guard on each: of a tensor that it has met in the model before, Dynamo does not look into the groups.
    _ = [id(param) for param in params]
    grads = [param.grad for param in params]
    scale, inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    with torch.no_grad():
        adamw_step(operands.name, indices, params, found.state, grads, found.rates, scale, inf)
    return loss


def grad_norm(optimizer: FusedAdamW) -> Tensor | None:
    """`FusedAdamW.grad_norm`."""
    operands = optimizer._operands
    _find_operands(operands.key)
    groups = getattr(_shelf, f"{operands.key}_groups")
    measured = optimizer._skip_nonfinite or any(group["max_grad_norm"] is not None for group in groups)
    return operands.grad_norm.view(()) if measured else None


def skipped_steps(optimizer: FusedAdamW) -> Tensor:
    """`FusedAdamW.skipped_steps`."""
    operands = optimizer._operands
    _find_operands(operands.key)
    return operands.skipped_steps.view(())


def _is_hooked(optimizer: FusedAdamW) -> bool:
    of_one = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    of_all = len(torch_optimizer._global_optimizer_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)
    return of_one + of_all > 0  # numbers: it is these that guards look at, not whether a dict is empty


# What it does not trace.


def _step_outside(optimizer: FusedAdamW, closure: Callable[[], Any] | None) -> Any:
    return optimizer.step(closure)


def _find_operands(key: str) -> None:
    """Called when something is traced, and never by the graph."""
    optimizer = _optimizers[key]
    optimizer._operands.traced = True
    try:
        optimizer._operands.renew(optimizer)
    except (TypeError, ValueError, RuntimeError):
        optimizer._operands.in_graph = False  # and the step itself raises what is wrong


def _add_moments(key: str, indices: list[int]) -> None:
    """Make the moments of the parameters that have gradients when a step is traced: they are operands."""
    optimizer = _optimizers[key]
    every = [(param, group) for group in optimizer.param_groups for param in group["params"]]
    starting = [(param, optimizer.state[param], group["amsgrad"]) for param, group in map(every.__getitem__, indices)]
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # the operator raises what is wrong
        tensor_list.complete_states(starting)
    optimizer._operands.renew(optimizer)


@functools.cache
def _mark_for_dynamo() -> None:
    """Tell Dynamo what it is not to trace.

    Once there is an optimizer, and not at import: this loads Dynamo, for about a second, as torch's `Optimizer` does
    in any case when the first is made. A process that only imports this, such as a spawned worker, goes without.
    """
    global _step_outside
    reason = "hooks and DTensors are left to the step outside of the graph"
    _step_outside = torch.compiler.disable(_step_outside, reason=reason)  # type: ignore[no-untyped-call]
    for function in (_find_operands, _add_moments):
        torch.compiler.assume_constant_result(function)  # type: ignore[no-untyped-call]


# What the graph calls.


@torch.library.custom_op("nexus::adamw_step", mutates_args=("params", "state"), tags=(torch.Tag.cudagraph_unsafe,))
def adamw_step(
    name: str,
    indices: list[int],
    params: list[Tensor],
    state: list[Tensor],
    grads: list[Tensor],
    rates: list[Tensor],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update parameters of an optimizer once, in place, as `FusedAdamW.step`.

    Hyperparameters are the optimizer's own, as they are when this runs: a rate that moves changes no operand.

    Args:
        name: of the operands that the graph was made for; see `OperandsOf`.
        indices: of the parameters that have a gradient, among all of the optimizer.
        params: these parameters.
        grads: their gradients.
        state: moments, counters, rates of schedules and whatever else a step writes; see `Operands`.
        rates: rates that are tensors.
        grad_scale: what the gradients are multiples of, one element.
        found_inf: not 0 in a step that is to be skipped, one element.
    """
    optimizer = _optimizers.get(name[: name.rindex("_")])
    if optimizer is None:
        raise RuntimeError("this graph steps an optimizer that is gone")
    update = functools.partial(optimizer._update, grad_scale, found_inf)
    optimizer._operands.step(name, params, dict(zip(indices, grads, strict=True)), state, rates, update)


@adamw_step.register_fake
def _(*_: Any) -> None:
    """It only writes."""
