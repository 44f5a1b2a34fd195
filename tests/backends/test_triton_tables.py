"""How the Triton backend follows tensors: its tables in device memory."""

from __future__ import annotations

import math

import pytest
import torch
from references import assert_same_run, make_grads, make_params, run_beside_torch, set_grads, step_both

pytest.importorskip("triton")
import triton_interpreter  # noqa: F401  # mends it

from nexus.backends import triton as backend
from nexus.backends.records import layout
from nexus.backends.triton_tables import CHUNK_ELEMENTS, CapturedGroups, DeviceTable, chunk_words, words
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import Cosine

# The tables.


def test_a_table_follows_its_words() -> None:
    table = DeviceTable(torch.device("cpu"))
    words = torch.arange(10)
    first = table.upload(words, capturing=False)
    assert torch.equal(first, words)
    words[3] = -1
    words[7] = 2**62 + 1
    assert table.upload(words, capturing=False) is first  # in place
    assert torch.equal(first, words)
    longer = table.upload(torch.arange(12), capturing=False)
    assert torch.equal(longer, torch.arange(12))
    assert torch.equal(first, words)


def test_a_captured_table_belongs_to_its_graph() -> None:
    table = DeviceTable(torch.device("cpu"))
    words = torch.tensor([5, -(2**63), 2**63 - 1, 0])
    eager = table.upload(words, capturing=False)
    words[1:3] = torch.tensor([2**60 + 1, -7])
    captured = table.upload(words, capturing=True)
    assert captured is eager  # of which a replay writes what has changed
    assert torch.equal(captured, words)
    later = table.upload(words + 1, capturing=False)
    second = table.upload(words + 2, capturing=True)
    third = table.upload(words + 3, capturing=True)  # nothing was uploaded in between
    for found, expected in ((captured, words), (later, words + 2), (second, words + 2), (third, words + 3)):
        assert torch.equal(found, expected)
    assert later is second
    assert len({found.data_ptr() for found in (captured, second, third)}) == 3


def test_graphs_share_a_table_that_is_fixed() -> None:
    table = DeviceTable(torch.device("cpu"), fixed=True)
    first = table.upload(torch.arange(5), capturing=False)
    assert table.upload(torch.arange(5), capturing=True) is first
    assert table.upload(torch.arange(5), capturing=False) is first


def test_hyperparameters_reach_captured_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params([(5,), (3,)])
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": Cosine(0.1, 9)}]
    optimizer = FusedAdamW(groups, max_grad_norm=math.inf, backend="triton")
    set_grads(params, make_grads(params))
    optimizer.step()
    monkeypatch.setattr(backend, "is_capturing", lambda device: True)
    optimizer.step()  # runs here, too; what matters is the tables that it leaves to a graph
    monkeypatch.undo()
    (own,) = engine_of(optimizer).runner._devices.values()
    captured = own._captured[0]
    for change in (
        {"lr": 0.25},
        {"weight_decay": 0.5, "max_grad_norm": 3.0},
        {"betas": (0.1, 0.2), "maximize": True},
    ):
        optimizer.param_groups[0].update(change)
        optimizer.sync_hyperparameters()
        (now,) = words(engine_of(optimizer).runner.records.groups(), "Group", [2])
        assert torch.equal(captured.table, now.flatten())
    optimizer.step()
    assert not captured.written_by_replays
    group = layout("Group")
    values = captured.table.view(torch.float64)[: group.words]
    assert float(values[0]) == 0.25
    assert values[group.offset("beta1") // 8 : group.offset("maximize") // 8].tolist() == [0.1, 0.2, 1e-8, 3.0]


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


def test_what_no_replay_would_use_is_refused() -> None:
    others = torch.arange(6)
    CapturedGroups(torch.zeros(5), False, True).update(others, measures_norm=True)  # of another number of groups
    with pytest.raises(RuntimeError, match="clipping cannot be switched on in it"):
        CapturedGroups(torch.zeros(6), False, False).update(others, measures_norm=True)
    with pytest.raises(RuntimeError, match="make a step before the capture"):
        CapturedGroups(torch.zeros(6), True, True).update(others, measures_norm=True)


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
def test_parameters_that_share_memory_are_refused() -> None:
    memory = torch.zeros(10)
    params = [torch.nn.Parameter(memory[:6]), torch.nn.Parameter(memory[6:]), torch.nn.Parameter(memory[5:8])]
    set_grads(params, make_grads(params))
    FusedAdamW(params[:2], backend="triton").step()
    with pytest.raises(ValueError, match="share memory"):
        FusedAdamW(params, backend="triton").step()
