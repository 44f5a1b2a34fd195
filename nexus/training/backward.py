"""Parameters that are updated during the backward pass, each as soon as its gradient is there."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nexus.arguments import shown
from nexus.backends.interface import LAST_WRITE, RATES, DevicePlan, StepState
from nexus.optim import FusedAdamW
from nexus.optim.engine import Attributes, Engine, attributes_of, engine_of
from nexus.optim.groups import ParamGroup
from nexus.optim.settings import SETTINGS
from nexus.schedules import Schedule
from nexus.schedules.table import ScheduleTable

__all__ = ["StepInBackward", "step_in_backward"]


def step_in_backward(model: nn.Module, optimizer: FusedAdamW) -> StepInBackward:
    """Let each backward pass update the parameters as it goes, and free each gradient at once.

    The training loop stays as it is, one backward pass and one `optimizer.step()`: what a backward pass has updated
    already, the step leaves alone. It updates the others that have a gradient, and ends the update: schedules and
    the count of updates advance there. The parameters after it are, bit for bit, those of the plain loop. What
    changes is that the gradients are never all there at once.

    Args:
        model: whose parameters are updated in the backward pass, as far as they are the optimizer's.
        optimizer: without `max_grad_norm` and `skip_nonfinite`: a norm needs all gradients before the first update.

    Returns:
        A handle, whose `remove()` ends it; also a context manager that does.

    Raises:
        TypeError, ValueError, RuntimeError: here, what cannot be had in a backward pass, with the remedy.
        RuntimeError: in a backward pass, a second gradient of a parameter before `optimizer.step()`, or clipping
            that was switched on; the parameter and its gradient stay as they are. In a step, a `GradScaler`.

    >>> import torch
    >>> from nexus.optim import FusedAdamW
    >>> from nexus.training import step_in_backward
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    >>> optimizer = FusedAdamW(model.parameters(), lr=1e-2)
    >>> with step_in_backward(model, optimizer):
    ...     for _ in range(3):
    ...         model(torch.ones(2, 4)).sum().backward()
    ...         optimizer.step()
    >>> [param.grad for param in model.parameters()]
    [None, None, None, None]
    >>> int(optimizer.state[model[0].weight]["step"])
    3
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    if not isinstance(optimizer, FusedAdamW):
        raise TypeError(f"optimizer must be a nexus.optim.FusedAdamW, got {shown(optimizer)}")
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise TypeError(
            "gradients of a DistributedDataParallel are there before they are averaged over the ranks: use "
            "torch.distributed.fsdp.fully_shard for less memory, or step after the backward pass"
        )
    for hook in optimizer._optimizer_step_post_hooks.values():
        if isinstance(getattr(hook, "__self__", None), StepInBackward):
            raise RuntimeError("this optimizer steps in backward passes already: remove() that handle first")
    _check_options(optimizer)
    return StepInBackward(model, optimizer)


class StepInBackward:
    """What `step_in_backward` returns."""

    def __init__(self, model: nn.Module, optimizer: FusedAdamW) -> None:
        self._model = model
        self._owner = weakref.ref(optimizer)  # which keeps this, by its hooks
        self._lock = threading.Lock()  # each device has a thread of its own in a backward pass
        self._stepped: set[Tensor] = set()
        self._evaluated: dict[int, tuple[Any, ...]] = {}  # the settings of each group, as this update's rates are
        self._parts: dict[Tensor, _OneParameter] = {}
        self._hooks: dict[Tensor, Any] = {}
        self._find_parameters()
        if not self._hooks:
            raise ValueError("no parameter of the model that requires a gradient is the optimizer's")
        self._ends = [
            optimizer.register_step_pre_hook(self._check_scale),
            optimizer.register_step_post_hook(self._end_update),
        ]

    @property
    def _optimizer(self) -> FusedAdamW:
        optimizer = self._owner()
        if optimizer is None:
            raise RuntimeError("the optimizer that stepped in the backward pass is gone: remove() the handle")
        return optimizer

    def remove(self) -> None:
        """Leave gradients alone from now on. What this update has done is done, and ends with the next step."""
        for handle in (*self._ends, *self._hooks.values()):
            handle.remove()
        self._hooks.clear()
        self._parts.clear()

    def __enter__(self) -> StepInBackward:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _find_parameters(self) -> None:
        """Follow what has been added to the optimizer, taken away, or unfrozen."""
        optimizer, of_model = self._optimizer, set(self._model.parameters())
        parts = {}
        listed = engine_of(optimizer).named_parameters(optimizer.param_groups)
        for ordinal, (index, param, name) in enumerate(listed):
            if param not in of_model or not param.requires_grad:
                continue
            group, part = optimizer.param_groups[index], self._parts.get(param)
            if part is None or part.group is not group or part.first_ordinal != ordinal:
                part = _OneParameter(optimizer, group, param, name, ordinal)
            parts[param] = part
            if param not in self._hooks:
                hook = _hook(weakref.ref(self))
                self._hooks[param] = param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        self._parts = parts

    def _step(self, param: Tensor) -> None:
        """Update a parameter whose gradient has just been completed."""
        with self._lock:
            engine_of(self._optimizer).check_shows_parameters("a backward pass that updates")
            if not self._stepped:  # the first of an update
                _check_options(self._optimizer)
                self._find_parameters()
            part = self._parts.get(param)
            if part is None or param.grad is None:
                return
            if param in self._stepped:
                raise RuntimeError(
                    f"{part.name} has a second gradient before optimizer.step(): one backward pass is one update "
                    "here. Call optimizer.step() after each; to accumulate gradients, remove() the handle that "
                    "step_in_backward returned"
                )
            if param.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "updates in a backward pass cannot be captured: remove() the handle before capture"
                )
            if not self._stepped:
                engine_of(self._optimizer).prologue(attributes_of(self._optimizer))
                self._evaluated = {id(group): group.watched() for group in self._optimizer.param_groups}
            evaluated = self._evaluated.get(id(part.group), ())
            is_same = len(evaluated) > 0 and all(map(is_, part.group.watched(), evaluated))
            part.step_alone(shares_prologue=is_same)
            self._stepped.add(param)
            param.grad = None

    def _check_scale(self, *_: Any) -> None:
        """Before `optimizer.step()`."""
        given = vars(self._optimizer)
        if self._stepped and (given.get("grad_scale") is not None or given.get("found_inf") is not None):
            raise RuntimeError(
                "a GradScaler steps this optimizer, and the backward pass has updated parameters with gradients that "
                "are still scaled: train in bfloat16 without a GradScaler, or step after the backward pass"
            )

    _check_scale.looks_at_gradients = False  # type: ignore[attr-defined]  # see FusedAdamW._step_supports_amp_scaling

    def _end_update(self, *_: Any) -> None:
        """After `optimizer.step()`."""
        with self._lock:
            self._stepped.clear()


