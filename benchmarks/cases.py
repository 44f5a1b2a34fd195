"""What is timed: lists of shapes and the jobs done on them, models and their training steps, and beside whom."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nexus.optim import EMA
from nexus.optim.storage import MODES, bytes_table

STEP = "step"
STEP_SCHEDULE = "step + schedule"
CLIP_STEP_SCHEDULE = "clip + step + schedule"
EAGER, CAPTURED = "training step", "training step, captured"

NORM, PROLOGUE, UPDATE = "norm", "prologue", "update"  # a step's kernels

FUSED, FOREACH, FOR_LOOP = "fused", "foreach", "for-loop"  # ways to run torch.optim.AdamW
CAPTURABLE = "fused, capturable"  # and a rate that is a tensor
NEXUS_TRITON = "nexus in Triton"
OPTIMI, TORCHAO, APEX, BITSANDBYTES_FLOAT32 = "torch-optimi", "torchao", "apex", "bitsandbytes"
NO_AVERAGE, SEPARATE_AVERAGE = "nexus, no average", "nexus and _foreach_lerp_"
NEXUS_FLOAT32, FUSED_FLOAT32 = "nexus in float32", "fused, float32"
OPTIMI_KAHAN, TORCHAO_8_BIT, BITSANDBYTES = "torch-optimi, Kahan", "torchao, 8 bit", "bitsandbytes, 8 bit"
DEEPSPEED, DEEPSPEED_BFLOAT16 = "DeepSpeed", "DeepSpeed, bfloat16"  # of the latter the moments, too
OTHERS = (OPTIMI, DEEPSPEED, TORCHAO, BITSANDBYTES_FLOAT32)  # of other packages, on a CPU and in float32
COPY = "copy"  # that reads and writes as many bytes: what memory alone takes
TORCH_LOOP, TORCH_FUSED_LOOP, TORCH_GRAPH = "torch loop", "torch loop, fused", "torch in a CUDA graph"
NEXUS_EAGER = "nexus, not captured"

CPU, CUDA = "cpu", "cuda"
FLOAT32, BFLOAT16 = "float32", "bfloat16"  # of parameters and gradients; the moments are float32
AVERAGE_DECAY = 0.999
ITEM_SIZES = {FLOAT32: 4, BFLOAT16: 2}

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """A list of tensors, and what is done with them."""

    name: str
    title: str
    shapes: tuple[Shape, ...]
    repeats: int  # timed pairs
    quick_repeats: int
    groups: int = 1  # above 1: the tensors are dealt out evenly, and each group has a rate of its own
    jobs: tuple[str, ...] = (STEP, CLIP_STEP_SCHEDULE)
    peers: tuple[str, ...] = (FUSED, FOREACH, FOR_LOOP)
    cuda_peers: tuple[str, ...] = (FUSED, CAPTURABLE, FOREACH, NEXUS_TRITON)
    dtype: str = FLOAT32
    devices: tuple[str, ...] = (CPU, CUDA)
    mode: str = ""  # how nexus stores state: a name of nexus.optim.storage.MODES
    average: bool = False  # of the parameters, which nexus keeps

    @property
    def options(self) -> dict[str, Any]:
        """Of nexus's optimizer."""
        if self.average:
            return {"average": EMA(AVERAGE_DECAY)}
        return {} if not self.mode else next(options for name, _, options in MODES if name == self.mode)

    @property
    def elements(self) -> int:
        """Of all tensors together."""
        return sum(map(math.prod, self.shapes))

    @property
    def by_default(self) -> tuple[str, ...]:
        """The devices on which it is timed without being asked for."""
        return () if self.mode or self.average else self.devices

    @property
    def tolerance(self) -> float:
        """Of the parameters' difference. In float32, rounding of parameters that go a short way is a tenth of it.

        In bfloat16, where peers' moments are of that type too, they were seen to differ by up to 0.035 in 200 steps.
        """
        return 0.1 if self.dtype == BFLOAT16 or self.mode else 5e-3

    def comparisons(self, device: str) -> Iterator[tuple[str, str]]:
        """Each job, and each peer that it is set beside on this kind of device."""
        for job in self.jobs:
            for peer in self.cuda_peers if device == CUDA else self.peers:
                yield job, peer

    def bytes_needed(self, device: str) -> int:
        """At most: parameter, gradient, two moments and average of two optimizers, and three temporaries of foreach.

        On a GPU three more, those of a captured graph.
        """
        return self.elements * 4 * (2 * (4 + self.average) + (6 if device == CUDA else 3))

    def bytes_moved(self, job: str) -> int:
        """The fewest that nexus's step can load and store: each input read once, each output written once.

        Parameter in and out, gradient in, two float32 moments and an average in and out; clipping reads the gradient
        once more.
        """
        if self.mode:
            return int(self.elements * next(moved for name, _, moved in bytes_table() if name == self.mode))
        item = ITEM_SIZES[self.dtype]
        return self.elements * (3 * item + 4 * 4 + 2 * 4 * self.average + (item if job == CLIP_STEP_SCHEDULE else 0))


