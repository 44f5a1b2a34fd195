"""The update itself, its counts and state: rows of docs/parity.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import MOMENTS, Float64AdamW, copies, make_grads, make_params, moment_dtype, set_grads, step_both
from side_by_side import Make, both, fails, outcomes, param, params_of, same_of_both, state_of, train

THEME = "The update"
DECAYED = 100 * 1e-8 * 1.25  # steps, decay of each, mean of the parameters
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parity(
    "parameters and moments in float64, also with `amsgrad`, `maximize`, without decay, with `eps` large or 0",
    torch="the formula of the docs",
    also=(
        "test_adamw.py::test_every_option_equals_torch",
        "test_training_gpt.py::test_float32_training_follows_float64",
    ),
)
@pytest.mark.parity(
    "a step at `lr=0`",
    torch="changes moments and count, and no parameter",
    also=("test_adamw.py::test_values_at_the_edge_go_where_torchs_go",),
)
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}, {"eps": 1.0}, {"eps": 0.0}, {"lr": 0.0}],
    ids=str,
)
@same_of_both
def test_float64_runs_are_the_same(make: Make, options: dict[str, Any]) -> object:
    own = make_params([(600,), (7, 3), ()], torch.float64)
    start = copies(own)
    optimizer = make(own, **{"lr": 1e-2, **options})
    train(optimizer, steps=20)
    moved = [not torch.equal(each, before) for each, before in zip(own, start, strict=True)]
    assert moved == [options != {"lr": 0.0}] * 3
    assert all(state["step"] == 20 and state["exp_avg"].all() for state in optimizer.state.values())
    return optimizer


@pytest.mark.parity(
    "float32 parameters, compared with a float64 run of 50 steps",
    torch="more than twice the error of `FusedAdamW`",
    nexus="closer",
    why="the decay is subtracted together with the update, and is no factor that is rounded the same in each step",
    also=("test_adamw.py::test_a_small_decay_is_not_lost_to_rounding",),
)
def test_float32_runs_stay_close_to_float64() -> None:
    def off(make: Make) -> float:
        """The largest difference of parameters about 1, whose decay is by a factor close to 1."""
        own, options = make_params([(2000,)]), {"lr": 1e-2, "weight_decay": 0.1}
        optimizer, reference = make(own, **options), Float64AdamW(own, **options)
        step_both(optimizer, reference, steps=50)
        return (own[0].double() - reference.params[0]).abs().max().item()

    first, second = both(off)
    assert second < first / 2
    assert second < 1e-6


@pytest.mark.parity(
    "a decay of 1e-8 a step (`lr=1e-6`) on float32 parameters that their gradients move",
    torch="lost: `1 - 1e-8` is 1 in float32",
    nexus="there, on the average of many parameters",
    why="it is subtracted together with the update",
    also=("test_adamw.py::test_a_small_decay_is_not_lost_to_rounding",),
)
@outcomes(torch=pytest.approx(0.0, abs=0.1 * DECAYED), nexus=pytest.approx(DECAYED, rel=0.1))
def test_a_small_decay(make: Make) -> object:
    own = [torch.nn.Parameter(torch.rand(4096) * 1.5 + 0.5)]
    plain = copies(own)
    pair = make(own, lr=1e-6, weight_decay=0.01), make(plain, lr=1e-6, weight_decay=0.0)
    for _ in range(100):
        own[0].grad = plain[0].grad = torch.randn(4096)
        for optimizer in pair:
            optimizer.step()
    return (plain[0].double() - own[0].double()).mean().item()


@pytest.mark.parity(
    "bfloat16 parameters: the second moment after 2000 steps with a gradient of 0.1",
    torch="less than a third of what it should be: what it would grow by is less than half its last place, and lost",
    nexus="right to a part in 100",
    why="moments of half-precision parameters are float32",
    also=("test_adamw.py::test_every_size_equals_torch",),
)
def test_the_second_moment_of_a_bfloat16_parameter() -> None:
    def second_moment(make: Make) -> float:
        own = param(8, dtype=torch.bfloat16)
        own.grad = torch.full_like(own, 0.1)
        optimizer = make([own])
        for _ in range(2000):
            optimizer.step()
        return state_of(optimizer)["exp_avg_sq"][0].item()

    first, second = both(second_moment)
    expected = 0.1**2 * (1 - 0.999**2000)
    assert first < expected / 3
    assert second == pytest.approx(expected, rel=0.01)


@pytest.mark.parity(
    "parameters of float32, float64, bfloat16 and float16 in one optimizer",
    torch="each is updated in its own type, with one count each",
    nexus="same, with arithmetic and moments in float32 for half precision",
    why="see the rows about bfloat16",
    also=("test_adamw.py::test_every_dtype_in_one_optimizer_equals_torch",),
)
@pytest.mark.parity(
    "Steps and state",
    "dtype of the moments",
    torch="the parameter's: bfloat16 for bfloat16",
    nexus="float32 for half precision, the parameter's otherwise",
    why="in bfloat16 a second moment stands still: `beta2` of 0.999 changes it by less than half its last place",
)
@outcomes(torch=[(dtype,) * 3 for dtype in DTYPES], nexus=[(moment_dtype(dtype),) * 3 for dtype in DTYPES])
def test_all_dtypes_in_one_optimizer(make: Make) -> object:
    own = [param(3, dtype=dtype) for dtype in DTYPES]
    optimizer = make(own, lr=0.25, weight_decay=0.0, eps=0.0, amsgrad=True)
    set_grads(own, [torch.ones_like(each) for each in own])
    optimizer.step()
    assert [each.tolist() for each in own] == [[0.75] * 3] * 4
    assert [int(optimizer.state[each]["step"]) for each in own] == [1] * 4
    return [tuple(optimizer.state[each][name].dtype for name in MOMENTS) for each in own]


@pytest.mark.parity(
    "`clip_grad_norm_` before the step",
    torch="scales the gradients, which the step uses",
    also=("test_gradients.py::test_gradients_of_every_origin",),
)
@same_of_both
def test_clipping_before_the_step(make: Make) -> object:
    optimizer = make(make_params([(3, 4), (5,)], torch.float64), lr=0.1)
    norms = []
    for _ in range(3):
        set_grads(params_of(optimizer), make_grads(params_of(optimizer)))
        norms.append(torch.nn.utils.clip_grad_norm_(params_of(optimizer), 0.5))
        optimizer.step()
    return optimizer, norms


@pytest.mark.parity(
    "Steps and state",
    "when state is made, its names and shapes",
    torch="in the first step with a gradient: `step`, `exp_avg`, `exp_avg_sq`, with `amsgrad` `max_exp_avg_sq`",
)
@pytest.mark.parametrize("amsgrad", [False, True])
@same_of_both
def test_state_is_made_in_the_first_step(make: Make, amsgrad: bool) -> object:
    optimizer = make([param(2, 3), param(4)], amsgrad=amsgrad)
    assert {len(optimizer.state), len(optimizer.state_dict()["state"])} == {0}
    train(optimizer, steps=1)
    states = [state_of(optimizer, index) for index in range(2)]
    assert set(states[0]) == {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())
    return [{name: tuple(value.shape) for name, value in state.items()} for state in states]


@pytest.mark.parity(
    "Steps and state",
    "`torch.set_default_device` and `set_default_dtype`",
    torch="moments are on the device of their parameter and of its dtype, whatever the defaults are",
    also=("test_state.py::test_state_is_made_for_the_parameters_whatever_the_defaults",),
)
@same_of_both
def test_defaults(make: Make) -> object:
    optimizer = make(make_params([(3,)], torch.float64), lr=0.1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        for _ in range(3):
            params_of(optimizer)[0].grad = torch.ones(3, dtype=torch.float64)
            with torch.device("meta"):
                optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    moment = state_of(optimizer)["exp_avg"]
    assert (moment.device.type, moment.dtype) == ("cpu", torch.float64)
    return optimizer


@pytest.mark.parity(
    "Steps and state",
    "`state['step']`",
    torch="a float32 tensor, which sticks at 2**24",
    nexus="a float64 tensor, which goes on",
    why="long runs get there",
    also=("test_counters.py::test_counts_go_on_beyond_what_float32_holds",),
)
@outcomes(torch=(torch.float32, (), 2**24), nexus=(torch.float64, (), 2**24 + 2))
def test_the_count_of_steps(make: Make) -> object:
    optimizer = make([param(3)])
    train(optimizer, steps=1)
    step = state_of(optimizer)["step"]
    step.fill_(2**24 - 1)
    train(optimizer, steps=3)
    return step.dtype, step.shape, int(state_of(optimizer)["step"])


@pytest.mark.parity(
    "Steps and state",
    "`amsgrad` switched on in mid-run",
    torch="`KeyError: 'max_exp_avg_sq'`",
    nexus="taken: the largest second moment is sought from there on",
    why="options of a group may change between steps",
    also=("test_adamw.py::test_amsgrad_switched_while_training",),
)
@outcomes(torch=fails(KeyError, "max_exp_avg_sq"), nexus=(6, True))
def test_amsgrad_is_switched_on(make: Make) -> object:
    optimizer = make([param(3)])
    train(optimizer)
    optimizer.param_groups[0]["amsgrad"] = True
    train(optimizer)
    state = state_of(optimizer)
    return int(state["step"]), bool((state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all())


@pytest.mark.parity(
    "Steps and state",
    "what the user does to parameters and state: `p.data = ...`, `optimizer.state.clear()`, a parameter taken out "
    "of its group",
    torch="the next step goes on from what is there",
    also=(
        "test_layouts.py::test_swapped_storage_is_followed",
        "test_parity_groups.py::test_groups_by_hand",
    ),
)
@same_of_both
def test_changes_by_the_user_are_followed(make: Make) -> object:
    found = [make(make_params([(5,), (3,)], torch.float64), lr=0.1) for _ in range(3)]
    for optimizer in found:
        train(optimizer)
    swapped, cleared, shortened = found
    params_of(swapped)[0].data = torch.full((5,), 7.0, dtype=torch.float64)
    cleared.state.clear()
    shortened.param_groups[0]["params"].pop(0)
    for optimizer in found:
        train(optimizer)
    return found
