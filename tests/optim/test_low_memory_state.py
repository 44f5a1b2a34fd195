"""Options and state of parameters that are stored in fewer bits: checked, saved, loaded, copied, changed."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cuda_on_cpu import NAME, captured_step
from low_memory_runs import BF16, SEVEN_BYTES, assert_same, assert_same_state, beside, go_on, parameters, trained
from references import make_grads, set_grads
from torch import Tensor
from torch.nn import Parameter

from nexus.backends import codecs
from nexus.optim import FusedAdamW
from nexus.optim.storage import MODES, bytes_table

modes = pytest.mark.parametrize(("dtype", "options"), [mode[1:] for mode in MODES], ids=[mode[0] for mode in MODES])


def resaved(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@modes
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_run_is_resumed_bit_for_bit(dtype: torch.dtype, options: dict[str, Any], amsgrad: bool) -> None:
    options = options | {"amsgrad": amsgrad}
    optimizer, params = trained(dtype, **options)
    runs = [(copy.deepcopy((optimizer, params)))]
    pickled = pickle.loads(pickle.dumps((optimizer, params)))
    runs.append(pickled)
    for compact in (False, True):
        saved = resaved(optimizer.state_dict(compact=compact))
        loaded, own = beside(params, **options)
        loaded.load_state_dict(saved)
        assert_same_state(loaded, optimizer)
        runs.append((loaded, own))
    go_on(optimizer, params)
    for other, own in runs:
        go_on(other, own)
        assert_same(own, params)
        assert_same_state(other, optimizer)


@modes
def test_torch_goes_on_from_any_mode_and_any_mode_from_torch(dtype: torch.dtype, options: dict[str, Any]) -> None:
    optimizer, params = trained(dtype, **options)
    own = [Parameter(param.detach().float()) for param in params]
    peer = torch.optim.AdamW(own, lr=1e-2)
    peer.load_state_dict(optimizer.state_dict())
    for param, of_torch in zip(params, own, strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            saved = optimizer.state_dict()["state"][0 if param is params[0] else 1][name]
            assert saved.dtype == torch.float32
            assert saved.stride() == param.stride()
            assert_same(peer.state[of_torch][name], saved)
    go_on(peer, own)
    back, _ = beside(params, **options)
    back.load_state_dict(peer.state_dict())
    for name, tolerance in (("exp_avg", 1 / 127), ("exp_avg_sq", 2 / 255)):  # half a code, where it is widest
        now = back.state_dict()["state"][0][name]
        wanted = peer.state[own[0]][name]
        assert float((now - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


@modes
def test_bytes_are_those_of_the_tensors(dtype: torch.dtype, options: dict[str, Any]) -> None:
    param = Parameter(torch.zeros(64, 128, dtype=dtype))
    optimizer = FusedAdamW([param], **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    tensors = [param, param.grad, *(value for name, value in optimizer.state[param].items() if name != "step")]
    assert optimizer.bytes_per_parameter() == sum(each.nbytes for each in tensors) / param.numel()
    table = {name: resident for name, resident, _ in bytes_table()}
    name = next(mode[0] for mode in MODES if mode[1:] == (dtype, options))
    assert table[name] == optimizer.bytes_per_parameter()


def test_small_tensors_and_groups_keep_float32_moments() -> None:
    params = [Parameter(torch.zeros(n, dtype=BF16)) for n in (4095, 4096, 5000)]
    optimizer = FusedAdamW([{"params": params[:2], **SEVEN_BYTES}, {"params": params[2:]}], stochastic_rounding=True)
    go_on(optimizer, params, 1)
    dtypes = [(optimizer.state[p]["exp_avg"].dtype, "master_low" in optimizer.state[p]) for p in params]
    assert dtypes == [(torch.float32, True), (torch.int8, True), (torch.float32, False)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, SEVEN_BYTES),
        (SEVEN_BYTES, {}),
        ({"master_weight_bits": 32}, {"master_weight_bits": 24, "exp_avg_dtype": BF16}),
        ({"exp_avg_sq_dtype": BF16, "amsgrad": True}, {"exp_avg_sq_dtype": torch.uint8, "amsgrad": True}),
    ],
    ids=["to fewer bits", "to more", "another master", "amsgrad"],
)
def test_options_changed_in_mid_run_encode_what_is_there(before: dict[str, Any], after: dict[str, Any]) -> None:
    defaults = {"master_weight_bits": None, "exp_avg_dtype": None, "exp_avg_sq_dtype": None}
    optimizer, params = trained(**before)
    loaded, own = beside(params, **after)
    loaded.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0].update(defaults | after)
    go_on(optimizer, params)
    go_on(loaded, own)
    assert_same(params, own)
    assert_same_state(optimizer, loaded)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_refused_change_encodes_nothing(backend: str) -> None:
    params = [*parameters(), *parameters()]
    optimizer = FusedAdamW(params, lr=1e-2, backend=backend, **SEVEN_BYTES)
    go_on(optimizer, params)
    optimizer.state[params[2]]["exp_avg_sq"].share_memory_()
    go_on(optimizer, params)
    before = copy.deepcopy([params, [optimizer.state[param] for param in params]])
    optimizer.param_groups[0]["exp_avg_sq_dtype"] = torch.float32
    with pytest.raises(TypeError, match="parameter 2 of group 0: state 'exp_avg_sq' is in shared memory"):
        go_on(optimizer, params, 1)
    assert_same([params, [optimizer.state[param] for param in params]], before)
    optimizer.param_groups[0]["exp_avg_sq_dtype"] = torch.uint8
    go_on(optimizer, params)
    assert {optimizer.state[param]["exp_avg_sq"].dtype for param in params[::2]} == {torch.uint8}


def test_a_master_weight_is_the_weight_of_a_float32_run() -> None:
    wide = [Parameter(param.detach().float()) for param in parameters()]
    narrow = [Parameter(param.detach().to(BF16)) for param in wide]
    runs = [FusedAdamW(wide, lr=1e-3), FusedAdamW(narrow, lr=1e-3, master_weight_bits=32)]
    for _ in range(100):
        grads = [grad.to(BF16) for grad in make_grads(narrow)]
        set_grads(narrow, grads)
        set_grads(wide, [grad.float() for grad in grads])
        for run in runs:
            run.step()
        for index, param in enumerate(wide):
            assert_same(runs[1].state_dict()["state"][index]["master_param"], param)


def test_float32_weights_are_taken_for_master_weights() -> None:
    model = torch.nn.Linear(70, 70)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.to(BF16)
    optimizer = FusedAdamW(model.named_parameters(), lr=1e-3, **SEVEN_BYTES | {"master_weight_bits": 32})
    optimizer.load_master(weights)
    saved = optimizer.state_dict()["state"]
    assert_same([saved[0]["master_param"], saved[1]["master_param"]], list(weights.values()))
    assert_same([param.float() for param in model.parameters()], [rounded_away(each) for each in weights.values()])
    optimizer.load_master([weight * 2 for weight in weights.values()])
    assert_same(optimizer.state_dict()["state"][0]["master_param"], weights["weight"] * 2)
    with pytest.raises(ValueError, match=r"weights has no 'weight' \(str\), and 1 of 2 names are missing"):
        optimizer.load_master({"bias": weights["bias"]})
    with pytest.raises(ValueError, match="weights must be 2 tensors, one for each parameter here"):
        optimizer.load_master([weights["weight"]])
    with pytest.raises(ValueError, match=r"the weight of parameter weight of group 0 must be of shape \(70, 70\)"):
        optimizer.load_master([weights["bias"], weights["bias"]])
    before = copy.deepcopy(list(model.parameters()))
    for bad in (weights["bias"].to_sparse(), weights["bias"].to("meta")):
        with pytest.raises(ValueError, match="the weight of parameter bias of group 0 must be dense, and both must"):
            optimizer.load_master([weights["weight"], bad])
    assert_same(list(model.parameters()), before)
    with pytest.raises(ValueError, match="the parameters have no names here"):
        FusedAdamW(model.parameters(), master_weight_bits=32).load_master(weights)
    with pytest.raises(ValueError, match="has no master weight, which a float32 weight would go to"):
        FusedAdamW(model.named_parameters()).load_master(weights)


def rounded_away(value: Tensor) -> Tensor:
    upper, _ = codecs.split(value.flatten(), torch.int16)
    return upper.view(value.shape).float()


@pytest.mark.parametrize("compact", [False, True])
def test_a_frozen_parameter_keeps_its_state_through_a_checkpoint(compact: bool) -> None:
    optimizer, params = trained(**SEVEN_BYTES)
    frozen = params[0]
    frozen.grad = None
    frozen.requires_grad_(False)
    saved = resaved(optimizer.state_dict(compact=compact))
    if not compact:  # what torch's optimizers read
        assert {name: value.dtype for name, value in saved["state"][0].items()} == {
            "step": torch.float64,
            **dict.fromkeys(("exp_avg", "exp_avg_sq", "master_param"), torch.float32),
        }
    other, own = beside(params, **SEVEN_BYTES)
    own[0].requires_grad_(False)
    other.load_state_dict(saved)
    for param in (frozen, own[0]):
        param.requires_grad_(True)
    go_on(optimizer, params)
    go_on(other, own)
    assert_same(own, params)
    assert_same([other.state[param] for param in own], [optimizer.state[param] for param in params])


@pytest.mark.parametrize("bits", [24, 32])
def test_a_master_weight_that_is_not_the_parameters(bits: int) -> None:
    optimizer, params = trained(master_weight_bits=bits)
    saved = copy.deepcopy(optimizer.state_dict())
    other, own = beside(params, master_weight_bits=bits)
    with torch.no_grad():
        own[0][3, 4] += 1
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="master_param is not what the parameter is rounded from, in 1 of 4355"):
        other.load_state_dict(saved)
    assert_same(other.state_dict()["state"], before["state"])
    del saved["state"][0]["master_param"]  # the parameter wins
    other.load_state_dict(saved)
    assert_same(other.state_dict()["state"][0]["master_param"], own[0].detach().float())
    assert_same(other.state_dict()["state"][1]["master_param"], optimizer.state_dict()["state"][1]["master_param"])


@pytest.mark.parametrize("bits", [24, 32])
def test_a_parameter_that_the_user_writes_to(bits: int) -> None:
    optimizer, params = trained(master_weight_bits=bits)
    params[0].data.mul_(-3.0)
    with torch.no_grad():
        params[0][:5] = 0.0
        params[0][5:10] = -0.0
    master = optimizer.state_dict()["state"][0]["master_param"]
    assert_same(rounded_away(master), params[0].detach().float())
    go_on(optimizer, params)
    assert bool(params[0].isfinite().all())


def test_saved_groups_have_plain_types_and_can_be_written_back() -> None:
    optimizer, params = trained(**SEVEN_BYTES)
    saved = resaved(optimizer.state_dict())["param_groups"][0]
    assert {type(value) for value in saved.values()} <= {int, float, str, bool, list, tuple, type(None)}
    assert saved["exp_avg_dtype"] == "torch.int8"
    other, own = copy.deepcopy((optimizer, params))
    other.param_groups[0].update(saved | {"params": own})  # as ZeroRedundancyOptimizer does
    go_on(optimizer, params)
    go_on(other, own)
    assert_same_state(other, optimizer)
    assert other.param_groups[0]["exp_avg_dtype"] == torch.int8


@pytest.mark.parametrize(("name", "value"), [("exp_avg_dtype", BF16), ("master_weight_bits", None)])
def test_state_that_a_graph_writes_to_is_stored_as_it_was(name: str, value: Any) -> None:
    optimizer, params = trained(backend=NAME, **SEVEN_BYTES)
    graph = captured_step(optimizer)
    before = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    for change in (optimizer.step, optimizer.sync_hyperparameters):
        with pytest.raises(RuntimeError, match=rf"'{name}' was changed from .*: drop the graph first"):
            change()
    optimizer.param_groups[0][name] = before
    other, own = beside(params, **SEVEN_BYTES)
    other.load_state_dict(optimizer.state_dict())
    set_grads(own, [param.grad for param in params])
    graph.replay()
    other.step()
    assert_same(params, own)
    del graph
    optimizer.param_groups[0][name] = value
    go_on(optimizer, params, 1)


def test_a_refused_load_of_master_weights_leaves_no_state() -> None:
    params = parameters()
    optimizer = FusedAdamW(params, master_weight_bits=32)
    optimizer.state[params[1]] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"state 'exp_avg' must be of shape \(7, 9\)"):
        optimizer.load_master([param.float() for param in params])
    assert params[0] not in optimizer.state


def test_a_master_weight_that_was_loaded_for_a_frozen_parameter_does_not_outlive_it() -> None:
    optimizer, params = trained(master_weight_bits=32)
    other, own = beside(params)
    for param in own:
        param.requires_grad_(False)
    other.load_state_dict(optimizer.state_dict())
    assert "master_param" in other.state_dict()["state"][0]
    for param in own:
        param.requires_grad_(True)
    go_on(other, own, 1)
    assert "master_param" not in other.state_dict()["state"][0]
