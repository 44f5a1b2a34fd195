"""The records of the extension (csrc/record.h): Python fills them by the names of their fields, as one block."""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from nexus.backends.interface import DevicePlan, GroupSettings, Rate, TensorEntry

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # of parameters and gradients
DTYPES = (*FLOAT_DTYPES, torch.int8, torch.uint8, torch.int16)  # in the order of the C++ enum
DTYPE_INDEX = {dtype: index for index, dtype in enumerate(DTYPES)}

_NESTED = {"R": "Rate", "H": "History"}


class Record:
    """The layout of one record.

    Args:
        layouts: `extension.records`.
        name: of the record. A field of a record within it is called `outer.inner`.
    """

    def __init__(self, layouts: Mapping[str, tuple[int, tuple[tuple[str, str], ...]]], name: str) -> None:
        fields = list(_flat(layouts, name))
        self.names = tuple(field for field, _ in fields)
        self._struct = struct.Struct("@" + "".join(character for _, character in fields))
        self._values = itemgetter(*self.names)
        self.words = layouts[name][0] // 8
        assert self._struct.size == layouts[name][0], f"{name} is laid out otherwise"

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """One record, of a number for each field."""
        return self._struct.pack(*self._values(values))

    def offset(self, name: str) -> int:
        """Where a field stands in the record, in bytes."""
        until = self._struct.format[: 2 + self.names.index(name)]
        return struct.calcsize(until) - struct.calcsize("@" + until[-1])


@functools.cache
def layout(name: str) -> Record:
    """A record's, as the extension was compiled with it."""
    from nexus import _native

    return Record(_native.records, name)


def _flat(layouts: Mapping[str, Any], name: str, prefix: str = "") -> Any:
    for field, character in layouts[name][1]:
        if character in _NESTED:
            yield from _flat(layouts, _NESTED[character], f"{prefix}{field}.")
        else:
            yield prefix + field, character


def address(tensor: Tensor | None) -> int:
    """Where a tensor's memory is; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def group_values(group: GroupSettings) -> dict[str, Any]:
    """The fields of a `Group`."""
    values: dict[str, Any] = {}
    for name, value in group.items():
        if isinstance(value, Rate):
            values |= {
                f"{name}.value": value.value,
                f"{name}.tensor": address(value.tensor),
                f"{name}.is_float64": value.tensor is not None and value.tensor.dtype == torch.float64,
                f"{name}.table": address(value.table),
                f"{name}.layers": 0 if value.table is None else value.table.shape[0],
                f"{name}.rows": 0 if value.table is None else value.table.shape[1],
                f"{name}.clock": address(value.clock),
                f"{name}.scale": value.scale,
                f"{name}.last": address(value.last),
            }
        else:
            values[name] = value
    return values


def tensor_values(entry: TensorEntry) -> dict[str, int]:
    """The fields of a `TensorRecord`. Where its gradient is, the watch fills in, and its place the device."""
    param, grad, state = entry.param, entry.grad, entry.state
    assert state is not None
    streams = {name: address(tensor) for name, tensor in state._asdict().items()}
    return streams | {
        "param": param.data_ptr(),
        "grad": 0,
        "numel": param.numel(),
        "first": entry.first,
        "ordinal": entry.ordinal,
        "group": entry.group,
        "place": 0,
        "param_dtype": DTYPE_INDEX[param.dtype],
        "grad_dtype": DTYPE_INDEX[param.dtype if grad is None else grad.dtype],
        "exp_avg_dtype": DTYPE_INDEX[state.exp_avg.dtype],
        "exp_avg_sq_dtype": DTYPE_INDEX[state.exp_avg_sq.dtype],
        "master_low_dtype": -1 if state.master_low is None else DTYPE_INDEX[state.master_low.dtype],
        "stochastic_rounding": entry.stochastic_rounding,
        "narrow_average": state.average is not None and state.average.dtype == torch.bfloat16,
    }


def state_values(plan: DevicePlan) -> dict[str, int]:
    """The fields of a `StepState`: no sum of squares where nobody wants the norm."""
    state, ring = plan.state, plan.history
    return {
        "completed": state.completed.data_ptr(),
        "skipped": state.skipped.data_ptr(),
        "sum_of_squares": state.sum_of_squares.data_ptr() if plan.measures_norm else 0,
        "grad_norm": state.grad_norm.data_ptr(),
        "grad_scale": 0,  # these two are a step's own
        "found_inf": 0,
        "skip_nonfinite": state.skip_nonfinite,
        "seed": state.seed,
        "advances": plan.advances,
        "history.count": 0 if ring is None else ring.count.data_ptr(),
        "history.rows": 0 if ring is None else ring.rows.data_ptr(),
        "history.slots": 0 if ring is None else ring.slots,
        "history.width": 0 if ring is None else ring.width,
    }
