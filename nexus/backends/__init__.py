"""The ways to run an update. Each is a module with the interface of `nexus.backends.interface.Backend`."""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple, cast

import torch
from torch import Tensor

from nexus.arguments import MAX_STEP
from nexus.backends import cuda, native, reference, torch_fused, triton
from nexus.backends.interface import Backend
from nexus.schedules import Schedule
from nexus.schedules.table import lower

__all__ = ["BackendInfo", "describe", "evaluate", "select"]

_FUSED = tuple(cast(Backend, module) for module in (native, cuda, triton))  # in the order of preference
_PLAIN = tuple(cast(Backend, module) for module in (torch_fused, reference))  # of PyTorch's operations
_BACKENDS = {backend.NAME: backend for backend in (*_FUSED, *_PLAIN)}


class BackendInfo(NamedTuple):
    """A backend, whether it runs here, and in words what it runs on or why it does not."""

    name: str
    available: bool
    detail: str


def describe() -> list[BackendInfo]:
    """What there is on this machine."""
    reasons = {name: backend.unavailable() for name, backend in _BACKENDS.items()}
    return [
        BackendInfo(name, reasons[name] is None, reasons[name] or backend.detail())
        for name, backend in _BACKENDS.items()
    ]


def select(name: str, devices: list[torch.device]) -> Backend:
    """The backend called `name`, or the best one for tensors on these devices if `name` is `"auto"`.

    Raises:
        ValueError: an unknown name, or a backend that does not run on one of the devices.
        RuntimeError: a backend that is not available on this machine.
    """
    if name not in ("auto", *_BACKENDS):
        raise ValueError(f"backend must be one of {('auto', *_BACKENDS)}, got {name!r}")
    types = {device.type for device in devices}
    if name == reference.NAME:
        return _BACKENDS[name]
    if name != "auto":
        backend = _BACKENDS[name]
        if not types <= backend.DEVICE_TYPES:
            raise ValueError(
                f"backend={name!r} runs on {_listed(backend.DEVICE_TYPES)}, but the tensors are on {_listed(types)}; "
                "move them first, or leave the choice to backend='auto'"
            )
        reason = backend.unavailable(devices)
        if reason is not None:
            raise RuntimeError(f"backend={name!r} cannot run here: {reason}")
        return backend

    if types <= {"cpu"}:
        # torch's own kernel, if it must be: nexus.optim has warned. Not Triton's interpreter, which is for tests.
        return _BACKENDS[native.NAME if native.unavailable() is None else torch_fused.NAME]
    reasons: list[str] = []
    for backend in _FUSED:
        if types <= backend.DEVICE_TYPES:
            reason = backend.unavailable(devices)
            if reason is None:
                if reasons and cuda.has_code():  # and not for this GPU, or this driver
                    say_once(f"{backend.NAME!r} runs in the place of {reasons[-1]}")
                return backend
            reasons.append(f"backend {backend.NAME!r}: {reason}")
    if reasons:
        raise RuntimeError(
            f"no kernels for parameters on {_listed(types)}. {'. '.join(reasons)}. backend='reference' runs "
            "anywhere, in plain PyTorch"
        )
    if len(types) > 1:
        raise ValueError(f"parameters are on {_listed(types)}; make an optimizer for each of them")
    raise ValueError(f"nexus has no kernels for {_listed(types)}; backend='reference' runs there, in plain PyTorch")


@functools.cache
def say_once(words: str) -> None:
    warnings.warn(f"nexus: {words}", RuntimeWarning, stacklevel=2)


def evaluate(
    schedule: Schedule, steps: Tensor, device: torch.device | str | None = None, name: str = "auto"
) -> Tensor:
    """See `nexus.schedules.evaluate`."""
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a nexus Schedule, got {type(schedule).__name__}")
    if not isinstance(steps, Tensor) or steps.dtype != torch.int64:
        given = steps.dtype if isinstance(steps, Tensor) else type(steps).__name__
        raise TypeError(f"steps must be a tensor of int64, got {given}")
    if steps.numel() and (int(steps.min()) < 0 or int(steps.max()) > MAX_STEP):
        raise ValueError(f"steps must be from 0 to 2**53, got {int(steps.min())} to {int(steps.max())}")
    steps = steps.to(device) if device is not None else steps
    return select(name, [steps.device]).evaluate(lower(schedule, steps.device), steps)


def _listed(types: set[str] | frozenset[str]) -> str:
    return " and ".join(sorted(types))
