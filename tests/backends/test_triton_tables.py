"""How the Triton backend follows tensors: its tables in device memory."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from graphs_on_cpu import Graph, Graphs
from references import assert_same_run, make_grads, make_params, params_of, run_beside_torch, set_grads, step_both
from torch import Tensor
from torch.overrides import TorchFunctionMode

pytest.importorskip("triton")
import triton_interpreter  # noqa: F401  # mends it

from nexus.backends import triton as backend
from nexus.backends.interface import RATES
from nexus.backends.records import layout
from nexus.backends.triton_tables import (
    CHUNK_ELEMENTS,
    CapturedStep,
    DeviceTable,
    Upload,
    chunk_words,
    update_captured,
    words,
)
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Cosine
from nexus.training import capture_train_step

# The tables.


def test_a_table_follows_its_words() -> None:
    table = DeviceTable(torch.device("cpu"))
    words = torch.arange(10)
    first = table.upload(words, capturing=False).memory
    assert torch.equal(first, words)
    words[3] = -1
    words[7] = 2**62 + 1
    assert table.upload(words, capturing=False).memory is first  # in place
    assert torch.equal(first, words)
    longer = table.upload(torch.arange(12), capturing=False).memory
    assert torch.equal(longer, torch.arange(12))
    assert torch.equal(first, words)


class WordsAdded(TorchFunctionMode):
    """Counts what is added from arguments of kernels."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._foreach_add_:
            self.count += len(args[1])
        return func(*args, **(kwargs or {}))


def captured_upload(table: DeviceTable, words: Tensor) -> tuple[Graph, Tensor, int]:
    """A graph that uploads words, where it leaves them, and how many of them it holds itself."""
    with WordsAdded() as added:
        graph, upload = Graphs().capture(lambda: table.upload(words, capturing=True))
    return graph, upload.memory, added.count


def test_captures_in_a_row_start_from_one_upload() -> None:
    """A graph holds the words that differ from it alone, and none depends on what another has written."""
    table = DeviceTable(torch.device("cpu"))
    before = torch.tensor([5, -(2**63), 2**63 - 1, 0, 7])
    live = table.upload(before, capturing=False).memory
    graphs = []
    for change in ({1: 2**60 + 1, 2: -7}, {2: -(2**63)}, {}, {0: 6, 1: 2**63 - 1, 2: 1}):
        words = before.clone()
        words[list(change)] = torch.tensor(list(change.values()), dtype=torch.int64)
        graph, memory, held = captured_upload(table, words)
        assert held == len(change)
        assert (memory is live) == (not change)
        graphs.append((graph, memory, words))
    eager = table.upload(before + 1, capturing=False).memory
    for graph, memory, words in [*graphs, *reversed(graphs)]:
        if memory is not live:
            memory.fill_(-1)  # as an earlier kernel of the graph may do to the graph's own memory
        graph.replay()
        assert torch.equal(memory, words)
        assert torch.equal(live, before)
        assert torch.equal(eager, before + 1)


def test_a_graph_holds_all_words_of_a_table_of_another_length() -> None:
    table = DeviceTable(torch.device("cpu"))
    live = table.upload(torch.arange(3), capturing=False).memory
    graph, memory, held = captured_upload(table, torch.arange(1, 6))
    assert held == 5
    memory.fill_(-1)
    graph.replay()
    assert torch.equal(memory, torch.arange(1, 6))
    assert table.upload(torch.arange(3), capturing=False).memory is live


def test_graphs_share_a_table_that_is_fixed() -> None:
    table = DeviceTable(torch.device("cpu"), fixed=True)
    first = table.upload(torch.arange(5), capturing=False)
    assert table.upload(torch.arange(5), capturing=True) is first
    assert table.upload(torch.arange(5), capturing=False) is first


on_cpu = pytest.mark.skipif(not backend.INTERPRETS, reason="Triton runs on the GPU, where test_gpu.py captures")


