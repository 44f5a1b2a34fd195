"""`torch.optim.AdamW(fused=True)` and FusedAdamW, put through the same: for the tests behind docs/parity.md."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from parity_table import TORCH
from references import MOMENT, PARAMS, assert_close, make_grads, params_of, set_grads
from torch.optim import Optimizer

from nexus.optim import FusedAdamW

Make = Callable[..., Optimizer]
Seen = TypeVar("Seen")

of_this_torch = pytest.mark.skipif(
    torch.__version__.split(".")[:2] != TORCH.split("."),
    reason=f"docs/parity.md is about torch {TORCH}; what another one does differently is no fault of nexus",
)


def fused_torch(params: Any, *args: Any, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(params, *args, fused=True, **options)


def both(observe: Callable[[Make], Seen], backend: str | None = None) -> tuple[Seen, Seen]:
    """What `observe` returns for torch's optimizer and for nexus's, from the same random numbers."""
    ours: Make = FusedAdamW if backend is None else functools.partial(FusedAdamW, backend=backend)
    return seeded(observe, fused_torch), seeded(observe, ours)


def beside_plain(observe: Callable[[Make], Seen], backend: str) -> tuple[Seen, Seen]:
    """The same for torch's plain loop and for nexus on one backend."""
    return seeded(observe, torch.optim.AdamW), seeded(observe, functools.partial(FusedAdamW, backend=backend))


def seeded(observe: Callable[[Make], Seen], make: Make) -> Seen:
    torch.manual_seed(20_240_404)
    return observe(make)


def param(*shape: int, dtype: torch.dtype = torch.float64, value: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, value, dtype=dtype))


def train(optimizer: Optimizer, steps: int = 3) -> None:
    """Steps with gradients about 1 for all parameters."""
    params = params_of(optimizer)
    for _ in range(steps):
        set_grads(params, make_grads(params))
        optimizer.step()


def train_alike(*optimizers: Optimizer, steps: int = 3) -> None:
    """The same steps of each."""
    seed = int(torch.randint(2**31, (), device="cpu"))
    for optimizer in optimizers:
        torch.manual_seed(seed)
        train(optimizer, steps)


def state_of(optimizer: Optimizer, index: int = 0) -> dict[str, Any]:
    return optimizer.state[params_of(optimizer)[index]]


def assert_same(first: Optimizer, second: Optimizer) -> None:
    """Parameters, moments and counts of two runs, in the precision of the parameters."""
    pairs = zip(params_of(first), params_of(second), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert_close(other, one, PARAMS[one.dtype], "parameter")
        states = first.state.get(one, {}), second.state.get(other, {})
        assert set(states[0]) == set(states[1])
        for name, value in states[0].items():
            if name == "step":
                assert int(value) == int(states[1][name])
            else:
                assert_close(states[1][name], value, MOMENT[value.dtype], name)


def assert_found_the_same(first: Any, second: Any) -> None:
    """Of what a run returns: optimizers, tensors, other values, and lists of them."""
    assert isinstance(first, Optimizer) or type(first) is type(second)
    if isinstance(first, Optimizer):
        assert_same(first, second)
    elif isinstance(first, (list, tuple)):
        for one, other in zip(first, second, strict=True):
            assert_found_the_same(one, other)
    elif isinstance(first, torch.Tensor):
        torch.testing.assert_close(second, first, rtol=1e-14, atol=1e-14)
    else:
        assert first == second


def same_of_both(run: Callable[..., object]) -> Callable[..., None]:
    """A test that `run(make, ...)` returns the same for torch's optimizer and for nexus's."""
    return _test_of(run, lambda observe: assert_found_the_same(*both(observe)))


def same_on_every_backend(run: Callable[..., object]) -> Callable[..., None]:
    """The same for torch's optimizer and for nexus's, on each backend in turn."""
    return _test_of(run, lambda observe, backend: assert_found_the_same(*both(observe, backend)))


def fails(kind: type[Exception], words: str) -> Any:
    """The outcome that is this error, with what the pattern `words` finds in its text."""
    return pytest.raises(kind, match=words)


def outcomes(*, torch: Any, nexus: Any) -> Callable[[Callable[..., object]], Callable[..., None]]:
    """A test that `run(make, ...)` ends so with torch's optimizer, and so with nexus's; see `assert_outcomes`."""
    return lambda run: _test_of(run, lambda observe: assert_outcomes(observe, torch, nexus))


def _test_of(run: Callable[..., object], check: Callable[..., None]) -> Callable[..., None]:
    """A test that hands `run` all that pytest gives, but `make` and what `check` asks for."""
    _, *for_run = inspect.signature(run).parameters.values()
    _, *for_check = inspect.signature(check).parameters.values()

    @functools.wraps(run)
    def test(**given: Any) -> None:
        others = {each.name: given.pop(each.name) for each in for_check}
        check(functools.partial(run, **given), **others)

    del test.__wrapped__
    test.__signature__ = inspect.Signature([*for_run, *for_check])  # what pytest is to give
    return test


def assert_outcomes(observe: Callable[[Make], object], torchs: Any, ours: Any) -> None:
    """What `observe` returns for torch's optimizer and for nexus's, or how it `fails`."""
    for make, expected in ((fused_torch, torchs), (FusedAdamW, ours)):
        if isinstance(expected, contextlib.AbstractContextManager):
            with expected:
                seeded(observe, make)
        else:
            assert seeded(observe, make) == expected
