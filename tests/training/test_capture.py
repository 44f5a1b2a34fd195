"""A captured train step: after N calls, everything is as after N plain steps, bit for bit.

Graphs are those of graphs_on_cpu.py, which repeat what was recorded and run no Python; without them, steps run
eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from capture_worlds import LOOPS, World, plain_step, train
from cuda_on_cpu import NAME, shim
from graphs_on_cpu import Graphs
from references import same_bits
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.training import capture_train_step
from nexus.training.capture import device as graph_device


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graphs]:
    """Lets steps on the CPU be captured."""
    shim().reset()
    double = Graphs()
    monkeypatch.setattr(graph_device, "graph_device", lambda device: double)
    yield double
    shim().reset()


def same_gradients(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    return all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("name", LOOPS)
def test_captured_steps_equal_plain_ones(name: str, graphs: Graphs) -> None:
    plain = World(NAME, captured=False)
    expected = LOOPS[name](plain)
    end = plain.state(), plain.gradients()
    captured = World(NAME, captured=True)
    assert same_bits(LOOPS[name](captured), expected)
    assert same_bits(captured.state(), end[0])
    assert same_gradients(captured.gradients(), end[1])
    assert "replay" in graphs.events


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", LOOPS)
def test_eager_steps_equal_plain_ones(name: str, backend: str) -> None:
    plain = World(backend, captured=False)
    expected = LOOPS[name](plain)
    end = plain.state(), plain.gradients()
    eager = World(backend, captured=True)
    assert same_bits(LOOPS[name](eager), expected)
    assert same_bits(eager.state(), end[0])
    assert same_gradients(eager.gradients(), end[1])


def test_the_order_of_things(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    inner = plain_step(world)

    def train_step(x: Tensor, y: Tensor) -> Tensor:
        graphs.events.append("run")
        return inner(x, y)

    train(world, world.step(train_step, warmup=4), 6)
    assert graphs.events == [
        *["side stream", "run", "main stream"] * 4,
        *["random state", "capture", "run", "set random state", "replay"],
        "replay",
    ]


def test_a_capture_trains_nothing(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    replays = []
    step = world.step(plain_step(world))
    train(world, step, 3)
    before = world.state(), world.gradients()
    graphs_capture = graphs.capture

    def capture(run: Any) -> Any:
        graph, result = graphs_capture(run)
        graph.replay = lambda: replays.append((world.state(), world.gradients()))
        return graph, result

    graphs.capture = capture  # type: ignore[method-assign]
    step(*world.batch(3))
    ((state, gradients),) = replays
    assert same_bits(state, before[0])
    assert same_gradients(gradients, before[1])


# Inputs and outputs.


def test_inputs_are_copied_and_outputs_are_overwritten(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step, cloning = world.step(plain_step(world)), world.step(plain_step(world), clone_outputs=True)
    for each in (step, cloning):
        train(world, each, 3)
    first = step(*world.batch(0))
    kept = first.clone()
    second = step(*world.batch(1))
    assert second is not first or second.data_ptr() == first.data_ptr()
    assert not torch.equal(first, kept)
    assert not first.requires_grad
    first = cloning(*world.batch(0))
    kept = first.clone()
    cloning(*world.batch(1))
    assert torch.equal(first, kept)


def test_one_graph_for_each_kind_of_inputs(graphs: Graphs) -> None:
    world = World(NAME, captured=True)

    def train_step(x: Tensor, factor: object = 1, names: tuple[str, ...] = ()) -> None:
        world.optimizer.zero_grad()
        (world.loss(x, x[:, :1]) * float(factor)).backward()  # type: ignore[arg-type]
        world.optimizer.step()

    step = world.step(train_step, warmup=2)
    x = torch.randn(6, 4)
    alike = [lambda: step(x), lambda: step(torch.randn(6, 4))]
    others = [
        lambda: step(torch.randn(5, 4)),
        lambda: step(x.double().float().t().contiguous().t()),
        lambda: step(x, 1),
        lambda: step(x, 1.0),
        lambda: step(x, True),
        lambda: step(x, factor=1),
        lambda: step(x, names=("a",)),
    ]
    for count, calls in ((1, alike * 2), *((index + 2, [call] * 3) for index, call in enumerate(others))):
        for call in calls:
            assert call() is None
        assert step.graph_count == count


def test_the_oldest_graph_is_dropped_and_this_is_said_once(graphs: Graphs) -> None:
    ends = []
    for captured in (False, True):
        world = World(NAME, captured)
        step = world.step(plain_step(world), max_graphs=2, warmup=2)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for index, size in enumerate((3, 3, 4, 3, 4, 4, 5, 5, 5, 3, 3, 3, 5)):
                step(*world.batch(index, size))
        ends.append(world.state())
    (warning,) = said
    assert "max_graphs=2 kinds: what was captured first is dropped" in str(warning.message)
    assert warning.category is RuntimeWarning
    assert warning.filename == __file__
    assert step.graph_count == 2
    assert graphs.events.count("capture") == 4  # 3 again
    assert same_bits(*ends)


def test_reset_captures_anew(graphs: Graphs) -> None:
    ends = []
    for captured in (False, True):
        world = World(NAME, captured)
        step = world.step(plain_step(world))
        train(world, step, 5)
        world.optimizer.add_param_group({"params": [torch.ones(3)]})  # which needs no gradient
        if captured:
            with pytest.raises(
                RuntimeError, match="has 7 parameters, and had 6 when its step was captured: call reset"
            ):
                train(world, step, 1, first=5)
            step.reset()
        train(world, step, 5, first=5)
        ends.append(world.state())
    assert graphs.events.count("capture") == 2
    assert same_bits(*ends)


def test_a_group_that_is_added_before_the_capture_begins_the_plain_steps_anew(graphs: Graphs) -> None:
    ends = []
    for captured in (False, True):
        world = World(NAME, captured)
        step = world.step(plain_step(world))
        train(world, step, 3)
        world.optimizer.add_param_group({"params": [torch.ones(3)]})
        train(world, step, 5, first=3)
        ends.append(world.state())
    assert graphs.events[: graphs.events.index("capture")].count("side stream") == 6
    assert same_bits(*ends)


def test_steps_between_replays(graphs: Graphs) -> None:
    ends = []
    for captured in (False, True):
        world = World(NAME, captured)
        eager = plain_step(world)
        step = world.step(eager)
        for index in range(9):
            (eager if index % 3 == 1 else step)(*world.batch(index))
        ends.append(world.state())
    assert same_bits(*ends)


def test_a_step_without_capture_is_the_step_itself() -> None:
    world = World("native", captured=True)
    step = world.step(plain_step(world))
    result = step(*world.batch(0))
    assert not result.requires_grad
    assert step.graph_count == 0


def test_no_warning_in_the_documented_use(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(world, world.step(plain_step(world)), 5)
    assert isinstance(world.optimizer, FusedAdamW)


def test_arguments() -> None:
    world = World("native", captured=False)
    for options, error, text in (
        ({"warmup": 1}, ValueError, "warmup must be an int from 2 to .*got 1 .*makes the state.*Leave it out for 3"),
        ({"warmup": 3.0}, TypeError, "warmup must be an int from 2"),
        ({"max_graphs": 0}, ValueError, "max_graphs must be an int from 1"),
        ({"clone_outputs": 1}, TypeError, "clone_outputs must be a bool"),
    ):
        with pytest.raises(error, match=text):
            capture_train_step(plain_step(world), world.optimizer, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="train_step must be callable"):
        capture_train_step(3, world.optimizer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
        capture_train_step(plain_step(world), world.model)  # type: ignore[arg-type]