class _OneParameter(Engine):
    """One parameter in a plan of its own, with the owner's state, settings and schedules.

    Its step does to the parameter what the owner's would, bit for bit: it reads the owner's count of completed
    updates, and leaves it alone. It takes no part in a norm or a history, which are of all parameters.
    """

    advances = False

    def __init__(self, owner: FusedAdamW, group: ParamGroup, param: Tensor, name: str, ordinal: int) -> None:
        super().__init__(engine_of(owner).requested_backend)
        self.first_ordinal = ordinal
        self.backend = engine_of(owner).backend
        self.group = group
        self.name = name
        self._owner: FusedAdamW = weakref.proxy(owner)  # which keeps this, by way of a handle
        self._param = param
        own = ParamGroup({**group, "params": [param]})
        own.outputs = group.outputs
        self._last_write: object | None = None  # to any group, where this one's rate may depend on it
        self._attributes: Attributes = {"param_groups": [own], "state": {}, "defaults": owner.defaults}

    def step_alone(self, *, shares_prologue: bool) -> None:
        """Update the parameter, which has a gradient; with rates that the owner has evaluated, if it has."""
        self._follow()
        device = self._param.device
        came_back = self.states.get(device) is not self.state_on(device)  # from another device
        owner = engine_of(self._owner)
        renewed, self.renewed = self.renewed != owner.renewed, owner.renewed
        if came_back or renewed or (self._last_write is not None and self._last_write is not LAST_WRITE[0]):
            self.forget_plan()
        if self.runner is not None:
            self.runner.take_prologue(engine_of(self._owner).runner if shares_prologue else None, self._param)
        self.step(self._attributes, None, None)
        self.release_state()
        self._attributes["state"].clear()  # the owner's to free

    def _follow(self) -> None:
        """Take over what has been changed in the owner."""
        theirs, mine = self.group, self._attributes["param_groups"][0]
        for name in SETTINGS:
            if mine[name] is not theirs[name]:
                mine[name] = theirs[name]
        states = self._owner.state
        if states.get(self._param) is None:
            states[self._param] = {}
        self._attributes["state"][self._param] = states[self._param]

    def settle(self, attributes: Attributes) -> None:
        engine_of(self._owner).settle(attributes_of(self._owner))
        self._follow()

    def fill_settings(self, plan: DevicePlan, groups: list[ParamGroup], device: torch.device) -> None:
        """See `Engine.fill_settings`. A rate may be the tensor that another group's schedule writes."""
        rates = {id(groups[0].given(name)) for name in RATES}
        others = [group for group in self._owner.param_groups if group is not self.group]
        sources = [group for group in others if not rates.isdisjoint(map(id, group.outputs.values()))]
        super().fill_settings(plan, [*groups, *sources], device)
        del plan.groups[1:]
        self._last_write = LAST_WRITE[0] if sources else None

    def state_on(self, device: torch.device) -> StepState:
        return engine_of(self._owner).state_on(device)

    def table(self, schedule: Schedule, device: torch.device) -> ScheduleTable:
        return engine_of(self._owner).table(schedule, device)

    def clock_of(self, schedule: Schedule, device: torch.device) -> Tensor:
        return engine_of(self._owner).clock_of(schedule, device)

    def named_parameters(self, groups: list[ParamGroup]) -> Iterator[tuple[int, Tensor, str]]:
        yield 0, self._param, self.name


def _hook(handle: weakref.ref[StepInBackward]) -> Callable[[Tensor], None]:
    # Weak: the garbage collector does not see what such a hook holds. The optimizer keeps the handle.
    def step(param: Tensor) -> None:
        stepper = handle()
        if stepper is not None:
            stepper._step(param)

    outside: Callable[[Tensor], None] = torch.compiler.disable(step)  # type: ignore[no-untyped-call]
    return outside


def _check_options(optimizer: FusedAdamW) -> None:
    if engine_of(optimizer).measures_norm(optimizer.param_groups):
        raise RuntimeError(
            "max_grad_norm and skip_nonfinite need the gradients of all parameters before the first is updated: set "
            "them to None and False (also in each group), or step after the backward pass"
        )
