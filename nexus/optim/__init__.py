"""Optimizers. Importing this says, once, if the compiled backend is missing, and why."""

import warnings

from nexus.backends import native
from nexus.optim.averages import EMA, Mean
from nexus.optim.fused_adamw import FusedAdamW
from nexus.optim.grouping import param_groups
from nexus.optim.history import History, HistoryRows

__all__ = ["EMA", "FusedAdamW", "History", "HistoryRows", "Mean", "param_groups"]

if (_reason := native.unavailable()) is not None:
    warnings.warn(
        f"nexus runs in plain PyTorch (backend 'torch'), without its compiled kernels: {_reason}",
        RuntimeWarning,
        stacklevel=2,
    )
