"""Workers: parameters and state in memory that processes share (Hogwild, A3C), and several threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from references import (
    BACKENDS,
    Float64AdamW,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    same_bits,
    set_grads,
    snapshot,
)
from side_by_side import Make, both, of_this_torch, param, params_of, state_of, train
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import Cosine

State = dict[str, Tensor]


def shared(weight: Tensor, dtype: torch.dtype = torch.float64) -> State:
    moments = {name: torch.zeros_like(weight).share_memory_() for name in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.zeros((), dtype=dtype).share_memory_(), **moments}


@pytest.mark.parity(
    "Copies",
    "a state in shared memory, as asynchronous workers put there",
    torch="is written where it is",
    nexus="same, if the count is float64; a float32 one, which would have to be replaced by a private copy, is "
    "`TypeError`",
    why="float32 sticks at 2**24",
    also=("test_workers.py::test_a_shared_state_that_does_not_fit_is_named",),
)
@of_this_torch
def test_state_in_shared_memory() -> None:
    def run(make: Make) -> tuple[list[float], bool]:
        weight = param(3)
        optimizer = make([weight], lr=0.1)
        own = shared(weight, torch.float64 if make is FusedAdamW else torch.float32)
        optimizer.state[weight] = own
        views = {name: tensor.view_as(tensor) for name, tensor in own.items()}  # another process's
        train(optimizer)
        if make is FusedAdamW:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert int(views["step"]) == 3
        assert all(torch.equal(views[name], optimizer.state[weight][name]) for name in views)
        return weight.tolist(), all(each.is_shared() for each in optimizer.state[weight].values())

    peer, ours = both(run)
    assert (peer[1], ours[1]) == (True, True)
    assert ours[0] == pytest.approx(peer[0])


MISFITS: dict[str, tuple[torch.dtype, Callable[[State], Any], str]] = {
    "a count of float32": (
        torch.float64,
        lambda state: state.update(step=torch.zeros(()).share_memory_()),
        r"'step' is in shared .* Share one of torch\.float64 and one element$",
    ),
    "moments of bfloat16": (
        torch.bfloat16,
        lambda state: None,
        r"parameter 0 .*state 'exp_avg' is in shared memory.*torch\.float32",
    ),
    "no count": (
        torch.float64,
        lambda state: state.pop("step"),
        "state 'exp_avg', beside which another is missing, is in shared .*Share all",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)  # memory of a GPU is not shared so
@pytest.mark.parametrize(("dtype", "spoil", "words"), MISFITS.values(), ids=MISFITS)
def test_a_shared_state_that_does_not_fit_is_named(
    backend: str, dtype: torch.dtype, spoil: Callable[[State], Any], words: str
) -> None:
    weight = param(3, dtype=dtype)
    optimizer = FusedAdamW([weight], backend=backend)
    own = shared(weight)
    spoil(own)
    optimizer.state[weight], before = own, dict(own)
    with pytest.raises(TypeError, match=words):
        train(optimizer)
    assert optimizer.state[weight] == before  # the same tensors
    assert not any(value.any() for value in own.values())


def test_a_load_into_shared_memory_is_refused_before_anything_is_written() -> None:
    weight = param(3)
    optimizer = FusedAdamW([weight])
    train(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.state[weight] = shared(weight, torch.float32)
    with pytest.raises(TypeError, match="state 'step' is in shared memory"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[weight]["step"].is_shared()
    assert not optimizer.state[weight]["exp_avg"].any()


def take_steps(optimizer: torch.optim.Optimizer, rounds: list[list[Tensor]]) -> None:
    for grads in rounds:
        set_grads(params_of(optimizer), grads)
        optimizer.step()


@pytest.mark.parametrize(("way", "all_shared"), [("fork", False), ("spawn", False), ("spawn", True)])
def test_steps_of_another_process_are_seen_and_counted(way: str, all_shared: bool) -> None:
    """`all_shared`: with the norm and the count of skipped steps, whose memory moves as the process is spawned."""
    start = make_params([(40,), (3, 2)])
    rounds = [make_grads(start) for _ in range(6)]
    options = {"lr": 1e-2, "amsgrad": True, "max_grad_norm": 1.0 if all_shared else None}
    reference, alone = Float64AdamW(start, **options), FusedAdamW(copies(start), **options)
    for grads in rounds:
        reference.step(grads)
    take_steps(alone, rounds)

    module = torch.nn.ParameterList(copies(start)).share_memory()
    optimizer = FusedAdamW(module.parameters(), **options)
    take_steps(optimizer, rounds[:2])
    for state in optimizer.state.values():
        for value in state.values():
            value.share_memory_()
    if all_shared:
        optimizer.grad_norm.share_memory_()
        optimizer.skipped_steps.share_memory_()
    take_steps(optimizer, rounds[2:3])
    optimizer.zero_grad()
    child = mp.get_context(way).Process(target=take_steps, args=(optimizer, rounds[3:5]))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    take_steps(optimizer, rounds[5:])
    assert same_bits(snapshot(optimizer), snapshot(alone))
    assert_same_run(optimizer, reference)


# Threads.


@pytest.mark.usefixtures("restored_threads")
def test_two_optimizers_on_two_threads(backend: str) -> None:
    torch.set_num_threads(2)
    start = [make_params([(40_000,), (7,)]) for _ in range(2)]
    rounds = [[make_grads(own) for _ in range(8)] for own in start]

    def run(which: int) -> list[Tensor]:
        optimizer = FusedAdamW(
            copies(start[which]), lr=Cosine(peak_lr=0.1, total_steps=20), max_grad_norm=1.0, backend=backend
        )
        take_steps(optimizer, rounds[which])
        return snapshot(optimizer)

    expected = [run(0), run(1)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, range(2), timeout=120))
    assert all(same_bits(*pair) for pair in zip(expected, found, strict=True))


def test_other_threads_may_read_the_state_in_the_middle_of_a_step() -> None:
    weight, done = param(300_000, dtype=torch.float32), threading.Event()
    optimizer, seen = FusedAdamW([weight], lr=0.1), []
    weight.grad = torch.ones_like(weight)

    def read() -> None:
        while not done.is_set():
            seen.append(len(optimizer.state_dict()["state"]))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    for _ in range(50):
        optimizer.step()
    done.set()
    thread.join()
    assert seen
    assert int(state_of(optimizer)["step"]) == 50
    assert (weight == weight[0]).all()
