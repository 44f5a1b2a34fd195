"""What the Triton kernels read besides the tensors themselves: tables of int64 words in device memory.

An address is a word; a float64 is the word with its bits. So whatever changes from step to step is data, and no
kernel is compiled anew for it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nexus.backends.interface import TensorEntry
from nexus.backends.records import DTYPE_INDEX, layout

CHUNK_ELEMENTS = 16_384  # of one tensor: what one program updates

# The columns.
CHUNK = ("begin", "count", "tensor")
COEFFICIENTS = (
    "grad_multiplier",
    "decay",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "step_size",
    "inv_sqrt_bias2",
    "eps",
)


def words(memory: memoryview, name: str, counts: list[int]) -> tuple[Tensor, ...]:
    """Copies of records, a row each, in parts of so many."""
    columns = layout(name).words
    copy = torch.zeros(sum(counts), columns, dtype=torch.int64, device="cpu")
    if len(copy):
        copy.view(-1).copy_(torch.frombuffer(bytearray(memory), dtype=torch.int64))
    return torch.split(copy, counts)


def put_kinds(records: Tensor, kinds: list[int]) -> None:
    """Let each record say which of the kinds of updates is its own."""
    column = layout("TensorRecord").offset("place") // 4
    records.view(torch.int32)[:, column] = torch.tensor(kinds, dtype=torch.int32, device="cpu")


def dtypes_of(entry: TensorEntry) -> tuple[torch.dtype, torch.dtype]:
    """Of a parameter and of its gradient."""
    param = entry.param.dtype
    return param, param if entry.grad is None else entry.grad.dtype


def kind_of(entry: TensorEntry, block_elements: int) -> tuple[int, int, bool, int]:
    """What an update is compiled for: dtypes by their index, amsgrad, and elements at once."""
    param, grad = dtypes_of(entry)
    assert entry.state is not None
    return DTYPE_INDEX[param], DTYPE_INDEX[grad], entry.state.max_exp_avg_sq is not None, block_elements


def chunk_words(sizes: tuple[int, ...]) -> Tensor:
    """The rows of `CHUNK` for tensors of these sizes; an empty one has a chunk too, which counts its steps."""
    numel = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    counts = ((numel + CHUNK_ELEMENTS - 1) // CHUNK_ELEMENTS).clamp_(min=1)
    tensor = torch.repeat_interleave(counts)
    begin = (torch.arange(len(tensor), device="cpu") - (counts.cumsum(0) - counts)[tensor]) * CHUNK_ELEMENTS
    return torch.stack([begin, (numel[tensor] - begin).clamp_(max=CHUNK_ELEMENTS), tensor], dim=1)


def is_capturing(device: torch.device) -> bool:
    """Whether what is enqueued on the device's current stream becomes part of a graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class DeviceTable:
    """A table in device memory that follows one on the host.

    A graph that is captured keeps the table for itself: each replay writes into it again what has changed between
    the last upload before the capture and the capture, and nothing else ever does.

    Args:
        device: where the table is.
        fixed: its words never change once they are there, so graphs may share the table.
    """

    def __init__(self, device: torch.device, *, fixed: bool = False) -> None:
        self._device = device
        self._fixed = fixed
        self._table: Tensor | None = None
        self._uploaded = torch.empty(0, dtype=torch.int64, device="cpu")

    def holds(self, words: Tensor) -> bool:
        """Whether an upload of these words would write nothing."""
        return self._table is not None and torch.equal(words, self._uploaded)

    def upload(self, words: Tensor, *, capturing: bool) -> Tensor:
        """The table, once what differs from the last upload is on its way to it.

        Args:
            words: 1-dim int64, on the CPU; may be overwritten afterwards.
            capturing: whether this becomes part of a graph.
        """
        if self._fixed and self._table is not None:
            return self._table
        if self._table is None or words.shape != self._uploaded.shape:
            table = torch.empty(words.shape, dtype=torch.int64, device=self._device)
            changed = torch.arange(len(words), device="cpu")
        else:
            table = self._table
            changed = (words != self._uploaded).nonzero().flatten()
        if capturing:
            _write_by_value(table, words, changed)
            self._table = None
            return table
        if len(changed):
            _write_from_host(table, words, changed)
            self._uploaded = words.clone()
        self._table = table
        return table


class CapturedGroups(NamedTuple):
    """The hyperparameters that a graph reads."""

    table: Tensor
    measures_norm: bool
    written_by_replays: bool

    def update(self, words: Tensor, *, measures_norm: bool) -> None:
        """Write others, if they are of as many groups.

        Raises:
            RuntimeError: no replay would make use of them.
        """
        if self.table.shape != words.shape:
            return
        if measures_norm and not self.measures_norm:
            raise RuntimeError(
                "a graph holds a step that does not measure the gradient norm, so clipping cannot be switched on in "
                "it; capture it with max_grad_norm=math.inf"
            )
        if self.written_by_replays:
            raise RuntimeError(
                "a graph holds a step that was captured right after a hyperparameter had changed, and every replay "
                "sets that again; make a step before the capture"
            )
        _write_from_host(self.table, words, torch.arange(len(words), device="cpu"))


def _write_by_value(table: Tensor, words: Tensor, indices: Tensor) -> None:
    """Write some words in arguments of kernels, of which a graph keeps a copy."""
    if len(indices):
        places = table.unbind()
        targets = [places[i] for i in indices.tolist()]
        torch._foreach_zero_(targets)
        torch._foreach_add_(targets, words[indices].tolist())


def _write_from_host(table: Tensor, words: Tensor, indices: Tensor) -> None:
    """Write some words by way of page-locked memory, which PyTorch keeps until the copy is over."""
    first, last = int(indices[0]), int(indices[-1]) + 1
    part = words[first:last]
    table[first:last].copy_(part.pin_memory() if table.device.type == "cuda" else part, non_blocking=True)
