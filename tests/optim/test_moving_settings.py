"""Betas, eps, the limit of the gradient norm and lr_scale that move: tensors and schedules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from references import (
    BACKENDS,
    GPU_BACKENDS,
    MOMENT,
    PARAMS,
    assert_close,
    copies,
    make_grads,
    make_params,
    moment_dtype,
    same_bits,
    set_grads,
    snapshot,
    tensors_where_it_runs,
)
from torch import Tensor

# isort: split
import triton_interpreter  # noqa: F401  # mends it

from nexus.backends import triton
from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant, Cosine, Linear, OneCycle, Schedule, join

SHAPES = [(), (3, 0), (7,), (130, 5)]
STEPS = 24
BETA1 = Linear(start_lr=0.95, end_lr=0.8, total_steps=10)
BETA2 = OneCycle(peak_lr=0.999, total_steps=20, start_factor=0.8, end_factor=0.9, kind="linear")
EPS = Linear(start_lr=1e-2, end_lr=1e-8, total_steps=15)
LIMIT = Linear(start_lr=0.5, end_lr=4.0, total_steps=15)
RATE = WSD(warmup_steps=3, stable_steps=10, decay_steps=8, peak_lr=1e-2, min_lr=1e-3)
SCALE = Cosine(peak_lr=0.7, total_steps=20, min_lr=0.1)


ON_CPU, ON_GPU = [*BACKENDS, "triton"], list(GPU_BACKENDS)
WAYS = [*((name, "cpu") for name in ON_CPU), *((name, "gpu") for name in ON_GPU)]
"""The backends, and where each is to run. On the CPU, Triton is interpreted, which is slow."""


def marks_of(name: str, where: str) -> list[pytest.MarkDecorator]:
    if where == "gpu":
        return [pytest.mark.gpu]
    return [pytest.mark.skipif(name == "triton" and not triton.INTERPRETS, reason="Triton runs on the GPU")]


@pytest.fixture(params=[pytest.param(way, marks=marks_of(*way), id=" on ".join(way)) for way in WAYS])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend. Tensors are made where it runs."""
    name, where = request.param
    with tensors_where_it_runs(where):
        yield name


class Oracle:
    """AdamW in float64, of one group of parameters, whose settings are functions of the count of completed updates.

    Kingma & Ba 2015, arXiv:1412.6980, section 3: the moments' bias is what the weights of all gradients so far lack
    of 1. It sums these weights up, one by one, where an update multiplies betas.
    """

    def __init__(self, params: Sequence[Tensor], **settings: Any) -> None:
        self.dtypes = [param.dtype for param in params]
        self.params = [param.detach().double().clone() for param in params]
        self.settings = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "lr_scale": 1.0} | settings
        self.moments = [[torch.zeros_like(param), torch.zeros_like(param)] for param in self.params]
        self.weights: tuple[list[float], list[float]] = ([], [])  # of each gradient so far, in the two moments
        self.completed = 0

    def now(self, name: str) -> float:
        value = self.settings[name]
        return float(value(self.completed) if isinstance(value, Schedule) else value)

    def step(self, grads: Sequence[Tensor]) -> None:
        grads = [grad.double() for grad in grads]
        if "max_grad_norm" in self.settings:
            norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
            grads = [grad * min(1.0, self.now("max_grad_norm") / (norm + 1e-6)) for grad in grads]
        betas = self.now("beta1"), self.now("beta2")
        for weights, beta in zip(self.weights, betas, strict=True):
            weights[:] = [beta * weight for weight in weights] + [1.0 - beta]
        bias1, bias2 = (math.fsum(weights) for weights in self.weights)
        lr = self.now("lr") * (self.now("lr_scale") if isinstance(self.settings["lr"], Schedule) else 1.0)
        for index, (param, grad, moments) in enumerate(zip(self.params, grads, self.moments, strict=True)):
            moments[0] = betas[0] * moments[0] + (1.0 - betas[0]) * grad
            moments[1] = betas[1] * moments[1] + (1.0 - betas[1]) * grad.square()
            change = (moments[0] / bias1) / ((moments[1] / bias2).sqrt() + self.now("eps"))
            self.params[index] = (param * (1.0 - lr * 0.01) - lr * change).to(self.dtypes[index]).double()
        self.completed += 1


def run_beside_the_oracle(optimizer: FusedAdamW, oracle: Oracle, steps: int = STEPS) -> None:
    params = optimizer.param_groups[0]["params"]
    for _ in range(steps):
        grads = make_grads(params)
        set_grads(params, grads)
        optimizer.step()
        oracle.step(grads)


def assert_same_run(optimizer: FusedAdamW, oracle: Oracle) -> None:
    params = optimizer.param_groups[0]["params"]
    for index, param in enumerate(params):
        assert_close(param, oracle.params[index], PARAMS[param.dtype])
        state = optimizer.state[param]
        for name, moment in zip(("exp_avg", "exp_avg_sq"), oracle.moments[index], strict=True):
            assert_close(state[name], moment, MOMENT[moment_dtype(param.dtype)], name)


CASES: dict[str, dict[str, Any]] = {
    "beta2": {"beta2": BETA2},
    "beta1": {"beta1": BETA1},
    "both betas": {"beta1": BETA1, "beta2": BETA2},
    "a beta of 0": {
        "beta1": Linear(start_lr=0.0, end_lr=0.9, total_steps=10),
        "beta2": Linear(start_lr=0.9, end_lr=0.0, total_steps=10),
    },
    "eps": {"eps": EPS},
    "the limit of the norm": {"max_grad_norm": LIMIT},
    "lr_scale": {"lr": RATE, "lr_scale": SCALE},
    "everything": {
        "lr": RATE,
        "lr_scale": SCALE,
        "beta1": BETA1,
        "beta2": BETA2,
        "eps": EPS,
        "max_grad_norm": LIMIT,
    },
}


