"""Gradients of every origin, changed in every way, and those that are no plain memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from references import assert_same_run, make_grads, make_params, run_beside_torch
from side_by_side import Make, assert_same, beside_plain, fused_torch, of_this_torch, param, params_of
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from nexus.schedules import WSD


def backward(module: nn.Module, x: Tensor) -> None:
    module(x).float().square().mean().backward()


def accumulated(module: nn.Module, x: Tensor) -> None:
    for part in x.split(2):
        backward(module, part)


def functional(module: nn.Module, x: Tensor) -> None:
    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, weights, x).square().sum()

    grads = torch.func.grad(loss)({name: each.detach() for name, each in module.named_parameters()})
    for name, each in module.named_parameters():
        each.grad = grads[name]


def recomputed(module: nn.Module, x: Tensor, *, use_reentrant: bool) -> None:
    checkpoint(module, x.requires_grad_(), use_reentrant=use_reentrant).square().sum().backward()


def clipped(module: nn.Module, x: Tensor, *, clip: Callable[[Any, float], Any]) -> None:
    backward(module, x)
    clip(module.parameters(), 0.3)


def parametrized(module: nn.Module, *, by: Callable[..., Any]) -> nn.Module:
    by(module[0])
    return module


def lazy(module: nn.Module) -> nn.Module:
    made = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    made(torch.randn(6, 4))
    return made


def autocast(dtype: torch.dtype) -> Any:
    return torch.autocast(torch.empty(()).device.type, dtype)


class Origin(NamedTuple):
    backward: Callable[[nn.Module, Tensor], None] = backward
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    around: Callable[[], Any] = contextlib.nullcontext  # the backward pass and the step


ORIGINS = {
    "weight_norm": Origin(wrap=functools.partial(parametrized, by=parametrizations.weight_norm)),
    "spectral_norm": Origin(wrap=functools.partial(parametrized, by=parametrizations.spectral_norm)),
    "orthogonal": Origin(wrap=functools.partial(parametrized, by=parametrizations.orthogonal)),
    "lazy": Origin(wrap=lazy),
    "accumulated": Origin(accumulated),
    "functional": Origin(functional),
    "checkpointed": Origin(functools.partial(recomputed, use_reentrant=False)),
    "checkpointed, reentrant": Origin(functools.partial(recomputed, use_reentrant=True)),
    "autocast to bfloat16": Origin(around=lambda: autocast(torch.bfloat16)),
    "autocast to float16": Origin(around=lambda: autocast(torch.float16)),
    "clipped": Origin(functools.partial(clipped, clip=clip_grad_norm_)),
    "clipped values": Origin(functools.partial(clipped, clip=clip_grad_value_)),
}


@pytest.mark.parametrize("origin", ORIGINS.values(), ids=ORIGINS)
def test_gradients_of_every_origin(backend: str, origin: Origin) -> None:
    module = origin.wrap(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)))
    params = list(module.parameters())
    optimizer, reference = run_beside_torch(
        params, backend, 0, lr=WSD(warmup_steps=2, stable_steps=20, decay_steps=5, peak_lr=1e-2), max_grad_norm=0.5
    )
    for _ in range(5):
        optimizer.zero_grad()
        with origin.around():
            origin.backward(module, torch.randn(6, 4))
            reference.step([each.grad for each in params])
            optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm)
    assert_same_run(optimizer, reference)


CHANGES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "new": lambda param, grad: setattr(param, "grad", grad.clone()),
    "in place": lambda param, grad: param.grad.copy_(grad),
    "its data": lambda param, grad: setattr(param.grad, "data", grad.clone()),
    "set_": lambda param, grad: param.grad.set_(grad.clone()),
    "transposed": lambda param, grad: setattr(param, "grad", grad.t().contiguous().t()),
}


def test_gradients_are_read_where_they_are(backend: str) -> None:
    params = make_params([(6, 7), (3, 2)])
    optimizer, reference = run_beside_torch(params, backend)
    for name in [name for name in CHANGES for _ in range(2)] * 2:
        grads = make_grads(params)
        for each, grad in zip(params, grads, strict=True):
            CHANGES[name](each, grad)
        reference.step(grads)
        optimizer.step()
        assert_same_run(optimizer, reference, name)


KINDS: dict[str, Callable[[], Tensor]] = {
    "zeros without memory": lambda: torch._efficientzerotensor(1, dtype=torch.float64),
    "an imaginary part of a conjugate": lambda: torch.tensor([1 + 2j], dtype=torch.complex128).conj().imag,
    "negated": lambda: torch._neg_view(torch.full((1,), 3.0, dtype=torch.float64)),
    "expanded": lambda: torch.full((), 3.0, dtype=torch.float64).expand(4),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parity(
    "Parameters and gradients",
    "gradients that are no plain memory: zeros that autograd makes of nothing, views of another sign, expanded ones",
    torch="`RuntimeError`; expanded ones are read as what lies behind them, silently. Right without `fused=True`",
    nexus="read by what they say",
    why="they are copied",
)
@of_this_torch
def test_gradients_that_are_no_plain_memory(kind: str, backend: str) -> None:
    def run(make: Make) -> Optimizer:
        """Such gradients come between plain ones, so that they are not met by a new plan."""
        own = param(KINDS[kind]().numel())
        optimizer = make([own], lr=0.1)
        for step in range(6):
            own.grad = KINDS[kind]() if step % 2 else torch.full_like(own, 0.5 + 0.1 * step)
            optimizer.step()
        return optimizer

    plain, ours = beside_plain(run, backend)
    assert_same(plain, ours)
    with torch.device("cpu"):
        if kind == "expanded":
            assert params_of(run(fused_torch))[0].tolist() != params_of(plain)[0].tolist()
        else:
            with pytest.raises(RuntimeError):
                run(fused_torch)


class Tied(nn.Parameter):
    grad = None  # hides torch's property


def test_a_parameter_class_with_a_gradient_of_its_own(backend: str) -> None:
    weight = Tied(torch.ones(3))
    optimizer, reference = run_beside_torch([weight], backend)
    assert Tensor.grad.__get__(weight) is None
    assert_same_run(optimizer, reference)
