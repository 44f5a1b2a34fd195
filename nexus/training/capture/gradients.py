"""What a train step does with `p.grad`, and how its graph is given the same to see.

A step that clears the gradients before it computes them needs nothing. One that adds to what is there (gradient
accumulation, or a `zero_grad` outside of the step) is captured over gradients which lie outside of the graph's
memory and stay in their places, so that steps that were captured one by one share them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import Enum, auto

import torch
from torch import Tensor

from nexus.backends.sharding import local


class Role(Enum):
    """What a step does with the gradient that it finds."""

    REPLACED = auto()  # drops it unseen
    KEPT = auto()  # adds to it, or overwrites it, in its place
    CONSUMED = auto()  # adds to it, and then drops it


class Gradients:
    """The gradients of one captured step.

    Args:
        named: the parameters that require one, and their names.
    """

    def __init__(self, named: list[tuple[str, Tensor]]) -> None:
        self._names = [name for name, _ in named]
        self._params = [param for _, param in named]
        self._before: list[Tensor | None] = [None] * len(named)
        self._places: list[Tensor | None] = [None] * len(named)
        self._roles: list[Role | None] = [None] * len(named)  # None: not seen yet
        self._missing: list[str] = []
        self._fetched: list[tuple[int, Tensor, Tensor | None]] = []
        self._left: list[tuple[Tensor, Tensor | None]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """See what becomes of the gradients in a plain run of the step."""
        self._before = [param.grad for param in self._params]
        versions = [None if grad is None else _versions(grad) for grad in self._before]
        computed: set[int] = set()
        hooks = []
        for index, param in enumerate(self._params):
            register = param.register_post_accumulate_grad_hook
            hooks.append(register(_noting(computed, index)))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._missing = []
        for index, (param, before) in enumerate(zip(self._params, self._before, strict=True)):
            if before is not None:
                self._roles[index] = _role(before, versions[index], param.grad)
            elif param.grad is None and index in computed:
                # If the step drops it at the start, too, that is all the same: the graph begins without one.
                self._roles[index] = Role.CONSUMED
            elif param.grad is None:
                self._missing.append(self._names[index])

    def refusal(self) -> str | None:
        """Why a graph could not do what the step that was watched has done."""
        if self._missing:
            rest = f" and {len(self._missing) - 1} more have" if len(self._missing) > 1 else " has"
            return (
                f"{self._missing[0]}{rest} no gradient in the warm-up, and would never be updated by the graph. "
                "If it is not to be trained, set requires_grad_(False) or leave it out of the optimizer; if it is "
                "used in some steps only, run those steps without capture"
            )
        for name, role, before in zip(self._names, self._roles, self._before, strict=True):
            if role is Role.CONSUMED and before is not None:
                return f"{name} has a gradient before the step, {_CONSUMED}"
        return None

    @contextlib.contextmanager
    def captured(self) -> Iterator[None]:
        """Let the run that is captured see gradients in their places, or none; afterwards, all is as it was.

        Raises:
            RuntimeError: the step adds to a gradient and then drops it.
        """
        self._before = [param.grad for param in self._params]
        self._places = [None] * len(self._params)
        for index, (param, role) in enumerate(zip(self._params, self._roles, strict=True)):
            if role in (None, Role.KEPT):
                self._places[index] = torch.zeros_like(param) if param.grad is None else param.grad
            param.grad = self._places[index]
        versions = [None if place is None else _versions(place) for place in self._places]
        self._fetched, self._left = [], []
        try:
            yield
            for index, (param, place) in enumerate(zip(self._params, self._places, strict=True)):
                role = self._roles[index]
                if place is not None:
                    role = _role(place, versions[index], param.grad)
                    if role is Role.CONSUMED:
                        raise RuntimeError(f"{self._names[index]} has a gradient before the step, {_CONSUMED}")
                if role is not Role.REPLACED:
                    self._fetched.append((index, param, place))
                if role is not Role.KEPT:
                    self._left.append((param, param.grad))
        finally:
            for param, grad in zip(self._params, self._before, strict=True):
                param.grad = grad
            self._before = []

    def fetch(self) -> None:
        """Bring what the parameters have now to where the graph looks for it; before each replay.

        Raises:
            RuntimeError: a gradient that the graph cannot see.
        """
        for index, param, place in self._fetched:
            grad = param.grad
            if grad is place:
                continue
            if place is None:
                raise RuntimeError(f"{self._names[index]} has a gradient before the step, {_CONSUMED}")
            if grad is None:
                place.zero_()
            else:
                place.copy_(grad)
            param.grad = place

    def leave(self) -> None:
        """Let the parameters have what the graph has left; after each replay."""
        for param, grad in self._left:
            if param.grad is not grad:
                param.grad = grad


_CONSUMED = (
    "and the step adds to it and then sets it to None: a graph that has dropped a gradient would not see the next. "
    "To accumulate gradients, clear them by zero_grad(set_to_none=False); if it is left from before, clear it first"
)


def _role(before: Tensor, versions: tuple[int, int] | None, now: Tensor | None) -> Role:
    if now is before:
        return Role.KEPT
    return Role.REPLACED if _versions(before) == versions else Role.CONSUMED


def _versions(tensor: Tensor) -> tuple[int, int]:
    """What rises when it is written to: autograd adds to a DTensor, FSDP2 to the part that is here."""
    return tensor._version, local(tensor)._version


def _noting(computed: set[int], index: int) -> Callable[[Tensor], None]:
    return lambda param: computed.add(index)
