"""Updates in the backward pass: the plain loop's, bit for bit, without all gradients at once."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from references import same_bits, snapshot
from torch import Tensor, nn

from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Cosine
from nexus.training import step_in_backward
from nexus.training.schedulers import WSDScheduler


class Tied(nn.Module):
    """A small model with a weight that is used twice, one that is idle at times, one that is always, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.sometimes = nn.Linear(6, 6)
        self.never = nn.Linear(6, 6)
        self.frozen = nn.Parameter(torch.randn(6), requires_grad=False)

    def forward(self, tokens: Tensor, step: int = 0) -> Tensor:
        x = self.norm(self.embedding(tokens)) + self.frozen
        x = x + torch.tanh(self.hidden(x))
        if step % 3:
            x = x + self.sometimes(x)
        logits = self.head(x)
        return nn.functional.cross_entropy(logits.flatten(0, -2), tokens.roll(1).flatten())


def batch(step: int) -> Tensor:
    generator = torch.Generator(device="cpu").manual_seed(step)
    return torch.randint(11, (2, 5), generator=generator, device="cpu").to(torch.get_default_device())


def two_runs(
    backend: str, make: Callable[..., FusedAdamW] | None = None, **options: Any
) -> tuple[tuple[Tied, FusedAdamW], tuple[Tied, FusedAdamW]]:
    first = Tied()
    second = copy.deepcopy(first)
    make = make or (lambda model: FusedAdamW(model.parameters(), backend=backend, **options))
    return (first, make(first)), (second, make(second))


def train(model: Tied, optimizer: FusedAdamW, steps: range) -> None:
    for step in steps:
        model(batch(step), step).backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(model: Tied, optimizer: FusedAdamW) -> list[Tensor]:
    saved = optimizer.state_dict()
    counts = [
        torch.tensor(group[key]["step"])
        for group in saved["param_groups"]
        for key in ("lr_schedule", "weight_decay_schedule")
        if group[key] is not None
    ]
    rates = [torch.as_tensor(group["lr"], dtype=torch.float64) for group in saved["param_groups"]]
    completed = [state.completed for state in engine_of(optimizer).states.values()]
    return [*(param.detach() for param in model.parameters()), *snapshot(optimizer), *counts, *rates, *completed]


def assert_same(plain: tuple[Tied, FusedAdamW], in_backward: tuple[Tied, FusedAdamW]) -> None:
    assert same_bits(state_of(*plain), state_of(*in_backward))


def grouped(model: Tied, backend: str) -> FusedAdamW:
    groups: list[dict[str, Any]] = [
        {"params": [model.embedding.weight, model.frozen], "lr_scale": 0.5},
        {"params": model.norm.parameters(), "weight_decay": 0.0, "lr": 0.03},
        {"params": model.hidden.parameters(), "lr": torch.tensor(0.01), "amsgrad": True},
        {"params": [*model.sometimes.parameters(), *model.never.parameters()], "weight_decay": Cosine(0.1, 30)},
    ]
    return FusedAdamW(groups, lr=WSD(3, 10, 10, 0.02), maximize=False, backend=backend)


