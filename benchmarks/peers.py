"""The AdamWs of others, made so that each computes the same as nexus."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from benchmarks.cases import (
    APEX,
    BITSANDBYTES,
    BITSANDBYTES_FLOAT32,
    CAPTURABLE,
    DEEPSPEED,
    DEEPSPEED_BFLOAT16,
    FLOAT32,
    FOR_LOOP,
    FOREACH,
    FUSED,
    FUSED_FLOAT32,
    NEXUS_TRITON,
    OPTIMI,
    OPTIMI_KAHAN,
    TORCHAO,
    TORCHAO_8_BIT,
)
from nexus import backends
from nexus.schedules import WSD

PEAK_LR = 1e-3
WARMUP_STEPS = 10
SCHEDULE = WSD(warmup_steps=WARMUP_STEPS, stable_steps=None, decay_steps=1, peak_lr=PEAK_LR)
MAX_GRAD_NORM = 0.5  # below the norm of every case's gradients, and of most training steps
# Said to each, since their defaults differ.
OPTIONS: dict[str, Any] = {"lr": PEAK_LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}

Groups: TypeAlias = list[dict[str, Any]]


@dataclass(frozen=True)
class Peer:
    """One of them."""

    how: Mapping[str, Any] = field(default_factory=dict)  # options of its own
    module: str = "torch.optim"
    name: str = "AdamW"
    distribution: str = "torch"
    dtype: str = ""  # of its parameters, where that is not the case's
    overwrites_gradients: bool = False  # uses them as scratch space

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph may hold its step."""
        return bool(self.how.get("capturable"))

    def make(self, groups: Groups, device: torch.device) -> Optimizer:
        """Over these groups."""
        if self.capturable:  # a tensor for each group: a scheduler writes to it, and torch would share one among all
            groups = [{**group, "lr": torch.tensor(PEAK_LR, device=device)} for group in groups]
        optimizer: Optimizer = getattr(importlib.import_module(self.module), self.name)(groups, **OPTIONS, **self.how)
        return optimizer


_DEEPSPEED = ("deepspeed.ops.adam", "DeepSpeedCPUAdam", "deepspeed")

PEERS = {
    FUSED: Peer({"fused": True}),
    CAPTURABLE: Peer({"fused": True, "capturable": True}),
    FOREACH: Peer({"foreach": True}),
    FOR_LOOP: Peer({"foreach": False, "fused": False}),
    OPTIMI: Peer({}, "optimi", "AdamW", "torch-optimi"),
    TORCHAO: Peer({}, "torchao.optim", "_AdamW", "torchao"),
    FUSED_FLOAT32: Peer({"fused": True}, dtype=FLOAT32),
    DEEPSPEED: Peer({"adamw_mode": True}, *_DEEPSPEED),
    DEEPSPEED_BFLOAT16: Peer({"adamw_mode": True, "fp32_optimizer_states": False}, *_DEEPSPEED),
    OPTIMI_KAHAN: Peer({"kahan_sum": True}, "optimi", "AdamW", "torch-optimi", overwrites_gradients=True),
    TORCHAO_8_BIT: Peer({}, "torchao.optim", "AdamW8bit", "torchao"),
    BITSANDBYTES_FLOAT32: Peer({}, "bitsandbytes.optim", "AdamW", "bitsandbytes"),
    BITSANDBYTES: Peer({}, "bitsandbytes.optim", "AdamW8bit", "bitsandbytes"),
    APEX: Peer({"adam_w_mode": True}, "apex.optimizers", "FusedAdam", "apex"),
}


def warmup(step: int, scale: float = 1.0) -> float:
    """The factor that torch's schedulers multiply a base rate of `PEAK_LR` by; `SCHEDULE` says the same."""
    return scale * min(1.0, step / WARMUP_STEPS)


def unavailable(name: str) -> str | None:
    """Why this peer cannot be set beside nexus here; None if it can."""
    if name == NEXUS_TRITON:
        ways = {info.name: info for info in backends.describe()}
        if not ways["triton"].available:
            return ways["triton"].detail
        return None if ways["cuda"].available else "nexus itself runs in Triton here"
    if name not in PEERS:  # a copy, or a training loop
        return None
    try:
        importlib.import_module(PEERS[name].module)
    except ModuleNotFoundError as error:
        return f"not installed ({error})"
    except Exception as error:  # whatever a foreign package does at import
        return f"cannot be imported ({type(error).__name__}: {error})"
    return None


def installed_version(package: str) -> str | None:
    """Of a distribution, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Of the packages that peers come from; None where one is not installed."""
    return {peer.distribution: installed_version(peer.distribution) for peer in PEERS.values()}
