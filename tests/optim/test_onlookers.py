"""Who else looks at a step: clips gradients before the update under a GradScaler, hooks, traces, counts memory."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import make_params
from side_by_side import (
    Make,
    assert_same,
    beside_plain,
    both,
    fused_torch,
    of_this_torch,
    param,
    params_of,
    train,
    train_alike,
)
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nexus.optim import FusedAdamW
from nexus.schedules import Constant

Watch = Callable[[Optimizer], Any]  # makes of an optimizer what a GradScaler steps

# GradScaler.


def clip(optimizer: Optimizer) -> None:
    nn.utils.clip_grad_norm_(params_of(optimizer), 1.5)


def subclass(optimizer: Optimizer) -> Optimizer:
    """As fairseq's, detectron2's and Avalanche's."""

    class Clipping(type(optimizer)):  # type: ignore[misc]
        def step(self, closure: Any = None) -> Any:
            clip(self)
            return super().step(closure)

    optimizer.__class__ = Clipping
    return optimizer


def pre_hook(optimizer: Optimizer) -> Optimizer:
    optimizer.register_step_pre_hook(lambda *_: clip(optimizer))
    return optimizer


def in_place_of_step(optimizer: Optimizer, with_its_names: bool) -> Optimizer:
    if with_its_names:
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)  # whose wrapper of step() is wrapped in turn
    step = optimizer.step

    def clip_then_step(*args: Any) -> Any:
        clip(optimizer)
        return step()

    method = types.MethodType(clip_then_step, optimizer)
    optimizer.step = functools.wraps(step)(clip_then_step) if with_its_names else method  # type: ignore[method-assign]
    return optimizer


class Wrapper:
    """As many a NoamOpt: not an optimizer, and passes on what it is asked."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        clip(self.optimizer)
        self.optimizer.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


WATCHES: dict[str, Watch] = {
    "a subclass": subclass,
    "a hook": pre_hook,
    "a method put in its place": functools.partial(in_place_of_step, with_its_names=False),
    "a function with the names of step": functools.partial(in_place_of_step, with_its_names=True),
    "a wrapper": Wrapper,
}


def scaled_run(make: Make, watch: Watch) -> list[Tensor]:
    """Steps of which one overflows, under a GradScaler."""
    params = make_params([(3,), (2, 2)], torch.float64)
    optimizer = watch(make(params, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for step in range(8):
        loss = sum((param * (step + 1.0)).sum() for param in params)
        scaler.scale(loss).backward()
        if step == 4:
            params[0].grad.view(-1)[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [param.detach() for param in params]


@pytest.mark.parametrize("watch", WATCHES.values(), ids=WATCHES)
@pytest.mark.parity(
    "GradScaler",
    "a subclass that overrides `step`, a hook, a method in its place or a wrapper clips gradients before the update",
    torch="sees them scaled, silently: clips far too much. Right without `fused=True`",
    nexus="sees them unscaled, and an overflow is skipped before it",
    why="users come from both",
)
@of_this_torch
def test_clipping_before_the_update(watch: Watch, backend: str) -> None:
    plain, ours = beside_plain(lambda make: scaled_run(make, watch), backend)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    fused, _ = both(lambda make: scaled_run(make, watch))
    if watch is not Wrapper:  # there, the overflow makes everything NaN
        assert all(each.isfinite().all() for each in fused)
    assert not torch.allclose(fused[0], plain[0], rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize("looks", [False, True])
def test_only_who_looks_makes_a_scaler_unscale_before_the_update(looks: bool) -> None:
    weight = param(2)
    optimizer = FusedAdamW([weight])
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # which wraps step()
    seen: list[Tensor] = []
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append(weight.grad.clone())) if looks else None
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale((weight * 3.0).sum()).backward()
    scaler.step(optimizer)
    if handle is not None:
        handle.remove()
    assert [grad.tolist() for grad in (*seen, weight.grad)] == ([[3.0] * 2] * 2 if looks else [[3.0 * 64] * 2])


# Subclasses.


def test_a_subclass_may_have_names_of_its_own() -> None:
    class Noam(FusedAdamW):
        """As many schedulers written by hand."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self._step = self._update = self._rate = 0

        def step(self, closure: Any = None) -> Any:
            self._step += 1
            return super().step(closure)

    ours, plain = Noam([param(3)]), torch.optim.AdamW([param(3)], lr=0.1)
    train_alike(ours, plain)
    assert ours._step == 3
    assert_same(plain, ours)


# Traces.


