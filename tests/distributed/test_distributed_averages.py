"""Averages of parameters that are spread over processes."""

from __future__ import annotations

import functools

import pytest
import torch
from distributed_cases import Net, batch, loss_of, make_fsdp, make_net, my_rows, train, whole
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from worlds import in_processes

from nexus.optim import EMA, FusedAdamW, Mean

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")

DTYPE = torch.float64  # so that another order of summation does not grow
close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)


def outputs(model: Net) -> Tensor:
    with torch.no_grad():
        return model(my_rows(batch(99, DTYPE)[0]))


@pytest.mark.parametrize("average", [EMA(0.75), Mean(start=2)], ids=["EMA", "Mean"])
@in_processes(2)
def test_averages_are_those_of_one_process_and_shown_in_their_place(average: EMA | Mean) -> None:
    models = make_fsdp(DTYPE), make_net(DTYPE)
    options = {"lr": 1e-2, "average": average, "max_grad_norm": 1.0}
    ours, alone = (FusedAdamW(model.parameters(), **options) for model in models)
    for steps in ((0, 5), (5, 8)):
        train(models[0], ours, *steps)
        train(models[1], alone, *steps, rows=lambda tensor: tensor)
        for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
            close(whole(ours.state[mine]["average"]), alone.state[theirs]["average"])
        before = outputs(models[0])  # which leaves parameters gathered
        with ours.averaged(), alone.averaged():
            close(outputs(models[0]), outputs(models[1]))
            assert not torch.equal(outputs(models[0]), before)
        assert torch.equal(outputs(models[0]), before)
        close(before, outputs(models[1]))
    x, y = batch(1, DTYPE)
    assert torch.isfinite(loss_of(models[0], my_rows(x), my_rows(y)))


@in_processes(2)
def test_averages_are_saved_whole_and_exchanged() -> None:
    model, alone = make_fsdp(DTYPE), make_net(DTYPE)
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, average=EMA(0.75))
    train(model, optimizer, 0, 4)
    swa = AveragedModel(alone)
    optimizer.store_average(model, swa)
    assert int(swa.n_averaged) == 4
    for mine, theirs in zip(model.parameters(), swa.module.parameters(), strict=True):
        assert torch.equal(whole(optimizer.state[mine]["average"]), theirs)
    with torch.no_grad():
        for theirs in swa.module.parameters():
            theirs.mul_(2.0)
    optimizer.load_average(model, swa)
    for mine, theirs in zip(model.parameters(), swa.module.parameters(), strict=True):
        assert torch.equal(whole(optimizer.state[mine]["average"]), theirs)
    again = make_fsdp(DTYPE)
    resumed = FusedAdamW(again.parameters(), lr=1e-2, average=EMA(0.75))
    with torch.no_grad():
        for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    resumed.load_state_dict(optimizer.state_dict())
    for run, of in ((model, optimizer), (again, resumed)):
        train(run, of, 4, 6)
    for mine, theirs in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(whole(resumed.state[mine]["average"]), whole(optimizer.state[theirs]["average"]))