@on_cpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "max_grad_norm": 1.0,
            "amsgrad": True,
            "lr": WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1e-2),
        },
    ],
)
def test_captures_in_a_row(options: dict[str, Any], graphs: Graphs) -> None:
    """Each with gradients of its own; their replays and steps between them equal the reference's steps."""
    params = make_params([(5,), (3, 7), (CHUNK_ELEMENTS + 1,)])
    optimizer, reference = run_beside_torch(params, "triton", steps=2, **options)
    captured = []
    for _ in range(3):
        static = [torch.zeros_like(param) for param in params]
        set_grads(params_of(optimizer), static)
        captured.append((graphs.capture(optimizer.step)[0], static))
    for step in range(9):
        if step % 4 == 3:
            step_both(optimizer, reference, steps=1)  # gradients elsewhere
            continue
        graph, static = captured[step % 3]
        grads = make_grads(params)
        for target, grad in zip(static, grads, strict=True):
            target.copy_(grad)
        graph.replay()
        reference.step(grads)
    assert_same_run(optimizer, reference)


@on_cpu
def test_tables_go_with_their_graph(graphs: Graphs) -> None:
    """Those of `capture_train_step`, also where a capture fails; of others, they live as long as the optimizer."""
    model = torch.nn.Linear(4, 1)
    optimizer = FusedAdamW(model.parameters(), backend="triton")

    def train_step(x: Tensor) -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    captured = capture_train_step(train_step, optimizer)
    for _ in range(4):
        captured(torch.ones(2, 4))
    runner = engine_of(optimizer).runner
    assert runner.has_captured()
    (tables,) = map(weakref.ref, runner._captured)
    for _ in range(3):
        captured(torch.ones(3, 4))
    graphs.fail = RuntimeError("as told")
    with pytest.raises(RuntimeError, match="as told"):
        captured(torch.ones(3, 4))
    graphs.fail = None
    gc.collect()
    assert list(runner._captured) == [tables()]
    captured.reset()
    gc.collect()
    assert tables() is None
    assert not runner.has_captured()
    graph, _ = graphs.capture(optimizer.step)
    del graph
    gc.collect()
    assert runner.has_captured()


