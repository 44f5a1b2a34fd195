"""Averages in the place of the parameters, in checkpoints, in every kind of loop, and exchanged with torch's."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from cuda_on_cpu import NAME
from graphs_on_cpu import Graphs
from low_memory_cases import MODES
from references import (
    LAYOUTS,
    Tolerance,
    assert_close,
    make_grads,
    make_params,
    params_of,
    params_tolerance,
    same_bits,
    set_grads,
    snapshot,
    through_a_file,
)
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nexus.optim import EMA, FusedAdamW, Mean
from nexus.optim.averages import saved_average
from nexus.schedules import Clock, Linear
from nexus.schedules.clock import Clocked
from nexus.training import capture_train_step, step_in_backward

SHAPES = [(16_384 + 130,), (7,), (67, 65)]
KINDS = {
    "EMA": EMA(0.75),
    "scheduled": EMA(Linear(start_lr=0.0, end_lr=0.9, total_steps=5)),
    "Mean": Mean(start=2),
    "by a clock": EMA(Linear(start_lr=0.0, end_lr=0.9, total_steps=50).at(Clock())),
    "bfloat16": EMA(0.75, dtype=torch.bfloat16),
}
kinds = pytest.mark.parametrize("average", KINDS.values(), ids=list(KINDS))
modes = pytest.mark.parametrize("name", MODES)


def made(name: str = "float32", average: Any = KINDS["EMA"], **options: Any) -> FusedAdamW:
    params = make_params(SHAPES, MODES[name].param)
    return FusedAdamW(params, **{"lr": 0.1, **MODES[name].options(), "average": average, **options})


def go_on(optimizer: FusedAdamW, steps: range) -> FusedAdamW:
    params = params_of(optimizer)
    for step in steps:
        torch.manual_seed(step)
        set_grads(params, make_grads(params))
        optimizer.step()
        decay = optimizer.param_groups[0]["average"] and optimizer.param_groups[0]["average"].schedule
        if isinstance(decay, Clocked):
            optimizer.advance(decay.clock, 10)
    return optimizer


def average_of(optimizer: FusedAdamW, param: Tensor) -> Tensor:
    found: Tensor = optimizer.state[param]["average"]
    return found


# In the place of the parameters.


@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_are_shown_and_parameters_come_back(name: str, dtype: torch.dtype, backend: str) -> None:
    optimizer = go_on(made(name, EMA(0.75, dtype=dtype), backend=backend), range(3))
    params = params_of(optimizer)
    before, averages = snapshot(optimizer), [average_of(optimizer, param).clone() for param in params]
    addresses = [param.data_ptr() for param in params]
    with optimizer.averaged():
        for param, average in zip(params, averages, strict=True):
            assert torch.equal(param.detach(), average.to(param.dtype))
    assert same_bits(before, snapshot(optimizer))
    assert [param.data_ptr() for param in params] == addresses
    again = copy.deepcopy(optimizer)
    assert same_bits(snapshot(go_on(optimizer, range(3, 5))), snapshot(go_on(again, range(3, 5))))


def test_parameters_come_back_after_an_exception(backend: str) -> None:
    optimizer = go_on(made(backend=backend), range(3))
    before = snapshot(optimizer)
    with pytest.raises(KeyError, match="mine"), optimizer.averaged():
        raise KeyError("mine")
    assert same_bits(before, snapshot(optimizer))
    with optimizer.averaged():
        assert not same_bits(before, snapshot(optimizer))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_of_any_layout(layout: str, backend: str) -> None:
    param = torch.nn.Parameter(LAYOUTS[layout](torch.randn(4, 3, 2, 5)))
    twin = torch.nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    optimizers = [FusedAdamW([each], lr=0.1, average=EMA(0.5), backend=backend) for each in (param, twin)]
    for step in range(4):
        grad = torch.randn(4, 3, 2, 5, generator=torch.Generator(twin.device).manual_seed(step), device=twin.device)
        param.grad, twin.grad = grad.clone(), grad
        for optimizer in optimizers:
            optimizer.step()
    # PyTorch's kernel takes no tensor that is laid out otherwise: the reference does.
    tolerance = params_tolerance(backend, torch.float32) if backend == "torch" else Tolerance(0.0, 0.0)
    for one, other in zip(*(each.state.values() for each in optimizers), strict=True):
        assert_close(one["average"], other["average"], tolerance)
    average = optimizers[0].state[param]["average"].clone()
    with optimizers[0].averaged():
        assert torch.equal(param.detach(), average)
    assert_close(param, twin, tolerance)


def test_what_has_no_average_stays() -> None:
    with_one, without, idle, frozen = make_params([(5,)] * 4)
    frozen.requires_grad_(False)
    optimizer = FusedAdamW([{"params": [with_one, idle, frozen], "average": EMA(0.5)}, {"params": [without]}], lr=0.1)
    for _ in range(2):
        for param in (with_one, without):
            param.grad = torch.ones_like(param)
        optimizer.step()
    before = [param.detach().clone() for param in (with_one, without, idle, frozen)]
    with optimizer.averaged():
        assert not torch.equal(with_one.detach(), before[0])
        assert same_bits([each.detach() for each in (without, idle, frozen)], before[1:])


INSIDE = {
    "step()": lambda optimizer: optimizer.step(),
    "averaged()": lambda optimizer: optimizer.averaged().__enter__(),
    "state_dict()": lambda optimizer: optimizer.state_dict(),
    "load_state_dict()": lambda optimizer: optimizer.load_state_dict({"state": {}, "param_groups": []}),
    "load_master()": lambda optimizer: optimizer.load_master(params_of(optimizer)),
    "a copy of the optimizer": copy.deepcopy,
    "a copy of the optimizer ": pickle.dumps,
}


@pytest.mark.parametrize("what", INSIDE)
def test_what_needs_the_parameters_is_refused_meanwhile(what: str, backend: str) -> None:
    optimizer = go_on(made(backend=backend), range(2))
    before = snapshot(optimizer)
    with optimizer.averaged():
        shown = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=re.escape(what.strip()) + " within `with optimizer.averaged"):
            INSIDE[what](optimizer)
        assert same_bits(shown, snapshot(optimizer))
    assert same_bits(before, snapshot(optimizer))
    go_on(optimizer, range(2, 3))


def test_averages_that_nobody_keeps_are_refused_with_the_remedy() -> None:
    optimizer = go_on(made(average=None), range(1))
    with pytest.raises(RuntimeError, match=r"no parameter group keeps averages: give FusedAdamW average=EMA\(decay"):
        optimizer.averaged().__enter__()
    model = torch.nn.ParameterList(params_of(optimizer))
    for method in (optimizer.load_average, optimizer.store_average):
        with pytest.raises(RuntimeError, match="no parameter group keeps averages"):
            method(model, AveragedModel(model))
    go_on(optimizer, range(1, 2))


# In checkpoints.


@modes
@kinds
@pytest.mark.parametrize("compact", [False, True], ids=["", "compact"])
def test_a_resumed_run_has_the_same_bits(name: str, average: Any, compact: bool) -> None:
    first = go_on(made(name, average), range(4))
    saved = through_a_file(first.state_dict(compact=compact))
    for index, param in enumerate(params_of(first)):
        stored = saved["state"][index]["average"]
        assert stored.shape == param.shape
        assert stored.dtype == (average_of(first, param).dtype if compact else torch.float32)
    second = made(name, average)
    for mine, theirs in zip(params_of(second), params_of(first), strict=True):
        mine.data.copy_(theirs.data)
    second.load_state_dict(saved)
    assert same_bits(snapshot(first), snapshot(second))
    assert same_bits(snapshot(go_on(first, range(4, 7))), snapshot(go_on(second, range(4, 7))))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
@kinds
def test_copies_go_on_alike(average: Any, way: Any) -> None:
    first = go_on(made(average=average), range(3))
    second = way(first)
    assert saved_average(second.param_groups[0]["average"]) == saved_average(average)
    assert same_bits(snapshot(go_on(first, range(3, 5))), snapshot(go_on(second, range(3, 5))))


@pytest.mark.filterwarnings("ignore:the loaded state dict has no count of the clock")  # nor has torch's
@kinds
def test_torch_loads_what_is_saved_and_the_other_way_about(average: Any) -> None:
    first = go_on(made(average=average), range(3))
    theirs = torch.optim.AdamW(make_params(SHAPES), lr=0.1)
    theirs.load_state_dict(through_a_file(first.state_dict()))
    for mine, other in zip(params_of(first), params_of(theirs), strict=True):
        assert torch.equal(first.state[mine]["exp_avg"], theirs.state[other]["exp_avg"])
    back = made(average=average)
    plain = torch.optim.AdamW(params_of(back), lr=0.1)
    for param in params_of(back):
        param.grad = torch.ones_like(param)
    plain.step()
    back.load_state_dict(plain.state_dict())
    for param in params_of(back):  # which has none, so that it begins as the parameter is
        assert torch.equal(average_of(back, param), param.detach().to(average_of(back, param).dtype))


def test_a_checkpoint_says_where_no_averages_are_kept() -> None:
    saved = go_on(made(average=None), range(1)).state_dict()
    assert saved["param_groups"][0]["average"] is None  # torch.distributed.checkpoint asks for every key of a group
    assert "average" not in saved["state"][0]


def test_averages_that_do_not_go_on_as_they_were_are_said() -> None:
    saved = go_on(made(average=EMA(0.9)), range(2)).state_dict()
    with pytest.warns(
        UserWarning, match=r"averages its parameters by EMA\(decay=0.5.*, and the checkpoint did by EMA"
    ):
        made(average=EMA(0.5)).load_state_dict(saved)
    without = made(average=None)
    with pytest.warns(UserWarning, match="which keeps none here: they are left out. Give the constructor"):
        without.load_state_dict(saved)
    assert "average" not in without.state[params_of(without)[0]]
    wrong = copy.deepcopy(saved)
    wrong["state"][0]["average"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"average must be of shape \(16514,\), got \(3,\)"):
        made(average=EMA(0.9)).load_state_dict(wrong)


# In every kind of loop.


@kinds
def test_a_captured_step_averages_and_shows_its_averages(average: Any, graphs: Graphs) -> None:
    def run(captured: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Linear(7, 3)
        optimizer = FusedAdamW(model.parameters(), lr=0.1, average=average, backend=NAME)

        def train_step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        step = capture_train_step(train_step, optimizer) if captured else train_step
        found = []
        for index in range(9):
            step(torch.randn(4, 7, generator=torch.Generator().manual_seed(index)))
            if index in (1, 6):
                with optimizer.averaged():
                    found += [param.detach().clone() for param in model.parameters()]
                    if captured and index == 6:
                        with pytest.raises(RuntimeError, match="a captured step within"):
                            step(torch.randn(4, 7))
        return [*found, *snapshot(optimizer)]

    assert same_bits(run(False), run(True))
    assert "replay" in graphs.events


@kinds
def test_updates_in_the_backward_pass_average_alike(average: Any, backend: str) -> None:
    def run(in_backward: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(80, 70), torch.nn.Linear(70, 3))
        optimizer = FusedAdamW(model.parameters(), lr=0.1, average=average, backend=backend)
        handle = step_in_backward(model, optimizer) if in_backward else None
        for _ in range(5):
            model(torch.ones(2, 80)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        with optimizer.averaged():
            if handle is not None:
                with pytest.raises(RuntimeError, match="a backward pass that updates within"):
                    model(torch.ones(2, 80)).sum().backward()
        if handle is not None:
            handle.remove()
        return snapshot(optimizer)

    assert same_bits(run(False), run(True))


def test_a_grad_scaler_skips_and_unscales(backend: str) -> None:
    param = make_params([(300,)])[0]
    twin = torch.nn.Parameter(param.detach().clone())
    swa = AveragedModel(torch.nn.ParameterList([twin]), multi_avg_fn=get_ema_multi_avg_fn(0.75))
    ours = FusedAdamW([param], lr=0.1, average=EMA(0.75), backend=backend)
    theirs = torch.optim.AdamW([twin], lr=0.1, foreach=False)
    for each, optimizer in ((param, ours), (twin, theirs)):
        scaler = torch.amp.GradScaler(each.device.type, init_scale=8.0)
        for step in range(8):
            scale = torch.inf if step in (0, 3) else 1.0
            generator = torch.Generator(each.device).manual_seed(step)
            optimizer.zero_grad()
            factors = torch.randn(300, generator=generator, device=each.device)
            scaler.scale((each * factors).sum() * scale).backward()
            scaler.step(optimizer)
            scaler.update()
            if optimizer is theirs and scale == 1.0:
                swa.update_parameters(torch.nn.ParameterList([twin]))
    expected = next(swa.module.parameters()).detach()
    torch.testing.assert_close(ours.state[param]["average"], expected, rtol=1e-5, atol=1e-6)


# Exchanged with torch's AveragedModel.


@pytest.mark.parametrize("average", [EMA(0.75), Mean(), Mean(start=2)], ids=str)
def test_an_averaged_model_goes_on_and_comes_back(average: Any, backend: str) -> None:
    optimizer = made(average=average, backend=backend)
    model = torch.nn.ParameterList(params_of(optimizer))
    swa = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75) if isinstance(average, EMA) else None)
    go_on(optimizer, range(4))
    optimizer.store_average(model, swa)
    assert int(swa.n_averaged) == 4 - getattr(average, "start", 0)
    for mine, theirs in zip(model, swa.module.parameters(), strict=True):
        assert torch.equal(average_of(optimizer, mine), theirs.detach())
    for step in range(4, 7):  # both go on
        go_on(optimizer, range(step, step + 1))
        swa.update_parameters(model)
    for mine, theirs in zip(model, swa.module.parameters(), strict=True):
        torch.testing.assert_close(average_of(optimizer, mine), theirs.detach(), rtol=1e-6, atol=1e-6)
    optimizer.load_average(model, swa)  # and the optimizer takes over
    assert optimizer.param_groups[0]["average"] == average
    for mine, theirs in zip(model, swa.module.parameters(), strict=True):
        assert torch.equal(average_of(optimizer, mine), theirs.detach())


def test_a_mean_goes_on_with_the_count_of_an_averaged_model(backend: str) -> None:
    optimizer = go_on(made(average=Mean(), backend=backend), range(5))
    model = torch.nn.ParameterList(params_of(optimizer))
    swa = AveragedModel(model)
    swa.n_averaged.fill_(2)
    optimizer.load_average(model, swa)
    assert optimizer.param_groups[0]["average"] == Mean(start=3)
    for step in range(5, 8):
        go_on(optimizer, range(step, step + 1))
        swa.update_parameters(model)
    for mine, theirs in zip(model, swa.module.parameters(), strict=True):
        torch.testing.assert_close(average_of(optimizer, mine), theirs.detach(), rtol=1e-6, atol=1e-6)
    swa.n_averaged.fill_(99)
    with pytest.raises(ValueError, match="n_averaged=99, and this optimizer has made 8 updates"):
        optimizer.load_average(model, swa)


def test_an_exchange_that_does_not_fit_is_refused() -> None:
    optimizer = made()
    model = torch.nn.ParameterList(params_of(optimizer))
    with pytest.raises(RuntimeError, match="parameter 0 of group 0 has no average yet, as it has made no update"):
        optimizer.load_average(model, AveragedModel(model))
    go_on(optimizer, range(2))
    before = snapshot(optimizer)
    for other, error, message in [
        (model, TypeError, "averaged must be a torch.optim.swa_utils.AveragedModel"),
        (AveragedModel(torch.nn.ParameterList(make_params(SHAPES[:2]))), ValueError, "averaged is of another model"),
        (AveragedModel(torch.nn.ParameterList(make_params([*SHAPES[:2], (3,)]))), ValueError, "differ in '2'"),
    ]:
        with pytest.raises(error, match=message):
            optimizer.load_average(model, other)
    stranger = torch.nn.ParameterList(make_params(SHAPES))
    with pytest.raises(ValueError, match="no parameter of model has an average here"):
        optimizer.load_average(stranger, AveragedModel(stranger))
    assert same_bits(before, snapshot(optimizer))


def test_nothing_that_trains_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = go_on(made(average=Mean(start=2)), range(2))

    def refuse(*_: Any) -> None:
        raise AssertionError("a number was read from the device")

    for name in ("item", "__float__", "__int__", "__bool__", "tolist", "cpu"):
        monkeypatch.setattr(Tensor, name, refuse)
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param)
    optimizer.step()
    with optimizer.averaged():
        pass
