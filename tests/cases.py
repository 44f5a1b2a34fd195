"""What updates are tested over: sizes, types, options. Each option is a case on every backend."""

from __future__ import annotations

import math
from typing import Any

import torch

from nexus.schedules import WSD, Cosine

BLOCK, CHUNK = 512, 16_384  # of the compiled kernels
SHAPES = [(), (0,), (1,), (7,), (0, 5), (13, 17), (100_003,)]
SHAPES += [(size + by,) for size in (BLOCK, CHUNK) for by in (-1, 0, 1)]
FEW_SHAPES = [(), (3, 0), (2, 3, 5), (2 * BLOCK + 3,)]
# parameter, gradient
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
SCHEDULE = WSD(warmup_steps=10, stable_steps=20, decay_steps=30, peak_lr=2e-2, min_lr=1e-3, decay_type="cosine")
OPTIONS: dict[str, dict[str, Any]] = {
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "no decay": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.1},
    "betas and eps": {"betas": (0.5, 0.8), "eps": 1e-3},
    "no momentum": {"betas": (0.0, 0.999)},
    "rmsprop of one step": {"betas": (0.9, 0.0)},
    "clip": {"max_grad_norm": 0.7},
    "clip by nothing": {"max_grad_norm": 1e6},
    "measure the norm": {"max_grad_norm": math.inf},
    "schedule": {"lr": SCHEDULE, "weight_decay": Cosine(peak_lr=0.2, total_steps=40)},
    "everything": {
        "lr": SCHEDULE,
        "amsgrad": True,
        "maximize": True,
        "weight_decay": 0.1,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "max_grad_norm": 3.0,
    },
}
