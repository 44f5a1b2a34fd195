"""What is timed: lists of shapes, the jobs that are done on them, and the optimizers that nexus is set beside."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

STEP = "step"
STEP_SCHEDULE = "step + schedule"
CLIP_STEP_SCHEDULE = "clip + step + schedule"

FUSED, FOREACH, FOR_LOOP = "fused", "foreach", "for-loop"  # ways to run torch.optim.AdamW
TRAFFIC = "traffic"  # the same loads and stores, and no arithmetic

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A list of float32 tensors, and what is done with them. `repeats` is the number of timed pairs."""

    name: str
    title: str
    shapes: tuple[Shape, ...]
    repeats: int
    quick_repeats: int
    groups: int = 1  # above 1: the tensors are dealt out evenly, and each group has a rate of its own
    jobs: tuple[str, ...] = (STEP, CLIP_STEP_SCHEDULE)
    peers: tuple[str, ...] = (FUSED, FOREACH, FOR_LOOP)
    memory_bound: bool = False  # too large for any cache: set beside TRAFFIC as well

    @property
    def elements(self) -> int:
        """Of all tensors together."""
        return sum(map(math.prod, self.shapes))

    @property
    def bytes_needed(self) -> int:
        """At most: parameter, gradient and two moments of two optimizers, and three temporaries of foreach."""
        return self.elements * 4 * (2 * 4 + 3)


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


CASES = {
    case.name: case
    for case in (
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
        Case("many", "1000 tensors of 1,000 elements", ((1000,),) * 1000, repeats=150, quick_repeats=15),
    )
}