OPTIONS: dict[str, dict[str, Any]] = {
    "float": {"lr": 0.01},
    "schedule": {"lr": WSD(3, 10, 10, 0.02), "weight_decay": Cosine(0.1, 30), "amsgrad": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_it_equals_the_plain_loop(backend: str, options: dict[str, Any]) -> None:
    plain, ours = two_runs(backend, **options)
    with step_in_backward(*ours):
        train(*plain, range(25))
        train(*ours, range(25))
        assert_same(plain, ours)
    train(*plain, range(25, 28))
    train(*ours, range(25, 28))
    assert_same(plain, ours)
    states = ours[1].state
    assert ours[0].never.weight not in states
    assert int(states[ours[0].sometimes.weight]["step"]) < int(states[ours[0].hidden.weight]["step"]) == 28


def test_groups_with_options_of_their_own(backend: str) -> None:
    plain, ours = two_runs(backend, lambda model: grouped(model, backend))
    with step_in_backward(*ours):
        train(*plain, range(25))
        train(*ours, range(25))
    assert_same(plain, ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(backend: str, dtype: torch.dtype) -> None:
    first = Tied().to(dtype)
    second = copy.deepcopy(first)
    schedule = WSD(3, 10, 10, 0.02)
    plain = first, FusedAdamW(first.parameters(), lr=schedule, backend=backend)
    ours = second, FusedAdamW(second.parameters(), lr=schedule, backend=backend)
    with step_in_backward(*ours):
        train(*plain, range(8))
        train(*ours, range(8))
    assert_same(plain, ours)


def changes() -> dict[str, Callable[[Tied, FusedAdamW], object]]:
    """What users do between two steps."""

    def take_out(optimizer: FusedAdamW, param: Tensor) -> None:
        params = optimizer.param_groups[0]["params"]
        params[:] = [other for other in params if other is not param]

    def swap(model: Tied, optimizer: FusedAdamW) -> None:
        for param in model.parameters():
            param.data = param.data.clone()

    def other_layout(model: Tied, optimizer: FusedAdamW) -> None:
        model.hidden.weight.data = model.hidden.weight.data.t().contiguous().t()

    def new_schedule(model: Tied, optimizer: FusedAdamW) -> None:
        optimizer.param_groups[0]["lr"] = Cosine(0.05, 40)

    def fixed_rate(model: Tied, optimizer: FusedAdamW) -> None:
        optimizer.param_groups[0]["lr_schedule"] = None
        optimizer.param_groups[0]["lr"] = 0.005

    def settings(model: Tied, optimizer: FusedAdamW) -> None:
        optimizer.param_groups[0].update(betas=(0.5, 0.9), eps=1e-3, maximize=True, weight_decay=0.3)

    def reload(model: Tied, optimizer: FusedAdamW) -> None:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def freeze(model: Tied, optimizer: FusedAdamW) -> None:
        model.hidden.requires_grad_(False)

    def unfreeze(model: Tied, optimizer: FusedAdamW) -> None:
        model.frozen.requires_grad_(True)

    def new_group(model: Tied, optimizer: FusedAdamW) -> None:
        take_out(optimizer, model.hidden.bias)
        optimizer.add_param_group({"params": [model.hidden.bias], "lr": 0.5})

    def removed(model: Tied, optimizer: FusedAdamW) -> None:
        take_out(optimizer, model.hidden.bias)
        del optimizer.state[model.hidden.bias]

    return {
        "storage swapped": swap,
        "another layout": other_layout,
        "a new schedule": new_schedule,
        "a fixed rate": fixed_rate,
        "settings": settings,
        "amsgrad": lambda model, optimizer: optimizer.param_groups[0].update(amsgrad=True),
        "state loaded": reload,
        "state cleared": lambda model, optimizer: optimizer.state.clear(),
        "decay begun": lambda model, optimizer: optimizer.begin_decay(),
        "frozen": freeze,
        "unfrozen": unfreeze,
        "moved to another group": new_group,
        "taken away": removed,
    }


@pytest.mark.parametrize("change", changes().values(), ids=list(changes()))
def test_what_users_change_between_steps(backend: str, change: Callable[[Tied, FusedAdamW], object]) -> None:
    plain, ours = two_runs(backend, lr=WSD(2, None, 4, 0.02))
    with step_in_backward(*ours):
        train(*plain, range(4))
        train(*ours, range(4))
        change(*plain)
        change(*ours)
        train(*plain, range(4, 9))
        train(*ours, range(4, 9))
        assert_same(plain, ours)


@pytest.mark.parametrize("kind", ["torch", "nexus"])
def test_schedulers(backend: str, kind: str) -> None:
    plain, ours = two_runs(backend, lr=0.02)

    def scheduled(model: Tied, optimizer: FusedAdamW) -> None:
        scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        if kind == "nexus":
            scheduler = WSDScheduler(optimizer, 2, 5, 5, 0.02)
        for step in range(10):
            train(model, optimizer, range(step, step + 1))
            scheduler.step()

    scheduled(*plain)
    with step_in_backward(*ours):
        scheduled(*ours)
    assert_same(plain, ours)


def test_history_has_one_row_a_step(backend: str) -> None:
    schedule = WSD(3, 10, 10, 0.02)
    _, (model, optimizer) = two_runs(backend, lr=schedule)
    history = optimizer.history(50)
    with step_in_backward(model, optimizer):
        train(model, optimizer, range(9))
    rows = history.read()
    assert rows.step.tolist() == list(range(9))
    assert rows.lr[:, 0].tolist() == [schedule(t) for t in range(9)]


def test_a_closure(backend: str) -> None:
    plain, ours = two_runs(backend, lr=0.01)

    def run(model: Tied, optimizer: FusedAdamW) -> list[float]:
        losses = []
        for step in range(4):

            def closure(step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss: Tensor = model(batch(step), step)
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
        return losses

    expected = run(*plain)
    with step_in_backward(*ours):
        assert run(*ours) == expected
    assert_same(plain, ours)


# Memory.


def test_one_gradient_at_a_time(backend: str) -> None:
    most = []
    for in_backward in (False, True):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(10)))
        optimizer = FusedAdamW(model.parameters(), backend=backend)
        params = list(model.parameters())
        seen: list[int] = []

        def look(_: Tensor, params: list[nn.Parameter] = params, seen: list[int] = seen) -> None:
            seen.append(sum(param.grad.nbytes for param in params if param.grad is not None))

        for param in params:
            param.register_post_accumulate_grad_hook(look)  # before the one that steps
        handle = step_in_backward(model, optimizer) if in_backward else None
        for _ in range(3):
            model(torch.ones(2, 16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        most.append(max(seen))
        assert handle is None or all(param.grad is None for param in params)
    assert most == [10 * (16 * 16 + 16) * 4, 16 * 16 * 4]  # all, and the largest alone


def test_gradients_are_freed_at_once(backend: str) -> None:
    model = nn.Linear(16, 16)
    optimizer = FusedAdamW(model.parameters(), backend=backend)
    graves: list[Any] = []
    model.weight.register_post_accumulate_grad_hook(
        lambda param: graves.append(weakref.ref(param.grad.untyped_storage()))
    )
    with step_in_backward(model, optimizer):
        for _ in range(3):
            model(torch.ones(2, 16)).sum().backward()
            assert graves.pop()() is None
            optimizer.step()


@pytest.mark.skipif(sys.platform != "linux", reason="reads what glibc was told to give back")
def test_the_process_takes_less_memory(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "backward_memory.py"
    command = [sys.executable, str(script), "--width", "1024", "--layers", "10", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (path,) = tmp_path.iterdir()
    measured = json.loads(path.read_text("utf-8"))
    plain, in_backward = (row["peak_mib"] for row in measured["rows"])
    assert measured["gradients_mib"] == 40
    assert plain - in_backward > 25


@pytest.mark.gpu
def test_peak_memory_on_a_gpu() -> None:
    def peak(in_backward: bool) -> int:
        model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16))).cuda()
        optimizer = FusedAdamW(model.parameters())
        handle = step_in_backward(model, optimizer) if in_backward else None
        for step in range(3):
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
            model(torch.ones(2, 2048, device="cuda")).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        return torch.cuda.max_memory_allocated()

    of_one = 2048 * 2048 * 4
    assert peak(False) - peak(True) > 12 * of_one


# What cannot be.


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_a_norm_is_refused(options: dict[str, Any]) -> None:
    model = Tied()
    optimizer = FusedAdamW(model.parameters(), **options)
    with pytest.raises(RuntimeError, match=r"need the gradients of all parameters.*step after the backward pass"):
        step_in_backward(model, optimizer)
    assert not optimizer._optimizer_step_post_hooks


def test_a_norm_that_is_asked_for_later_is_refused(backend: str) -> None:
    plain, (model, optimizer) = two_runs(backend)
    with step_in_backward(model, optimizer):
        train(model, optimizer, range(2))
        before = state_of(model, optimizer)
        optimizer.param_groups[0]["max_grad_norm"] = 1.0
        with pytest.raises(RuntimeError, match="set them to None and False"):
            model(batch(2), 2).backward()
        assert same_bits(before, state_of(model, optimizer))
        optimizer.param_groups[0]["max_grad_norm"] = None
        optimizer.zero_grad()
        train(model, optimizer, range(2, 4))
    train(*plain, range(4))
    assert_same(plain, (model, optimizer))


def test_accumulation_is_refused(backend: str) -> None:
    plain, (model, optimizer) = two_runs(backend)
    with step_in_backward(model, optimizer):
        model(batch(0)).backward()
        before = state_of(model, optimizer)
        with pytest.raises(RuntimeError, match=r"has a second gradient before optimizer.step\(\): .*remove\(\)"):
            model(batch(1)).backward()
        assert same_bits(before, state_of(model, optimizer))
        optimizer.zero_grad()
        optimizer.step()
        train(model, optimizer, range(1, 3))
    train(*plain, range(1))  # the same batches, as if nothing had been
    train(*plain, range(1, 3))
    assert_same(plain, (model, optimizer))


def test_a_grad_scaler_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = FusedAdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with step_in_backward(model, optimizer):
        scaler.scale(model(torch.ones(3)).sum()).backward()
        with pytest.raises(RuntimeError, match="a GradScaler steps this optimizer"):
            scaler.step(optimizer)


def test_an_exception_in_another_hook_ends_the_pass_and_not_the_run(backend: str) -> None:
    plain, ours = two_runs(backend, lr=WSD(2, 5, 5, 0.02))
    failing = True

    def hook(grad: Tensor) -> None:
        if failing:
            raise KeyError("in a hook")

    with step_in_backward(*ours):
        train(*ours, range(3))
        handle = ours[0].embedding.weight.register_hook(hook)  # whose gradient comes last
        with pytest.raises(KeyError, match="in a hook"):
            ours[0](batch(3), 3).backward()
        assert all(param.grad is None for param in ours[0].parameters())
        failing = False
        ours[1].step()  # ends that update, of the parameters that had a gradient
        train(*ours, range(4, 6))
        handle.remove()
    train(*plain, range(3))
    plain[0](batch(3), 3).backward()
    plain[0].embedding.weight.grad = None
    plain[1].step()
    plain[1].zero_grad()
    train(*plain, range(4, 6))
    assert_same(plain, ours)


def test_a_gradient_that_cannot_be_read_is_named_and_changes_nothing_else(backend: str) -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = FusedAdamW(model.named_parameters(), backend=backend)
    before = model.weight.detach().clone()
    with step_in_backward(model, optimizer):
        with pytest.raises(RuntimeError, match="parameter weight of group 0 has a gradient of layout"):
            model(torch.tensor([1, 2])).sum().backward()
        assert torch.equal(model.weight, before)
        assert model.weight.grad is not None


ARGUMENTS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no model": (3, FusedAdamW([nn.Parameter(torch.ones(1))]), TypeError, "model must be a torch.nn.Module, got 3"),
    "no optimizer": (nn.Linear(1, 1), 3, TypeError, "optimizer must be a nexus.optim.FusedAdamW, got 3"),
    "of another model": (
        nn.Linear(1, 1),
        FusedAdamW([nn.Parameter(torch.ones(1))]),
        ValueError,
        "no parameter of the model that requires a gradient is the optimizer's",
    ),
}


@pytest.mark.parametrize(("model", "optimizer", "error", "words"), ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_arguments(model: Any, optimizer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        step_in_backward(model, optimizer)


def test_torchs_optimizer_is_refused() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="FusedAdamW"):
        step_in_backward(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]


def test_a_data_parallel_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parallel(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    model = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="before they are averaged over the ranks"):
        step_in_backward(Parallel(model), FusedAdamW(model.parameters()))


def test_twice_is_refused_and_again_is_not(backend: str) -> None:
    plain, ours = two_runs(backend)
    handle = step_in_backward(*ours)
    with pytest.raises(RuntimeError, match=r"steps in backward passes already: remove\(\)"):
        step_in_backward(*ours)
    train(*ours, range(2))
    handle.remove()
    handle.remove()
    with step_in_backward(*ours):
        train(*ours, range(2, 4))
    train(*plain, range(4))
    assert_same(plain, ours)


def test_copies_do_not_step_in_backward(backend: str) -> None:
    model = Tied()
    optimizer = FusedAdamW(model.parameters(), backend=backend)
    with step_in_backward(model, optimizer):
        train(model, optimizer, range(2))
        other, other_optimizer = copy.deepcopy((model, optimizer))
    other(batch(2)).backward()
    assert other.hidden.weight.grad is not None
    other_optimizer.step()


def test_all_is_freed_with_the_model(backend: str) -> None:
    model = Tied()
    optimizer = FusedAdamW(model.parameters(), backend=backend)
    handle = step_in_backward(model, optimizer)
    train(model, optimizer, range(2))
    graves = [weakref.ref(each) for each in (model, optimizer, handle, model.hidden.weight)]
    del model, optimizer, handle
    gc.collect()
    assert [grave() for grave in graves] == [None] * 4