MLP, DEMO_GPT, GPT2 = "mlp", "demo gpt", "gpt-2"  # models
TRAINING_PEERS = {
    (CPU, EAGER): (TORCH_LOOP, TORCH_FUSED_LOOP),
    (CUDA, CAPTURED): (TORCH_LOOP, TORCH_GRAPH, NEXUS_EAGER),
    (CUDA, EAGER): (TORCH_LOOP,),
}
"""Beside whom each job is timed on each kind of device: where there are no graphs, nothing is captured."""


@dataclass(frozen=True)
class TrainingCase:
    """A model and its batches."""

    name: str
    title: str
    model: str
    repeats: int  # timed pairs
    quick_repeats: int
    loop_steps: int  # made in a row, for steps a second
    gigabytes: int = 1  # of memory, at most: of two models with optimizers, activations and graphs
    cuda_gigabytes: int = 1  # where the batches are larger
    autocast: bool = False  # to bfloat16
    by_default: tuple[str, ...] = (CPU, CUDA)  # elsewhere it has to be asked for by its name
    devices = (CPU, CUDA)
    groups = 1

    @property
    def dtype(self) -> str:
        """In words."""
        return "float32, autocast to bfloat16" if self.autocast else "float32"

    @property
    def tolerance(self) -> float:
        """Of the losses' difference in the first steps. Rounding is a tenth of it or less."""
        return 5e-2 if self.autocast else 5e-3

    def comparisons(self, device: str) -> Iterator[tuple[str, str]]:
        """Each job, and each peer that it is set beside on this kind of device."""
        for (kind, job), peers in TRAINING_PEERS.items():
            yield from ((job, peer) for peer in peers if kind == device)

    def bytes_needed(self, device: str) -> int:
        """At most."""
        return (self.cuda_gigabytes if device == CUDA else self.gigabytes) * 10**9

    def bytes_moved(self, job: str) -> None:
        """Not counted."""


AnyCase = Case | TrainingCase


def gpt_shapes(layers: int, width: int, vocabulary: int, context: int) -> tuple[Shape, ...]:
    """The parameters of a GPT with learned positions, biases and tied embeddings, as GPT-2 has them."""

    norm = ((width,), (width,))
    attention = ((3 * width, width), (3 * width,), (width, width), (width,))
    mlp = ((4 * width, width), (4 * width,), (width, 4 * width), (width,))
    return ((vocabulary, width), (context, width), *(*norm, *attention, *norm, *mlp) * layers, *norm)


def _low_memory_peers(dtype: torch.dtype, options: dict[str, Any]) -> tuple[str, ...]:
    """Of a mode, on a CPU. Those with 8-bit moments, slow as they are, stand beside the modes that have them."""
    return (
        *_WIDE_PEERS,
        DEEPSPEED,
        *((DEEPSPEED_BFLOAT16, OPTIMI_KAHAN, TORCHAO) if dtype == torch.bfloat16 else ()),
        *((TORCHAO_8_BIT, BITSANDBYTES) if options.get("exp_avg_dtype") == torch.int8 else ()),
    )


