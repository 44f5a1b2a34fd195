"""What identifies a run of the demo: two runs with equal `RunConfig` give equal numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from gpt.model import GPTConfig
from nexus.schedules import WSD, Cosine, CosineRestarts, Schedule

SCHEDULES = {"WSD": "wsd", "CosineRestarts": "sgdr", "Cosine": "cosine"}  # class and name on the command line


@dataclass(frozen=True)
class Size:
    """How large the demo is. With 1200 steps the defaults take about two minutes."""

    model: GPTConfig = field(default_factory=GPTConfig)
    batch: int = 4  # windows of `model.context` bytes
    held_out_windows: int = 512
    timed_steps: int = 40
    sample_bytes: int = 400


@dataclass(frozen=True)
class RunConfig:
    """Everything that the numbers of a run depend on."""

    steps: int
    schedule: Schedule
    seed: int
    size: Size
    device: str  # "cpu" or "cuda"
    threads: int
    text: str  # fingerprint of the corpus

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for the checkpoint."""
        return {**self.__dict__, "schedule": self.schedule.to_dict(), "size": asdict(self.size)}


def schedule_for(name: str, steps: int, peak_lr: float = 2e-3) -> Schedule:
    """The schedule called `name` for a run of `steps` updates, down to a hundredth of the peak.

    `wsd`: 5 % warm-up, 75 % stable, 20 % decay. `sgdr`: about 5 % warm-up, then three cycles, each twice as
    long as the one before, that end with the run. `cosine`: 5 % warm-up, then one half-cosine.
    """
    min_lr, warmup = peak_lr / 100, steps // 20
    if name == "wsd":
        decay = max(1, steps // 5)
        return WSD(
            warmup_steps=warmup,
            stable_steps=steps - warmup - decay,
            decay_steps=decay,
            peak_lr=peak_lr,
            min_lr=min_lr,
        )
    if name == "sgdr":
        cycle = max(1, (steps - warmup) // 7)
        return CosineRestarts(
            peak_lr=peak_lr, min_lr=min_lr, cycle_length=cycle, cycle_mult=2.0, warmup_steps=max(0, steps - 7 * cycle)
        )
    if name == "cosine":
        return Cosine(peak_lr=peak_lr, total_steps=steps, min_lr=min_lr, warmup_steps=warmup)
    raise ValueError(f"schedule must be one of {', '.join(SCHEDULES.values())}, got {name!r}")
