"""Watches a train step as torch runs it, and notes what no graph can hold."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NEXUS = str(Path(__file__).resolve().parents[2])
_TORCH = str(Path(torch.__file__).resolve().parent)
# What these do at a step is known to be captured as it should be.
_EXEMPT = tuple(str(Path(_NEXUS) / name) for name in ("backends", "optim", "schedules"))

_EMPTY = {"aten::" + name for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}
_COPIES = {"aten::_to_copy", "aten::copy_"}


class Inspector(TorchDispatchMode):  # type: ignore[no-untyped-call]  # by its __init_subclass__
    """Sees every operation of a step, the backward pass included, and notes in `refusal` what cannot be captured.

    Kernels that torch does not know of go unnoticed.

    Args:
        device: where the graph will be.
        rates: tensors that a graph must find written by the device, and not by a number from the host.
    """

    def __init__(self, device: torch.device, rates: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.refusal: str | None = None
        self._device = device
        self._rates = {_key(rate) for rate in rates}
        self._constants: dict[int, torch.UntypedStorage] = {}  # kept, so that no other storage has the key

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Asked by Dynamo: compiled code runs as it is, also while this looks on."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a DTensor, say: what it does with the tensors inside comes here by itself
        kwargs = kwargs or {}
        if self.refusal is None:
            self._check_before(func, args, kwargs)
        result = func(*args, **kwargs)
        if self.refusal is None:
            given = _tensors((args, kwargs))
            keys = {_key(tensor) for tensor in given}
            made = [tensor for tensor in _tensors(result) if _key(tensor) not in keys]
            self._note_constants(func, given, made)
            self._check_after(func, given, made)
        return result

    def _note_constants(self, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """A number on the host is the same in every replay, unless it was copied from the device.

        So are the seed and the offset that efficient attention gives: outside of a capture, they are on the host.
        """
        name = func._schema.name
        if name == "aten::lift_fresh":
            made = given
        of_the_host = all(tensor.device.type == "cpu" for tensor in given)
        for tensor in made:
            if tensor.device.type == "cpu" and tensor.dim() == 0 and (of_the_host or name not in _COPIES | _EMPTY):
                self._constants[_key(tensor)] = tensor.untyped_storage()

    def _check_before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.layout == torch.strided]


def _key(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key
