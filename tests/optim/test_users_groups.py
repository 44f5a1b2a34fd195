"""What training code puts into an optimizer's groups: parameters of any kind that are not trained, lists by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from references import make_grads, make_params, set_grads
from side_by_side import (
    Make,
    assert_same,
    beside_plain,
    both,
    fused_torch,
    of_this_torch,
    param,
    params_of,
    state_of,
    train,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import return_and_correct_aliasing

from nexus.optim import FusedAdamW

# Frozen parameters.


class Wrapped(Tensor):
    """As quantized weights of torchao and bitsandbytes are: a tensor around others, without memory of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32, requires_grad=False)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return return_and_correct_aliasing(func, args, kwargs or {}, Wrapped(args[0].inner))
        raise NotImplementedError(f"{func} of a quantized weight")


def freed() -> Tensor:
    tensor = torch.ones(4)
    tensor.untyped_storage().resize_(0)
    return tensor


FROZEN: dict[str, Callable[[], Tensor]] = {
    "int8": lambda: torch.ones(3, dtype=torch.int8),
    "uint8": lambda: torch.ones(3, 2, dtype=torch.uint8),
    "bool": lambda: torch.ones(3, dtype=torch.bool),
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "expanded": lambda: torch.ones(1).expand(5),
    "overlapping": lambda: torch.ones(5).as_strided((3, 3), (1, 1)),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "freed": freed,
    "meta": lambda: torch.ones(3, device="meta"),
    "wrapped": lambda: Wrapped(torch.ones(3, dtype=torch.int8)),
    "negated": lambda: torch._neg_view(torch.ones(3)),
    "empty": lambda: torch.ones(0),
}


@pytest.mark.parametrize("kind", FROZEN)
@pytest.mark.parity(
    "Parameters and gradients",
    "frozen parameters (`requires_grad=False`, without a gradient) of any kind: integers, float8, complex, expanded, "
    "sparse, without memory, quantized by a wrapper",
    torch="left alone: in the constructor, in `add_param_group`, in steps, in state dicts",
    nexus="same",
    also=("test_users_groups.py::test_what_is_frozen_on_each_backend",),
)
@of_this_torch
def test_what_is_frozen(kind: str) -> None:
    assert_same(*both(lambda make: with_frozen(make, kind)))


@pytest.mark.parametrize("kind", FROZEN)
def test_what_is_frozen_on_each_backend(kind: str, backend: str) -> None:
    assert_same(*beside_plain(lambda make: with_frozen(make, kind), backend))


def with_frozen(make: Make, kind: str) -> Optimizer:
    """A run beside parameters that are not trained, some from the start and some from later on; only the others."""
    frozen = [nn.Parameter(FROZEN[kind](), requires_grad=False) for _ in range(2)]
    trained, later = make_params([(5,), (2, 3)], torch.float64)
    optimizer = make([{"params": [frozen[0], trained], "lr": 0.1}, {"params": [later]}], lr=0.2)

    def steps() -> None:
        for _ in range(2):
            set_grads([trained, later], make_grads([trained, later]))
            optimizer.step()

    steps()
    optimizer.add_param_group({"params": [frozen[1]]})
    steps()
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2], [3]]
    optimizer.load_state_dict(saved)
    steps()
    assert set(optimizer.state) == {trained, later}
    del optimizer.param_groups[2], optimizer.param_groups[0]["params"][0]
    return optimizer


def test_a_layer_that_is_frozen_quantized_and_trained_again(backend: str) -> None:
    def run(make: Make) -> Optimizer:
        first, second = make_params([(4,), (3,)], torch.float64)
        optimizer = make([first, second], lr=0.1)
        train(optimizer, 2)
        kept = first.data
        first.requires_grad_(False)
        first.grad = None
        first.data = torch.ones(4, dtype=torch.int8)
        for _ in range(2):
            second.grad = torch.ones_like(second)
            optimizer.step()
        first.data = kept
        first.requires_grad_(True)
        train(optimizer, 2)
        return optimizer

    assert_same(*beside_plain(run, backend))


def test_what_is_frozen_is_refused_where_it_could_be_updated() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)
    optimizer = FusedAdamW([param(2), weight])
    weight.requires_grad_(True)
    with pytest.raises(TypeError, match=r"parameter 1 of group 0 is of torch\.complex64"):
        train(optimizer, 1)
    with pytest.raises(TypeError, match=r"parameter 0 of group 0 is of torch\.complex64"):
        FusedAdamW([weight])


# Gradients.

