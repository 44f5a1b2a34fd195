"""Random optimizers beside float64 torch: `run(seed, backend)`. As a program, for as long as it is told to.

A seed is a whole run: its groups, options, dtypes, shapes, layouts, and what happens between its steps.
"""

from __future__ import annotations

import argparse
import copy
import io
import random
import sys
import time
from typing import Any

import torch
from references import BACKENDS, LAYOUTS, Float64AdamW, assert_same_parameter, norm_rtol, set_grads
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant, Cosine, CosineRestarts, Schedule
from nexus.schedules.curves import DECAYS

DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (1,), (7,), (31,), (257,), (3, 0), (5, 13), (2, 3, 5), (4, 3, 2, 5), (511,), (64, 9), (16_411,))
OF_LAYOUTS = ("contiguous", "contiguous", "transposed", "sliced", "every other", "offset")


class Case:
    """One random run."""

    def __init__(self, seed: int, backend: str) -> None:
        self.dice = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.backend = backend
        dice = self.dice
        groups = [self.group() for _ in range(dice.choice((1, 1, 2, 4)))]
        self.skip = dice.random() < 0.3
        self.limit = dice.choice((None, None, 0.5, 1e6))
        # Then the reference's scheduler writes all of its rates.
        self.keeps_rates = any(isinstance(group["lr"], Schedule) for group in groups)
        self.groups = groups
        own = [{**group, "params": list(group["params"])} for group in groups]
        self.reference = Float64AdamW([as_float(group) for group in groups], max_grad_norm=self.limit)
        self.optimizer = self.make(own)
        self.params = [param for group in own for param in group["params"]]
        self.silent = {index for index in range(len(self.params)) if dice.random() < 0.1}
        self.skipped = 0

    def make(self, groups: Any) -> FusedAdamW:
        return FusedAdamW(groups, max_grad_norm=self.limit, skip_nonfinite=self.skip, backend=self.backend)

    def randn(self, shape: Any) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def laid_out(self, values: Tensor) -> Tensor:
        return LAYOUTS[self.dice.choice(OF_LAYOUTS)](values) if values.dim() else values

    def schedule(self, peak: float) -> Schedule:
        dice = self.dice
        warmup = dice.choice((0, 1, 3))
        decay_type = dice.choice(tuple(DECAYS))
        return dice.choice(
            (
                WSD(
                    warmup_steps=warmup,
                    stable_steps=dice.choice((0, 4)),
                    decay_steps=5,
                    peak_lr=peak,
                    min_lr=peak / 10,
                    decay_type=decay_type,
                ),
                Cosine(peak_lr=peak, total_steps=9 + warmup, min_lr=0.0, warmup_steps=warmup),
                CosineRestarts(
                    peak_lr=peak, min_lr=0.0, cycle_length=4, cycle_mult=dice.choice((1.0, 1.5)), warmup_steps=warmup
                ),
                Constant(peak),
            )
        )

    def group(self) -> dict[str, Any]:
        dice = self.dice
        rate, decay = dice.choice((1e-4, 1e-3, 2e-2)), dice.choice((0.0, 1e-2, 0.3))
        params = []
        for _ in range(dice.choice((0, 1, 3, 6)) or 1):
            values = self.laid_out(self.randn(dice.choice(SHAPES)).to(dice.choice(DTYPES)))
            params.append(torch.nn.Parameter(values))
        lr = dice.choice((rate, torch.tensor(rate, dtype=torch.float64), self.schedule(rate)))
        return {
            "params": params,
            "lr": lr,
            "weight_decay": dice.choice((decay, decay, self.schedule(decay or 0.1))),
            "lr_scale": dice.choice((1.0, 0.3)) if isinstance(lr, Schedule) else 1.0,
            "betas": dice.choice(((0.9, 0.999), (0.5, 0.8), (0.0, 0.99), (0.95, 0.9999))),
            "eps": dice.choice((1e-8, 1e-3)),
            "amsgrad": dice.random() < 0.3,
            "maximize": dice.random() < 0.3,
        }

    def gradients(self) -> list[Tensor | None]:
        grads: list[Tensor | None] = []
        for index, param in enumerate(self.params):
            if index in self.silent or self.dice.random() < 0.15:
                grads.append(None)
                continue
            values = (self.randn(param.shape) * 0.5 + 0.5).to(param.dtype)
            if param.dtype in (torch.bfloat16, torch.float16) and self.dice.random() < 0.2:
                values = values.float()
            grads.append(self.laid_out(values))
        return grads

    def step(self) -> None:
        grads = self.gradients()
        there = [grad for grad in grads if grad is not None and grad.numel()]
        spoils = bool(self.skip and there and self.dice.random() < 0.2)
        if spoils:
            spoiled = self.dice.choice(there)
            spoiled[(0,) * spoiled.dim()] = self.dice.choice((torch.inf, -torch.inf, torch.nan))
            self.skipped += 1
        else:
            self.reference.step(grads)
        set_grads(self.params, grads)
        self.optimizer.step()
        if self.limit is not None and not spoils:
            norm = self.optimizer.grad_norm
            assert norm is not None
            torch.testing.assert_close(
                norm, self.reference.grad_norm, rtol=norm_rtol(self.backend), atol=0.0, check_dtype=False
            )

    # What users do between two steps.

    def load_in_place(self) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def load_elsewhere(self) -> None:
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        counted = self.optimizer.skipped_steps
        pairs = zip(self.groups, self.optimizer.param_groups, strict=True)
        groups = [{**group, "lr": copy.deepcopy(group["lr"]), "params": now["params"]} for group, now in pairs]
        self.optimizer = self.make(groups)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        self.optimizer.skipped_steps.copy_(counted)

    def swap_storage(self) -> None:
        param = self.dice.choice(self.params)
        param.data = self.laid_out(param.data.clone())

    def change_a_number(self) -> None:
        index = self.dice.randrange(len(self.groups))
        ours, theirs = self.optimizer.param_groups[index], self.reference.optimizer.param_groups[index]
        name, value = self.dice.choice((("betas", (0.8, 0.95)), ("eps", 1e-4), ("maximize", not ours["maximize"])))
        ours[name] = theirs[name] = value
        if not self.keeps_rates:
            rate = self.dice.choice((3e-4, 5e-3))
            theirs["lr"] = rate
            if isinstance(ours["lr"], Tensor):
                ours["lr"].fill_(rate)
            else:
                ours["lr"] = rate

    def read(self) -> None:
        assert len(self.optimizer.state_dict()["param_groups"]) == len(self.groups)
        assert "FusedAdamW" in repr(self.optimizer)

    def run(self) -> None:
        events = (self.load_in_place, self.load_elsewhere, self.swap_storage, self.change_a_number, self.read)
        for _ in range(self.dice.choice((1, 4, 12))):
            self.step()
            if self.dice.random() < 0.3:
                self.dice.choice(events)()
        assert int(self.optimizer.skipped_steps) == self.skipped
        for index, param in enumerate(self.params):
            state = self.optimizer.state.get(param, {})
            if state and not self.reference.state(index) and self.skipped:  # its only gradients were of skipped steps
                assert not any(value.any() for value in state.values()), index
                del self.optimizer.state[param]
            assert_same_parameter(self.optimizer, param, self.reference, index)


def as_float(group: dict[str, Any]) -> dict[str, Any]:
    """Torch's for-loop takes no tensor for a rate beside a scheduler."""
    return {**group, "lr": float(group["lr"]) if isinstance(group["lr"], Tensor) else group["lr"]}


def run(seed: int, backend: str) -> None:
    """The run of a seed; AssertionError if it is not that of float64 torch."""
    try:
        Case(seed, backend).run()
    except Exception:
        print(f"python tests/fuzz.py --seed {seed} --count 1  # fails with {backend!r}", file=sys.stderr)
        raise


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="the first seed (default: of the clock)")
    parser.add_argument("--count", type=int, default=None, help="how many seeds at most")
    arguments = parser.parse_args()
    import cuda_on_cpu  # noqa: F401  # registers its backend

    first = time.time_ns() // 10**6 if arguments.seed is None else arguments.seed
    end = time.monotonic() + arguments.seconds
    seed = first
    while time.monotonic() < end and seed - first != arguments.count:
        for backend in BACKENDS:
            run(seed, backend)
        seed += 1
    print(f"{seed - first} runs from seed {first}, each with {', '.join(BACKENDS)}: no difference")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
