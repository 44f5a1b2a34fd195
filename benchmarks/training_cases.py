"""Whole training steps that are timed: the models, and the loops that nexus is set beside."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import CPU, CUDA

EAGER, CAPTURED = "training step", "training step, captured"  # jobs

TORCH_LOOP, TORCH_FUSED_LOOP = "torch loop", "torch loop, fused"
TORCH_GRAPH = "torch in a CUDA graph"
NEXUS_EAGER = "nexus, not captured"

PEERS = {
    (CPU, EAGER): (TORCH_LOOP, TORCH_FUSED_LOOP),
    (CUDA, CAPTURED): (TORCH_LOOP, TORCH_GRAPH, NEXUS_EAGER),
    (CUDA, EAGER): (TORCH_LOOP,),
}
"""Beside whom each job is timed on each kind of device."""

MLP, DEMO_GPT, GPT2 = "mlp", "demo gpt", "gpt-2"


@dataclass(frozen=True)
class TrainingCase:
    """A model and its batches. `repeats` is the number of timed pairs."""

    name: str
    title: str
    model: str
    repeats: int
    quick_repeats: int
    loop_steps: int  # made in a row, for steps a second
    gigabytes: int = 1  # of memory, at most
    cuda_gigabytes: int = 1  # where the batches are larger
    autocast: bool = False  # to bfloat16
    devices: tuple[str, ...] = (CPU, CUDA)
    by_default: tuple[str, ...] = (CPU, CUDA)  # elsewhere it has to be asked for by its name

    def jobs_on(self, device: str) -> tuple[str, ...]:
        """What is timed on this kind of device: where there are no graphs, nothing is captured."""
        return tuple(job for kind, job in PEERS if kind == device)

    def bytes_needed(self, device: str) -> int:
        """At most: of two models with optimizers, activations and graphs."""
        return (self.cuda_gigabytes if device == CUDA else self.gigabytes) * 10**9


TRAINING_CASES = {
    case.name: case
    for case in (
        TrainingCase("train-mlp", "MLP of 2 layers", MLP, repeats=300, quick_repeats=20, loop_steps=20),
        TrainingCase("train-gpt", "the demo's GPT", DEMO_GPT, repeats=30, quick_repeats=3, loop_steps=10),
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
