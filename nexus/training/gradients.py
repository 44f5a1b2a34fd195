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
        self._before = [param.grad for param in self._params]
        self._places: list[Tensor | None] = [None] * len(named)
        self._roles = [Role.REPLACED] * len(named)
        self._fetched: list[tuple[int, Tensor, Tensor | None]] = []
        self._left: list[tuple[Tensor, Tensor | None]] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Find out what becomes of gradients in a run of the step; it sees those that are there, or zeros."""
        probes = [
            torch.zeros_like(param) if grad is None else grad.detach().clone()
            for param, grad in zip(self._params, self._before, strict=True)
        ]
        versions = [_versions(probe) for probe in probes]
        computed: set[int] = set()
        hooks = []
        for index, (param, probe) in enumerate(zip(self._params, probes, strict=True)):
            param.grad = probe
            register = param.register_post_accumulate_grad_hook
            hooks.append(register(_noting(computed, index)))  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._missing = []
        for index, (param, probe) in enumerate(zip(self._params, probes, strict=True)):
            now, before = param.grad, self._before[index]
            if now is probe:
                self._roles[index] = Role.KEPT
                self._places[index] = probe if before is None else before
            elif _versions(probe) != versions[index]:
                self._roles[index] = Role.CONSUMED
            if index not in computed and before is None and (now is None or now is probe):
                self._missing.append(self._names[index])

    def refusal(self) -> str | None:
        """Why a graph could not do what the step that was watched does."""
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

    def restore(self) -> None:
        """Let every parameter have the gradient that it had at first."""
        for param, grad in zip(self._params, self._before, strict=True):
            param.grad = grad

    def before_capture(self) -> None:
        """Leave what the graph is to see: gradients in their places, or none."""
        for param, place in zip(self._params, self._places, strict=True):
            param.grad = place

    def after_capture(self) -> None:
        """Note where the graph leaves the gradients."""
        for index, (param, role, place) in enumerate(zip(self._params, self._roles, self._places, strict=True)):
            if role is not Role.REPLACED:
                self._fetched.append((index, param, place))
            if role is not Role.KEPT:
                self._left.append((param, param.grad))
        self.restore()
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


def _versions(tensor: Tensor) -> tuple[int, int]:
    """What rises when it is written to: autograd adds to a DTensor, FSDP2 to the part that is here."""
    return tensor._version, local(tensor)._version


def _noting(computed: set[int], index: int) -> Callable[[Tensor], None]:
    return lambda param: computed.add(index)