GRADIENTS: dict[str, Callable[[], Tensor]] = {
    "zeros without memory": lambda: torch._efficientzerotensor(1, dtype=torch.float64),
    "an imaginary part of a conjugate": lambda: torch.tensor([1 + 2j], dtype=torch.complex128).conj().imag,
    "negated": lambda: torch._neg_view(torch.full((1,), 3.0, dtype=torch.float64)),
    "expanded": lambda: torch.full((), 3.0, dtype=torch.float64).expand(1),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parity(
    "Parameters and gradients",
    "gradients that are no plain memory: zeros that autograd makes of nothing, views of another sign, expanded ones",
    torch="`RuntimeError`; expanded ones are read as what lies behind them, silently. Right without `fused=True`",
    nexus="read by what they say",
    why="they are copied",
    also=("test_users_groups.py::test_gradients_of_any_kind_on_each_backend",),
)
@of_this_torch
def test_gradients_of_any_kind(kind: str) -> None:
    plain, ours = beside_plain(lambda make: with_gradient(make, kind), "native")
    assert_same(plain, ours)
    if kind != "expanded":
        with pytest.raises(RuntimeError):
            with_gradient(fused_torch, kind)
    else:
        assert not torch.equal(params_of(with_gradient(fused_torch, kind))[1], params_of(plain)[1])


@pytest.mark.parametrize("kind", GRADIENTS)
def test_gradients_of_any_kind_on_each_backend(kind: str, backend: str) -> None:
    assert_same(*beside_plain(lambda make: with_gradient(make, kind), backend))


def with_gradient(make: Make, kind: str) -> Optimizer:
    """Gradients of that kind come between plain ones, so that they are not met by a new plan."""
    own = [param(1), param(4)]
    optimizer = make(own, lr=0.1)
    for step in range(6):
        for each in own:
            each.grad = torch.full_like(each, 0.5 + 0.1 * step)
        if step % 2:
            own[0].grad = GRADIENTS[kind]()
            own[1].grad = GRADIENTS[kind]().expand(4) if kind == "expanded" else own[1].grad
        optimizer.step()
    return optimizer


def test_a_parameter_class_with_a_gradient_of_its_own(backend: str) -> None:
    class Tied(nn.Parameter):
        @property  # type: ignore[misc]
        def grad(self) -> Tensor | None:
            return self.__dict__.get("_own_grad")

        @grad.setter
        def grad(self, value: Tensor | None) -> None:
            self.__dict__["_own_grad"] = value

    def run(make: Make) -> Tensor:
        weight = Tied(torch.ones(3, dtype=torch.float64))
        optimizer = make([weight], lr=0.1)
        for step in range(3):
            weight.grad = torch.full((3,), 1.0 + step, dtype=torch.float64)
            optimizer.step()
        return weight.detach().as_subclass(Tensor)

    torch.testing.assert_close(*beside_plain(run, backend), rtol=1e-13, atol=0)


# Groups by hand.


def append(optimizer: Optimizer, new: nn.Parameter) -> None:
    optimizer.param_groups[0]["params"].append(new)


def as_tuple(optimizer: Optimizer, new: nn.Parameter) -> None:
    optimizer.param_groups[0]["params"] = (*optimizer.param_groups[0]["params"], new)


def groups_as_a_tuple(optimizer: Optimizer, new: nn.Parameter) -> None:
    optimizer.param_groups = tuple(optimizer.param_groups)  # type: ignore[assignment]
    optimizer.param_groups[0]["params"].append(new)


def a_plain_group(optimizer: Optimizer, new: nn.Parameter) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [new]})


def the_same_memory(optimizer: Optimizer, new: nn.Parameter) -> None:
    """As weight_norm and Gaussian splatting do: a new parameter over the memory of one that gets no gradients."""
    old = optimizer.param_groups[0]["params"][0]
    old.grad = None
    old.requires_grad_(False)
    optimizer.param_groups[0]["params"].append(nn.Parameter(old.detach()))
    optimizer.param_groups[0]["params"].append(new)


BY_HAND = [append, as_tuple, groups_as_a_tuple, a_plain_group, the_same_memory]


@pytest.mark.parametrize("named", [False, True], ids=["plain", "named"])
@pytest.mark.parametrize("edit", BY_HAND, ids=lambda edit: edit.__name__)
@pytest.mark.parity(
    "Parameter groups",
    "edited by hand: parameters appended, also to a group with names, `params` or `param_groups` as tuples, a "
    "parameter over the memory of one without a gradient",
    torch="the next step takes what is there",
    nexus="same",
    also=("test_users_groups.py::test_groups_by_hand_on_each_backend",),
)
@of_this_torch
def test_groups_by_hand(edit: Any, named: bool) -> None:
    assert_same(*both(lambda make: by_hand(make, edit, named)))


@pytest.mark.parametrize("edit", BY_HAND, ids=lambda edit: edit.__name__)
def test_groups_by_hand_on_each_backend(edit: Any, backend: str) -> None:
    assert_same(*beside_plain(lambda make: by_hand(make, edit, True), backend))


