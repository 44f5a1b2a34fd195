"""Parameters that are not trained: of any kind, in the constructor, in steps and in state dicts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import make_grads, make_params, set_grads
from side_by_side import Make, assert_same, both, fused_torch, param, train
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import return_and_correct_aliasing

from nexus.optim import FusedAdamW


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
)
def test_what_is_frozen(kind: str, backend: str) -> None:
    def run(make: Make) -> Optimizer:
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

    assert_same(*both(run, backend))


def test_what_is_frozen_is_refused_where_it_could_be_updated() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)
    optimizer = FusedAdamW([param(2), weight])
    weight.requires_grad_(True)
    with pytest.raises(TypeError, match=r"parameter 1 of group 0 is of torch\.complex64"):
        train(optimizer, 1)


HELD: dict[str, Callable[[], Tensor]] = {
    "freed": lambda: torch.empty(0, dtype=torch.float64),
    "packed": lambda: torch.zeros(2, dtype=torch.uint8),
    "quantized": lambda: torch.ones(4, dtype=torch.int8),
}


@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parity(
    "State dicts",
    "the state of a parameter that is frozen, and whose data is freed or packed, on loading",
    torch="is loaded",
    nexus="same, as it was saved, in its types",
    why="a later thaw goes on with it",
)
def test_the_state_of_what_is_frozen_is_loaded_as_it_was_saved(kind: str, backend: str) -> None:
    def run(make: Make) -> Optimizer:
        weight, other = make_params([(4,), (3,)], torch.float64)
        optimizer = make([weight, other], lr=0.1)
        train(optimizer, 2)
        weight.requires_grad_(False)
        weight.grad = None
        kept, weight.data = weight.data, HELD[kind]()
        for _ in range(2):
            other.grad = torch.ones_like(other)
            optimizer.step()
        if make is not fused_torch or kind == "freed":  # torch makes the moments integers
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        weight.data = kept
        weight.requires_grad_(True)
        train(optimizer, 2)
        return optimizer

    assert_same(*both(run, backend))
