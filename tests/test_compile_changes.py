"""What becomes of a compiled step when something else has changed: what is stale is never used."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from references import make_params, same_bits, snapshot
from torch import Tensor, nn

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine

SCHEDULE = WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-2, min_lr=1e-4)

# Dynamo itself looks there, when a loss comes into a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(step: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(step, backend="aot_eager", **options)


# The model changes, and the optimizer with it or not.


def load_by_assignment(model: nn.Module, optimizer: FusedAdamW) -> None:
    model.load_state_dict(
        {key: torch.full_like(value, 0.5) for key, value in model.state_dict().items()}, assign=True
    )
    optimizer.state.clear()
    optimizer.param_groups[0]["params"][:] = model.parameters()


def tie(model: nn.Module, optimizer: FusedAdamW) -> None:
    model[2].weight = model[0].weight


def replace_a_weight(model: nn.Module, optimizer: FusedAdamW) -> None:
    model[0].weight = nn.Parameter(torch.full_like(model[0].weight, 0.5))


def replace_a_layer(model: nn.Module, optimizer: FusedAdamW) -> None:
    model[2] = nn.Linear(4, 4)
    optimizer.param_groups[0]["params"][2:] = model[2].parameters()


def train_what_was_frozen(model: nn.Module, optimizer: FusedAdamW) -> None:
    extra = nn.Linear(4, 4)
    model.append(extra)
    optimizer.add_param_group({"params": extra.parameters(), "lr": 0.1})


@pytest.mark.parametrize("inside", [True, False], ids=["the step is compiled", "the step is outside"])
@pytest.mark.parametrize(
    "change", [load_by_assignment, tie, replace_a_weight, replace_a_layer, train_what_was_frozen]
)
def test_a_model_that_changes(change: Callable[[nn.Module, FusedAdamW], None], inside: bool) -> None:
    def run(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> list[Any]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        optimizer = FusedAdamW(model.parameters(), lr=SCHEDULE, max_grad_norm=0.1)

        def forward_backward(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            if inside:
                for param in model.parameters():
                    if param.grad is not None:
                        param.grad.mul_(0.5)  # a graph that writes gives copies to the step
                optimizer.step()
            return loss.detach()

        train = wrap(forward_backward)
        seen = []
        for t in range(7):
            if t == 3:
                change(model, optimizer)
            seen.append(train(torch.randn(8, 4)))
            if not inside:
                optimizer.step()
            seen.append(optimizer.grad_norm.clone())
        return [*seen, *[param.detach() for param in model.parameters()], *snapshot(optimizer)]

    assert same_bits(run(lambda step: step), run(compiled))


# The optimizer changes.


def add_a_group(optimizer: FusedAdamW) -> None:
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.1})
    optimizer.param_groups[1]["params"][0].grad = torch.ones(3)


def take_a_parameter_away(optimizer: FusedAdamW) -> None:
    del optimizer.param_groups[0]["params"][0]


def replace_a_parameter(optimizer: FusedAdamW) -> None:
    optimizer.param_groups[0]["params"][1] = nn.Parameter(torch.full((5,), 2.0))


def freeze_a_parameter(optimizer: FusedAdamW) -> None:
    optimizer.param_groups[0]["params"][1].requires_grad_(False)


def move_a_parameter(optimizer: FusedAdamW) -> None:
    param = optimizer.param_groups[0]["params"][1]
    param.data = param.data.clone()


def replace_a_moment(optimizer: FusedAdamW) -> None:
    state = optimizer.state[optimizer.param_groups[0]["params"][1]]
    state["exp_avg"] = torch.full_like(state["exp_avg"], 0.5)


def forget_a_parameter(optimizer: FusedAdamW) -> None:
    del optimizer.state[optimizer.param_groups[0]["params"][1]]


def load_an_older_state(optimizer: FusedAdamW) -> None:
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"], state["exp_avg"] = state["step"] - 1, state["exp_avg"] * 0.5
    optimizer.load_state_dict(saved)


def switch_amsgrad_on(optimizer: FusedAdamW) -> None:
    optimizer.param_groups[0]["amsgrad"] = True


def switch_clipping_on(optimizer: FusedAdamW) -> None:
    optimizer.param_groups[0]["max_grad_norm"] = 0.1


def assign_another_schedule(optimizer: FusedAdamW) -> None:
    optimizer.param_groups[0]["lr"] = Cosine(0.05, 20)


def keep_a_history(optimizer: FusedAdamW) -> None:
    optimizer.history(9)


def leave_it(optimizer: FusedAdamW) -> None:
    """Nothing: then gradients alone come and go."""


def clear_the_state(optimizer: FusedAdamW) -> None:
    optimizer.state.clear()


CHANGES = [
    add_a_group,
    clear_the_state,
    take_a_parameter_away,
    replace_a_parameter,
    freeze_a_parameter,
    move_a_parameter,
    replace_a_moment,
    forget_a_parameter,
    load_an_older_state,
    switch_amsgrad_on,
    switch_clipping_on,
    assign_another_schedule,
    keep_a_history,
    leave_it,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changes_between_steps_is_seen(change: Callable[[FusedAdamW], None]) -> None:
    first = FusedAdamW(make_params([(3, 4), (5,), (6,)]), lr=SCHEDULE)
    second = copy.deepcopy(first)
    step = compiled(lambda: first.step(), fullgraph=True)
    for t in range(7):
        if t == 3:
            change(first)
            change(second)
        both = [[param for group in each.param_groups for param in group["params"]] for each in (first, second)]
        for index, pair in enumerate(zip(*both, strict=True)):
            grad = None if (t + index) % 4 == 1 or not pair[0].requires_grad else torch.randn(pair[0].shape)
            for param in pair:
                param.grad = grad
        before = snapshot(first)
        step()
        second.step()
        assert not same_bits(before, snapshot(first))
        assert same_bits(snapshot(first), snapshot(second)), t
    if first._history is not None:
        rows = [optimizer.history(9).read() for optimizer in (first, second)]
        assert len(rows[0].step) == 4
        assert all(torch.equal(a, b) for a, b in zip(rows[0][:2], rows[1][:2], strict=True))


# Several steps in one graph, of which the first finds that something has changed.


@pytest.mark.parametrize(
    "change",
    [clear_the_state, add_a_group, replace_a_moment, take_a_parameter_away, switch_amsgrad_on, keep_a_history],
)
def test_three_steps_in_one_graph(change: Callable[[FusedAdamW], None]) -> None:
    def run(wrap: Callable[[Callable[[], Any]], Callable[[], Any]]) -> list[Tensor]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        params = make_params([(3, 4), (5,)])
        optimizer = FusedAdamW(params, lr=SCHEDULE, max_grad_norm=1.0)

        def three_steps() -> None:
            for _ in range(3):
                optimizer.step()

        step = wrap(three_steps)
        seen = []
        for t in range(4):
            for param in params:
                param.grad = torch.randn_like(param)
            if t == 2:
                change(optimizer)
            step()
            seen += snapshot(optimizer)
        return [*seen, *params, *([] if change is not keep_a_history else optimizer.history(9).read()[:3])]

    assert same_bits(run(lambda step: step), run(compiled))


# What is written or read beside the step, in its graph.


def test_rates_that_are_written_in_the_graph(backend: str) -> None:
    found = []
    for wrap in (lambda step: step, compiled):
        param = nn.Parameter(torch.ones(3))
        lr, decay, t = torch.tensor(0.0), torch.tensor(0.5), torch.zeros(())
        optimizer = FusedAdamW([param], lr=lr, weight_decay=decay, backend=backend)

        def step(optimizer: FusedAdamW = optimizer, lr: Tensor = lr, decay: Tensor = decay, t: Tensor = t) -> None:
            t.add_(1)
            lr.copy_(t / 4)
            optimizer.step()
            decay.mul_(0.5)

        train = wrap(step)
        for _ in range(4):
            param.grad = torch.ones(3)
            train()
        found.append([*snapshot(optimizer), lr, decay])
    assert same_bits(*found)
    assert (found[0][-2], found[0][-1]) == (1.0, 0.03125)


def test_the_state_is_read_beside_the_step(backend: str) -> None:
    first = FusedAdamW(make_params([(3, 4), (5,)]), lr=SCHEDULE, backend=backend)
    for optimizer in (first, copy.deepcopy(first)):
        params = optimizer.param_groups[0]["params"]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        optimizer = copy.deepcopy(optimizer) if optimizer is not first else optimizer  # whose moments share no base
        params = optimizer.param_groups[0]["params"]
        for param in params:
            param.grad = torch.full_like(param, 0.5)

        def step(optimizer: FusedAdamW = optimizer, param: Tensor = params[0]) -> Tensor:
            optimizer.step()
            return optimizer.state[param]["exp_avg"] * 2

        twice = compiled(step)()
        assert torch.equal(twice, 2 * optimizer.state[params[0]]["exp_avg"])


def test_a_norm_that_is_measured_from_some_step_on() -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([param])

    def step() -> Tensor | None:
        optimizer.step()
        return None if optimizer.grad_norm is None else optimizer.grad_norm * 2

    train, norms = compiled(step), []
    for limit in (None, None, 1.0, 1.0, None):
        optimizer.param_groups[0]["max_grad_norm"] = limit
        param.grad = torch.tensor([3.0, 4.0, 0.0])
        norms.append(train())
    assert norms == [None, None, torch.tensor(10.0), torch.tensor(10.0), None]


def test_a_parameter_without_a_gradient_may_be_used_by_a_backward_pass_to_come() -> None:
    with_grad, without = make_params([(3,), (3,)])
    optimizer = FusedAdamW([with_grad, without])
    train = compiled(lambda: optimizer.step())
    for _ in range(2):
        with_grad.grad = torch.ones(3)
        later = without.square().sum()
        train()
        later.backward()
        assert torch.equal(without.grad, 2 * without.detach())
        without.grad = None
    with_grad.grad = torch.ones(3)
    later = with_grad.square().sum()
    train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


def test_what_was_replaced_is_freed() -> None:
    params = make_params([(3, 4), (5,)])
    optimizer = FusedAdamW(params)
    for param in params:
        param.grad = torch.ones_like(param)
    compiled(lambda: optimizer.step())()
    moment = weakref.ref(optimizer.state[params[0]]["exp_avg"].untyped_storage())
    param = weakref.ref(params.pop())
    optimizer.state.clear()
    del optimizer.param_groups[0]["params"][1]
    optimizer.step()  # eager
    torch._dynamo.reset()
    gc.collect()
    assert (moment(), param()) == (None, None)


def test_other_threads_may_ask_a_group_for_its_parameters_while_one_compiles() -> None:
    optimizer = FusedAdamW(make_params([(3,)]))
    group, failures, stop = optimizer.param_groups[0], [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                assert len(group.get("params")) == 1
            except Exception as error:
                failures.append(error)
                return

    thread = threading.Thread(target=ask)
    thread.start()
    for size in range(1, 6):
        compiled(lambda x: x.sin() + 1, dynamic=False)(torch.ones(size))
    stop.set()
    thread.join()
    assert failures == []


def test_an_optimizer_that_is_made_in_a_compiled_function() -> None:
    def train(kind: type[torch.optim.Optimizer]) -> Tensor:
        param = nn.Parameter(torch.ones(3))
        optimizer = kind([param], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            param.square().sum().backward()
            optimizer.step()
        return param.detach()

    assert torch.equal(compiled(train)(FusedAdamW), train(FusedAdamW))
    torch.testing.assert_close(compiled(train)(FusedAdamW), train(torch.optim.AdamW))


def test_an_import_does_not_load_dynamo() -> None:
    code = "import sys, nexus.optim, nexus.training; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
