"""What the optimizer hands to a backend, and what it expects of one. Backends know no parameter groups.

A `Plan` says where everything is: parameters, gradients, moments, counters, rates. The optimizer makes a new
one whenever `Runner.changed` says that the last is out of date; in between, a backend may keep raw pointers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from nexus.backends import sharding


class Change(IntEnum):
    """What happened since the last plan. The values are those of the native module."""

    NONE = 0
    SETTINGS = 1  # a hyperparameter of a group
    TENSORS = 2  # anything else: tensors, gradients, groups


@dataclass
class Rate:
    """A number that comes from a float, from a one-element tensor, or from a schedule."""

    value: float = 0.0
    tensor: Tensor | None = None  # read at every step
    host: Tensor | None = None  # on the CPU, where the parameters are elsewhere: goes into `tensor` at every step
    table: Tensor | None = None  # float64 (layers, rows, 9): a schedule, evaluated at every step
    clock: Tensor | None = None  # 0-dim int64: the count to evaluate it at; None: of completed updates
    scale: float = 1.0  # multiplies the schedule
    last: Tensor | None = None  # 0-dim float64: where a schedule's value is left once used


GroupSettings: TypeAlias = dict[str, Any]
"""The hyperparameters of a parameter group on one device: a number, or a `Rate`, for each field of the extension's
record `Group` (csrc/record.h)."""


LAST_WRITE = [object()]
"""Another object after each write to a parameter group, of whatever optimizer: what a watch compares in each step."""


STATE_NAMES = (
    "step",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "average",
    "exp_avg_scale",
    "exp_avg_sq_scale",
    "max_exp_avg_sq_scale",
    "master_low",
)
"""The keys of a parameter's state whose tensors a step uses."""


class StateStreams(NamedTuple):
    """What a step keeps for one parameter from one update to the next."""

    exp_avg: Tensor  # of the arithmetic's dtype, bfloat16 or int8
    exp_avg_sq: Tensor  # of the arithmetic's dtype, bfloat16 or uint8
    max_exp_avg_sq: Tensor | None  # as exp_avg_sq
    exp_avg_scale: Tensor | None  # float32, one for each 128 elements, of a moment in 8 bits
    exp_avg_sq_scale: Tensor | None
    max_exp_avg_sq_scale: Tensor | None
    master_low: Tensor | None  # the low bits of a float32 master weight: int16 (all), or uint8 (the upper half)
    average: Tensor | None  # of the parameter over its updates: of the arithmetic's dtype, or bfloat16
    step: Tensor  # 0-dim float64: this parameter's own count of updates, which it holds exactly up to 2**53


@dataclass(eq=False)
class TensorEntry:
    """Every stream of one parameter, all of one shape and one layout, dense in memory.

    Of a DTensor, the streams are the part of it that is in this process. Where the user's parameter or gradient is
    laid out otherwise, a buffer stands in for it. The gradient itself is not held on to: it may be freed between
    steps.
    """

    original: Tensor
    group: int
    param_buffer: Tensor | None
    grad_buffer: Tensor | None
    state: StateStreams | None  # None once a backend has their addresses: the state is its owner's to free
    ordinal: int  # of the parameter in the optimizer
    first: int  # where its element 0 is in the whole tensor, of which this process may have a part
    stochastic_rounding: bool

    @property
    def param(self) -> Tensor:
        """What a kernel updates."""
        return sharding.local(self.original).detach() if self.param_buffer is None else self.param_buffer

    @property
    def grad(self) -> Tensor | None:
        """What a kernel reads; None in a step in which the parameter has no gradient."""
        grad = self.original.grad
        if grad is None:
            return None
        return sharding.local(grad) if self.grad_buffer is None else self.grad_buffer

    @property
    def staged(self) -> bool:
        """Whether `fetch` and `put_back` have anything to do."""
        return self.param_buffer is not None or self.grad_buffer is not None

    def fetch(self) -> None:
        """Copy into the buffers, before a step."""
        grad = self.original.grad
        if grad is not None and self.param_buffer is not None:
            self.param_buffer.copy_(sharding.local(self.original).detach())
        if grad is not None and self.grad_buffer is not None:
            self.grad_buffer.copy_(sharding.spread_as(grad, self.original))

    def put_back(self) -> None:
        """Copy out of the parameter's buffer, after a step."""
        if self.original.grad is not None and self.param_buffer is not None:
            sharding.local(self.original).detach().copy_(self.param_buffer)


@dataclass
class StepState:
    """Device memory that outlives plans: counters and what a step leaves for its readers. Never replaced."""

    device: torch.device
    skip_nonfinite: bool
    seed: int  # of stochastic rounding
    completed: Tensor = field(init=False)  # t, the argument of every schedule
    skipped: Tensor = field(init=False)
    sum_of_squares: Tensor = field(init=False)
    grad_norm: Tensor = field(init=False)

    @torch.inference_mode(False)  # it outlives a mode in which it may be made
    def __post_init__(self) -> None:
        self.completed = torch.zeros((), dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.device)
        self.sum_of_squares = torch.zeros((), dtype=torch.float64, device=self.device)
        self.grad_norm = torch.zeros((), dtype=torch.float64, device=self.device)


