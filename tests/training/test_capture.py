"""A captured train step: after N calls, everything is as after N plain steps, bit for bit.

Graphs are those of graphs_on_cpu.py, which repeat what was recorded and run no Python; without them, steps run
eagerly.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_worlds import LOOPS, World, assert_same_ends, plain_step, run, train
from cuda_on_cpu import NAME
from graphs_on_cpu import Graph, Graphs
from references import same_bits
from torch import Tensor

from nexus.backends import triton
from nexus.training import capture_train_step


@pytest.mark.parametrize("name", LOOPS)
def test_captured_steps_equal_plain_ones(name: str, graphs: Graphs) -> None:
    plain, captured = (run(name, World(NAME, captured)) for captured in (False, True))
    assert same_bits(plain, captured)
    assert "replay" in graphs.events


@pytest.mark.skipif(not triton.INTERPRETS, reason="Triton runs on the GPU, where test_capture_gpu.py captures")
@pytest.mark.parametrize("name", ["other_shapes_in_turns", "scaled", "edited"])
def test_captured_steps_of_triton_equal_plain_ones(name: str, graphs: Graphs) -> None:
    pytest.importorskip("triton")
    plain, captured = (run(name, World("triton", captured)) for captured in (False, True))
    assert same_bits(plain, captured)
    assert "replay" in graphs.events


@pytest.mark.parametrize("backend", ["native", "torch", "reference"])
@pytest.mark.parametrize("name", LOOPS)
def test_eager_steps_equal_plain_ones(name: str, backend: str) -> None:
    plain, eager = (run(name, World(backend, captured)) for captured in (False, True))
    assert same_bits(plain, eager)


def test_the_order_of_things(graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step = plain_step(world, then=lambda loss: graphs.events.append("run"))
    train(world, world.step(step, warmup=4), 6)
    assert graphs.events == [
        *["side stream", "run", "main stream"] * 4,
        *["random state", "capture", "run", "set random state", "replay"],
        "replay",
    ]


def test_a_capture_trains_nothing(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(NAME, captured=True)
    step = world.step(plain_step(world))
    train(world, step, 3)
    before, after = world.state(), []
    monkeypatch.setattr(Graph, "replay", lambda graph: after.append(world.state()))
    step(*world.batch(3))
    assert same_bits(before, *after)


# Inputs and outputs.


@pytest.mark.parametrize("clones", [False, True])
def test_inputs_are_copied_and_outputs_are_overwritten(clones: bool, graphs: Graphs) -> None:
    world = World(NAME, captured=True)
    step = world.step(plain_step(world), clone_outputs=clones)
    train(world, step, 3)
    first = step(*world.batch(0))
    kept = first.clone()
    second = step(*world.batch(1))
    assert (second.data_ptr() == first.data_ptr()) == (not clones)
    assert torch.equal(first, kept) == clones
    assert not first.requires_grad


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
    sizes = (3, 3, 4, 3, 4, 4, 5, 5, 5, 3, 3, 3, 5)
    steps = []

    def use(world: World) -> None:
        steps.append(world.step(plain_step(world), max_graphs=2, warmup=2))
        train(world, steps[-1], len(sizes), batch=lambda index: world.batch(index, sizes[index]))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert_same_ends(use)
    (warning,) = said
    assert "max_graphs=2 kinds: what was captured first is dropped" in str(warning.message)
    assert warning.category is RuntimeWarning
    assert Path(warning.filename).name == "capture_worlds.py"  # where the step is called
    assert steps[1].graph_count == 2
    assert graphs.events.count("capture") == 4  # 3 again


def test_reset_captures_anew(graphs: Graphs) -> None:
    def use(world: World) -> None:
        step = world.step(plain_step(world))
        train(world, step, 5)
        world.optimizer.add_param_group({"params": [torch.ones(3)]})  # which needs no gradient
        if world.captured:
            with pytest.raises(
                RuntimeError, match="has 7 parameters, and had 6 when its step was captured: call reset"
            ):
                train(world, step, 1, first=5)
            step.reset()
        train(world, step, 5, first=5)

    assert_same_ends(use)
    assert graphs.events.count("capture") == 2


def test_a_group_that_is_added_before_the_capture_begins_the_plain_steps_anew(graphs: Graphs) -> None:
    def use(world: World) -> None:
        step = world.step(plain_step(world))
        train(world, step, 3)
        world.optimizer.add_param_group({"params": [torch.ones(3)]})
        train(world, step, 5, first=3)

    assert_same_ends(use)
    assert graphs.events[: graphs.events.index("capture")].count("side stream") == 6


def test_steps_between_replays(graphs: Graphs) -> None:
    def use(world: World) -> None:
        eager = plain_step(world)
        step = world.step(eager)
        for index in range(9):
            (eager if index % 3 == 1 else step)(*world.batch(index))

    assert_same_ends(use)


def test_a_step_without_capture_is_the_step_itself() -> None:
    world = World("native", captured=True)
    step = world.step(plain_step(world))
    assert not step(*world.batch(0)).requires_grad
    assert step.graph_count == 0


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"warmup": 1}, ValueError, "warmup must be an int from 2 to .*got 1 .*makes the state.*Leave it out for 3"),
        ({"warmup": 3.0}, TypeError, "warmup must be an int from 2"),
        ({"max_graphs": 0}, ValueError, "max_graphs must be an int from 1"),
        ({"clone_outputs": 1}, TypeError, "clone_outputs must be a bool"),
        ({"train_step": 3}, TypeError, "train_step must be callable"),
        ({"optimizer": torch.nn.Linear(1, 1)}, TypeError, r"optimizer must be a torch\.optim\.Optimizer"),
    ],
)
def test_arguments(given: dict[str, Any], error: type[Exception], text: str) -> None:
    world = World("native", captured=False)
    with pytest.raises(error, match=text):
        capture_train_step(**{"train_step": plain_step(world), "optimizer": world.optimizer, **given})
