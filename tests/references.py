"""Float64 torch as the reference of every update, and the one table of tolerances.

A comparison is never re-synchronised: both sides run all steps from the same start and see the same gradients.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import Schedule

# On the CPU. "torch" has roundings of its own; the last is the CUDA backend, see cuda_on_cpu.py.
BACKENDS = ("native", "torch", "reference", "cuda on cpu")
GPU_BACKENDS = ("cuda", "triton")
EVERY_BACKEND = [*BACKENDS, *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_BACKENDS)]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


LAYOUT_SHAPE = (4, 3, 2, 5)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "sliced": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "every other": lambda x: torch.stack([x, x], dim=-1)[..., 0],
    "offset": lambda x: torch.cat([torch.zeros(3, dtype=x.dtype), x.flatten()])[3:].view(x.shape),
    "as_strided": lambda x: torch.cat([x.flatten(), x.flatten()]).as_strided(x.shape, (30, 10, 5, 1), 120),
}


@contextlib.contextmanager
def tensors_where_it_runs(backend: str) -> Iterator[None]:
    """Lets tensors be made on the GPU for a backend that runs there, and for "gpu"."""
    if backend not in ("gpu", *GPU_BACKENDS):
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@dataclass(frozen=True)
class Tolerance:
    """Largest allowed |difference|: `rtol` of the expected element plus `atol`, where all values are about 1.

    `unequal` is the share of elements that need not be exactly equal.
    """

    rtol: float
    atol: float
    unequal: float = 1.0


# Measured: the largest |difference| that the tests of this folder see, in values of about 1.
PARAMS = {
    # The same formula in another order: roundings of 2**-53. Measured: 7e-15.
    torch.float64: Tolerance(rtol=5e-15, atol=1e-14),
    # A rounding of 2**-24 a step. Measured: 5e-7; where an update is an ill-conditioned quotient of 300, 2e-7 of it.
    torch.float32: Tolerance(rtol=5e-7, atol=1e-6),
    # The reference rounds its parameters to this type after every step. Where float32 and float64 come to lie on
    # two sides of the middle between two values, both go on one unit in the last place apart: 2**-8 and 2**-11
    # below 1. Measured: one unit, in a share of 1e-3 of the elements.
    torch.bfloat16: Tolerance(rtol=2**-7, atol=2**-8, unequal=3e-3),
    torch.float16: Tolerance(rtol=2**-10, atol=2**-11, unequal=3e-3),
}
# Of the backend "torch", whose kernel multiplies a parameter by 1 - lr * weight_decay in every step.
PARAMS_OF_TORCH = {
    torch.float64: PARAMS[torch.float64],
    # That factor is rounded to float32, the same way in every step. Measured: 1.8e-6 of the value and 1 more.
    torch.float32: Tolerance(rtol=3e-6, atol=3e-6),
    # As above, but a parameter that went on one unit apart may do so twice. Measured: shares of 1e-3 and 2.3e-3.
    # Two units are 2**-6 and 2**-9 of a value just above a power of 2: fuzz.py --seed 81570 has such.
    torch.bfloat16: Tolerance(rtol=2**-6, atol=2**-7, unequal=5e-3),
    torch.float16: Tolerance(rtol=2**-9, atol=2**-10, unequal=5e-3),
}
# Of moments, which do not depend on the parameters, and are float32 for half precision.
MOMENT = {
    # Measured: 4e-16.
    torch.float64: Tolerance(rtol=1e-15, atol=1e-15),
    # Measured: 3e-7.
    torch.float32: Tolerance(rtol=5e-7, atol=5e-7),
}


def params_tolerance(backend: str, dtype: torch.dtype) -> Tolerance:
    return (PARAMS_OF_TORCH if backend == "torch" else PARAMS)[dtype]


def norm_rtol(backend: str, exact: float = 1e-12) -> float:
    """Of the norm of all gradients: `exact`, but where "torch" sums stretches in float32. Measured: 2e-6."""
    return 5e-6 if backend == "torch" else exact


def moment_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_close(actual: Tensor, expected: Tensor, tolerance: Tolerance, what: str = "") -> None:
    """Compare in float64; NaNs and infinities have to be at the same places."""
    actual, expected = actual.detach().double(), expected.detach().double()
    options = {"rtol": tolerance.rtol, "atol": tolerance.atol, "equal_nan": True}
    torch.testing.assert_close(actual, expected, **options, msg=lambda text: f"{what}: {text}")


class Float64AdamW:
    """`torch.optim.AdamW(foreach=False, fused=False)` in float64, with `LambdaLR` and `clip_grad_norm_`.

    Args:
        groups: dicts as for an optimizer; `"params"` are tensors, whose values are copied. `"lr"` and
            `"weight_decay"` may be schedules, and `"lr_scale"` multiplies the former.
        max_grad_norm: as for `FusedAdamW`.
        options: for torch's optimizer.
    """

    def __init__(
        self,
        groups: Sequence[Tensor] | Sequence[dict[str, Any]],
        *,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        if not groups or isinstance(groups[0], Tensor):
            groups = [{"params": list(groups)}]
        settings = [{"lr": 1e-3, "weight_decay": 1e-2, "lr_scale": 1.0, **options, **group} for group in groups]
        self.max_grad_norm = max_grad_norm
        self.completed = 0
        self.grad_norm = torch.zeros((), dtype=torch.float64)
        self.dtypes = [param.dtype for group in settings for param in group["params"]]
        self.decays = [group["weight_decay"] for group in settings]
        rates = [_factor(group["lr"], group.pop("lr_scale")) for group in settings]
        scheduled = any(isinstance(group["lr"], Schedule) for group in settings)
        for group in settings:
            group["params"] = [torch.nn.Parameter(param.detach().double().clone()) for param in group["params"]]
            for name in ("lr", "weight_decay"):
                group[name] = 1.0 if isinstance(group[name], Schedule) else group[name]
        self.optimizer = torch.optim.AdamW(settings, foreach=False, fused=False)
        self.params = params_of(self.optimizer)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rates) if scheduled else None

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = None if grad is None else grad.detach().double().clone()
        if self.max_grad_norm is not None:
            self.grad_norm = torch.nn.utils.clip_grad_norm_(self.params, self.max_grad_norm, foreach=False)
        for group, decay in zip(self.optimizer.param_groups, self.decays, strict=True):
            if isinstance(decay, Schedule):
                group["weight_decay"] = decay(self.completed)
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.completed += 1
        with torch.no_grad():
            for param, dtype in zip(self.params, self.dtypes, strict=True):
                param.copy_(param.to(dtype))

    def state(self, index: int) -> dict[str, Tensor]:
        return self.optimizer.state.get(self.params[index], {})


def _factor(rate: Any, scale: float) -> Callable[[int], float]:
    """What `LambdaLR` is to multiply: a schedule's factor is its rate, of 1."""
    return lambda step: scale * rate(step) if isinstance(rate, Schedule) else 1.0


