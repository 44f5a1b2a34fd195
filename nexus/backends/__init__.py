"""The ways to run an update. Each is a module with the interface of `nexus.backends.interface.Backend`."""

from __future__ import annotations

from typing import NamedTuple, cast

from nexus.backends import native, reference
from nexus.backends.interface import Backend

__all__ = ["BackendInfo", "describe", "select"]

_BACKENDS: dict[str, Backend] = {module.NAME: cast(Backend, module) for module in (native, reference)}


class BackendInfo(NamedTuple):
    """A backend, whether it runs here, and in words what it runs on or why it does not."""

    name: str
    available: bool
    detail: str


def describe() -> list[BackendInfo]:
    """What there is on this machine, the fastest first."""
    reason = native.unavailable()
    return [
        BackendInfo(native.NAME, reason is None, native.detail() if reason is None else reason),
        BackendInfo(reference.NAME, True, "any device of PyTorch, one tensor at a time; slow, for comparison"),
    ]


def select(name: str, device_types: set[str]) -> Backend:
    """The backend called `name`, or the best one for tensors on these types of device if `name` is `"auto"`.

    Raises:
        ValueError: an unknown name, or a backend that cannot run on one of the devices.
        RuntimeError: a backend that is not available on this machine.
    """
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"backend must be one of {('auto', *_BACKENDS)}, got {name!r}")
    elsewhere = sorted(device_types - {"cpu"})
    if name == reference.NAME:
        return _BACKENDS[name]
    if elsewhere:
        raise ValueError(
            f"no compiled backend for tensors on {', '.join(elsewhere)} in this version of nexus, only for the "
            f"CPU; backend='reference' runs there in plain PyTorch, slowly"
        )
    reason = native.unavailable()
    if reason is None:
        return _BACKENDS[native.NAME]
    if name == native.NAME:
        raise RuntimeError(f"backend='native' cannot run here: {reason}")
    return _BACKENDS[reference.NAME]  # said at import: nexus.optim warns
