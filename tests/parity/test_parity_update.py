"""The update itself, its counts and state: rows of docs/parity.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import Float64AdamW, copies, make_grads, make_params, set_grads
from side_by_side import Make, assert_same, both, fused_torch, of_this_torch, param, params_of, state_of, train

from nexus.optim import FusedAdamW

pytestmark = of_this_torch


@pytest.mark.parity(
    "The update",
    "parameters and moments in float64, also with `amsgrad`, `maximize`, without decay, with `eps` large or 0",
    torch="the formula of the docs",
    nexus="same",
    also=(
        "test_adamw.py::test_every_option_equals_torch",
        "test_training_gpt.py::test_float32_training_follows_float64",
    ),
)
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}, {"eps": 1.0}, {"eps": 0.0}],
    ids=str,
)
def test_float64_runs_are_the_same(options: dict[str, Any]) -> None:
    def run(make: Make) -> torch.optim.Optimizer:
        optimizer = make(make_params([(600,), (7, 3), ()], torch.float64), lr=1e-2, **options)
        train(optimizer, steps=20)
        return optimizer

    assert_same(*both(run))


def off_from_float64(make: Make, dtype: torch.dtype, steps: int = 50) -> float:
    """The largest difference of parameters about 1, whose decay is by a factor close to 1."""
    start = make_params([(2000,)], dtype)
    own = copies(start)
    optimizer, reference = make(own, lr=1e-2, weight_decay=0.1), Float64AdamW(start, lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        grads = make_grads(start)
        set_grads(own, grads)
        optimizer.step()
        reference.step(grads)
    return (own[0].double() - reference.params[0]).abs().max().item()


@pytest.mark.parity(
    "The update",
    "float32 parameters, compared with a float64 run of 50 steps",
    torch="more than twice the error of `FusedAdamW`",
    nexus="closer",
    why="the decay is subtracted together with the update, and is no factor that is rounded the same in each step",
    also=("test_adamw.py::test_a_small_decay_is_not_lost_to_rounding",),
)
def test_float32_runs_stay_close_to_float64() -> None:
    first, second = both(lambda make: off_from_float64(make, torch.float32))
    assert second < first / 2
    assert second < 1e-6


@pytest.mark.parity(
    "The update",
    "a decay of 1e-8 a step (`lr=1e-6`) on float32 parameters that their gradients move",
    torch="lost: `1 - 1e-8` is 1 in float32",
    nexus="there, on the average of many parameters",
    why="it is subtracted together with the update",
    also=("test_adamw.py::test_a_small_decay_is_not_lost_to_rounding",),
)
def test_a_small_decay() -> None:
    def decayed(make: Make) -> float:
        own = [torch.nn.Parameter(torch.rand(4096) * 1.5 + 0.5)]
        plain = copies(own)
        pair = make(own, lr=1e-6, weight_decay=0.01), make(plain, lr=1e-6, weight_decay=0.0)
        for _ in range(100):
            grad = torch.randn(4096)
            own[0].grad, plain[0].grad = grad, grad
            for optimizer in pair:
                optimizer.step()
        return (plain[0].double() - own[0].double()).mean().item()

    first, second = both(decayed)
    expected = 100 * 1e-8 * 1.25  # steps, decay of each, mean of the parameters
    assert abs(first) < 0.1 * expected
    assert second == pytest.approx(expected, rel=0.1)


@pytest.mark.parity(
    "The update",
    "bfloat16 parameters: the second moment after 2000 steps with a gradient of 0.1",
    torch="less than a third of what it should be: what it would grow by is less than half its last place, and lost",
    nexus="right to a part in 100",
    why="moments of half-precision parameters are float32",
    also=("test_adamw.py::test_every_size_equals_torch",),
)
def test_the_second_moment_of_a_bfloat16_parameter() -> None:
    def second_moment(make: Make) -> float:
        own = param(8, dtype=torch.bfloat16)
        optimizer = make([own])
        for _ in range(2000):
            own.grad = torch.full_like(own, 0.1)
            optimizer.step()
        return state_of(optimizer)["exp_avg_sq"][0].item()

    first, second = both(second_moment)
    expected = 0.1**2 * (1 - 0.999**2000)
    assert first < expected / 3
    assert second == pytest.approx(expected, rel=0.01)


@pytest.mark.parity(
    "The update",
    "parameters of float32, float64, bfloat16 and float16 in one optimizer",
    torch="each is updated in its own type, with one count each",
    nexus="same, with arithmetic and moments in float32 for half precision",
    why="see the rows about bfloat16",
    also=("test_adamw.py::test_every_dtype_in_one_optimizer_equals_torch",),
)
def test_all_dtypes_in_one_optimizer() -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

    def run(make: Make) -> torch.optim.Optimizer:
        optimizer = make([param(3, dtype=dtype) for dtype in dtypes], lr=0.25, weight_decay=0.0, eps=0.0)
        for own in params_of(optimizer):
            own.grad = torch.ones_like(own)
        optimizer.step()
        return optimizer

    found = both(run)
    for optimizer in found:
        assert [own.tolist() for own in params_of(optimizer)] == [[0.75] * 3] * 4
        assert [int(state_of(optimizer, index)["step"]) for index in range(4)] == [1] * 4
    first, second = ([state_of(each, index)["exp_avg"].dtype for index in range(4)] for each in found)
    assert first == list(dtypes)
    assert second == [torch.float32, torch.float64, torch.float32, torch.float32]


@pytest.mark.parity(
    "The update",
    "a step at `lr=0`",
    torch="changes moments and count, and no parameter",
    nexus="same",
    also=("test_adamw.py::test_values_at_the_edge_go_where_torchs_go",),
)
def test_a_rate_of_zero() -> None:
    def run(make: Make) -> torch.optim.Optimizer:
        optimizer = make([param(3)], lr=0.0)
        train(optimizer, steps=2)
        return optimizer

    first, second = both(run)
    assert_same(first, second)
    assert params_of(second)[0].tolist() == [1.0] * 3
    assert int(state_of(second)["step"]) == 2
    assert state_of(second)["exp_avg"].all()


# State.


@pytest.mark.parity(
    "Steps and state",
    "when state is made, its names and shapes",
    torch="in the first step with a gradient: `step`, `exp_avg`, `exp_avg_sq`, with `amsgrad` `max_exp_avg_sq`",
    nexus="same",
    also=("test_torch_cases.py::test_no_state_before_a_gradient_and_none_is_empty_after",),
)
@pytest.mark.parametrize("amsgrad", [False, True])
def test_state_is_made_in_the_first_step(amsgrad: bool) -> None:
    def run(make: Make) -> list[dict[str, tuple[int, ...]]]:
        optimizer = make([param(2, 3), param(4)], amsgrad=amsgrad)
        before = {len(optimizer.state), len(optimizer.state_dict()["state"])}
        assert before == {0}
        train(optimizer, steps=1)
        states = (state_of(optimizer, index) for index in range(2))
        return [{name: tuple(value.shape) for name, value in state.items()} for state in states]

    first, second = both(run)
    assert first == second
    assert set(second[0]) == {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if amsgrad else set())


@pytest.mark.parity(
    "Steps and state",
    "dtype of the moments",
    torch="the parameter's: bfloat16 for bfloat16",
    nexus="float32 for half precision, the parameter's otherwise",
    why="in bfloat16 a second moment stands still: `beta2` of 0.999 changes it by less than half its last place",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_of_moments(dtype: torch.dtype) -> None:
    def dtypes(make: Make) -> set[torch.dtype]:
        optimizer = make([param(3, dtype=dtype)], amsgrad=True)
        train(optimizer, steps=1)
        return {value.dtype for name, value in state_of(optimizer).items() if name != "step"}

    first, second = both(dtypes)
    assert first == {dtype}
    assert second == {torch.float64 if dtype == torch.float64 else torch.float32}


@pytest.mark.parity(
    "Steps and state",
    "`state['step']`",
    torch="a float32 tensor, which sticks at 2**24",
    nexus="a float64 tensor, which goes on",
    why="long runs get there",
    also=("test_counters.py::test_counts_go_on_beyond_what_float32_holds",),
)
def test_the_count_of_steps() -> None:
    def count(make: Make) -> tuple[torch.dtype, torch.Size, int]:
        optimizer = make([param(3)])
        train(optimizer, steps=1)
        step = state_of(optimizer)["step"]
        step.fill_(2**24 - 1)
        train(optimizer, steps=3)
        return step.dtype, step.shape, int(state_of(optimizer)["step"])

    first, second = both(count)
    assert first == (torch.float32, torch.Size([]), 2**24)
    assert second == (torch.float64, torch.Size([]), 2**24 + 2)


@pytest.mark.parity(
    "Steps and state",
    "`amsgrad` switched on in mid-run",
    torch="`KeyError: 'max_exp_avg_sq'`",
    nexus="taken: the largest second moment is sought from there on",
    why="options of a group may change between steps",
    also=("test_tensor_changes.py::test_amsgrad_switched_while_training",),
)
def test_amsgrad_is_switched_on() -> None:
    def run(make: Make) -> torch.optim.Optimizer:
        optimizer = make([param(3)])
        train(optimizer)
        optimizer.param_groups[0]["amsgrad"] = True
        train(optimizer)
        return optimizer

    with pytest.raises(KeyError, match="max_exp_avg_sq"):
        run(fused_torch)
    state = state_of(run(FusedAdamW))
    assert int(state["step"]) == 6
    assert (state["max_exp_avg_sq"] >= state["exp_avg_sq"]).all()


@pytest.mark.parity(
    "Steps and state",
    "what the user does to parameters and state: `p.data = ...`, `optimizer.state.clear()`, a parameter taken out "
    "of its group",
    torch="the next step goes on from what is there",
    nexus="same",
    also=(
        "test_tensor_changes.py::test_swapped_storage_is_followed",
        "test_optimizer_behaviour.py::test_groups_and_parameters_are_taken_away_while_training",
    ),
)
def test_changes_by_the_user_are_followed() -> None:
    def run(make: Make) -> list[torch.optim.Optimizer]:
        swapped, cleared, shortened = (make(make_params([(5,), (3,)], torch.float64), lr=0.1) for _ in range(3))
        for optimizer in (swapped, cleared, shortened):
            train(optimizer)
        params_of(swapped)[0].data = torch.full((5,), 7.0, dtype=torch.float64)
        cleared.state.clear()
        shortened.param_groups[0]["params"].pop(0)
        for optimizer in (swapped, cleared, shortened):
            train(optimizer)
        return [swapped, cleared, shortened]

    for first, second in zip(*both(run), strict=True):
        assert_same(first, second)
