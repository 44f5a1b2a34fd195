"""State in fewer bits over several processes: the bits of one process, and checkpoints of another number of them."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import set_spread_grads, spread, whole
from references import make_grads
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from worlds import Worlds, in_processes

from nexus.backends import say_once
from nexus.optim import FusedAdamW
from nexus.optim.storage import MODES

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

ROWS = 640  # of five blocks each, so that parts begin with one
MODE = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
assert_same = functools.partial(torch.testing.assert_close, rtol=0, atol=0)


def run(params: list[Tensor], steps: range, **options: Any) -> FusedAdamW:
    optimizer = FusedAdamW(params, lr=1e-2, amsgrad=True, max_grad_norm=100.0, **options)
    for step in steps:
        torch.manual_seed(step)
        grads = [grad.to(param.dtype) for grad, param in zip(make_grads(params), params, strict=True)]
        set_spread_grads(params, grads)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("mode", [mode[0] for mode in MODES])
@in_processes()
def test_the_bits_are_those_of_one_process(mode: str) -> None:
    dtype, options = next(found[1:] for found in MODES if found[0] == mode)
    options = options | {"stochastic_rounding": True}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    alone = [torch.nn.Parameter(torch.randn(rows, ROWS).to(dtype)) for rows in (12, 7)]
    spread_out = [spread(param, mesh, [Shard(0)]) for param in alone]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run(spread_out, range(4), **options)
    expected = run(alone, range(4), **options)
    states = found.state_dict()["state"], expected.state_dict()["state"]
    for index, (mine, theirs) in enumerate(zip(spread_out, alone, strict=True)):
        assert_same(whole(mine).detach(), theirs.detach())
        for name, value in states[1][index].items():
            assert name == "step" or isinstance(states[0][index][name], DTensor)
            assert_same(whole(states[0][index][name]), value)


@in_processes(2)
def test_parts_that_begin_within_a_block_are_said_once() -> None:
    mesh = init_device_mesh("cpu", (2,))
    params = [spread(torch.zeros(75, 99, dtype=torch.bfloat16), mesh, [Shard(dim)]) for dim in (0, 1)]
    say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="this process's part of a parameter is of columns") as found:
        optimizer = run(params, range(2), **MODE)
    assert len(found) == 1
    assert optimizer.bytes_per_parameter() == 2 + 2 + 3 + 3 * 4 / 128
    with pytest.raises(ValueError, match="compact"):
        optimizer.state_dict(compact=True)


def go_on(loaded: Path | None, saved: Path | None, steps: range) -> dict[str, Tensor]:
    """Some steps between two checkpoints on disk. Returns what is there after them, whole."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(ROWS, 12, bias=False), torch.nn.Linear(ROWS, 7)).bfloat16()
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    params = list(model.parameters())
    optimizer = run(params, range(0), master_weight_bits=24, stochastic_rounding=True, **MODE)
    if loaded is not None:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(state, checkpoint_id=loaded)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for step in steps:
        torch.manual_seed(step)
        set_spread_grads(params, [grad.bfloat16() for grad in make_grads(params)])
        optimizer.step()
    if saved is not None:
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.save(state, checkpoint_id=saved)
    found = {name: whole(param).detach().clone() for name, param in model.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index} {name}": whole(value).clone() for name, value in state.items()}
    return found


@pytest.mark.xdist_group("distributed")
def test_three_processes_save_two_go_on_and_then_one(worlds: Worlds, tmp_path: Path) -> None:
    worlds(3).run(go_on, None, tmp_path / "3", range(3))
    worlds(2).run(go_on, tmp_path / "3", tmp_path / "2", range(3, 6))
    assert_same(go_on(tmp_path / "2", None, range(6, 9)), go_on(None, None, range(9)))