def params_of(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def assert_same_run(optimizer: FusedAdamW, reference: Float64AdamW, what: str = "") -> None:
    """Compare every parameter, moment and counter."""
    params = params_of(optimizer)
    assert len(params) == len(reference.params)
    for index, param in enumerate(params):
        assert_same_parameter(optimizer, param, reference, index, what)


def assert_same_parameter(
    optimizer: FusedAdamW, param: Tensor, reference: Float64AdamW, index: int, what: str = ""
) -> None:
    where = f"{what} parameter {index} {tuple(param.shape)} {param.dtype}"
    expected = reference.params[index]
    tolerance = params_tolerance(optimizer.backend, param.dtype)
    assert_close(param, expected, tolerance, where)
    unequal = int((param.double() != expected).sum())
    assert unequal <= max(2, tolerance.unequal * param.numel()), f"{where}: {unequal} differ"
    state, expected_state = optimizer.state.get(param, {}), reference.state(index)
    assert set(state) - {"beta_products"} == set(expected_state), where
    for name in MOMENTS:
        if name in state:
            assert state[name].dtype == moment_dtype(param.dtype), where
            assert_close(state[name], expected_state[name], MOMENT[state[name].dtype], f"{where} {name}")
    if "step" in state:
        assert state["step"].dtype == torch.float64
        assert int(state["step"]) == int(expected_state["step"]), where


def make_params(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Parameters of about 1."""
    return [torch.nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


def copies(params: Sequence[Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def make_grads(params: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Gradients of about 1 that mostly point one way, so that every parameter moves far."""
    return [(torch.randn(param.shape) * 0.5 + 0.5).to(param.device, dtype or param.dtype) for param in params]


def set_grads(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """As `backward` would leave them; of another dtype than the parameter's where they are."""
    for param, grad in zip(params, grads, strict=True):
        if grad is not None and grad.dtype != getattr(param, "grad_dtype", param.dtype):
            param.grad = None
            param.grad_dtype = grad.dtype
        param.grad = grad


def step_both(
    optimizer: FusedAdamW, reference: Float64AdamW, steps: int = 3, grads: Sequence[Tensor | None] | None = None
) -> None:
    """Some steps of both, on the same gradients: those that are given, or random ones."""
    params = params_of(optimizer)
    for _ in range(steps):
        given = make_grads(params) if grads is None else grads
        set_grads(params, given)
        reference.step(given)
        optimizer.step()


def backward_both(optimizer: FusedAdamW, reference: Float64AdamW, loss: Callable[[], Tensor], steps: int = 3) -> None:
    """Some steps of both, on the gradients of a loss."""
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        reference.step([param.grad for param in params_of(optimizer)])
        optimizer.step()


def run_beside_torch(
    params: Sequence[Tensor] | Sequence[dict[str, Any]], backend: str, steps: int = 3, **options: Any
) -> tuple[FusedAdamW, Float64AdamW]:
    """An optimizer over `params` themselves, or groups of them, and the reference, after some steps."""
    options = {"lr": 1e-2, **options}
    reference = Float64AdamW(params, **options)
    optimizer = FusedAdamW(params, backend=backend, **options)
    step_both(optimizer, reference, steps=steps)
    return optimizer, reference


def through_a_file(saved: Any, weights_only: bool = True) -> Any:
    """Written and read, as torch reads by default: plain types and tensors alone."""
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def bits(tensor: Tensor) -> Tensor:
    """The memory of a tensor as integers: equal bits, not equal values."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def snapshot(optimizer: FusedAdamW) -> list[Tensor]:
    """Copies of every parameter and all its state."""
    found = []
    for param in params_of(optimizer):
        values = (param.detach(), *optimizer.state.get(param, {}).values())
        found += [value.clone() for value in values if isinstance(value, Tensor)]
    return found


def same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        for a, b in zip(first, second, strict=True)
    )