def by_hand(make: Make, edit: Any, named: bool) -> Optimizer:
    own: list[Any] = make_params([(3,), (2, 2)], torch.float64)
    optimizer = make([(f"w{i}", each) for i, each in enumerate(own)] if named else own, lr=0.1)
    train(optimizer, 2)
    edit(optimizer, nn.Parameter(torch.ones(5, dtype=torch.float64)))
    for _ in range(3):
        optimizer.param_groups[0]["lr"] = numpy.float64(float(optimizer.param_groups[0]["lr"]) * 0.9)
        trained = [each for each in params_of(optimizer) if each.requires_grad]
        set_grads(trained, make_grads(trained))
        optimizer.step()
    optimizer.state_dict()
    return optimizer


def test_params_given_as_an_iterator_may_be_used_by_who_gave_them() -> None:
    def run(make: Make) -> int:
        group: dict[str, Any] = {"params": (each for each in [param(2), param(3)])}
        make([group], lr=0.1)
        return len(list(group["params"]))

    assert both(run) == (2, 2)
    optimizer = FusedAdamW([param(2), param(3)])
    optimizer.param_groups[0]["params"] = iter(params_of(optimizer))
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 2


def test_a_group_of_one_optimizer_is_that_group_in_another() -> None:
    """As horovod's and ignite's wrappers make theirs, under a scheduler that was made before."""

    def run(make: Make) -> Optimizer:
        first = make([param(3)], lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(first, 1, gamma=0.5)
        second = make(first.param_groups)
        first.step()
        for _ in range(3):
            train(second, 1)
            scheduler.step()
        return second

    first, second = both(run)
    assert_same(first, second)
    assert second.param_groups[0]["lr"] == first.param_groups[0]["lr"] == pytest.approx(0.0125)


@pytest.mark.parity(
    "State dicts",
    "the same group twice in `param_groups`",
    torch="a parameter has the number of its first place; a step updates it twice",
    nexus="the same number; a step is `ValueError`",
    why="an update that is made twice is never what was meant",
    also=("test_users_groups.py::test_a_step_with_the_same_group_twice_is_refused",),
)
@of_this_torch
def test_the_same_group_twice() -> None:
    def run(make: Make) -> Any:
        optimizer = make([{"params": [param(2), param(3)]}, {"params": [param(4)]}], lr=0.1)
        train(optimizer, 1)
        optimizer.param_groups.extend(optimizer.param_groups)
        saved = optimizer.state_dict()
        return [group["params"] for group in saved["param_groups"]], sorted(saved["state"])

    first, second = both(run)
    assert first == second == ([[0, 1], [2], [0, 1], [2]], [0, 1, 2])
    peer = fused_torch([param(2)])
    peer.param_groups.extend(peer.param_groups)
    train(peer, 1)
    assert int(state_of(peer)["step"]) == 2
    ours = FusedAdamW([param(2)])
    ours.param_groups.extend(ours.param_groups)
    with pytest.raises(ValueError, match="would be updated twice"):
        train(ours, 1)


def test_a_step_with_the_same_group_twice_is_refused(backend: str) -> None:
    optimizer = FusedAdamW([param(2), param(3)], backend=backend)
    train(optimizer, 1)
    optimizer.param_groups.extend(optimizer.param_groups)
    with pytest.raises(ValueError, match=r"parameter 0 of group 1 is also parameter 0 of group 0"):
        optimizer.step()
    del optimizer.param_groups[1]
    train(optimizer, 1)


FREED: dict[str, Callable[[], Tensor]] = {
    "freed": lambda: torch.empty(0, dtype=torch.float64),
    "packed": lambda: torch.zeros(2, dtype=torch.uint8),
}


@pytest.mark.parametrize("kind", FREED)
@pytest.mark.parity(
    "State dicts",
    "the state of a parameter that is frozen, and whose data is freed or packed, on loading",
    torch="is loaded",
    nexus="same, as it was saved, in its types",
    why="a later thaw goes on with it",
)
@of_this_torch
def test_the_state_of_what_is_frozen_is_loaded_as_it_was_saved(kind: str) -> None:
    def run(make: Make) -> Optimizer:
        weight, other = make_params([(4,), (3,)], torch.float64)
        optimizer = make([weight, other], lr=0.1)
        train(optimizer, 2)
        kept, saved = weight.data, copy.deepcopy(optimizer.state_dict())
        weight.requires_grad_(False)
        weight.grad = None
        weight.data = FREED[kind]()
        if make is FusedAdamW or kind == "freed":  # torch makes the moments integers
            optimizer.load_state_dict(saved)
        weight.data = kept
        weight.requires_grad_(True)
        train(optimizer, 2)
        return optimizer

    assert_same(*both(run))
