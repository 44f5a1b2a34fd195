"""Stands in for the extension's list of tensors where there is no extension: it notices nothing.

So every step begins with a new plan. It has the methods of `_native.WatchedList` that `WatchedRunner` calls.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import Any, NamedTuple

from torch import Tensor

from nexus.backends import shards
from nexus.backends.interface import Change
from nexus.backends.watched import DTYPES

_NO_ELEMENTS = 256  # not 0, which is no gradient; nothing is read there


class _Watched(NamedTuple):
    param: Tensor
    streams: Tensor
    staged_param: bool
    grad_buffer: int

    def addresses(self) -> tuple[int, int]:
        grad = self.param.grad
        if grad is None:
            return self.streams.data_ptr(), 0
        return self.streams.data_ptr(), self.grad_buffer or shards.local(grad).data_ptr() or _NO_ELEMENTS


class UnwatchedList:
    """Tensors and float rates, in the order in which they were added."""

    def __init__(self) -> None:
        self.begin({})

    def begin(self, attributes: dict[str, Any]) -> None:
        self._rates: list[float] = []
        self._ranges: list[tuple[int, int, int]] = []  # of the parameters' memory, each with its index
        self._watched: dict[int, _Watched] = {}
        self._is_new = True

    def begin_groups(self) -> None:
        self._rates = []

    def add_group(self, lr: tuple[Any, ...], *others: Any) -> None:
        self._rates.append(lr[0])

    def add_tensor(
        self,
        param: int,
        exp_avg: int,
        exp_avg_sq: int,
        max_exp_avg_sq: int,
        step: int,
        numel: int,
        group: int,
        param_dtype: int,
        grad_dtype: int,
    ) -> int:
        self._ranges.append((param, param + numel * DTYPES[param_dtype].itemsize, len(self._ranges)))
        return len(self._ranges) - 1

    def watch_parameter(self, param: Tensor) -> None:
        pass

    def watch_entry(
        self,
        param: Tensor,
        record: int,
        streams: Tensor,
        staged_param: bool,
        staged_grad: bool,
        grad_buffer: int,
        placements: tuple[object, ...] | None,
    ) -> None:
        self._watched[record] = _Watched(param, streams, staged_param, grad_buffer)

    def watch_tensor(self, tensor: Tensor) -> None:
        pass

    def watch_setting_tensor(self, tensor: Tensor, written_by_steps: bool) -> None:
        pass

    def written(self) -> tuple[Tensor, ...]:
        """The parameters that the next step writes to in place."""
        return tuple(w.param for w in self._watched.values() if w.param.grad is not None and not w.staged_param)

    def overlap(self) -> tuple[int, int]:
        """Two tensors with a gradient that share memory, by their indices, or (-1, -1)."""
        ranges = sorted(
            found for found in self._ranges if found[0] < found[1] and self._watched[found[2]].param.grad is not None
        )
        for (_, end, first), (begin, _, second) in itertools.pairwise(ranges):
            if begin < end:
                return first, second
        return -1, -1

    def release_state(self) -> None:
        pass

    def refresh(self, attributes: dict[str, Any]) -> int:
        """A `Change`: none where the list has just been made, and after that whatever there may be."""
        is_new, self._is_new = self._is_new, False
        return Change.NONE if is_new else Change.TENSORS

    def release_gradients(self) -> None:
        pass

    def write_pointers(self, out: int) -> None:
        """Pairs of addresses, of each tensor and its gradient, to the memory at `out`."""
        addresses = [address for _, watched in sorted(self._watched.items()) for address in watched.addresses()]
        words = (ctypes.c_int64 * len(addresses))(*addresses)
        ctypes.memmove(out, words, ctypes.sizeof(words))

    def rates(self) -> list[float]:
        """The float rates of all groups."""
        return self._rates
