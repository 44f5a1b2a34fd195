"""`torch.compile`: rows of docs/parity.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from references import make_params
from side_by_side import Make, assert_same, both, fails, outcomes
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

THEME = "torch.compile"
RATES = [0.1, 0.2, 0.3, 0.4, 0.5]
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),  # of what Dynamo imports
    # Where Dynamo looks itself:
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(make: Make) -> torch.optim.Optimizer:
    return make(make_params([(3, 4)], torch.float64), lr=RATES[0])


def train(optimizer: torch.optim.Optimizer, step: Callable[[], object]) -> None:
    """A step at each rate."""
    (group,) = optimizer.param_groups
    for rate in RATES:
        group["params"][0].grad = None
        group["params"][0].square().sum().backward()
        group["lr"] = rate
        step()


@pytest.mark.parity(
    "a compiled function that steps, with a float rate that moves",
    torch="the graph breaks at the update; what is around it is compiled anew for each rate, until torch gives up",
    nexus="the graph breaks at the step, and nothing is compiled anew",
    why="Dynamo does not look into the step: an operator that it traces costs more host time than the step itself",
    also=(
        "test_compile.py::test_a_training_step_is_compiled_once",
        "test_compile.py::test_hyperparameters_that_move_compile_nothing_anew",
    ),
)
def test_a_rate_that_moves() -> None:
    def run(make: Make) -> tuple[torch.optim.Optimizer, int, int]:
        optimizer = made(make)
        compiler = CompileCounterWithBackend("aot_eager")
        step = torch.compile(lambda: optimizer.step() and None, backend=compiler)
        counters.clear()
        seen: list[int] = []
        train(optimizer, lambda: (step(), seen.append(compiler.frame_count)))
        return optimizer, seen[-1] - seen[0], sum(counters["graph_break"].values())

    (first, recompiled, breaks), (second, ours, our_breaks) = both(run)
    assert recompiled >= 3
    assert ours == 0
    assert min(breaks, our_breaks) >= 1
    assert_same(first, second)


@pytest.mark.parity("`fullgraph=True`", torch="an error: the graph breaks at the update")
@outcomes(
    torch=pytest.raises(torch._dynamo.exc.Unsupported),
    nexus=fails(torch._dynamo.exc.Unsupported, r"cannot see what .* leave fullgraph=True out"),
)
def test_fullgraph(make: Make) -> object:
    optimizer = made(make)
    return train(optimizer, torch.compile(lambda: optimizer.step(), backend="aot_eager", fullgraph=True))


@pytest.mark.parity(
    "`optimizer.param_groups` read in a compiled function",
    torch="is in the graph, which is compiled anew for what it reads",
    nexus="what reads them runs outside of the graph, with the same result",
    why="Dynamo takes groups to be of the very type `dict`; those of nexus refuse a second driver of a rate",
    also=("test_compile.py::test_what_is_read_in_a_compiled_function",),
)
def test_groups_are_read() -> None:
    def run(make: Make) -> tuple[list[float], int]:
        optimizer = made(make)
        rates: list[float] = []
        compiler = CompileCounterWithBackend("aot_eager")
        read = torch.compile(lambda: torch.ones(()) * optimizer.param_groups[0]["lr"], backend=compiler)
        train(optimizer, lambda: (rates.append(read().item()), optimizer.step()))
        return rates, compiler.frame_count

    (torchs, torch_graphs), (ours, nexus_graphs) = both(run)
    assert torchs == pytest.approx(RATES)
    assert ours == torchs
    assert torch_graphs > 1
    assert nexus_graphs == 0
