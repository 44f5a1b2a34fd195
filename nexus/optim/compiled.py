"""The step as one operator of torch's, which `torch.compile` takes into its graphs."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor

from nexus.backends.shards import is_spread
from nexus.optim import tensor_list
from nexus.optim.step_memory import step_memory

if TYPE_CHECKING:
    from nexus.backends.interface import Plan
    from nexus.optim.fused_adamw import FusedAdamW

_optimizers: WeakValueDictionary[str, FusedAdamW] = WeakValueDictionary()
_numbers = itertools.count()


class Operands:
    """The tensors of an optimizer that graphs of `torch.compile` hand to `nexus::adamw_step`.

    They are found when a step is traced. A step that finds others there puts them here, and the compiler's guards,
    which look at these lists, see that the graph is out of date.
    """

    def __init__(self, optimizer: FusedAdamW) -> None:
        self.name = f"optimizer {next(_numbers)}"  # a string: for Dynamo, an int may become a variable
        self.params: list[Tensor] = []  # whose gradients a step reads
        self.written: list[Tensor] = []  # all that a step writes, each piece of memory once
        self._places: list[Any] = []
        self.grad_norm: Tensor | None = None
        self.skipped_steps: Tensor
        self.in_graph = True  # whether the operator takes these tensors
        self.plan: Plan | None = None  # of the optimizer, when they were found
        _optimizers[self.name] = optimizer

    def renew(self, optimizer: FusedAdamW) -> None:
        """Find the tensors as they are now."""
        for device in optimizer._devices():
            optimizer._state_on(device)
        self.plan = optimizer._plan
        self.grad_norm, self.skipped_steps = optimizer.grad_norm, optimizer.skipped_steps
        params = [param for group in optimizer.param_groups for param in group["params"]]
        # An operand on the meta device would make the whole operator a fake one.
        self.in_graph = not any(is_spread(param) or param.is_meta for param in params)
        parts: dict[int, list[Tensor]] = {}
        for (what, *_), tensor in step_memory(optimizer).items():
            if what != "param" and self.in_graph:
                parts.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
        state = [_whole(part[0]) if len(part) > 1 or part[0]._is_view() else part[0] for part in parts.values()]
        places = [*map(id, params), *map(_place, state)]
        if places != self._places:
            self._places, self.params, self.written = places, params, [*params, *state]


def step(optimizer: FusedAdamW, closure: Callable[[], Any] | None) -> Any:
    """`FusedAdamW.step` as Dynamo traces it. It reads nothing that moves with the rate."""
    if _is_hooked(optimizer):
        return _step_outside(optimizer, closure)
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    operands = optimizer._operands
    _find_operands(operands.name)
    if not operands.in_graph:
        _step_outside(optimizer, None)
        return loss
    grads = [param.grad for param in operands.params]
    _add_moments(operands.name, [grad is not None for grad in grads])
    scale, inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    with torch.no_grad():
        adamw_step(operands.name, operands.written, grads, scale, inf)
    return loss


def zero_grad(optimizer: FusedAdamW, set_to_none: bool) -> None:
    """`FusedAdamW.zero_grad` as Dynamo traces it."""
    operands = optimizer._operands
    _find_operands(operands.name)
    with torch.no_grad():
        for param in operands.params:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()


def grad_norm(optimizer: FusedAdamW) -> Tensor | None:
    """`FusedAdamW.grad_norm` as Dynamo traces it."""
    _find_operands(optimizer._operands.name)
    return optimizer._operands.grad_norm


def skipped_steps(optimizer: FusedAdamW) -> Tensor:
    """`FusedAdamW.skipped_steps` as Dynamo traces it."""
    _find_operands(optimizer._operands.name)
    return optimizer._operands.skipped_steps


def _is_hooked(optimizer: FusedAdamW) -> bool:
    of_one = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    of_all = len(torch_optimizer._global_optimizer_pre_hooks) + len(torch_optimizer._global_optimizer_post_hooks)
    return of_one + of_all > 0  # numbers: it is these that guards look at, not whether a dict is empty


@torch.compiler.disable(reason="hooks and DTensors are left to the step outside of the graph")  # type: ignore[no-untyped-call, untyped-decorator]
def _step_outside(optimizer: FusedAdamW, closure: Callable[[], Any] | None) -> Any:
    return optimizer.step(closure)


# The two that follow are called when something is traced, and never by the graph.


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _find_operands(name: str) -> None:
    _optimizers[name]._operands.renew(_optimizers[name])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _add_moments(name: str, have_grads: list[bool]) -> None:
    """Make the moments of the parameters that will have gradients: they are operands."""
    optimizer = _optimizers[name]
    have = iter(have_grads)
    with contextlib.suppress(TypeError, ValueError, RuntimeError):  # the operator raises what is wrong, when it runs
        optimizer._settle_groups()
        tensor_list.complete_states(
            [
                (param, optimizer.state[param], group["amsgrad"])
                for group in optimizer.param_groups
                for param in group["params"]
                if next(have)
            ]
        )
    optimizer._operands.renew(optimizer)


def _whole(part: Tensor) -> Tensor:
    """The memory that a tensor is a part of: a graph's operands may not overlap."""
    storage = part.untyped_storage()
    whole = torch.empty(0, dtype=part.dtype, device=part.device)
    return whole.set_(storage, 0, (storage.nbytes() // part.element_size(),), (1,))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


@torch.library.custom_op("nexus::adamw_step", mutates_args=("written",), tags=(torch.Tag.cudagraph_unsafe,))
def adamw_step(
    name: str,
    written: list[Tensor],
    grads: list[Tensor | None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update every parameter of an optimizer once, in place, as `FusedAdamW.step`.

    Hyperparameters are the optimizer's own, as they are when this runs: a rate that moves changes no operand.

    Args:
        name: the optimizer's.
        written: see `Operands`. A compiler may give copies, which are then what is updated, and so are the originals.
        grads: of each of `Operands.params`, or None.
        grad_scale: what the gradients are multiples of, one element.
        found_inf: not 0 in a step that is to be skipped, one element.
    """
    optimizer = _optimizers.get(name)
    if optimizer is None:
        raise RuntimeError("this graph steps an optimizer that is gone")
    operands = optimizer._operands
    copies = [
        (copy, real.detach()) for copy, real in zip(written, operands.written, strict=True) if not _is(copy, real)
    ]
    for copy, real in copies:
        real.copy_(copy)
    own_grads = [(param, param.grad) for param in operands.params]
    try:
        for (param, own), grad in zip(own_grads, grads, strict=True):
            if not _is(grad, own):
                param.grad = grad
        optimizer._update(grad_scale, found_inf)
    finally:
        for param, own in own_grads:
            if param.grad is not own:
                param.grad = own
    for copy, real in copies:
        copy.copy_(real)
    if optimizer._plan is not operands.plan:
        operands.renew(optimizer)


@adamw_step.register_fake
def _(*_: Any) -> None:
    """It only writes."""


def _is(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are one place in memory, laid out the same."""
    if a is b or a is None or b is None:
        return a is b
    return _place(a) == _place(b)
