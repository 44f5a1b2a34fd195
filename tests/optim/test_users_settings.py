"""What training code sets in an optimizer's groups: numbers of any library, momenta, and what would be ignored."""

from __future__ import annotations

from collections import UserList
from typing import Any

import numpy
import pytest
import torch
from references import make_params
from side_by_side import Make, assert_same, both, of_this_torch, param, params_of, train
from torch.optim import Optimizer

from nexus.optim import FusedAdamW, checkpoint, engine, fused_adamw
from nexus.optim.engine import devices_of
from nexus.schedules import WSD, Constant, Cosine
from nexus.training.schedulers import WSDScheduler


class ConfigList(list):  # type: ignore[type-arg]
    """As configuration libraries have them."""


BETAS: dict[str, Any] = {
    "a subclass of list": ConfigList([0.9, 0.99]),
    "a sequence": UserList([0.9, 0.99]),
    "an array": numpy.array([0.9, 0.99]),
    "NumPy's numbers": (numpy.float64(0.9), numpy.array(0.99)),
    "a tensor": torch.tensor([0.9, 0.99], dtype=torch.float64),
    "a list": [0.9, 0.99],
}


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_any_sequence_of_two_numbers_is_a_pair_of_betas(betas: Any, backend: str) -> None:
    plain, given, later = (make_params([(3,)], torch.float64) for _ in range(3))
    for own in (given, later):
        own[0].data.copy_(plain[0].data)
    optimizers = [
        torch.optim.AdamW(plain, betas=(0.9, 0.99)),
        FusedAdamW(given, betas=betas, backend=backend),
        FusedAdamW(later, backend=backend),
    ]
    optimizers[2].param_groups[0]["betas"] = betas
    for optimizer in optimizers:
        torch.manual_seed(2)
        train(optimizer)
    for ours in optimizers[1:]:
        assert_same(optimizers[0], ours)
        assert ours.param_groups[0]["betas"] == (0.9, 0.99)


@pytest.mark.parametrize(
    "number", [numpy.float64, numpy.float32, numpy.array, numpy.float16], ids=lambda n: n.__name__
)
def test_any_real_number_is_a_number(number: Any, backend: str) -> None:
    options = {"lr": 0.25, "eps": 2.0**-20, "weight_decay": 0.125, "max_grad_norm": 0.5}
    given = {name: number(value) for name, value in options.items()}
    plain, own, later = (make_params([(3,)], torch.float64) for _ in range(3))
    for each in (own, later):
        each[0].data.copy_(plain[0].data)
    optimizers = [FusedAdamW(plain, **options), FusedAdamW(own, **given, backend=backend)]
    optimizers.append(FusedAdamW(later, max_grad_norm=1.0, backend=backend))
    optimizers[2].param_groups[0].update(given)
    for optimizer in optimizers:
        torch.manual_seed(2)
        train(optimizer)
        group = optimizer.param_groups[0]
        assert all(isinstance(group[name], float) for name in ("eps", "weight_decay", "max_grad_norm"))
    for ours in optimizers[1:]:
        assert_same(optimizers[0], ours)


def test_an_array_that_changes_later_changes_nothing() -> None:
    rate = numpy.array(0.5)
    optimizer = FusedAdamW([param(2)], lr=rate)
    rate[()] = 100.0
    train(optimizer, 1)
    assert float(params_of(optimizer)[0].detach()[0]) == pytest.approx(1 - 0.5 * 0.01 - 0.5)


# Rates.


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parity(
    "Rates and schedulers",
    "`OneCycleLR` and `CyclicLR` with momenta that are tensors, which leave a tensor beside a float in `betas`",
    torch="taken",
    nexus="same: the tensor is read at the next step",
    why="the group keeps a pair of floats, in which no change goes unnoticed",
)
@of_this_torch
def test_momenta_that_are_tensors(scheduler: str) -> None:
    def run(make: Make) -> Optimizer:
        optimizer = make([param(3)], lr=0.1)
        momenta = {"base_momentum": torch.tensor(0.85), "max_momentum": torch.tensor(0.95)}
        own = (
            torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=12, **momenta)
            if scheduler == "OneCycleLR"
            else torch.optim.lr_scheduler.CyclicLR(optimizer, 0.05, 0.2, step_size_up=3, **momenta)
        )
        for _ in range(10):
            train(optimizer, 1)
            own.step()
        return optimizer

    first, second = both(run)
    assert_same(first, second)


