"""State in shared memory, as asynchronous workers (Hogwild, A3C) have it: what is shared stays shared."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing
from references import tensors_where_it_runs
from side_by_side import Make, both, of_this_torch, param, train
from torch import Tensor

from nexus.optim import FusedAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")


def shared(weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    moments = {name: torch.zeros_like(weight).share_memory_() for name in MOMENTS}
    return {"step": torch.zeros((), dtype=dtype).share_memory_(), **moments}


@pytest.mark.parity(
    "Copies",
    "a state in shared memory, as asynchronous workers put there",
    torch="is written where it is",
    nexus="same, if the count is float64; a float32 one, which would have to be replaced by a private copy, is "
    "`TypeError`",
    why="float32 sticks at 2**24",
)
@of_this_torch
def test_shared_memory() -> None:
    def run(make: Make, dtype: torch.dtype) -> tuple[list[float], bool]:
        weight = param(3)
        optimizer = make([weight], lr=0.1)
        own = optimizer.state[weight] = shared(weight, dtype)
        views = {name: tensor.view_as(tensor) for name, tensor in own.items()}  # another process's
        train(optimizer)
        if make is FusedAdamW:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert int(views["step"]) == 3
        assert all(torch.equal(views[name], optimizer.state[weight][name]) for name in views)
        return weight.tolist(), all(each.is_shared() for each in optimizer.state[weight].values())

    peer, _ = both(lambda make: run(make, torch.float32) if make is not FusedAdamW else ([], True))
    _, ours = both(lambda make: run(make, torch.float64) if make is FusedAdamW else ([], True))
    assert (peer[1], ours[1]) == (True, True)
    assert ours[0] == pytest.approx(peer[0])
    with pytest.raises(TypeError, match=r"'step' is in shared .* Share one of torch\.float64 and one element$"):
        run(FusedAdamW, torch.float32)


def test_a_shared_moment_that_does_not_fit_is_named(backend: str) -> None:
    with tensors_where_it_runs(backend):
        weight = param(3, dtype=torch.bfloat16)
    optimizer = FusedAdamW([weight], backend=backend)
    optimizer.state[weight] = shared(weight, torch.float64)
    with pytest.raises(TypeError, match=r"parameter 0 .*state 'exp_avg' is in shared memory.*torch\.float32"):
        train(optimizer)
    assert optimizer.state[weight]["exp_avg"].is_shared()


def test_a_part_of_a_shared_state_is_named(backend: str) -> None:
    with tensors_where_it_runs(backend):
        weight = param(3)
    optimizer = FusedAdamW([weight], backend=backend)
    optimizer.state[weight] = own = shared(weight, torch.float64)
    del own["step"]
    with pytest.raises(
        TypeError, match=r"state 'exp_avg', beside which another is missing, is in shared .*Share all"
    ):
        train(optimizer)
    assert sorted(own) == ["exp_avg", "exp_avg_sq"]


def test_a_load_is_refused_before_anything_is_written() -> None:
    weight = param(3)
    optimizer = FusedAdamW([weight])
    train(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.state[weight] = shared(weight, torch.float32)
    with pytest.raises(TypeError, match="state 'step' is in shared memory"):
        optimizer.load_state_dict(saved)
    assert optimizer.state[weight]["step"].is_shared()
    assert not optimizer.state[weight]["exp_avg"].any()


def work(optimizer: FusedAdamW, steps: int) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    (weight,) = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()


@pytest.mark.slow
def test_workers_count_together() -> None:
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    weight.share_memory_()
    optimizer = FusedAdamW([weight], lr=0.1)
    optimizer.state[weight] = shared(weight, torch.float64)
    for steps in (3, 4):  # one after the other, so that the sum is exact
        context = torch.multiprocessing.get_context("spawn")
        process = context.Process(target=work, args=(optimizer, steps))
        process.start()
        process.join(60)
        assert process.exitcode == 0
    work(optimizer, 2)
    assert int(optimizer.state[weight]["step"]) == 9
    alone = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    work(torch.optim.AdamW([alone], lr=0.1), 9)
    torch.testing.assert_close(weight, alone, rtol=1e-13, atol=0)
