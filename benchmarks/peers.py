"""The AdamWs of others, made so that each computes the same as nexus."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from benchmarks.cases import APEX, CAPTURABLE, FOR_LOOP, FOREACH, FUSED, NEXUS_TRITON, OPTIMI, TORCHAO
from nexus import backends

PEAK_LR = 1e-3

Groups: TypeAlias = list[dict[str, Any]]

# Said to each, since their defaults differ.
_OPTIONS: dict[str, Any] = {"lr": PEAK_LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


@dataclass(frozen=True)
class Peer:
    """One of them."""

    make: Callable[[Groups, torch.device], Optimizer]
    capturable: bool = False  # whether a CUDA graph may hold its step
    module: str = "torch"
    distribution: str = "torch"


def _torch(**how: Any) -> Callable[[Groups, torch.device], Optimizer]:
    return lambda groups, device: torch.optim.AdamW(groups, **_OPTIONS, **how)


def _capturable(groups: Groups, device: torch.device) -> Optimizer:
    # A tensor for each group: a scheduler writes to it, and torch would share one among all.
    own = [{**group, "lr": torch.tensor(PEAK_LR, device=device)} for group in groups]
    return torch.optim.AdamW(own, **_OPTIONS, fused=True, capturable=True)


def _optimi(groups: Groups, device: torch.device) -> Optimizer:
    optimizer: Optimizer = importlib.import_module("optimi").AdamW(groups, **_OPTIONS)
    return optimizer


def _torchao(groups: Groups, device: torch.device) -> Optimizer:
    optimizer: Optimizer = importlib.import_module("torchao.optim")._AdamW(groups, **_OPTIONS)
    return optimizer


def _apex(groups: Groups, device: torch.device) -> Optimizer:
    fused_adam = importlib.import_module("apex.optimizers").FusedAdam
    optimizer: Optimizer = fused_adam(groups, **_OPTIONS, adam_w_mode=True)
    return optimizer


PEERS = {
    FUSED: Peer(_torch(fused=True)),
    CAPTURABLE: Peer(_capturable, capturable=True),
    FOREACH: Peer(_torch(foreach=True)),
    FOR_LOOP: Peer(_torch(foreach=False, fused=False)),
    OPTIMI: Peer(_optimi, module="optimi", distribution="torch-optimi"),
    TORCHAO: Peer(_torchao, module="torchao.optim", distribution="torchao"),
    APEX: Peer(_apex, module="apex.optimizers", distribution="apex"),
}


def unavailable(name: str) -> str | None:
    """Why this peer cannot be set beside nexus here; None if it can."""
    if name == NEXUS_TRITON:
        ways = {info.name: info for info in backends.describe()}
        if "triton" not in ways:
            return "this nexus has no Triton backend"
        if not ways["triton"].available:
            return ways["triton"].detail
        if "cuda" not in ways or not ways["cuda"].available:
            return "nexus itself runs in Triton here"
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
