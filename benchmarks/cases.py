"""What is timed: lists of shapes, the jobs that are done on them, and the optimizers that nexus is set beside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

STEP = "step"
STEP_SCHEDULE = "step + schedule"
CLIP_STEP_SCHEDULE = "clip + step + schedule"

FUSED, FOREACH, FOR_LOOP = "fused", "foreach", "for-loop"  # ways to run torch.optim.AdamW
CAPTURABLE = "fused, capturable"  # and a rate that is a tensor
NEXUS_TRITON = "nexus in Triton"
OPTIMI, TORCHAO, APEX = "torch-optimi", "torchao", "apex"
COPY = "copy"  # that reads and writes as many bytes: what memory alone takes

CPU, CUDA = "cpu", "cuda"
FLOAT32, BFLOAT16 = "float32", "bfloat16"  # of parameters and gradients; the moments are float32
ITEM_SIZES = {FLOAT32: 4, BFLOAT16: 2}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A list of tensors, and what is done with them. `repeats` is the number of timed pairs."""

    name: str
    title: str
    shapes: tuple[Shape, ...]
    repeats: int
    quick_repeats: int
    groups: int = 1  # above 1: the tensors are dealt out evenly, and each group has a rate of its own
    jobs: tuple[str, ...] = (STEP, CLIP_STEP_SCHEDULE)
    peers: tuple[str, ...] = (FUSED, FOREACH, FOR_LOOP)
    cuda_peers: tuple[str, ...] = (FUSED, CAPTURABLE, FOREACH, NEXUS_TRITON)
    memory_bound: bool = False  # too large for any cache: set beside COPY, too
    dtype: str = FLOAT32
    devices: tuple[str, ...] = (CPU, CUDA)

    @property
    def elements(self) -> int:
        """Of all tensors together."""
        return sum(map(math.prod, self.shapes))

    def peers_on(self, device: str) -> tuple[str, ...]:
        """Whom it is set beside on this kind of device."""
        return self.cuda_peers if device == CUDA else self.peers

    def bytes_needed(self, device: str) -> int:
        """At most: parameter, gradient and two moments of two optimizers, and three temporaries of foreach.

        On a GPU three more, those of a captured graph.
        """
        return self.elements * 4 * (2 * 4 + (6 if device == CUDA else 3))

    def bytes_moved(self, job: str) -> int:
        """The fewest that nexus's step can load and store: each input read once, each output written once.

        Parameter in and out, gradient in, two float32 moments in and out; clipping reads the gradient once more.
        """
        item = ITEM_SIZES[self.dtype]
        return self.elements * (3 * item + 4 * 4 + (item if job == CLIP_STEP_SCHEDULE else 0))


def gpt_shapes(layers: int, width: int, vocabulary: int, context: int) -> tuple[Shape, ...]:
    """The parameters of a GPT with learned positions, biases and tied embeddings, as GPT-2 has them."""

    def block() -> Iterator[Shape]:
        yield from [(width,), (width,)]  # layer norm
        yield from [(3 * width, width), (3 * width,)]  # queries, keys, values
        yield from [(width, width), (width,)]  # out of the attention
        yield from [(width,), (width,)]  # layer norm
        yield from [(4 * width, width), (4 * width,)]  # MLP
        yield from [(width, 4 * width), (width,)]

    blocks = [shape for _ in range(layers) for shape in block()]
    return ((vocabulary, width), (context, width), *blocks, (width,), (width,))


_THIRD_PARTY = (FUSED, CAPTURABLE, FOREACH, NEXUS_TRITON, OPTIMI, TORCHAO, APEX)
_BILLION = gpt_shapes(layers=24, width=1792, vocabulary=50257, context=1024)

# Those for a GPU alone come first: a run there may be cut short, and they say the most.
CASES = {
    case.name: case
    for case in (
        Case(
            "billion",
            "GPT of 1.02B parameters",
            _BILLION,
            repeats=40,
            quick_repeats=5,
            cuda_peers=_THIRD_PARTY,
            memory_bound=True,
            devices=(CUDA,),
        ),
        Case(
            "billion-bf16",
            "GPT of 1.02B bfloat16 parameters",
            _BILLION,
            repeats=40,
            quick_repeats=5,
            memory_bound=True,
            dtype=BFLOAT16,
            devices=(CUDA,),
        ),
        Case("tiny", "148 tensors of 64 elements", ((64,),) * 148, repeats=1000, quick_repeats=60),
        Case(
            "gpt",
            "byte-level GPT: 3 layers, width 128",
            gpt_shapes(layers=3, width=128, vocabulary=256, context=256),
            repeats=500,
            quick_repeats=40,
        ),
        Case(
            "deep",
            "byte-level GPT: 12 layers, width 64",
            gpt_shapes(layers=12, width=64, vocabulary=256, context=256),
            repeats=500,
            quick_repeats=40,
        ),
        Case(
            "gpt2",
            "GPT-2 124M",
            gpt_shapes(layers=12, width=768, vocabulary=50257, context=1024),
            repeats=20,
            quick_repeats=4,
            peers=(FUSED, FOREACH),
            cuda_peers=_THIRD_PARTY,
            memory_bound=True,
        ),
        Case(
            "groups",
            "100 groups, each with its own rate",
            ((1000,),) * 100,
            repeats=500,
            quick_repeats=40,
            groups=100,
            jobs=(STEP_SCHEDULE, CLIP_STEP_SCHEDULE),
            peers=(FUSED, FOREACH),
        ),
        Case(
            "many",
            "1000 tensors of 1,000 elements",
            ((1000,),) * 1000,
            repeats=150,
            quick_repeats=15,
            cuda_peers=_THIRD_PARTY,
        ),
    )
}