_BESIDE_COPY = (COPY, FUSED, CAPTURABLE, FOREACH, NEXUS_TRITON)
_THIRD_PARTY = (*_BESIDE_COPY, OPTIMI, TORCHAO, APEX)
_LARGE: dict[str, Any] = {"repeats": 40, "quick_repeats": 5, "devices": (CUDA,)}
_COUNTED: dict[str, Any] = {**_LARGE, "repeats": 150, "cuda_peers": (COPY, NEXUS_TRITON)}
_TINY, _SMALL = (64,), (1000,)
_WIDE_PEERS = (NEXUS_FLOAT32, FUSED_FLOAT32)
_GPT, _DEEP = gpt_shapes(3, 128, 256, 256), gpt_shapes(12, 64, 256, 256)
_GPT2, _BILLION = gpt_shapes(12, 768, 50257, 1024), gpt_shapes(24, 1792, 50257, 1024)

CASES = {
    case.name: case
    for case in (
        Case("tiny", "148 tensors of 64 elements", (_TINY,) * 148, 1000, 60),
        Case("gpt", "byte-level GPT: 3 layers, width 128", _GPT, 500, 40),
        Case("deep", "byte-level GPT: 12 layers, width 64", _DEEP, 500, 40),
        Case("gpt2", "GPT-2 124M", _GPT2, 20, 4, peers=(FUSED, FOREACH, COPY), cuda_peers=_THIRD_PARTY),
        Case(
            "gpt2-average",
            "GPT-2 124M, with an average",
            _GPT2,
            30,
            4,
            jobs=(STEP,),
            peers=(NO_AVERAGE, SEPARATE_AVERAGE),
            cuda_peers=(NO_AVERAGE, SEPARATE_AVERAGE),
            average=True,
        ),
        Case(
            "groups",
            "100 groups, each with its own rate",
            (_SMALL,) * 100,
            repeats=500,
            quick_repeats=40,
            groups=100,
            jobs=(STEP_SCHEDULE, CLIP_STEP_SCHEDULE),
            peers=(FUSED, FOREACH),
        ),
        Case("many", "1000 tensors of 1,000 elements", (_SMALL,) * 1000, 150, 15, cuda_peers=_THIRD_PARTY),
        Case("ten", "10 tensors of 1,000 elements", (_SMALL,) * 10, **_COUNTED),
        Case("ten-thousand", "10,000 tensors of 1,000 elements", (_SMALL,) * 10_000, **_COUNTED),
        Case("billion", "GPT of 1.02B parameters", _BILLION, cuda_peers=_THIRD_PARTY, **_LARGE),
        Case(
            "billion-bf16",
            "GPT of 1.02B bfloat16 parameters",
            _BILLION,
            cuda_peers=_BESIDE_COPY,
            dtype=BFLOAT16,
            **_LARGE,
        ),
        *(
            Case(
                f"gpt2-{index}",
                f"GPT-2 124M, {mode}",
                _GPT2,
                30,
                4,
                jobs=(STEP,),
                peers=_low_memory_peers(dtype, options),
                cuda_peers=(COPY, *_WIDE_PEERS),
                dtype=str(dtype).removeprefix("torch."),
                mode=mode,
            )
            for index, (mode, dtype, options) in enumerate(MODES[1:], 1)
        ),
    )
}
QUICK = ("tiny", "gpt", "groups", "train-mlp")
"""The cases of a quick run: each takes seconds."""
TRAINING_CASES = {
    case.name: case
    for case in (
        TrainingCase("train-mlp", "MLP of 2 layers", MLP, 300, 20, 20),
        TrainingCase("train-gpt", "the demo's GPT", DEMO_GPT, 30, 3, 10),
        TrainingCase(
            "train-gpt2",
            "GPT-2 124M, autocast to bfloat16",
            GPT2,
            repeats=20,
            quick_repeats=3,
            loop_steps=4,
            gigabytes=8,
            cuda_gigabytes=50,
            autocast=True,
            by_default=(CUDA,),
        ),
    )
}
