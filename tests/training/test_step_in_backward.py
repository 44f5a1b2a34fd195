"""Updates in the backward pass: the plain loop's, bit for bit, without all gradients at once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import same_bits, snapshot
from torch import Tensor, nn

from nexus.optim import FusedAdamW
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


Run = tuple[Tied, FusedAdamW]
Use = Callable[[Tied, FusedAdamW], object]
Make = Callable[[Tied, str], FusedAdamW]


def with_options(**options: Any) -> Make:
    return lambda model, backend: FusedAdamW(model.parameters(), backend=backend, **options)


def two_runs(backend: str, make: Make | None = None, **options: Any) -> tuple[Run, Run]:
    first = Tied()
    second = copy.deepcopy(first)
    make = make or with_options(**options)
    return (first, make(first, backend)), (second, make(second, backend))


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
    return [*(param.detach() for param in model.parameters()), *snapshot(optimizer), *counts, *rates]


def assert_same(plain: Run, in_backward: Run) -> None:
    assert same_bits(state_of(*plain), state_of(*in_backward))


def grouped(model: Tied, backend: str) -> FusedAdamW:
    groups: list[dict[str, Any]] = [
        {"params": [model.embedding.weight, model.frozen], "lr_scale": 0.5},
        {"params": model.norm.parameters(), "weight_decay": 0.0, "lr": 0.03},
        {"params": model.hidden.parameters(), "lr": torch.tensor(0.01), "amsgrad": True},
        {
            "params": [*model.sometimes.parameters(), *model.never.parameters()],
            "weight_decay": Cosine(peak_lr=0.1, total_steps=30),
        },
    ]
    return FusedAdamW(
        groups, lr=WSD(warmup_steps=3, stable_steps=10, decay_steps=10, peak_lr=0.02), maximize=False, backend=backend
    )


def of_dtype(dtype: torch.dtype) -> Make:
    return lambda model, backend: FusedAdamW(
        model.to(dtype).parameters(),
        lr=WSD(warmup_steps=3, stable_steps=10, decay_steps=10, peak_lr=0.02),
        backend=backend,
    )


OPTIMIZERS: dict[str, Make] = {
    "float": with_options(lr=0.01),
    "schedule": with_options(
        lr=WSD(warmup_steps=3, stable_steps=10, decay_steps=10, peak_lr=0.02),
        weight_decay=Cosine(peak_lr=0.1, total_steps=30),
        amsgrad=True,
    ),
    "groups": grouped,
    "bfloat16": of_dtype(torch.bfloat16),
    "float64": of_dtype(torch.float64),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_equals_the_plain_loop(backend: str, make: Make) -> None:
    plain, ours = two_runs(backend, make)
    histories = [optimizer.history(50) for _, optimizer in (plain, ours)]
    with step_in_backward(*ours):
        train(*plain, range(25))
        train(*ours, range(25))
        assert_same(plain, ours)
    train(*plain, range(25, 28))
    train(*ours, range(25, 28))
    assert_same(plain, ours)
    expected, rows = (history.read() for history in histories)
    assert rows.step.tolist() == list(range(28))
    assert torch.equal(rows.lr, expected.lr)
    states = ours[1].state
    assert ours[0].never.weight not in states
    assert int(states[ours[0].sometimes.weight]["step"]) < int(states[ours[0].hidden.weight]["step"]) == 28


def take_out(optimizer: FusedAdamW, param: Tensor) -> None:
    params = optimizer.param_groups[0]["params"]
    params[:] = [other for other in params if other is not param]


def swap(model: Tied, optimizer: FusedAdamW) -> None:
    for param in model.parameters():
        param.data = param.data.clone()


def other_layout(model: Tied, optimizer: FusedAdamW) -> None:
    model.hidden.weight.data = model.hidden.weight.data.t().contiguous().t()


def new_group(model: Tied, optimizer: FusedAdamW) -> None:
    take_out(optimizer, model.hidden.bias)
    optimizer.add_param_group({"params": [model.hidden.bias], "lr": 0.5})


def removed(model: Tied, optimizer: FusedAdamW) -> None:
    take_out(optimizer, model.hidden.bias)
    del optimizer.state[model.hidden.bias]


def settings(**options: Any) -> Use:
    return lambda model, optimizer: optimizer.param_groups[0].update(options)


# What users do between two steps.
CHANGES: dict[str, Use] = {
    "storage swapped": swap,
    "another layout": other_layout,
    "a new schedule": settings(lr=Cosine(peak_lr=0.05, total_steps=40)),
    "a fixed rate": settings(lr_schedule=None, lr=0.005),
    "settings": settings(betas=(0.5, 0.9), eps=1e-3, maximize=True, weight_decay=0.3),
    "amsgrad": settings(amsgrad=True),
    "state loaded": lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "state cleared": lambda model, optimizer: optimizer.state.clear(),
    "decay begun": lambda model, optimizer: optimizer.begin_decay(),
    "frozen": lambda model, optimizer: model.hidden.requires_grad_(False),
    "unfrozen": lambda model, optimizer: model.frozen.requires_grad_(True),
    "moved to another group": new_group,
    "taken away": removed,
}


def between_steps(change: Use) -> Use:
    def loop(model: Tied, optimizer: FusedAdamW) -> None:
        train(model, optimizer, range(4))
        change(model, optimizer)
        train(model, optimizer, range(4, 9))

    return loop


def under(make_scheduler: Callable[[FusedAdamW], Any]) -> Use:
    def loop(model: Tied, optimizer: FusedAdamW) -> None:
        scheduler = make_scheduler(optimizer)
        for step in range(10):
            train(model, optimizer, range(step, step + 1))
            scheduler.step()

    return loop


def with_a_closure(model: Tied, optimizer: FusedAdamW) -> list[float]:
    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch(step), step)
        loss.backward()
        return loss

    return [optimizer.step(functools.partial(closure, step)).item() for step in range(4)]


LOOPS: dict[str, tuple[Any, Use]] = {
    **{
        name: (WSD(warmup_steps=2, stable_steps=None, decay_steps=4, peak_lr=0.02), between_steps(change))
        for name, change in CHANGES.items()
    },
    "torch's scheduler": (0.02, under(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8))),
    "nexus's scheduler": (
        0.02,
        under(lambda optimizer: WSDScheduler(optimizer, warmup_steps=2, stable_steps=5, decay_steps=5, peak_lr=0.02)),
    ),
    "a closure": (0.02, with_a_closure),
}


@pytest.mark.parametrize(("lr", "loop"), LOOPS.values(), ids=LOOPS)
def test_other_loops_and_what_users_change_between_steps(backend: str, lr: Any, loop: Use) -> None:
    plain, ours = two_runs(backend, lr=lr)
    expected = loop(*plain)
    with step_in_backward(*ours):
        assert loop(*ours) == expected
    assert_same(plain, ours)


# What cannot be.


@pytest.mark.parametrize(
    ("accumulates", "words"),
    [
        (False, "set them to None and False"),
        (True, r"has a second gradient before optimizer.step\(\): .*remove\(\)"),
    ],
)
def test_what_a_backward_pass_refuses_changes_nothing(backend: str, accumulates: bool, words: str) -> None:
    plain, ours = two_runs(backend)
    model, optimizer = ours
    with step_in_backward(*ours):
        train(*ours, range(2))
        if accumulates:
            model(batch(2), 2).backward()
        else:
            optimizer.param_groups[0]["max_grad_norm"] = 1.0
        before = state_of(*ours)
        with pytest.raises(RuntimeError, match=words):
            model(batch(3), 3).backward()
        assert same_bits(before, state_of(*ours))
        optimizer.param_groups[0]["max_grad_norm"] = None
        optimizer.zero_grad()
        if accumulates:
            optimizer.step()  # ends the update of batch 2
        train(*ours, range(3 if accumulates else 2, 5))
    train(*plain, range(5))  # the same batches, as if nothing had been
    assert_same(plain, ours)


def test_a_grad_scaler_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = FusedAdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with step_in_backward(model, optimizer):
        scaler.scale(model(torch.ones(3)).sum()).backward()
        with pytest.raises(RuntimeError, match="a GradScaler steps this optimizer"):
            scaler.step(optimizer)


def test_an_exception_in_another_hook_ends_the_pass_and_not_the_run(backend: str) -> None:
    plain, ours = two_runs(backend, lr=WSD(warmup_steps=2, stable_steps=5, decay_steps=5, peak_lr=0.02))
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


class Parallel(nn.parallel.DistributedDataParallel):
    """Without processes."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module


