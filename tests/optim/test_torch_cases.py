"""PyTorch's own cases for AdamW (`optim_db`, and what its test_optim.py does with them), run by a FusedAdamW."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from references import PARAMS as TOLERANCE
from references import (
    Float64AdamW,
    assert_close,
    assert_same_run,
    copies,
    make_grads,
    make_params,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)
from torch import Tensor
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LinearLR, LRScheduler, PolynomialLR, StepLR

from nexus.backends.interface import DevicePlan, Plan
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of
from nexus.optim.param_group import ParamGroup, settings_of

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@functools.cache
def info() -> Any:
    """What PyTorch tests AdamW with."""
    pytest.importorskip("expecttest")  # which torch.testing's module imports
    from torch.testing._internal.common_optimizers import optim_db

    (found,) = [each for each in optim_db if each.optim_cls is torch.optim.AdamW]
    return found


def cases(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, dict[str, Any]]]:
    """(description, options): those for CUDA include those for the CPU."""
    for each in info().optim_inputs_func("cuda", dtype):
        yield each.desc, each.kwargs


def implementations() -> list[dict[str, Any]]:
    """The options that ask torch for one implementation or another."""
    return [{}, {"foreach": False, "fused": False, "differentiable": False}, {"foreach": True}, {"fused": True}]


def as_numbers(options: dict[str, Any]) -> dict[str, Any]:
    """For the reference: numbers for tensors, and nothing of implementations."""
    plain = {key: value for key, value in options.items() if key not in ("capturable", "foreach", "fused")}
    if isinstance(plain.get("lr"), Tensor):
        plain["lr"] = float(plain["lr"])
    if "betas" in plain:
        first, second = plain["betas"]
        plain["betas"] = (float(first), float(second))
    plain.pop("differentiable", None)
    return plain


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_input_equals_the_for_loop_in_float64(backend: str, dtype: torch.dtype) -> None:
    seen = set()
    for description, options in cases(dtype):
        for implementation in implementations():
            params = make_params([(2, 3), (5,), ()], dtype)
            given = copy.deepcopy({**options, **implementation})
            optimizer = FusedAdamW(params, backend=backend, **given)
            reference = Float64AdamW(params, **as_numbers(given))
            step_both(optimizer, reference, steps=5)
            assert_same_run(optimizer, reference, description)
            seen.add(description)
    assert {"default", "amsgrad", "Tensor lr, Tensor betas, with capturable"} <= seen


# Torch's error inputs, by their descriptions: the words here, and why the type is another one where it is.
WORDS = {
    "invalid param type": "params argument given to the optimizer should be an iterable of Tensors or dicts",
    "a param group cannot have duplicate parameters": "a parameter is twice in this group",
    "duplicate parameters should not occur across param groups either": "appear in more than one parameter group",
    "Tensor lr must be 1-element": "lr as a tensor must have one element",
    "all optimizer params should be with/without names": "all optimizer params should be with/without names",
    "all optimizer param groups should be with/without names.": "all optimizer param groups should be with/without",
    "beta1 should be between 0 and 1": r"betas\[0\] must be a number in \[0, 1\), got 1.0",
    "weight_decay should > 0": "weight_decay must be a finite number >= 0, got -1",
    "betas must be either both floats or both Tensors": "betas must be either both floats or both Tensors",
    "`fused` and `foreach` cannot be `True` together": "`fused` and `foreach` cannot be `True` together",
    "`fused` does not support `differentiable`": "`fused` does not support `differentiable`",
}
OTHER_TYPES: dict[str, type[Exception]] = {
    # An update that is made twice is never what was meant: more than a warning.
    "a param group cannot have duplicate parameters": ValueError,
}
# Limits of torch's foreach implementation, which FusedAdamW does not have.
ALLOWED = {
    "lr as Tensor doesn't work with foreach & not capturable",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
}


def error_inputs() -> list[Any]:
    found = info().optim_error_inputs_func("cpu", torch.float32)
    if not torch.cuda.is_available():  # as for CUDA, of tensors that are on the CPU
        of_cuda = [
            ({"foreach": True, "fused": True}, "`fused` and `foreach` cannot be `True` together"),
            ({"fused": True, "differentiable": True}, "`fused` does not support `differentiable`"),
        ]
        from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerInput

        found += [
            ErrorOptimizerInput(
                OptimizerInput(params=[torch.zeros(())], kwargs=options, desc=words),
                error_type=RuntimeError,
                error_regex=words,
            )
            for options, words in of_cuda
        ]
    return list(found)


def test_every_error_input_is_an_error() -> None:
    seen = set()
    for each in error_inputs():
        given = each.optimizer_error_input
        seen.add(given.desc)
        params = given.params if given.params is not None else make_params([(1,)])
        if given.desc in ALLOWED:
            FusedAdamW(params, **given.kwargs)
            continue
        with pytest.raises(OTHER_TYPES.get(given.desc, each.error_type), match=WORDS[given.desc]):
            FusedAdamW(params, **given.kwargs)
    assert seen == ALLOWED | set(WORDS)


# What test_optim.py does.


def test_param_groups_with_a_rate_and_a_decay_of_their_own(backend: str) -> None:
    for description, options in cases():
        for own in ({"lr": 1e-2}, {"weight_decay": 0.5}, {"lr": 0.1, "weight_decay": 0.0}):
            params = make_params([(4, 3), (4,)])
            groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], **own}]
            reference = Float64AdamW([dict(group) for group in groups], **as_numbers(options))
            optimizer = FusedAdamW(groups, backend=backend, **copy.deepcopy(options))
            step_both(optimizer, reference)
            assert_same_run(optimizer, reference, description)


SCHEDULERS: list[list[Callable[[Any], LRScheduler]]] = [
    [lambda o: StepLR(o, gamma=0.9, step_size=10)],
    [lambda o: LinearLR(o, start_factor=0.4, total_iters=4)],
    [lambda o: StepLR(o, gamma=0.9, step_size=10), lambda o: LinearLR(o, start_factor=0.4, total_iters=4)],
    [lambda o: ExponentialLR(o, gamma=0.9), lambda o: ConstantLR(o, factor=0.4, total_iters=4)],
    [lambda o: PolynomialLR(o, power=0.9, total_iters=4), lambda o: ExponentialLR(o, gamma=0.9)],
]


@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("makers", SCHEDULERS, ids=range(len(SCHEDULERS)))
def test_it_goes_the_right_direction_with_schedulers(
    backend: str, makers: list[Callable[[Any], LRScheduler]], as_tensor: bool
) -> None:
    for maximize in (False, True):
        weight, bias = make_params([(10, 5), (10,)])
        data = torch.randn(5)
        lr: Any = torch.tensor(0.01) if as_tensor else 0.01
        optimizer = FusedAdamW([weight, bias], lr=lr, maximize=maximize, backend=backend)
        schedulers = [make(optimizer) for make in makers]

        def closure(
            optimizer: FusedAdamW = optimizer, weight: Tensor = weight, bias: Tensor = bias, data: Tensor = data
        ) -> Tensor:
            optimizer.zero_grad()
            loss = (weight.mv(data) + bias).pow(2).sum()
            loss.backward()
            return loss

        first = closure().item()
        for _ in range(20):
            optimizer.step(closure)
            for scheduler in schedulers:
                scheduler.step()
        assert (closure().item() > first) == maximize
        if as_tensor:
            assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_tensor_rate_of_any_number_of_dimensions(backend: str, shape: tuple[int, ...]) -> None:
    params = make_params([(2, 3)])
    optimizer, reference = (
        FusedAdamW(params, lr=torch.full(shape, 0.001), backend=backend),
        Float64AdamW(params, lr=float(torch.tensor(0.001))),
    )
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


@pytest.mark.parametrize("layout", ["same", "transposed", "every other"])
def test_gradients_and_parameters_that_are_not_contiguous(backend: str, layout: str) -> None:
    for description, options in cases():
        start = torch.randn(10, 5, 2)
        whole = {"same": start, "transposed": start.transpose(0, 2), "every other": start[..., 0]}[layout]
        params = [torch.nn.Parameter(whole)]
        reference = Float64AdamW(params, **as_numbers(options))
        optimizer = FusedAdamW(params, backend=backend, **copy.deepcopy(options))
        step_both(optimizer, reference)
        assert_same_run(optimizer, reference, description)


def test_complex_parameters_are_refused_and_their_real_view_is_taken(backend: str) -> None:
    # torch steps view_as_real of them; here that view is for the caller to make, as the error says.
    whole = torch.randn(5, 5, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"optimize torch.view_as_real\(p\)"):
        FusedAdamW([torch.nn.Parameter(whole.clone())], backend=backend)
    expected = torch.nn.Parameter(whole.clone())
    peer = torch.optim.AdamW([expected], lr=1e-2, foreach=False)
    own = torch.view_as_real(whole.clone()).requires_grad_()
    optimizer = FusedAdamW([own], lr=1e-2, backend=backend)
    for _ in range(3):
        grad = torch.randn_like(whole)
        expected.grad, own.grad = grad, torch.view_as_real(grad)
        peer.step()
        optimizer.step()
    assert_close(own, torch.view_as_real(expected), TOLERANCE[torch.float32])


def test_a_step_without_any_gradient_changes_no_parameter(backend: str) -> None:
    for _, options in cases():
        params = make_params([(5, 3), (2,)])
        before = copies(params)
        optimizer = FusedAdamW(params, backend=backend, **copy.deepcopy(options))
        optimizer.step()
        assert same_bits(before, params)
        assert not optimizer.state


def test_a_zero_gradient_changes_no_parameter_without_decay(backend: str) -> None:
    for _, options in cases():
        params = make_params([(5, 3), (2,)])
        before = copies(params)
        optimizer = FusedAdamW(params, backend=backend, **{**copy.deepcopy(options), "weight_decay": 0.0})
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.step()
        assert same_bits(before, params)


def test_no_state_is_empty(backend: str) -> None:
    for _, options in cases():
        params = make_params([(3, 2), (4,)])
        optimizer = FusedAdamW(params, backend=backend, **copy.deepcopy(options))
        set_grads(params, make_grads(params))
        optimizer.step()
        names = {"step", "exp_avg", "exp_avg_sq"} | ({"max_exp_avg_sq"} if options.get("amsgrad") else set())
        for state in optimizer.state.values():
            assert set(state) == names
            assert all(value is not None and value.numel() for value in state.values())


def test_it_can_be_printed(backend: str) -> None:
    for _, options in cases():
        optimizer = FusedAdamW(make_params([(3,)]), backend=backend, **copy.deepcopy(options))
        text = repr(optimizer)
        for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
            assert name in text


def test_its_defaults_are_torchs(backend: str) -> None:
    ours = FusedAdamW(make_params([(3,)]), backend=backend).defaults
    torchs = torch.optim.AdamW(make_params([(3,)])).defaults
    for name in ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"):
        assert ours[name] == torchs[name]


# State dicts.


def trained(backend: str, **options: Any) -> tuple[list[torch.nn.Parameter], FusedAdamW]:
    params = make_params([(4, 3), (4,)])
    optimizer = FusedAdamW(params, backend=backend, **copy.deepcopy(options))
    for _ in range(3):
        set_grads(params, make_grads(params))
        optimizer.step()
    return params, optimizer


def assert_goes_on_the_same(
    params: list[torch.nn.Parameter], optimizer: FusedAdamW, other_params: list[Any], other: Any
) -> None:
    for _ in range(3):
        grads = make_grads(params)
        set_grads(params, grads)
        set_grads(other_params, [grad.clone() for grad in grads])
        optimizer.step()
        other.step()
    assert same_bits(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("missing", ["maximize", "amsgrad", "foreach", "fused", "capturable", "differentiable"])
def test_it_can_load_an_older_state_dict(backend: str, missing: str) -> None:
    for _, options in cases():
        params, optimizer = trained(backend, **options)
        peer = torch.optim.AdamW(copies(params))
        peer.load_state_dict(optimizer.state_dict())
        older = peer.state_dict()
        for group in older["param_groups"]:
            del group[missing]
        optimizer.load_state_dict(older)
        set_grads(params, make_grads(params))
        optimizer.step()
        assert optimizer.param_groups[0]["amsgrad"] == bool(options.get("amsgrad", False))


def test_steps_that_are_no_tensors_are_loaded(backend: str) -> None:
    for _, options in cases():
        params, optimizer = trained(backend, **options)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            state["step"] = state["step"].item()
        other_params = copies(params)
        other = FusedAdamW(other_params, backend=backend, **copy.deepcopy(options))
        other.load_state_dict(saved)
        assert_goes_on_the_same(params, optimizer, other_params, other)


@pytest.mark.parity(
    "State dicts",
    "names of parameters, on loading",
    torch="come from the state dict, if it has some",
    nexus="same",
)
@pytest.mark.parametrize("named_before", [False, True])
@pytest.mark.parametrize("named_after", [False, True])
def test_names_come_from_the_state_dict_if_it_has_them(backend: str, named_before: bool, named_after: bool) -> None:
    def given(module: torch.nn.Module, named: bool, prefix: str) -> Any:
        pairs = [(prefix + name, param) for name, param in module.named_parameters()]
        return pairs if named else [param for _, param in pairs]

    module = torch.nn.Linear(3, 2)
    before = FusedAdamW(given(module, named_before, "before."), lr=0.5, backend=backend)
    module(torch.ones(3)).sum().backward()
    before.step()
    after = FusedAdamW(given(module, named_after, "after."), backend=backend)
    peer = torch.optim.AdamW(given(module, named_after, "after."), fused=True)
    for optimizer in (after, peer):
        optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
    after.step()
    assert after.param_groups[0].get("param_names") == peer.param_groups[0].get("param_names")
    assert after.param_groups[0]["lr"] == 0.5


def test_a_state_dict_is_deterministic_and_is_not_changed_by_a_load(backend: str) -> None:
    for _, options in cases():
        params, optimizer = trained(backend, **options)
        saved = copy.deepcopy(optimizer.state_dict())
        again = copy.deepcopy(saved)
        other_params = copies(params)
        other = FusedAdamW(other_params, backend=backend, **copy.deepcopy(options))
        other.load_state_dict(again)
        torch.testing.assert_close(again, saved, rtol=0, atol=0)
        assert_goes_on_the_same(params, optimizer, other_params, other)
        torch.testing.assert_close(again, saved, rtol=0, atol=0)
        torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_saved_and_loaded_by_weights_only(backend: str) -> None:
    for _, options in cases():
        _, optimizer = trained(backend, **options)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        torch.testing.assert_close(loaded, optimizer.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
def test_copies_have_all_public_attributes_and_go_on_the_same(
    backend: str, copied: Callable[[FusedAdamW], FusedAdamW]
) -> None:
    for _, options in cases():
        params, optimizer = trained(backend, **options)
        other = copied(optimizer)

        def public(each: FusedAdamW) -> set[str]:
            return {name for name in vars(each) if not name.startswith("_")}

        assert public(other) == public(optimizer)
        assert_goes_on_the_same(params, optimizer, other.param_groups[0]["params"], other)


# Hooks, in torch's order.


def test_state_dict_hooks_run_in_order(backend: str) -> None:
    _, optimizer = trained(backend)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda each: calls.append("second"))
    optimizer.register_state_dict_pre_hook(lambda each: calls.append("first"), prepend=True)

    def rename(each: Any, saved: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        return {**saved, "extra": 1}

    optimizer.register_state_dict_post_hook(rename)
    assert optimizer.state_dict()["extra"] == 1
    assert calls == ["first", "second", "post"]


@pytest.mark.parametrize("post", [False, True])
def test_load_state_dict_hooks_run_in_order(backend: str, post: bool) -> None:
    _, optimizer = trained(backend)
    calls: list[str] = []
    register: Any = (
        optimizer.register_load_state_dict_post_hook if post else optimizer.register_load_state_dict_pre_hook
    )
    register(lambda *_: calls.append("second"))
    register(lambda *_: calls.append("first"), prepend=True)
    saved = optimizer.state_dict()
    if not post:

        def other_rate(each: Any, given: dict[str, Any]) -> dict[str, Any]:
            given["param_groups"][0]["lr"] = 0.25
            return given

        register(other_rate)
    optimizer.load_state_dict(saved)
    assert calls == ["first", "second"]
    assert optimizer.param_groups[0]["lr"] == (1e-3 if post else 0.25)


# Overflow, as GradScaler hands it over.


@pytest.mark.parametrize("steps", [1, 3])
def test_it_does_not_step_if_found_inf(backend: str, steps: int) -> None:
    for _, options in cases():
        params = make_params([(5, 3), (2,)])
        optimizer = FusedAdamW(params, backend=backend, **copy.deepcopy(options))
        set_grads(params, make_grads(params))
        optimizer.step()
        before = snapshot(optimizer)
        optimizer.grad_scale = torch.full((1,), 2.0)
        optimizer.found_inf = torch.ones(1)
        for _ in range(steps):
            optimizer.step()
        assert same_bits(before, snapshot(optimizer))
        optimizer.found_inf = torch.zeros(1)
        optimizer.step()
        assert int(optimizer.state[params[0]]["step"]) == 2


# A rate on the CPU for parameters that are elsewhere: "elsewhere" is the meta device here, or the CPU again.


def a_group(lr: Tensor, params: list[Tensor]) -> ParamGroup:
    return ParamGroup({**FusedAdamW(make_params([(1,)])).param_groups[0], "lr": lr, "params": params})


def test_a_rate_on_the_cpu_is_copied_to_the_parameters_device() -> None:
    elsewhere = torch.device("meta")
    group = a_group(torch.tensor(0.5), [torch.zeros(3, device=elsewhere)])
    rate = settings_of(group, {}, elsewhere)["lr"]
    assert rate.host is group["lr"]
    assert rate.tensor is not None
    assert rate.tensor.device == elsewhere


def test_a_rate_on_another_device_is_refused_unless_nothing_there_uses_it() -> None:
    lr = torch.tensor(0.5, device="meta")
    with pytest.raises(
        ValueError, match="lr is a tensor on meta, and parameters of its group are on cpu: make it there"
    ):
        settings_of(a_group(lr, make_params([(3,)])), {}, torch.device("cpu"))
    unused = settings_of(a_group(lr, [torch.zeros(3, device="meta")]), {}, torch.device("cpu"))["lr"]
    assert unused.tensor is None


def test_a_rate_on_the_host_is_read_at_each_step(backend: str) -> None:
    params = make_params([(5,), (3, 2)])
    host = torch.tensor(0.25, dtype=torch.float64, device="cpu")
    optimizer, reference = FusedAdamW(params, lr=host.to(params[0].device), backend=backend), Float64AdamW(params)
    grads = make_grads(params)
    set_grads(params, grads)
    runner = engine_of(optimizer).prepare(vars(optimizer))
    plan = engine_of(optimizer).make_plan(vars(optimizer))
    ((device, of_device),) = plan.devices.items()
    of_device.groups[0]["lr"].host = host
    of_device.groups[0]["lr"].tensor = torch.zeros((), dtype=torch.float64)
    runner.bind(Plan(plan.parameters, {device: DevicePlan(**vars(of_device))}), vars(optimizer))
    for value in (0.25, 0.0, 0.5):
        host.fill_(value)
        reference.optimizer.param_groups[0]["lr"] = value
        reference.step(grads)
        runner.step(None, None)
    assert_same_run(optimizer, reference)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cuda", "triton", "reference"])
def test_a_rate_on_the_cpu_for_parameters_on_a_gpu(name: str) -> None:
    lr = torch.tensor(0.25)
    params = [param.detach().cuda().requires_grad_() for param in make_params([(5,), (3, 2)])]
    reference = Float64AdamW(params, lr=0.25)
    optimizer = FusedAdamW(params, lr=lr, backend=name)
    for value in (0.25, 0.0, 0.5):
        lr.fill_(value)
        reference.optimizer.param_groups[0]["lr"] = value
        grads = [torch.randn_like(param) for param in params]
        set_grads(params, grads)
        reference.step(grads)
        optimizer.step()
    assert_same_run(optimizer, reference)
    assert optimizer.param_groups[0]["lr"] is lr
    if name == "cuda":
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="a rate is a tensor on the CPU"), torch.cuda.graph(graph):
            optimizer.step()
