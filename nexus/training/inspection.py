"""Watches a train step as torch runs it: keeps what it is about to overwrite, and notes what no graph can hold."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NEXUS = str(Path(__file__).resolve().parents[1])
_TORCH = str(Path(torch.__file__).resolve().parent)
# What these do at a step is known to be captured as it should be.
_EXEMPT = tuple(str(Path(_NEXUS) / name) for name in ("backends", "optim", "schedules"))

_EMPTY = {"aten::" + name for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
_COPIES = {"aten::_to_copy", "aten::copy_"}
_PRUNE_EVERY = 64


class Inspector(TorchDispatchMode):  # type: ignore[no-untyped-call]  # by its __init_subclass__
    """Sees every operation of a step, the backward pass included.

    What existed before the first run and is written to is copied before. So is what the runs have made and go on
    writing to, such as state that is made at its first use: it goes back to what it was made as. Kernels that torch
    does not know of go unnoticed.

    Args:
        device: where the graph will be.
        rates: tensors that a graph must find written by the device, and not by a number from the host.
    """

    def __init__(self, device: torch.device, rates: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusal: str | None = None
        self._device = device
        self._rates = {_key(rate) for rate in rates}
        self._checks = False
        self._first_run = True
        self._before: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}
        self._born: dict[int, tuple[_WeakStorage, bool]] = {}  # whether it still has to get its first value
        self._made_as: dict[int, Tensor] = {}
        self._constants: dict[int, torch.UntypedStorage] = {}

    def check(self) -> None:
        """From now on, note in `refusal` the first thing that cannot be captured."""
        self._checks = True
        self._constants.clear()

    def end_first_run(self) -> None:
        """To be called when the first run has let go of its results: what is left of it now is there to stay."""
        self._first_run = False
        self._prune()
        for key, (weak, _) in self._born.items():
            storage = weak.revived()
            if storage is not None and key not in self._made_as:
                self._made_as[key] = _bytes(storage).clone()

    def restore(self) -> None:
        """Bring back everything that was overwritten; once."""
        for storage, value in self._before.values():
            _write(storage, value)
        for key, value in self._made_as.items():
            storage_left = self._born[key][0].revived()
            if storage_left is not None:
                _write(storage_left, value)
        self._before.clear()
        self._made_as.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor, say: what it does with the tensors inside comes here by itself
        kwargs = kwargs or {}
        written = _written(func, args, kwargs)
        for tensor in written:
            self._keep(tensor, func)
        given = _tensors((args, kwargs))
        if self._checks and self.refusal is None:
            self._check_before(func, args, kwargs, written)
        result = func(*args, **kwargs)
        keys = {_key(tensor) for tensor in given}
        made = [tensor for tensor in _tensors(result) if _key(tensor) not in keys]
        if func._schema.name == "aten::lift_fresh":
            made = given
        of_the_host = all(tensor.device.type == "cpu" for tensor in given)
        for tensor in made:
            self._note_birth(tensor, func, of_the_host)
        if self._checks and self.refusal is None:
            self._check_after(func, given, made)
        return result

    def _note_birth(self, tensor: Tensor, func: Any, of_the_host: bool) -> None:
        key = _key(tensor)
        if of_the_host and tensor.device.type == "cpu" and tensor.dim() == 0:
            self._constants[key] = tensor.untyped_storage()
        if self._first_run:
            self._made_as.pop(key, None)
            self._born[key] = _WeakStorage(tensor.untyped_storage()), func._schema.name in _EMPTY

    def _keep(self, tensor: Tensor, func: Any) -> None:
        key = _key(tensor)
        if key in self._before or key in self._made_as:
            return
        storage = tensor.untyped_storage()
        if key not in self._born or self._born[key][0].expired():
            if self._first_run:
                self._before[key] = storage, _bytes(storage).clone()
            return
        weak, waits = self._born[key]
        if waits:  # the first write to empty memory makes it what it is
            self._born[key] = weak, False
        elif self._first_run:
            self._made_as[key] = _bytes(storage).clone()
            if len(self._made_as) % _PRUNE_EVERY == 0:
                self._prune()

    def _prune(self) -> None:
        """Forget what has been freed: most of what a step makes."""
        self._born = {key: born for key, born in self._born.items() if not born[0].expired()}
        self._made_as = {key: value for key, value in self._made_as.items() if key in self._born}

    # What cannot be captured.

    def _check_before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], written: list[Tensor]) -> None:
        name = func._schema.name
        if name == "aten::fill_" and _key(args[0]) in self._rates:
            self._refuse(
                func,
                "writes a number from the host over a rate, where replays would find the same number for ever",
                "give FusedAdamW a Schedule as lr, or use a scheduler of nexus.training.schedulers, or set the rate "
                "outside of the step",
            )
        elif self._reads_back(func, args, kwargs):
            self._refuse(
                func,
                "makes the host wait for a value on the device (as .item(), float(t), `if t:` and boolean masks do)",
                "keep it on the device (torch.where, masked arithmetic), or return the tensor and read it outside",
            )

    def _reads_back(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if all(_key(tensor) in self._constants for tensor in _tensors(args)) and self._device.type != "cpu":
            return False
        if torch.Tag.data_dependent_output in func.tags:
            return True
        if torch.Tag.dynamic_output_shape not in func.tags or kwargs.get("output_size") is not None:
            return False
        if func._schema.name in ("aten::index", "aten::_unsafe_index"):
            return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
        return True

    def _check_after(self, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        if self._device.type != "cpu" and func._schema.name == "aten::lift_fresh" and given[0].device.type != "cpu":
            self._refuse(
                func,
                "makes a tensor on the device from numbers of the host (torch.tensor(..., device=...))",
                "make it before the step, or by torch.full, torch.zeros or torch.arange",
            )
            return
        crosses = func._schema.name in _COPIES and any(t.device == self._device for t in (*given, *made))
        for tensor in (*given, *made):
            # A kernel takes a number of the host as an argument; a copy of it would wait.
            if tensor.device != self._device and (crosses or _key(tensor) not in self._constants):
                self._refuse(
                    func,
                    f"uses a tensor of shape {tuple(tensor.shape)} on {tensor.device}, and the graph is on "
                    f"{self._device}",
                    f"move it there before the step, or make it there (device={str(self._device)!r}); inputs of the "
                    "step are moved for you",
                )
                return

    def _refuse(self, func: Any, cause: str, remedy: str) -> None:
        where = _users_line()
        if where is not None:
            self.refusal = f"{func} {where} {cause}. Instead: {remedy}"


def _users_line() -> str | None:
    """Where the user's code has asked for the running operation; None where nexus itself has."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_EXEMPT):
            return None
        if not file.startswith((_TORCH, _NEXUS, "<")):
            return f"({file}:{frame.f_lineno})"
        frame = frame.f_back
    return "(in the backward pass)"


@functools.cache
def _write_positions(func: Any) -> tuple[tuple[int, str], ...]:
    # The running statistics of the batch normalisations are written, and not all schemas say so.
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(func._schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or argument.name in ("running_mean", "running_var")
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    values = [args[index] if index < len(args) else kwargs.get(name) for index, name in _write_positions(func)]
    return _tensors(values) if values else []


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _write(storage: torch.UntypedStorage, value: Tensor) -> None:
    if storage.nbytes():  # FSDP2 frees the memory of gathered parameters, and keeps their tensors
        _bytes(storage).copy_(value)


class _WeakStorage:
    """Does not keep the memory, only the key, from being used again."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._weak = storage._weak_ref()
        self._free = torch.UntypedStorage._free_weak_ref

    def __del__(self) -> None:
        self._free(self._weak)  # type: ignore[no-untyped-call]

    def expired(self) -> bool:
        return bool(torch.UntypedStorage._expired(self._weak))

    def revived(self) -> torch.UntypedStorage | None:
        storage: torch.UntypedStorage | None = torch.UntypedStorage._new_with_weak_ptr(self._weak)
        return storage