@on_cpu
def test_hyperparameters_reach_captured_steps(graphs: Graphs) -> None:
    params = make_params([(5,), (3,)])
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": Cosine(peak_lr=0.1, total_steps=9)}]
    optimizer = FusedAdamW(groups, max_grad_norm=math.inf, backend="triton")
    set_grads(params, make_grads(params))
    optimizer.step()
    for _ in range(2):  # without a step between
        graphs.capture(optimizer.step)
    captured = engine_of(optimizer).runner._kept
    uploads = [step.groups for step in captured]
    for change in (
        {"lr": 0.125},
        {"lr": 0.25},
        {"weight_decay": 0.5, "max_grad_norm": 3.0},
        {"betas": (0.1, 0.2), "maximize": True},
    ):
        optimizer.param_groups[0].update(change)
        optimizer.sync_hyperparameters()
        (now,) = words(engine_of(optimizer).runner.records.groups(), "Group", [2])
        graphs.capture(optimizer.step)
        uploads.append(captured[-1].groups)
        for upload in uploads:
            assert torch.equal(upload.memory, now.flatten())
            assert upload.source is None
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()  # which is for itself
    group = layout("Group")
    for upload in uploads:
        values = upload.memory.view(torch.float64)[: group.words]
        assert float(values[0]) == 0.25
        rates = {name: float(values[group.offset(f"{name}.value") // 8]) for name in RATES[2:]}
        assert rates == {
            "beta1": 0.1,
            "beta2": 0.2,
            "eps": 1e-8,
            "max_grad_norm": 3.0,
            "lr_scale": 1.0,
            "average_decay": 0.0,
        }


def test_a_graph_cannot_begin_with_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, reference = run_beside_torch(make_params([(5,)]), "triton", steps=0)
    (param,) = optimizer.param_groups[0]["params"]
    param.grad = torch.ones(5)
    monkeypatch.setattr(backend, "_loaded", set())
    monkeypatch.setattr(backend, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="make a step before the capture"):
        optimizer.step()
    monkeypatch.setattr(backend, "is_capturing", lambda device: False)
    step_both(optimizer, reference, steps=1)
    monkeypatch.setattr(backend, "is_capturing", lambda device: True)
    step_both(optimizer, reference, steps=1)  # runs here, too
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(RuntimeError, match="make a step before the capture"):  # of the norm, there was none
        optimizer.step()
    assert_same_run(optimizer, reference)


@on_cpu
def test_a_graph_that_sets_a_hyperparameter_itself(graphs: Graphs) -> None:
    params = make_params([(5,)])
    optimizer, reference = run_beside_torch(params, "triton", steps=1)
    grads = make_grads(params)
    set_grads(params_of(optimizer), grads)
    (group,) = optimizer.param_groups
    group["weight_decay"] = 0.5  # seen by no step before the capture
    graph, _ = graphs.capture(optimizer.step)
    optimizer.sync_hyperparameters()  # which asks for nothing else
    reference.optimizer.param_groups[0]["weight_decay"] = 0.5
    graph.replay()
    reference.step(grads)
    assert_same_run(optimizer, reference)
    group["weight_decay"] = 0.25
    with pytest.raises(RuntimeError, match=r"make a step, or call sync_hyperparameters\(\), before the capture"):
        optimizer.sync_hyperparameters()


def captured_step(words: Tensor, *, measures_norm: bool = True, written_by_replays: bool = False) -> CapturedStep:
    source = torch.zeros_like(words) if written_by_replays else None
    return CapturedStep(Upload(words.clone(), words.clone(), source), measures_norm, ())


def test_what_no_replay_would_use_is_refused() -> None:
    words = torch.arange(6)
    good = captured_step(words)
    of_another_number_of_groups = captured_step(words[:5], measures_norm=False, written_by_replays=True)
    for bad, match in (
        (captured_step(words, measures_norm=False), "clipping cannot be switched on in it"),
        (captured_step(words, written_by_replays=True), "every replay sets that again"),
    ):
        with pytest.raises(RuntimeError, match=match):
            update_captured([good, of_another_number_of_groups, bad], words + 1, measures_norm=True)
        assert torch.equal(good.groups.memory, words)
    as_it_is = captured_step(words + 1, written_by_replays=True)
    update_captured([good, of_another_number_of_groups, as_it_is], words + 1, measures_norm=True)
    assert torch.equal(good.groups.memory, words + 1)
    assert torch.equal(of_another_number_of_groups.groups.memory, words[:5])


def test_chunks_cover_every_tensor_once() -> None:
    huge = 2**31 + 5
    sizes = (0, 1, CHUNK_ELEMENTS, CHUNK_ELEMENTS + 1, huge)
    chunks = chunk_words(sizes)
    for tensor, size in enumerate(sizes):
        own = chunks[chunks[:, 2] == tensor]
        assert int(own[0, 0]) == 0
        assert torch.equal(own[1:, 0], own[:-1, :2].sum(dim=1))
        assert int(own[-1, :2].sum()) == size


# Pointers that move.


@pytest.mark.usefixtures("where_triton_runs")
def test_pointers_that_move_are_followed() -> None:
    params = make_params([(9,), (300,)])
    optimizer, reference = run_beside_torch(params, "triton")  # gradients are new tensors
    params[1].data = params[1].data.clone()
    step_both(optimizer, reference, steps=3)
    assert_same_run(optimizer, reference)


@pytest.mark.usefixtures("where_triton_runs")
def test_pointers_that_move_after_a_step_in_inference_mode() -> None:
    optimizer, reference = run_beside_torch(make_params([(9,), (300,)]), "triton", steps=0)
    grads = make_grads(params_of(optimizer))
    set_grads(params_of(optimizer), grads)
    with torch.inference_mode():
        optimizer.step()
    reference.step(grads)
    step_both(optimizer, reference, steps=3)
    assert_same_run(optimizer, reference)


@pytest.mark.usefixtures("where_triton_runs")
def test_parameters_that_share_memory_are_refused() -> None:
    memory = torch.zeros(10)
    params = [torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[6:]), torch.nn.Parameter(memory[5:8])]
    set_grads(params, make_grads(params))
    FusedAdamW(params[:2], backend="triton").step()
    with pytest.raises(ValueError, match="share memory"):
        FusedAdamW(params, backend="triton").step()
