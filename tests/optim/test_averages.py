"""Averages of the parameters: the same bits as the oracle's, the same numbers as torch's `AveragedModel`."""

from __future__ import annotations

import dataclasses
from typing import Any

import low_memory_oracle as oracle
import numpy as np
import pytest
import torch
from low_memory_cases import MODES, WAYS, optimizer_of
from references import make_grads, make_params, params_of, same_bits, set_grads
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nexus.optim import EMA, FusedAdamW, Mean
from nexus.optim.averages import MeanDecay
from nexus.schedules import Constant, Linear

SHAPES = [(16_384 + 130,), (7,), (0,), (), (67, 65)]
SEED = 0x1234_5678_9ABC_DEF0
SCHEDULE = Linear(start_lr=0.5, end_lr=0.999, total_steps=4)
AVERAGES = {
    "float32": EMA(SCHEDULE),
    "bfloat16": EMA(SCHEDULE, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("name", MODES)
def test_averages_equal_the_oracle(name: str, amsgrad: bool, average: str, way: str) -> None:
    mode = dataclasses.replace(MODES[name], average=AVERAGES[average])
    values = [torch.randn(shape).to(mode.param) for shape in SHAPES]
    ours = [oracle.Parameter(value, mode, ordinal, SEED) for ordinal, value in enumerate(values)]
    params = [torch.nn.Parameter(value.clone()) for value in values]
    optimizer = optimizer_of(way, params, mode, lr=1e-2, amsgrad=amsgrad, seed=SEED)
    for t in range(4):
        grads = [torch.randn(shape).to(mode.param) for shape in SHAPES]
        settings = oracle.Settings(lr=1e-2, amsgrad=amsgrad, average_decay=SCHEDULE(t))
        for parameter, grad in zip(ours, grads, strict=True):
            parameter.step(grad, settings)
        set_grads(params, grads)
        optimizer.step()
    for param, parameter in zip(params, ours, strict=True):
        state = {"param": param, **optimizer.state[param]}
        del state["step"]
        expected = parameter.streams(amsgrad=amsgrad)
        assert set(state) == set(expected)
        for key, stored in expected.items():
            assert not oracle.unequal(oracle.stored_bits(state[key]), stored).any(), key


class Model(torch.nn.Module):
    """Parameters of some shapes."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList(make_params(shapes, dtype))


def averages(optimizer: FusedAdamW) -> list[Tensor]:
    return [optimizer.state[param]["average"] for param in params_of(optimizer)]


def torchs(model: torch.nn.Module, average: EMA | Mean) -> AveragedModel:
    if isinstance(average, Mean):
        return AveragedModel(model)
    assert isinstance(average.decay, float)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(average.decay))


# Where torch's kernel rounds once, or in another order, the averages part by a unit in the last place in a step.
TOLERANCES = {torch.float32: 5e-7, torch.float64: 1e-14}  # and 1 - (1 - 1 / n) is off by 2**-53 of 1


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("average", [EMA(0.9), EMA(0.999), EMA(0.0), Mean(), Mean(start=20)], ids=str)
def test_many_steps_equal_an_averaged_model(backend: str, average: EMA | Mean, dtype: torch.dtype) -> None:
    model = Model([(13, 17), (5_000,), ()], dtype)
    swa = torchs(model, average)
    options: dict[str, Any] = {"lr": SCHEDULE, "max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer = FusedAdamW(model.parameters(), average=average, backend=backend, **options)
    for step in range(120):
        grads = make_grads(params_of(optimizer))
        if step % 10 == 5:
            grads[1][3] = torch.nan
        set_grads(params_of(optimizer), grads)
        optimizer.step()
        if step % 10 != 5 and int(optimizer.state[model.weights[0]]["step"]) > getattr(average, "start", 0):
            swa.update_parameters(model)
    assert int(optimizer.skipped_steps) == 12
    for found, expected in zip(averages(optimizer), swa.module.parameters(), strict=True):
        torch.testing.assert_close(found, expected.detach(), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
        assert found.dtype == dtype


def test_updates_are_the_same_with_and_without_an_average(backend: str) -> None:
    for mode in (MODES["float32"], MODES["bf16 + 8, 8-bit moments by chance"], MODES["bf16 + 16, bf16 moments"]):
        if backend == "torch" and mode == MODES["float32"]:
            continue  # with an average, updated as by the reference; without one, by PyTorch's kernel
        runs = []
        for average in (None, EMA(0.9), EMA(0.9, dtype=torch.bfloat16)):
            torch.manual_seed(0)
            params = make_params(SHAPES, mode.param)
            optimizer = FusedAdamW(params, **{**mode.options(), "average": average}, backend=backend)
            for _ in range(3):
                set_grads(params, make_grads(params))
                optimizer.step()
            states = [
                value for param in params for name, value in optimizer.state[param].items() if name != "average"
            ]
            runs.append([param.detach() for param in params] + states)
        assert same_bits(runs[0], runs[1])
        assert same_bits(runs[0], runs[2])


def test_a_bfloat16_average_follows_where_rounding_to_nearest_stands_still(backend: str) -> None:
    param = torch.nn.Parameter(torch.ones(8_192))
    optimizer = FusedAdamW([param], lr=0.0, average=EMA(0.999, dtype=torch.bfloat16), backend=backend)
    for step in range(1_001):
        param.grad = torch.ones_like(param)
        optimizer.step()
        if step == 0:
            param.data.fill_(1.25)
    average = optimizer.state[param]["average"]
    assert average.dtype == torch.bfloat16
    expected = 1.25 - 0.25 * 0.999**1_000
    # A step of the average is 2**-12 at most, of a unit of 2**-7: the mean of 8,192 is off by 1e-3 at most.
    assert abs(float(average.double().mean()) - expected) < 1e-3
    assert len(average.unique()) > 2


def test_mean_is_a_schedule_of_the_decay() -> None:
    decay = MeanDecay(3)
    assert decay.values(0, 4) == [0.0] * 4
    assert np.allclose([1.0 - decay(3 + n) for n in (1, 2, 999)], [1 / 2, 1 / 3, 1 / 1_000], rtol=1e-12)
    assert (decay.phase(2), decay.phase(3)) == ("copy", "mean")


def test_an_average_that_is_asked_for_in_mid_run_begins_as_the_parameter_is(backend: str) -> None:
    params = make_params([(300, 20), (5,)])
    optimizer = FusedAdamW(params, lr=0.1, backend=backend)
    set_grads(params, make_grads(params))
    optimizer.step()
    before = [param.detach().clone() for param in params]
    optimizer.param_groups[0]["average"] = EMA(0.75)
    set_grads(params, make_grads(params))
    optimizer.step()
    for param, old, average in zip(params, before, averages(optimizer), strict=True):
        torch.testing.assert_close(average, old + 0.25 * (param.detach() - old), rtol=1e-6, atol=1e-7)
    optimizer.param_groups[0]["average"] = None
    optimizer.step()
    assert "average" not in optimizer.state[params[0]]


def test_bytes_are_counted() -> None:
    weight = torch.nn.Parameter(torch.zeros(64, 64))
    assert FusedAdamW([weight]).bytes_per_parameter() == 16
    assert FusedAdamW([weight], average=EMA()).bytes_per_parameter() == 20
    assert FusedAdamW([weight], average=Mean(dtype=torch.bfloat16)).bytes_per_parameter() == 18


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: EMA(1.0), ValueError, "decay must be a number from 0 to less than 1 or a Schedule, got 1.0"),
    (lambda: EMA(-0.1), ValueError, "decay must be a number from 0"),
    (lambda: EMA(True), TypeError, "decay must be a number from 0"),
    (lambda: EMA(Constant(1.5)), ValueError, "decay must be a Schedule of values from 0 to 1, got 1.5 at step 0"),
    (lambda: EMA(Linear(start_lr=0.5, end_lr=2.0, total_steps=10)), ValueError, "got 2.0 at step 10"),
    (lambda: EMA(dtype=torch.float16), ValueError, "dtype of an average must be torch.float32 or torch.bfloat16"),
    (lambda: Mean(start=-1), ValueError, "start must be an int from 0"),
    (lambda: Mean(dtype="bf16"), TypeError, "dtype of an average must be"),
    (lambda: FusedAdamW([torch.zeros(2, requires_grad=True)], average=0.9), TypeError, r"write EMA\(0.9\)"),
    (lambda: FusedAdamW([torch.zeros(2, requires_grad=True)], average=EMA), TypeError, "call it"),
    (
        lambda: FusedAdamW(
            [torch.zeros(2, dtype=torch.float64, requires_grad=True)], average=EMA(0.9, torch.bfloat16)
        ),
        ValueError,
        "is of float64, for which there is no average",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED, ids=[each[2][:30] for each in REFUSED])
def test_what_cannot_be_averaged_is_named(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
