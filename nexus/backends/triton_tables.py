"""What the Triton kernels read besides the tensors themselves: tables of int64 words in device memory.

An address is a word; a float64 is the word with its bits. So whatever changes from step to step is data, and no
kernel is compiled anew for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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
    "average_weight",
    "count",  # of the tensor's updates, this one included
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


class Kind(NamedTuple):
    """What an update is compiled for: dtypes by their index, -1 for a stream that is not there."""

    param: int
    grad: int
    exp_avg: int
    exp_avg_sq: int
    master_low: int
    amsgrad: bool
    stochastic_rounding: bool
    average: int
    elements: int  # at once


def kind_of(entry: TensorEntry, block_elements: int) -> Kind:
    """That of one tensor."""
    param, grad = dtypes_of(entry)
    state = entry.state
    assert state is not None
    return Kind(
        DTYPE_INDEX[param],
        DTYPE_INDEX[grad],
        DTYPE_INDEX[state.exp_avg.dtype],
        DTYPE_INDEX[state.exp_avg_sq.dtype],
        -1 if state.master_low is None else DTYPE_INDEX[state.master_low.dtype],
        state.max_exp_avg_sq is not None,
        entry.stochastic_rounding,
        -1 if state.average is None else DTYPE_INDEX[state.average.dtype],
        block_elements,
    )


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


@dataclass(eq=False)
class Upload:
    """Words in device memory."""

    memory: Tensor
    words: Tensor  # what is there, on the CPU
    source: Tensor | None = None  # of memory that each replay of a graph writes: what it copies first

    @classmethod
    @torch.inference_mode(False)  # it outlives a mode in which it may be made
    def of(cls, words: Tensor, device: torch.device) -> Upload:
        """Words on their way to memory of their own."""
        memory = torch.empty(words.shape, dtype=torch.int64, device=device)
        _write_from_host(memory, words)
        return cls(memory, words.clone())

    def write(self, words: Tensor) -> None:
        """Write as many others: enqueued."""
        changed = (words != self.words).nonzero().flatten().tolist()
        if changed:
            stretch = slice(changed[0], changed[-1] + 1)
            _write_from_host(self.memory[stretch], words[stretch])
            self.words = words.clone()


class DeviceTable:
    """A table in device memory that follows one on the host.

    A graph reads the last upload before its capture, which steps outside of graphs leave alone from then on: where
    their words differ, they get other memory. A graph that needs other words copies that upload in each replay, and
    adds the differences, which are arguments of kernels. So any number of captures may follow one upload, and what
    one graph writes, no other reads.

    Args:
        device: where the table is.
        fixed: its words are always the same.
    """

    def __init__(self, device: torch.device, *, fixed: bool = False) -> None:
        self._device = device
        self._fixed = fixed
        self._last: Upload | None = None  # never in a graph's own memory
        self._in_graphs = False

    def upload(self, words: Tensor, *, capturing: bool) -> Upload:
        """These words, which are there for what is enqueued from now on.

        Args:
            words: 1-dim int64, on the CPU; may be overwritten afterwards.
            capturing: whether this becomes part of a graph.
        """
        last = self._last
        if last is not None and (self._fixed or torch.equal(last.words, words)):
            self._in_graphs |= capturing
            return last
        fits = last is not None and last.words.shape == words.shape
        if capturing:
            self._in_graphs |= fits
            return _copy_in_replays(last if fits else None, words, self._device)
        if last is None or not fits or self._in_graphs:
            last = self._last = Upload.of(words, self._device)
            self._in_graphs = False
        else:
            last.write(words)
        return last


@dataclass(eq=False)
class CapturedStep:
    """A step in a graph.

    Args:
        groups: the hyperparameters that each replay reads.
        measures_norm: whether it measures the gradient norm.
        memory: what else a replay has to find in its place.
    """

    groups: Upload
    measures_norm: bool
    memory: tuple[Upload | Tensor, ...]

    def check(self, words: Tensor, *, measures_norm: bool) -> None:
        """See that replays would make use of other hyperparameters.

        Raises:
            RuntimeError: they would not.
        """
        if measures_norm and not self.measures_norm:
            raise RuntimeError(
                "a graph holds a step that does not measure the gradient norm, so clipping cannot be switched on in "
                "it; capture it with max_grad_norm=math.inf"
            )
        if self.groups.source is not None and not torch.equal(words, self.groups.words):
            raise RuntimeError(
                "a graph holds a step that was captured right after a hyperparameter had changed, and every replay "
                "sets that again; make a step, or call sync_hyperparameters(), before the capture"
            )


def update_captured(steps: Iterable[CapturedStep], words: Tensor, *, measures_norm: bool) -> None:
    """Give the hyperparameters of the groups of a device to all steps of as many groups, or, with an error, to none.

    Raises:
        RuntimeError: a replay would not make use of them.
    """
    steps = [step for step in steps if step.groups.words.shape == words.shape]
    for step in steps:
        step.check(words, measures_norm=measures_norm)
    for step in steps:
        step.groups.write(words)


def _copy_in_replays(last: Upload | None, words: Tensor, device: torch.device) -> Upload:
    """Captured: a copy of an upload, or of zeros, in which some words are made others.

    All of it is written in each replay, so it may be in memory that other kernels of the graph use before.
    """
    if last is None:
        last = Upload(torch.zeros(words.shape, dtype=torch.int64, device=device), torch.zeros_like(words))
    memory = last.memory.clone()
    differences = words - last.words  # modulo 2**64, as they are added
    indices = differences.nonzero().flatten()
    if len(indices):
        places = memory.unbind()
        torch._foreach_add_([places[i] for i in indices.tolist()], differences[indices].tolist())
    return Upload(memory, words.clone(), last.memory)


def _write_from_host(memory: Tensor, words: Tensor) -> None:
    """Write words by way of page-locked memory, which PyTorch keeps until the copy is over."""
    memory.copy_(words.pin_memory() if memory.device.type == "cuda" else words, non_blocking=True)
