"""The first runs of fuzz.py, the same ones each time. `make fuzz` makes new ones for as long as it is told to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable

import fuzz
import pytest
import torch
from side_by_side import params_of

from nexus.optim import FusedAdamW

RUNS = 50


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("first", range(0, 4 * RUNS, RUNS))
def test_random_runs_equal_torch_in_float64(first: int) -> None:
    torch.set_num_threads(1)  # threads that wait for one another are slow where others are at work
    for seed in range(first, first + RUNS):
        for backend in fuzz.BACKENDS:
            fuzz.run(seed, backend)


def test_a_seed_is_one_run() -> None:
    first, second = fuzz.Case(5, "native"), fuzz.Case(5, "native")
    first.run()
    second.run()
    assert all(torch.equal(a, b) for a, b in zip(first.params, second.params, strict=True))


STEP = FusedAdamW.step


def wrong_step(self: FusedAdamW) -> None:
    """Does nothing to the last parameter."""
    last = self.param_groups[-1]["params"][-1]
    grad, last.grad = last.grad, None
    STEP(self)
    last.grad = grad


def wrong_decay(self: FusedAdamW) -> None:
    """Decays a little more."""
    with torch.no_grad():
        for param in params_of(self):
            if param.grad is not None:
                param.mul_(1 - 1e-4)
    STEP(self)


@pytest.mark.parametrize("wrong", [wrong_step, wrong_decay])
def test_a_wrong_optimizer_is_found_out_soon(
    wrong: Callable[[FusedAdamW], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FusedAdamW, "step", wrong)
    passes = 0
    for seed in range(30):
        with contextlib.suppress(AssertionError):
            fuzz.run(seed, "native")
            passes += 1
    assert passes <= 20


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--seed", "3", "--count", "30"])
    assert fuzz.main() == 0
    assert capsys.readouterr().out.startswith("30 runs from seed 3")
    monkeypatch.setattr(FusedAdamW, "step", wrong_step)
    with pytest.raises(AssertionError):
        fuzz.main()
    assert "python tests/fuzz.py --seed" in capsys.readouterr().err