def is_slow(name: str) -> bool:
    return name == "triton" and triton.INTERPRETS


WAYS_OF_CASES = [
    pytest.param(way, settings, marks=marks_of(*way), id=f"{' on '.join(way)}-{name}")
    for way in WAYS
    for name, settings in CASES.items()
    if way != ("triton", "cpu") or name in ("everything", "a beta of 0")
]
each_way_and_case = pytest.mark.parametrize(("way", "settings"), WAYS_OF_CASES, indirect=["way"])


def options_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a group that has these settings."""
    options = {name: value for name, value in settings.items() if not name.startswith("beta")}
    return options | {"betas": (settings.get("beta1", 0.9), settings.get("beta2", 0.999))}


def make(params: Sequence[Tensor], backend: str, settings: dict[str, Any], **options: Any) -> FusedAdamW:
    """An optimizer of one group, so that it may have an lr_scale."""
    return FusedAdamW([{"params": params, **options_of({"lr": 1e-2} | settings)}], backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_way_and_case
def test_schedules_equal_the_update_in_float64(way: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    params = make_params(SHAPES, dtype)
    optimizer, oracle = make(params, way, settings), Oracle(params, **settings)
    run_beside_the_oracle(optimizer, oracle)
    assert_same_run(optimizer, oracle)


@each_way_and_case
def test_tensors_are_read_in_every_step(way: str, settings: dict[str, Any]) -> None:
    params = make_params(SHAPES, torch.float64)
    tensors = {name: torch.zeros((1,) if name == "eps" else (), dtype=torch.float64) for name in settings}
    first = {name: schedule(0) for name, schedule in settings.items()}
    for name, tensor in tensors.items():
        tensor.fill_(first[name])
    given = dict(tensors)
    if "lr_scale" in given:
        given["lr"] = settings["lr"]
    for name in ("beta1", "beta2"):
        if not given.keys().isdisjoint({"beta1", "beta2"}):
            given.setdefault(name, torch.tensor({"beta1": 0.9, "beta2": 0.999}[name], dtype=torch.float64))
    optimizer, oracle = make(params, way, given), Oracle(params, **settings)
    for _ in range(STEPS):
        for name, tensor in tensors.items():
            tensor.fill_(settings[name](oracle.completed))
        run_beside_the_oracle(optimizer, oracle, steps=1)
    assert_same_run(optimizer, oracle)


def test_the_bias_after_many_steps_of_one_beta_and_one_of_another(way: str) -> None:
    """1,000 steps at 0.999 leave weights of 0.632 in the moment, whatever one step at 0.9999 adds to them."""
    steps = 30 if is_slow(way) else 1000
    schedule = join([Constant(0.999), Constant(0.9999)], [steps])
    sizes = {}
    for form in ("product", "power"):
        param = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        betas = (0.0, schedule)
        optimizer = FusedAdamW(
            [param], lr=1.0, betas=betas, eps=0.0, weight_decay=0.0, backend=way, bias_correction=form
        )
        param.grad = torch.ones_like(param)
        for _ in range(steps + 1):
            before = param.detach().clone()
            optimizer.step()
        state = optimizer.state[param]
        # The last change is m / sqrt(v / bias2), with m = 1.
        sizes[form] = float(state["exp_avg_sq"] / (1.0 / (before - param.detach())).square())
    assert sizes["product"] == pytest.approx(1.0 - 0.999**steps * 0.9999, rel=1e-9)
    assert sizes["power"] == pytest.approx(1.0 - 0.9999 ** (steps + 1), rel=1e-9)
    if steps == 1000:
        assert list(sizes.values()) == pytest.approx([0.632, 0.095], abs=1e-3)


def test_betas_that_stand_still_keep_no_products(way: str) -> None:
    for settings in ({}, {"eps": EPS}, {"beta2": BETA2, "bias_correction": "power"}):
        params = make_params([(5,)])
        optimizer = make(params, way, settings)
        set_grads(params, make_grads(params))
        optimizer.step()
        assert set(optimizer.state[params[0]]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_constant_schedule_and_a_number_are_the_same_update(way: str) -> None:
    numbers = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "max_grad_norm": 0.5}
    start = make_params(SHAPES)
    runs = []
    for settings in (numbers, {name: Constant(value) for name, value in numbers.items()}):
        params = copies(start)
        optimizer = make(params, way, settings, bias_correction="power")
        torch.manual_seed(1)
        for _ in range(5):
            set_grads(params, make_grads(params))
            optimizer.step()
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_in_fewer_bits_has_the_bits_of_every_backend(dtype: torch.dtype) -> None:
    """The kernels that decode and encode streams; tensors of fewer than 4,096 elements have none of it."""
    start = make_params([(4100,), (3,)], dtype)
    options: dict[str, Any] = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
    if dtype == torch.bfloat16:
        options |= {"master_weight_bits": 24, "stochastic_rounding": True}
    runs = []
    for backend in BACKENDS:
        params = copies(start)
        optimizer = make(params, backend, CASES["everything"], **options)
        torch.manual_seed(1)
        for _ in range(8):
            set_grads(params, make_grads(params))
            optimizer.step()
        assert optimizer.state[params[0]]["beta_products"][2] == 8.0
        runs.append(snapshot(optimizer))
    assert all(same_bits(runs[0], other) for other in runs[1:])