def test_no_lr_scale_is_ignored(backend: str) -> None:
    groups = [{"params": make_params([(2,)]), "lr_scale": 0.5}, {"params": make_params([(2,)])}]
    optimizer = FusedAdamW(groups, lr=0.1, backend=backend)
    with pytest.raises(ValueError, match=r"lr_scale=0\.5, which multiplies schedules, and the rate is 0\.1"):
        train(optimizer, 1)
    assert not optimizer.state
    WSDScheduler(optimizer, 2, 5, 5, 1e-2)
    train(optimizer, 1)  # which multiplies, too
    optimizer = FusedAdamW([{**group, "params": make_params([(2,)])} for group in groups], lr=Constant(0.1))
    train(optimizer, 1)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.05, 0.1]
    optimizer.param_groups[0].update(lr=0.1, lr_schedule=None)
    with pytest.raises(ValueError, match="which multiplies schedules"):
        train(optimizer, 1)
    del optimizer.param_groups[0]["lr_scale"]
    train(optimizer, 1)


@pytest.mark.parametrize("name", ["skip_nonfinite", "backend", "norm_group"])
def test_an_option_of_the_optimizer_is_refused_in_a_group(name: str) -> None:
    words = f"{name} is no option of a group, got True .*Give it to FusedAdamW itself"
    with pytest.raises(TypeError, match=words):
        FusedAdamW([{"params": [param(2)], name: True}])
    optimizer = FusedAdamW([param(2)])
    train(optimizer, 2)
    saved = optimizer.state_dict()
    optimizer.param_groups[0][name] = True
    with pytest.raises(TypeError, match=words):
        train(optimizer, 1)
    del optimizer.param_groups[0][name]
    saved["param_groups"][0][name] = True
    with pytest.raises(ValueError, match=f"param_groups.0. of the loaded state dict: {words}"):
        optimizer.load_state_dict(saved)
    train(optimizer, 1)


@pytest.mark.parametrize("schedule", [Cosine(0.1, 20), WSD(2, 5, 5, 0.1)], ids=["cosine", "wsd"])
def test_reduce_lr_on_plateau_over_a_schedule_is_refused_at_its_first_write(schedule: Any, backend: str) -> None:
    optimizer = FusedAdamW(make_params([(3,)]), lr=schedule, backend=backend)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    for _ in range(2):
        train(optimizer, 1)
        plateau.step(1.0)
    train(optimizer, 1)
    plateau.step(1.0)
    with pytest.raises(RuntimeError, match=r"written in place \(as by ReduceLROnPlateau.*give FusedAdamW a float"):
        train(optimizer, 1)
    optimizer.param_groups[0]["lr_schedule"] = None
    reduced = float(optimizer.param_groups[0]["lr"])
    train(optimizer, 1)
    assert float(optimizer.param_groups[0]["lr"]) == reduced == pytest.approx(0.1 * schedule(2), rel=1e-6)


@pytest.mark.parametrize("count", [50, 200])
def test_many_groups_cost_no_more_each(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: how often the parameters of all groups are gone through."""
    seen: list[int] = []
    for module in (engine, fused_adamw, checkpoint):
        monkeypatch.setattr(module, "devices_of", lambda attributes: (seen.append(1), devices_of(attributes))[1])
    groups = [{"params": [param(1)]} for _ in range(count)]
    optimizer = FusedAdamW(groups, lr=Constant(0.1))
    train(optimizer, 1)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.3
    train(optimizer, 1)
    optimizer.state_dict()
    assert len(seen) < 20
