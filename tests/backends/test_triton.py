"""The Triton backend against float64 torch: on the CPU by Triton's interpreter, and on a GPU where there is one.

The interpreter takes about ten milliseconds a tensor and step, so models here are small, and hold many dtypes at
once; a chunk and a block of elements are made small too where what matters is how tensors are divided.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import OPTIONS
from references import (
    LAYOUT_SHAPE,
    LAYOUTS,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    params_of,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from schedule_cases import WHOLE, boundaries

pytest.importorskip("triton")
from triton_cases import COMMON, DTYPES, STEPS, run

from nexus.backends import triton as backend
from nexus.backends import triton_tables
from nexus.backends.triton_tables import CHUNK_ELEMENTS
from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant, Cosine, evaluate

pytestmark = pytest.mark.usefixtures("where_triton_runs")
SIZES = [(), (0,), (1,), (7,), (CHUNK_ELEMENTS - 1,), (CHUNK_ELEMENTS,), (CHUNK_ELEMENTS + 1,), (0, 5), (13, 17)]
BLOCK, CHUNK = 64, 256  # where tensors are divided small
DIVIDED = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 67, 1009]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 256 elements, in blocks of 64."""
    monkeypatch.setattr(triton_tables, "CHUNK_ELEMENTS", CHUNK)
    monkeypatch.setattr(backend, "block_elements", lambda param, grad: BLOCK)


# The update.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_size_equals_torch(dtype: torch.dtype) -> None:
    run(make_params(SIZES, dtype))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_every_division_of_a_tensor_equals_torch(dtypes: tuple[torch.dtype, ...], offset: int) -> None:
    dtype, grad_dtype = dtypes
    params = [torch.nn.Parameter(torch.randn(size + offset).to(dtype)[offset:].detach()) for size in DIVIDED]
    assert all((param.data_ptr() % 16 == 0) == (offset == 0) for param in params[1:])
    run(params, [grad_dtype] * len(params), max_grad_norm=1.0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_every_option_equals_torch(options: dict[str, Any]) -> None:
    params = [param for dtype, _ in COMMON for param in make_params([(2, 3, 5)], dtype)]
    run(params, [grad for _, grad in COMMON], **options)


def test_every_pair_of_dtypes_in_one_optimizer_equals_torch() -> None:
    pairs = [(dtype, grad) for dtype in (torch.float32, torch.float64) for grad in DTYPES]
    pairs += [pair for pair in COMMON if pair not in pairs]
    params = [param for dtype, _ in pairs for param in make_params([(33,)], dtype)]
    run(params, [grad for _, grad in pairs], max_grad_norm=1.0)


def test_no_difference_from_the_compiled_backend(where_triton_runs: str) -> None:
    options: dict[str, Any] = {
        "lr": WSD(warmup_steps=3, stable_steps=4, decay_steps=20, peak_lr=1e-2),
        "amsgrad": True,
        "weight_decay": 0.1,
    }
    with torch.device("cpu"):
        params = [param for dtype in DTYPES for param in make_params([(1000,)], dtype)]
        native = FusedAdamW(params, backend="native", **options)
        own = FusedAdamW([p.detach().clone().to(where_triton_runs) for p in params], backend="triton", **options)
        for _ in range(STEPS):
            grads = make_grads(params)
            set_grads(params, grads)
            set_grads(params_of(own), [grad.to(where_triton_runs) for grad in grads])
            native.step()
            own.step()
    # beta**t may differ in the last bit of float64, which float32 mostly does not see: in the interpreter, never.
    for mine, expected in zip(snapshot(own), snapshot(native), strict=True):
        if mine.dtype != torch.float64:
            unequal = float((mine.cpu() != expected).double().mean())
            assert unequal <= (0.0 if where_triton_runs == "cpu" else 1e-2)


def test_the_comparison_notices_a_kernel_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend._DeviceStep, "update", lambda self, *_: None)
    with pytest.raises(AssertionError, match="parameter 0"):
        run(make_params([(7,)]))


@pytest.mark.parametrize("layouts", [("transposed", "contiguous"), ("sliced", "offset"), ("channels_last",) * 2])
def test_layouts_that_differ_equal_torch(layouts: tuple[str, str]) -> None:
    of_param, of_grad = (LAYOUTS[name] for name in layouts)
    params = [torch.nn.Parameter(of_param(make_params([LAYOUT_SHAPE])[0].detach()))]
    optimizer, reference = run_beside_torch(params, "triton", steps=0)
    for _ in range(4):
        step_both(optimizer, reference, steps=1, grads=[of_grad(grad) for grad in make_grads(params)])
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_infinite_parameters_and_gradients_that_are_not_finite(value: float, options: dict[str, Any]) -> None:
    params = make_params([(40,), (4,)])
    with torch.no_grad():
        params[0][:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    optimizer, reference = run_beside_torch(params, "triton", steps=0, **options)
    for _ in range(2):
        grads = make_grads(params)
        grads[0][5] = value
        step_both(optimizer, reference, steps=1, grads=grads)
    step_both(optimizer, reference, steps=2)
    assert_same_run(optimizer, reference)


# The evaluator.


@pytest.mark.parametrize(
    "schedule",
    [
        *WHOLE,
        WSD(warmup_steps=10**6, stable_steps=2**40, decay_steps=10**12, peak_lr=1.0, min_lr=0.1, decay_type="sqrt"),
    ],
    ids=repr,
)
def test_rates_equal_the_oracle(schedule: Any) -> None:
    steps = [*range(1000), *boundaries(schedule)]
    oracle = torch.tensor([schedule(step) for step in steps], dtype=torch.float64)
    values = evaluate(schedule, torch.tensor(steps), backend="triton")
    # The cosine of a GPU may be another in its last bit, which the weight has twice.
    assert float((values - oracle).abs().max()) <= float(oracle.max()) * 2**-51
    assert torch.equal(values.float(), oracle.float())


@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 0)])
def test_the_result_has_the_shape_of_the_steps(shape: tuple[int, ...]) -> None:
    values = evaluate(Cosine(peak_lr=1.0, total_steps=10), torch.ones(shape, dtype=torch.int64), backend="triton")
    assert values.dtype == torch.float64
    assert values.shape == shape
    assert (values == Cosine(peak_lr=1.0, total_steps=10)(1)).all()


def test_steps_of_any_layout() -> None:
    steps = torch.arange(20).reshape(4, 5).t()[::2]
    values = evaluate(Constant(0.5), steps, backend="triton")
    assert values.tolist() == [[0.5] * 4] * 3


# The norm.


@pytest.mark.usefixtures("small_pieces")
def test_the_norms_bits_depend_on_the_values_alone() -> None:
    params = make_params([(1009,), (3,), (600,)])
    grads = make_grads(params)
    norms = []
    for offset in (0, 0, 1, 3):
        own = copies(params)
        optimizer = FusedAdamW(own, max_grad_norm=1.0, backend="triton")
        set_grads(own, [torch.cat([grad.new_zeros(offset), grad])[offset:] for grad in grads])
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert same_bits(norms[:1] * 3, norms[1:])
    squares = sum(float(grad.double().square().sum()) for grad in grads)
    assert float(norms[0]) == pytest.approx(math.sqrt(squares), rel=1e-14)