def traced_step(optimizer: Optimizer) -> Callable[[Tensor], Tensor]:
    (weight,) = params_of(optimizer)

    def step(x: Tensor) -> Tensor:
        (weight.grad,) = torch.autograd.grad((weight * x).sum(), [weight])
        optimizer.step()
        return x

    return step


@pytest.mark.parity(
    "Hooks, closures, printing",
    "`make_fx` over a function that steps",
    torch="the update is in the graph",
    nexus="`RuntimeError`; with `backend='reference'`, the update is in the graph",
    why="a tracer does not see what the kernels write: the graph would train nothing",
)
@of_this_torch
def test_a_trace_does_not_lose_the_update(backend: str) -> None:
    ones = torch.ones(3, dtype=torch.float64)

    def trains(make: Make) -> bool:
        """Whether the graph of a step does."""
        optimizer = make([param(3)], lr=0.1)
        train(optimizer, 1)
        graph = make_fx(traced_step(optimizer))(ones)
        before = params_of(optimizer)[0].tolist()
        graph(ones)
        return params_of(optimizer)[0].tolist() != before

    assert trains(fused_torch)
    if backend == "reference":
        assert trains(functools.partial(FusedAdamW, backend=backend))
        return
    weight = param(3)
    optimizer = FusedAdamW([weight], lr=0.1, backend=backend)
    for trained in (0, 1):  # before there is a plan, and after
        values, weight.grad = weight.tolist(), ones
        for trace in (
            make_fx(traced_step(optimizer)),
            make_fx(traced_step(optimizer), pre_dispatch=True),
            torch.func.functionalize(lambda x: (optimizer.step(), x)[1]),
        ):
            with pytest.raises(RuntimeError, match=r"a function that is traced .*backend='reference'"):
                trace(ones)
        assert weight.tolist() == values
        assert len(optimizer.state) == trained
        train(optimizer, 1)


def test_a_trace_of_an_estimate_is_refused() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        optimizer = FusedAdamW([param(3)], lr=0.1, backend="reference")
        for _ in range(2):  # before there is a plan, and after
            with pytest.raises(RuntimeError, match="a function that is traced"):
                make_fx(traced_step(optimizer))(torch.ones(3, dtype=torch.float64))
            train(optimizer, 1)


def test_state_without_memory_is_not_made_for_parameters_with_some(backend: str) -> None:
    weight = param(3)
    optimizer = FusedAdamW([weight], lr=0.1, backend=backend)
    weight.grad = torch.ones_like(weight)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="under FakeTensorMode"):
        optimizer.step()
    assert not optimizer.state
    optimizer.step()
    assert weight.tolist() != param(3).tolist()


# Estimates of memory.


def peak_of(make: Callable[[Any], Optimizer], layout: Callable[[Tensor], Tensor] = lambda t: t) -> int:
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
        optimizer = make(model.parameters())
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            model(torch.ones(4, 256)).sum().backward()
            for each in model.parameters():
                each.grad = layout(each.grad)
            optimizer.step()
        peak: dict[Any, int] = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        return peak["Total"]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "clipping over a schedule": {"lr": Constant(0.1), "max_grad_norm": 1.0, "skip_nonfinite": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parity(
    "Steps and state",
    "the peak of a step under `FakeTensorMode` and `MemTracker`",
    torch="gradients and state: an update allocates nothing",
    nexus="same, but for a few numbers that a step keeps",
    why="what the kernels do is no operation of torch's, and allocates nothing",
)
@of_this_torch
def test_an_estimate_of_memory_is_the_real_steps(options: dict[str, Any]) -> None:
    expected = peak_of(lambda params: fused_torch(params, amsgrad=options.get("amsgrad", False)))
    assert 0 <= peak_of(lambda params: FusedAdamW(params, **options)) - expected <= 4096


def test_an_estimate_has_the_copies_of_a_step() -> None:
    def transposed(grad: Tensor) -> Tensor:
        return grad.t().contiguous().t() if grad.dim() == 2 else grad

    plain, copied = peak_of(FusedAdamW), peak_of(FusedAdamW, transposed)
    assert copied - plain == 2 * 256 * 512 * 4  # of two matrices


def test_an_estimate_needs_no_gpu_and_no_gradient() -> None:
    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(3, device="cuda"))
        optimizer = FusedAdamW([weight], max_grad_norm=1.0, backend="reference")
        optimizer.step()
        assert not optimizer.state
        weight.grad = torch.empty_like(weight)
        optimizer.step()
        assert optimizer.state[weight]["exp_avg"].device.type == "cuda"