LAYER = nn.Linear(1, 1)
OURS = FusedAdamW(LAYER.parameters())
NOT_ITS_OWN = "no parameter of the model that requires a gradient is the optimizer's"
NEEDS_ALL = r"need the gradients of all parameters.*step after the backward pass"
REFUSED: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "no model": (3, OURS, TypeError, "model must be a torch.nn.Module, got 3"),
    "no optimizer": (LAYER, 3, TypeError, "optimizer must be a nexus.optim.FusedAdamW, got 3"),
    "torch's": (LAYER, torch.optim.AdamW(LAYER.parameters()), TypeError, "must be a nexus.optim.FusedAdamW"),
    "of another model": (nn.Linear(1, 1), OURS, ValueError, NOT_ITS_OWN),
    "data parallel": (Parallel(LAYER), OURS, TypeError, "before they are averaged over the ranks"),
    "clipping": (LAYER, FusedAdamW(LAYER.parameters(), max_grad_norm=1.0), RuntimeError, NEEDS_ALL),
    "skipping": (LAYER, FusedAdamW(LAYER.parameters(), skip_nonfinite=True), RuntimeError, NEEDS_ALL),
}


@pytest.mark.parametrize(("model", "optimizer", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(model: Any, optimizer: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        step_in_backward(model, optimizer)
    assert not getattr(optimizer, "_optimizer_step_post_hooks", None)


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


def test_an_optimizer_that_is_gone_is_said() -> None:
    model = nn.Linear(3, 2)
    handle = step_in_backward(model, FusedAdamW(model.parameters()))
    with pytest.raises(RuntimeError, match=r"is gone: remove\(\) the handle"):
        model(torch.ones(3)).sum().backward()
    handle.remove()
    model(torch.ones(3)).sum().backward()


def test_copies_do_not_step_in_backward(backend: str) -> None:
    run, _ = two_runs(backend)
    with step_in_backward(*run):
        train(*run, range(2))
        model, optimizer = copy.deepcopy(run)
    model(batch(2)).backward()
    assert model.hidden.weight.grad is not None
    optimizer.step()