HISTORY_COLUMNS = 3
"""Columns of a row of a `Ring` that are the step's; after them, each group has two."""


@dataclass(frozen=True, eq=False)
class Ring:
    """Where each step leaves a row: t, skipped, gradient norm (NaN: not measured); lr and clip coefficient by group.

    A step that is skipped leaves the rates that it would have used.
    """

    block: Tensor  # float64 (1 + slots * width,): the count of rows written so far, as an int64; then the rows
    slots: int  # one more than are read, so that an unfinished row never overwrites a readable one
    groups: int

    @property
    def width(self) -> int:
        """Columns of a row."""
        return HISTORY_COLUMNS + 2 * self.groups

    @property
    def count(self) -> Tensor:
        """int64 (1,), a view: row `i` is in slot `i % slots`, and row `count` is the next to be written."""
        return self.block[:1].view(torch.int64)

    @property
    def rows(self) -> Tensor:
        """(slots, width), a view."""
        return self.block[1:].view(self.slots, self.width)


@dataclass
class DevicePlan:
    """What one step works on, on one device."""

    state: StepState
    groups: list[GroupSettings]
    entries: list[TensorEntry]
    measures_norm: bool  # some group clips, or non-finite gradients are to be skipped
    history: Ring | None = None  # on one device of the plan at most
    advances: bool = True  # else the counters stay as they are, since another step ends this update


@dataclass
class Plan:
    """What one step works on. `parameters` has them all, in the order of the groups.

    A parameter that has never had a gradient has no entry. `norm_parts` is empty where nothing is spread over
    processes; where something is, it is the same on all of them, and the first part is the largest.
    """

    parameters: list[tuple[Tensor, TensorEntry | None]]
    devices: dict[torch.device, DevicePlan]
    norm_parts: list[sharding.NormPart] = field(default_factory=list)


class Glance(Protocol):
    """Whether all that a captured step depends on is as it was."""

    def remember(self, attributes: dict[str, Any]) -> None:
        """Take parameters, gradients and settings of the optimizer whose `__dict__` is given, as they are now."""

    def same(self, attributes: dict[str, Any]) -> bool:
        """Whether each is the very one that was remembered, and where it was."""


class Runner:
    """A backend at work for one optimizer. As it stands here: one that asks for a new plan before each step."""

    shares_prologue = False  # whether `prologue` does anything

    def changed(self, attributes: dict[str, Any]) -> int:
        """A `Change`: what the optimizer has to renew before `step`; pointers that merely moved are followed.

        Args:
            attributes: the optimizer's `__dict__`. A runner does not keep it: the optimizer owns the runner.
        """
        return Change.TENSORS

    def forget(self) -> None:
        """Let `changed` ask for a new plan."""

    def glance(self) -> Glance | None:
        """What tells quickly, before a replay, whether anything has changed since the last; None without graphs."""
        return None

    def release_state(self) -> None:
        """Hold no reference to the optimizer's state until `changed` is asked again."""
        raise NotImplementedError

    def bind(self, plan: Plan, attributes: dict[str, Any]) -> None:
        """Take over a new plan of the optimizer whose `__dict__` is `attributes`."""
        raise NotImplementedError

    def update_settings(self) -> None:
        """Take over the hyperparameters of the plan's groups, which have changed; its tensors have not."""

    @contextlib.contextmanager
    def capturing(self) -> Iterator[list[object]]:
        """To be entered before a capture. The list that it gives keeps alive what the graph reads of this runner.

        What the graph of any other capture reads lives as long as the runner.
        """
        yield []

    def has_captured(self) -> bool:
        """Whether a graph may have captured a step: what that writes to is never replaced."""
        return False

    def update_captured(self) -> None:
        """Give the hyperparameters to the steps that graphs have captured, too."""

    def prologue(self) -> None:
        """Do what the steps of other runners, each of one parameter of the plan, have in common."""

    def take_prologue(self, other: Runner | None, param: Tensor) -> None:
        """Let the step that comes next, of one parameter, use what another runner has prepared of it, if it has."""

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update everything once: enqueued, without synchronising with the host."""
        raise NotImplementedError


class Backend(Protocol):
    """A way to run: a module of this package."""

    NAME: str
    DEVICE_TYPES: frozenset[str]  # what its tensors may be on

    def unavailable(self, devices: Iterable[torch.device] = ()) -> str | None:
        """Why this backend cannot run here, or on one of these devices; None if it can."""

    def detail(self) -> str:
        """What it runs on, in words, where it can run."""

    def runner(self, setting_names: tuple[str, ...]) -> Runner:
        """One for an optimizer; `setting_names` are the keys of its groups' hyperparameters."""

    def evaluate(self, table: Tensor, steps: Tensor) -> Tensor:
        """A schedule's values at int64 `steps`, on their device, in float64."""
