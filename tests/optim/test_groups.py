"""What groups are made of: iterators, the groups of another optimizer, settings that do not belong there."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from references import make_params
from side_by_side import Make, param, params_of, same_of_both, train

import nexus
from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Constant
from nexus.training.schedulers import WSDScheduler


def test_params_given_as_an_iterator_may_be_used_by_who_gave_them() -> None:
    group: dict[str, Any] = {"params": (each for each in [param(2), param(3)])}
    FusedAdamW([group], lr=0.1)
    assert len(list(group["params"])) == 2
    optimizer = FusedAdamW([param(2), param(3)])
    optimizer.param_groups[0]["params"] = iter(params_of(optimizer))
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 2


@same_of_both
def test_a_group_of_one_optimizer_is_that_group_in_another(make: Make) -> object:
    """As horovod's and ignite's wrappers make theirs, under a scheduler that was made before."""
    first = make([param(3)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(first, 1, gamma=0.5)
    second = make(first.param_groups)
    first.step()
    for _ in range(3):
        train(second, 1)
        scheduler.step()
    assert second.param_groups[0]["lr"] == pytest.approx(0.0125)
    return second


def test_no_lr_scale_is_ignored(backend: str) -> None:
    groups = [{"params": make_params([(2,)]), "lr_scale": 0.5}, {"params": make_params([(2,)])}]
    optimizer = FusedAdamW(groups, lr=0.1, backend=backend)
    with pytest.raises(ValueError, match=r"lr_scale=0\.5, which multiplies schedules, and the rate is 0\.1"):
        train(optimizer, 1)
    assert not optimizer.state
    WSDScheduler(optimizer, warmup_steps=2, stable_steps=5, decay_steps=5, peak_lr=1e-2)
    train(optimizer, 1)  # which multiplies, too
    optimizer = FusedAdamW([{**group, "params": make_params([(2,)])} for group in groups], lr=Constant(0.1))
    train(optimizer, 1)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.05, 0.1]
    optimizer.param_groups[0].update(lr=0.1, lr_schedule=None)
    with pytest.raises(ValueError, match="which multiplies schedules"):
        train(optimizer, 1)
    del optimizer.param_groups[0]["lr_scale"]
    train(optimizer, 1)


def test_reduce_lr_on_plateau_over_a_schedule_is_refused_at_its_first_write() -> None:
    optimizer = FusedAdamW([param(3)], lr=WSD(warmup_steps=2, stable_steps=5, decay_steps=5, peak_lr=0.1))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    for _ in range(3):
        train(optimizer, 1)
        plateau.step(1.0)
    with pytest.raises(RuntimeError, match=r"written in place \(as by ReduceLROnPlateau.*give FusedAdamW a float"):
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


def test_many_groups_cost_no_more_each() -> None:
    """Counted, not timed: the lines of nexus that are run, from the constructor to a state dict."""

    library = os.path.dirname(nexus.__file__)

    def lines_each(count: int) -> float:
        lines = 0

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal lines
            lines += event == "line"
            return trace if frame.f_code.co_filename.startswith(library) else None

        groups, before = [{"params": [param(1)]} for _ in range(count)], sys.gettrace()
        sys.settrace(trace)
        try:
            optimizer = FusedAdamW(groups, lr=Constant(0.1))
            train(optimizer, 1)
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.3
            train(optimizer, 1)
            optimizer.state_dict()
        finally:
            sys.settrace(before)
        return lines / count

    assert lines_each(80) <= lines_each(20)


@pytest.mark.parametrize(
    "write",
    [
        lambda group: group.__setitem__("lr", 0.25),
        lambda group: group.update(lr=0.25),
        lambda group: group.__ior__({"lr": 0.25}),
        lambda group: (group.pop("lr"), group.setdefault("lr", 0.25)),
        lambda group: (group.__delitem__("lr"), group.update({"lr": 0.25})),
        lambda group: (items := {**group, "lr": 0.25}, group.clear(), group.update(items)),
    ],
    ids=["=", "update", "|=", "pop", "del", "clear"],
)
def test_however_a_group_is_written_to_the_next_step_sees_it(write: Any, backend: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = FusedAdamW([weight], lr=0.5, weight_decay=0.0, backend=backend)
    for expected in (-0.5, -1.0, -1.25):
        weight.grad = torch.ones(1)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.full((1,), expected))
        if expected == -1.0:
            write(optimizer.param_groups[0])


def test_an_item_that_is_popped_is_noticed() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = FusedAdamW([weight])
    weight.grad = torch.ones(1)
    optimizer.step()
    optimizer.param_groups[0].popitem()
    with pytest.raises(KeyError):
        optimizer.step()
