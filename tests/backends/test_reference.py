"""The reference: the same bits however tensors are cut, and a plan that stays while nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus.backends import codecs, reference_update
from nexus.optim import EMA, FusedAdamW
from nexus.optim.engine import engine_of
from nexus.schedules import WSD, Linear

SHAPES = [(5,), (7, 3), (1,), (0,), (), (300,), (128, 9), (64,)]
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "amsgrad": {"amsgrad": True, "maximize": True},
    "scheduled": {"lr": WSD(warmup_steps=2, stable_steps=2, decay_steps=3, peak_lr=1e-2), "skip_nonfinite": True},
    "averaged": {"average": EMA(0.9), "betas": (torch.tensor(0.8), torch.tensor(0.99))},
    "8 bit": {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8, "stochastic_rounding": True},
}


def trained(options: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters and state after steps in one of which a gradient is missing, and in one not finite."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    optimizer = FusedAdamW([{"params": params[::2]}, {"params": params[1::2], "eps": 1e-6}], **options)
    for step in range(5):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        if step == 2:
            params[5].grad = None
        if step == 3 and "skip_nonfinite" in options:
            params[0].grad.fill_(torch.inf)
        optimizer.step()
    return [*params, *(value for param in params for value in optimizer.state[param].values())]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in OPTIONS for dtype in DTYPES if (name, dtype) != ("8 bit", torch.float64)],
    ids=str,
)
def test_bits_do_not_depend_on_the_stretches(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS[name], "backend": "reference"}
    whole = trained(options, dtype)
    monkeypatch.setattr(reference_update, "STRETCH", {"cpu": 2 * codecs.SCALE_BLOCK})
    for one, other in zip(whole, trained(options, dtype), strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


def test_the_root_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bits = torch.randint(0, 0x7F800000, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, -1.0, torch.inf, torch.nan])])
    roots = [codecs.root(values)]
    monkeypatch.setattr(codecs, "_numpy", lambda: None)
    roots.append(codecs.root(values))
    assert roots[0].dtype == roots[1].dtype == torch.float32
    assert torch.equal(roots[0].isnan(), roots[1].isnan())
    assert torch.equal(roots[0].nan_to_num(), roots[1].nan_to_num())
    assert torch.equal(roots[0][:-5].double(), values[:-5].double().sqrt().float().double())


def edit_count(optimizer: FusedAdamW, kept: dict[str, Any]) -> None:
    kept["step"].fill_(7.0)


def share_moment(optimizer: FusedAdamW, kept: dict[str, Any]) -> None:
    kept["exp_avg"].data = kept["exp_avg"].clone()


def move_parameter(optimizer: FusedAdamW, kept: dict[str, Any]) -> None:
    optimizer.param_groups[0]["params"][0].data = torch.zeros(5)


def transpose_gradient(optimizer: FusedAdamW, kept: dict[str, Any]) -> None:
    optimizer.param_groups[0]["params"][1].grad = torch.ones(3, 4).t()


CHANGES: list[Callable[[FusedAdamW, dict[str, Any]], None]] = [
    edit_count,
    share_moment,
    move_parameter,
    transpose_gradient,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_plan_stays_until_something_changes(
    change: Callable[[FusedAdamW, dict[str, Any]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(4, 3))]
    optimizer = FusedAdamW(params, lr=0.1, max_grad_norm=1.0, backend="reference")
    engine = engine_of(optimizer)
    made, filled = [], []
    make_plan, fill_settings = engine.make_plan, engine.fill_settings
    monkeypatch.setattr(engine, "make_plan", lambda attributes: made.append(1) or make_plan(attributes))

    monkeypatch.setattr(engine, "fill_settings", lambda *args: filled.append(1) or fill_settings(*args))

    def step() -> None:
        optimizer.zero_grad()
        sum(param.sum() for param in params).backward()
        optimizer.step()

    step()
    kept = optimizer.state[params[0]]
    step()
    made.clear(), filled.clear()
    for rate in (0.5, 0.25, 0.125):  # as a scheduler of torch's
        optimizer.param_groups[0]["lr"] = rate
        before = params[0].detach().clone()
        step()
        assert torch.allclose(before - params[0], torch.full_like(before, rate), rtol=0.1)
    assert not made
    assert not filled
    optimizer.param_groups[0]["weight_decay"] = 0.5
    step()
    assert filled
    assert not made
    count = float(kept["step"])
    change(optimizer, kept)
    optimizer.step()
    assert made
    assert float(kept["step"]) == (8.0 if change is edit_count else count + 1.0)


def test_a_state_of_inference_mode_is_stepped() -> None:
    param = torch.nn.Parameter(torch.zeros(3))
    optimizer = FusedAdamW([param], lr=0.1, backend="reference")
    param.grad = torch.ones(3)
    optimizer.step()
    with torch.inference_mode():
        optimizer.state[param]["step"] = torch.tensor(1.0, dtype=torch.float64)
    for _ in range(2):
        optimizer.step()
    assert float(optimizer.state[param]["step"]) == 3.0


@pytest.mark.parametrize("turns", ["aaabbbxxxx", "abxxx", "xxx1xx"])
def test_tensors_that_differ_in_what_they_have_been_through_are_updated_alike(turns: str) -> None:
    """In one group as in a group each: with gradients in turns, and where a count is changed by hand."""

    def run(grouped: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        a, b = params = [torch.nn.Parameter(torch.randn(7, generator=generator)) for _ in range(2)]
        groups: list[Any] = params if grouped else [{"params": [a]}, {"params": [b]}]
        betas = [Linear(start_lr=low, end_lr=0.9, total_steps=6) for low in (0.1, 0.5)]
        optimizer = FusedAdamW(groups, lr=0.01, betas=betas, backend="reference")
        for turn in turns:
            if turn == "1":
                optimizer.state[b]["step"].fill_(1)
                optimizer.state[b]["beta_products"].fill_(0.25)
                continue
            for name, param in zip("ab", params, strict=True):
                grad = torch.randn(7, generator=generator)
                param.grad = grad if turn in (name, "x") else None
            optimizer.step()
        return [a.detach(), b.detach()]

    assert all(map(torch.equal, run(grouped=True), run(grouped=False)))
