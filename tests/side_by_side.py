"""`torch.optim.AdamW(fused=True)` and FusedAdamW, put through the same: for the tests behind docs/parity.md."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
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
    found = []
    for make in (fused_torch, ours):
        torch.manual_seed(20_240_404)
        found.append(observe(make))
    return found[0], found[1]


def beside_plain(observe: Callable[[Make], Seen], backend: str) -> tuple[Seen, Seen]:
    """The same for torch's plain loop and for nexus on one backend."""
    found = []
    for make in (torch.optim.AdamW, functools.partial(FusedAdamW, backend=backend)):
        torch.manual_seed(20_240_404)
        found.append(observe(make))
    return found[0], found[1]


def param(*shape: int, dtype: torch.dtype = torch.float64, value: float = 1.0) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.full(shape, value, dtype=dtype))


def train(optimizer: Optimizer, steps: int = 3) -> None:
    """Steps with gradients about 1 for all parameters."""
    params = params_of(optimizer)
    for _ in range(steps):
        set_grads(params, make_grads(params))
        optimizer.step()


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

    @functools.wraps(run)
    def test(**given: Any) -> None:
        assert_found_the_same(*both(functools.partial(run, **given)))

    signature = inspect.signature(run)
    del test.__wrapped__  # type: ignore[attr-defined]
    test.__signature__ = signature.replace(  # type: ignore[attr-defined]  # what pytest is to give
        parameters=list(signature.parameters.values())[1:], return_annotation=None
    )
    return test


def errors(observe: Callable[[Make], object], kinds: Sequence[type[Exception]] = (Exception,)) -> tuple[str, str]:
    """ "TypeError: its words" of both, which must fail."""

    def told(make: Make) -> str:
        with pytest.raises(tuple(kinds)) as caught:
            observe(make)
        return f"{caught.type.__name__}: {caught.value}"

    return both(told)
