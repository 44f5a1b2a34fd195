"""What cannot be captured is refused before capture, by name and with a remedy, after a plain step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from capture_worlds import World, plain_step, train
from cuda_on_cpu import NAME, shim
from graphs_on_cpu import Graphs
from references import same_bits
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.training import capture_train_step
from nexus.training.capture import device as graph_device
from nexus.training.capture.host import check_capturable
from nexus.training.schedulers import WSDScheduler


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Lets steps on the CPU be captured."""
    shim().reset()
    double = Graphs()
    monkeypatch.setattr(graph_device, "graph_device", lambda device: double)
    yield double
    shim().reset()


Build = Callable[[World], Callable[..., Any]]


def end(world: World) -> tuple[list[Tensor], list[Tensor | None]]:
    return world.state(), world.gradients()


def assert_same_end(first: tuple[list[Tensor], list[Any]], second: tuple[list[Tensor], list[Any]]) -> None:
    assert same_bits(first[0], second[0])
    for one, other in zip(first[1], second[1], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def assert_refused(build: Build, graphs: Graphs, match: str, error: type[Exception] = RuntimeError) -> World:
    """Before a capture, one of the first calls raises; each call was a plain step. Returns the captured world."""
    world = World(NAME, captured=True)
    train_step = build(world)
    step, message, steps = capture_train_step(train_step, world.optimizer), "", 0
    while not message and steps < 4:
        try:
            step(*world.batch(steps))
        except error as raised:
            message = str(raised)
        steps += 1
    assert re.search(match, message), message
    assert graphs.events.count("capture") == step.graph_count == 0
    found, plain = end(world), World(NAME, captured=False)
    train_step = build(plain)
    for index in range(steps):
        train_step(*plain.batch(index))
    assert_same_end(found, end(plain))
    return world


@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_step_that_raises(at: int, graphs: Graphs) -> None:
    """Its error is the user's own. A plain step leaves what a plain step leaves; a capture, the fourth, nothing."""
    error, ends = KeyError("the very one"), []
    for captured in (True, False):
        world = World(NAME, captured)
        inner, runs = plain_step(world), []

        def train_step(x: Tensor, y: Tensor, inner: Any = inner, runs: list[int] = runs) -> Tensor:
            loss = inner(x, y)
            runs.append(1)
            if len(runs) == at + 1:
                raise error
            return loss

        step = world.step(train_step)
        for index in range(6):
            if index == at and (captured or at < 3):
                with pytest.raises(KeyError) as raised:
                    step(*world.batch(index))
                assert raised.value is error
            if index != at or at == 3:
                (step if captured or at < 3 else inner)(*world.batch(index))
        ends.append(end(world))
    assert_same_end(*ends)


def test_a_capture_that_fails(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step = world.step(plain_step(world))
    train(world, step, 3)
    graphs.fail = RuntimeError("operation not permitted when stream is capturing")
    before = world.state()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="operation not permitted"):
            step(*world.batch(3))
        assert same_bits(world.state(), before)
    graphs.fail = None
    step(*world.batch(3))
    assert step.graph_count == 1


def _with(extra: Callable[[World, Tensor], Any]) -> Build:
    def build(world: World) -> Callable[..., Any]:
        inner = plain_step(world)

        def train_step(x: Tensor, y: Tensor) -> Any:
            loss = inner(x, y)
            result = extra(world, loss)
            return loss if result is None else result

        return train_step

    return build


@pytest.mark.parametrize(
    ("read", "operation"),
    [
        (lambda loss: loss.detach().item() and None, "aten._local_scalar_dense"),
        (lambda loss: float(loss.detach()) and None, "aten._local_scalar_dense"),
        (lambda loss: loss > 0 and None, "aten._local_scalar_dense"),
        (lambda loss: loss.reshape(1)[loss.reshape(1) > 0] * 2, "aten.index.Tensor"),
        (lambda loss: torch.nonzero(loss), "aten.nonzero"),
        (lambda loss: torch.equal(loss, loss) and None, "aten.equal"),
    ],
)
def test_what_waits_for_the_device(read: Callable[[Tensor], Any], operation: str, graphs: Graphs) -> None:
    where = rf"\({re.escape(__file__)}:\d+\)"
    match = rf"cannot be captured: {re.escape(operation)}.* {where} makes the host wait .*torch.where"
    assert_refused(_with(lambda world, loss: read(loss)), graphs, match)


def test_what_waits_in_the_backward_pass(graphs: Graphs) -> None:
    def build(world: World) -> Callable[..., Any]:
        world.model[0].weight.register_hook(lambda grad: grad * float(grad.norm()))
        return plain_step(world)

    assert_refused(build, graphs, r"_local_scalar_dense.* makes the host wait")


def test_a_rate_that_the_step_writes(graphs: Graphs) -> None:
    def build(world: World) -> Callable[..., Any]:
        lr = torch.tensor(1e-3)
        world.optimizer = FusedAdamW(world.model.parameters(), lr=lr, backend=NAME)
        return _with(lambda world, loss: lr.fill_(0.5) and None)(world)

    match = r"aten.fill_.Scalar .*test_capture_refusals.* writes a number from the host over a rate.*Schedule as lr"
    assert_refused(build, graphs, match)


def test_an_option_that_the_step_sets(graphs: Graphs) -> None:
    def decay(world: World, loss: Tensor) -> None:
        group = world.optimizer.param_groups[0]
        group["weight_decay"] = 0.9 * group["weight_decay"]

    match = r"sets group 0's 'weight_decay' from 0\.01 .* to 0\.009.* Set it outside of the step"
    assert_refused(_with(decay), graphs, match)


@pytest.mark.parametrize("kind", ["torch", "nexus"])
def test_a_scheduler_that_computes_on_the_host_in_the_step(kind: str, graphs: Graphs) -> None:
    def build(world: World) -> Callable[..., Any]:
        lr = torch.tensor(1e-2)
        if kind == "torch":
            world.optimizer = FusedAdamW(world.model.parameters(), lr=lr, backend=NAME)
            scheduler: Any = torch.optim.lr_scheduler.ExponentialLR(world.optimizer, 0.9)
        else:
            world.optimizer = torch.optim.AdamW(world.model.parameters(), lr=lr, fused=True, capturable=True)
            scheduler = WSDScheduler(world.optimizer, 3, 4, 5, 1e-2)
        return _with(lambda world, loss: scheduler.step())(world)

    name = {"torch": "ExponentialLR", "nexus": "WSDScheduler"}[kind]
    match = rf"calls {name}\.step\(\), which computes on the host.*after the captured step"
    assert_refused(build, graphs, match)


def test_a_scheduler_moved_to_a_step_by_number(graphs: Graphs) -> None:
    def build(world: World) -> Callable[..., Any]:
        world.optimizer = FusedAdamW(world.model.parameters(), backend=NAME)
        scheduler = WSDScheduler(world.optimizer, 3, 4, 5, 1e-2)
        return _with(lambda world, loss: scheduler.step(3))(world)

    with pytest.warns(UserWarning, match="epoch parameter"):
        assert_refused(build, graphs, "writes a number from the host")


def test_a_parameter_without_a_gradient(graphs: Graphs) -> None:
    unused = torch.nn.Parameter(torch.ones(2))

    def build(world: World) -> Callable[..., Any]:
        params = [*world.model.named_parameters(), ("unused", unused)]
        world.optimizer = FusedAdamW(params, backend=NAME)
        return plain_step(world)

    match = r"parameter unused of group 0 has no gradient in the warm-up.*requires_grad_\(False\)"
    world = assert_refused(build, graphs, match)
    unused.requires_grad_(False)
    step = capture_train_step(plain_step(world), world.optimizer)
    train(world, step, 4)
    assert step.graph_count == 1


def test_gradients_that_the_step_drops(graphs: Graphs) -> None:
    def build(world: World) -> Callable[..., Any]:
        def update(x: Tensor, y: Tensor) -> Tensor:
            loss = world.loss(x, y)
            loss.backward()
            world.optimizer.step()
            world.optimizer.zero_grad()
            return loss

        return update

    def build_with_gradients(world: World) -> Callable[..., Any]:
        world.loss(*world.batch(5)).backward()
        return build(world)

    match = r"parameter 0 of group 0 has a gradient before the step.*zero_grad\(set_to_none=False\)"
    world = assert_refused(build_with_gradients, graphs, match)
    step = capture_train_step(build(world), world.optimizer)
    train(world, step, 4)
    world.loss(*world.batch(5)).backward()
    before = world.state()
    with pytest.raises(RuntimeError, match=match):
        step(*world.batch(1))
    assert same_bits(world.state(), before)


# What is refused before the first step.


def assert_refused_at_once(world: World, graphs: Graphs, match: str) -> None:
    before = world.state()
    with pytest.raises(RuntimeError, match=match):
        capture_train_step(plain_step(world), world.optimizer)(*world.batch(0))
    assert same_bits(world.state(), before)
    assert not graphs.events


def test_a_number_under_a_scheduler_of_torch(graphs: Graphs) -> None:
    world = World(NAME, captured=True, lr=1e-2)
    torch.optim.lr_scheduler.CosineAnnealingLR(world.optimizer, 10)
    match = r"group 0 has the rate 0\.01 \(float\), a number, and a scheduler of torch.*Give FusedAdamW a Schedule"
    assert_refused_at_once(world, graphs, match)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_backends_without_graphs(backend: str, graphs: Graphs) -> None:
    world = World(backend, captured=True)
    match = rf"FusedAdamW with backend='{backend}' cannot be captured.*backend='cuda' or 'triton'"
    assert_refused_at_once(world, graphs, match)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_that_are_not_capturable(optimizer: Any, graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    world.optimizer = optimizer(world.model.parameters(), lr=1e-2)
    match = rf"this {optimizer.__name__} cannot be captured.*capturable=True.*nexus\.optim\.FusedAdamW"
    assert_refused_at_once(world, graphs, match)


def test_a_parameter_elsewhere() -> None:
    world = World(NAME, captured=True)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 is on cpu, and others are on cuda:0"):
        check_capturable(world.optimizer, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("result", "name"),
    [
        (lambda loss: 3, r"output of the train step must be a tensor, got 3 \(int\)"),
        (lambda loss: {"loss": loss, "parts": [loss, None]}, r"output\['parts'\]\[1\] of the train step .* got None"),
        (lambda loss: (loss, "a"), r"output\[1\] of the train step must be a tensor, got 'a'"),
    ],
)
@pytest.mark.parametrize("eager", [False, True])
def test_outputs(result: Any, name: str, eager: bool, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    if eager:
        monkeypatch.setattr(graph_device, "graph_device", lambda device: None)
        world = World("native", captured=True)
        with pytest.raises(TypeError, match=name):
            world.step(_with(lambda world, loss: result(loss))(world))(*world.batch(0))
        return
    assert_refused(_with(lambda world, loss: result(loss)), graphs, name, TypeError)


@pytest.mark.parametrize("backend", ["native", NAME])
def test_inputs(backend: str, graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native":
        monkeypatch.setattr(graph_device, "graph_device", lambda device: None)
    world = World(backend, captured=True)
    step = world.step(lambda *args, **kwargs: pytest.fail("the step was run"))
    x = torch.ones(2, 4)
    for args, kwargs, error, text in (
        ((x, {1, 2}), {}, TypeError, r"args\[1\] must be a tensor or hashable, got \{1, 2\} \(set\)"),
        ((), {"batch": [x, bytearray(b"")]}, TypeError, r"kwargs\['batch'\]\[1\] must be a tensor or hashable"),
        ((x.to_sparse(),), {}, TypeError, r"args\[0\] has the layout torch\.sparse_coo"),
        (([x, x.clone().requires_grad_()],), {}, ValueError, r"args\[0\]\[1\] requires a gradient.*\.detach\(\)"),
        ((x.to("meta"),), {}, ValueError, r"args\[0\] is on the meta device"),
    ):
        with pytest.raises(error, match=text):
            step(*args, **kwargs)


# At a later call.


@pytest.mark.parametrize("replays", [1, 3])
@pytest.mark.parametrize("dropped", [False, True])
def test_parameters_that_moved(dropped: bool, replays: int, graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    inner = plain_step(world)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        loss = inner(x, y)
        if dropped:
            world.optimizer.zero_grad()
        return loss

    step = world.step(train_step)
    train(world, step, 3 + replays)
    weight = world.model[0].weight
    weight.data = weight.data.clone()
    before = world.state()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 0 is not where it was.*call reset\(\)"):
        step(*world.batch(1))
    assert same_bits(world.state(), before)
    step.reset()
    step(*world.batch(1))


def test_numbers_that_a_graph_of_torchs_optimizer_holds(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    world.optimizer = torch.optim.AdamW(world.model.parameters(), lr=1e-2, fused=True, capturable=True)
    step = world.step(plain_step(world))
    train(world, step, 4)
    world.optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(RuntimeError, match=r"'weight_decay' was changed from 0\.01 .* to 0\.5 .*call reset\(\)"):
        step(*world.batch(1))
    world.optimizer.param_groups[0]["weight_decay"] = 1e-2
    step(*world.batch(1))


def test_what_a_graph_of_fused_adamw_cannot_follow(graphs: Graphs) -> None:
    world = World(NAME, captured=True, max_grad_norm=None)
    step, group = world.step(plain_step(world)), world.optimizer.param_groups[0]
    train(world, step, 4)
    for key, value, match in (
        ("amsgrad", True, r"'amsgrad' was changed from False .* to True .*call reset\(\)"),
        ("max_grad_norm", 1.0, "norm"),
    ):
        last, group[key] = group[key], value
        before = world.state()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=match):
                step(*world.batch(1))
        assert same_bits(world.state(), before)
        group[key] = last
        step(*world.batch(1))


def test_parameters_on_another_device(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step = world.step(plain_step(world))
    train(world, step, 4)
    graphs.device = torch.device("meta")  # as if they had been there
    with pytest.raises(RuntimeError, match=r"moved to cpu, and graphs of them on meta .*call reset\(\)"):
        step(*world.batch(1))
