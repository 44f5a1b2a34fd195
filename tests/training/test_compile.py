"""`torch.compile` of training steps: the graph breaks at the step, and nothing is compiled anew as rates move."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from references import same_bits, snapshot
from torch import Tensor, nn

from nexus.optim import EMA, FusedAdamW
from nexus.schedules import WSD, Clock, Linear, ReduceOnPlateau
from nexus.training import step_in_backward
from nexus.training.schedulers import WSDScheduler

SCHEDULE = WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-2, min_lr=1e-4)
OPTIONS: dict[str, dict[str, Any]] = {
    "a schedule": {"lr": SCHEDULE, "weight_decay": 0.1},
    "clipping": {"lr": 0.01, "max_grad_norm": 0.5, "skip_nonfinite": True},
    "amsgrad": {"lr": 0.01, "amsgrad": True, "maximize": True},
    "a tensor": {"lr": torch.tensor(0.01)},
}

# Dynamo itself looks there, when a loss comes into a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


Step = Callable[[Tensor], Tensor]


def plain(model: nn.Module, optimizer: FusedAdamW, scaler: torch.amp.GradScaler | None = None) -> Step:
    def train_step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return loss.detach()

    return train_step


def scaled(model: nn.Module, optimizer: FusedAdamW) -> Step:
    device = torch.empty(()).device.type
    return plain(model, optimizer, torch.amp.GradScaler(device, init_scale=4.0, growth_interval=2))


def with_closure(model: nn.Module, optimizer: FusedAdamW) -> Step:
    def train_step(x: Tensor) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        return optimizer.step(closure).detach()

    return train_step


def hooked(model: nn.Module, optimizer: FusedAdamW) -> Step:
    """Also in the backward pass."""
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step_in_backward(model, optimizer)
    step = plain(model, optimizer)

    def train_step(x: Tensor) -> Tensor:
        loss = step(x)
        assert calls == ["before", "after"]
        calls.clear()
        return loss

    return train_step


def nothing(step: int, optimizer: FusedAdamW) -> None: ...


def trained(
    compiler: str | None,
    make_step: Callable[[nn.Module, FusedAdamW], Step] = plain,
    between: Callable[[int, FusedAdamW], None] = nothing,
    overflow: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Losses and everything of the optimizer after twelve steps."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = FusedAdamW(model.parameters(), **copy.deepcopy(options))
    step = make_step(model, optimizer)
    if compiler is not None:
        step = torch.compile(step, backend=compiler)
    losses = []
    for index in range(12):
        x = torch.full((16, 4), torch.inf if overflow and index == 5 else 0.1 * (index + 1))
        losses.append(step(x).clone())
        between(index, optimizer)
    assert losses[0] != losses[-1]
    return losses + snapshot(optimizer)


def assert_compiled_is_eager(*args: Any, **options: Any) -> None:
    assert same_bits(*(trained(compiler, *args, **options) for compiler in (None, "aot_eager")))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_training_step_is_compiled_once(backend: str, options: dict[str, Any]) -> None:
    assert_compiled_is_eager(backend=backend, **options)


def by_tokens(model: nn.Module, optimizer: FusedAdamW) -> Step:
    clock = optimizer.param_groups[0]["lr_schedule"].clock
    step = plain(model, optimizer)

    def train_step(x: Tensor) -> Tensor:
        loss = step(x)
        optimizer.advance(clock, (x < 0.7).sum())
        return loss

    return train_step


def test_a_clock_is_advanced_in_a_compiled_step(backend: str) -> None:
    lr = WSD(warmup_steps=100, stable_steps=200, decay_steps=100, peak_lr=1e-2).at(Clock())
    assert_compiled_is_eager(by_tokens, backend=backend, lr=lr, skip_nonfinite=True, overflow=True)


def reporting(model: nn.Module, optimizer: FusedAdamW) -> Step:
    step = plain(model, optimizer)

    def train_step(x: Tensor) -> Tensor:
        loss = step(x)
        optimizer.report(loss.detach())
        return loss

    return train_step


def edits_and_averages(step: int, optimizer: FusedAdamW) -> None:
    if step == 4:
        optimizer.hold()
    with optimizer.averaged():
        assert any(param.grad is not None for group in optimizer.param_groups for param in group["params"])


def test_a_compiled_step_reports_averages_and_is_edited(backend: str) -> None:
    lr = ReduceOnPlateau(WSD(warmup_steps=3, stable_steps=None, decay_steps=3, peak_lr=1e-2), factor=0.5, patience=1)
    betas = (0.9, Linear(start_lr=0.9, end_lr=0.99, total_steps=10))
    assert_compiled_is_eager(reporting, edits_and_averages, backend=backend, lr=lr, betas=betas, average=EMA(0.9))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # of what Inductor imports
def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for setting, value in (("cpp_cache_precompile_headers", False), ("compile_threads", 1)):  # for few small kernels
        monkeypatch.setattr(torch._inductor.config, setting, value)
    eager, compiled = (trained(compiler, lr=SCHEDULE) for compiler in (None, "inductor"))
    # Inductor's tanh and its sums round otherwise: 3e-7 was measured.
    torch.testing.assert_close(compiled, eager, rtol=2e-6, atol=2e-6)


def write_a_float(step: int, optimizer: FusedAdamW) -> None:
    optimizer.param_groups[0]["lr"] = 0.01 / (step + 1)


def fill_a_tensor(step: int, optimizer: FusedAdamW) -> None:
    optimizer.param_groups[0]["lr"].fill_(0.01 / (step + 1))


def change_everything(step: int, optimizer: FusedAdamW) -> None:
    optimizer.param_groups[0].update(betas=(0.8, 0.9 + step / 200), eps=10.0**-step, weight_decay=step / 10)


@pytest.mark.parametrize(
    ("between", "rate"),
    [(write_a_float, 0.01), (fill_a_tensor, torch.tensor(0.01)), (change_everything, 0.01)],
    ids=lambda each: getattr(each, "__name__", "lr"),
)
def test_hyperparameters_that_move_compile_nothing_anew(between: Any, rate: Any) -> None:
    assert_compiled_is_eager(between=between, lr=rate)


def test_a_nexus_scheduler_compiles_nothing_anew() -> None:
    schedulers: list[WSDScheduler] = []

    def scheduled(model: nn.Module, optimizer: FusedAdamW) -> Step:
        schedulers.append(WSDScheduler(optimizer, warmup_steps=2, stable_steps=4, decay_steps=4, peak_lr=1e-2))
        return plain(model, optimizer)

    assert_compiled_is_eager(scheduled, between=lambda step, optimizer: schedulers[-1].step())


@pytest.mark.parametrize("make_step", [with_closure, scaled, hooked])
def test_other_ways_to_step(make_step: Callable[[nn.Module, FusedAdamW], Step]) -> None:
    # Of torch's own code, and of gradients that are there in the first step alone.
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert_compiled_is_eager(make_step, overflow=make_step is scaled, lr=SCHEDULE)


def test_what_is_read_in_a_compiled_function() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([param], lr=SCHEDULE, max_grad_norm=1.0, skip_nonfinite=True)

    @torch.compile(backend="aot_eager")
    def step(scale: Tensor) -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        (param * scale).sum().backward()
        optimizer.step()
        group, state = optimizer.param_groups[0], optimizer.state[param]
        return optimizer.grad_norm * 1, optimizer.skipped_steps + 0, group["lr"] * 1, state["step"] * 1

    with torch._dynamo.config.patch(error_on_recompile=False):
        for index, scale in enumerate([3.0, float("inf"), 5.0, 7.0]):
            norm, skipped, rate, count = step(torch.tensor([scale, 0.0, 0.0]))
            assert float(norm) == scale
            assert int(skipped) == (index >= 1)
            assert float(rate) == SCHEDULE(index - (index >= 1))
            assert int(count) == index + (index < 1)


def test_an_optimizer_that_is_made_in_a_compiled_function() -> None:
    def train(kind: type[torch.optim.Optimizer]) -> Tensor:
        param = nn.Parameter(torch.ones(3))
        optimizer = kind([param], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            param.square().sum().backward()
            optimizer.step()
        return param.detach()

    with torch._dynamo.config.patch(error_on_recompile=False):
        compiled = torch.compile(train, backend="aot_eager")
        assert torch.equal(compiled(FusedAdamW), train(FusedAdamW))
        torch.testing.assert_close(compiled(FusedAdamW), train(torch.optim.AdamW))


def test_an_import_does_not_load_dynamo() -> None:
    code = "import sys, nexus.optim, nexus.training; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
