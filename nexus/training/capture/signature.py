"""Inputs and outputs of a train step: pytrees of tensors, checked, and what makes two calls alike."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nexus.arguments import shown


class Inputs(NamedTuple):
    """The arguments of a call, taken apart.

    Attributes:
        signature: equal for calls that one graph can serve.
        leaves: tensors and constants, in the order of the tree.
        tree: puts leaves together to (args, kwargs); None where they are args as they stand.
    """

    signature: Hashable
    leaves: list[Any]
    tree: pytree.TreeSpec | None

    @property
    def tensors(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs), with `tensors` in the places of those that were given."""
        others = iter(tensors)
        leaves = [next(others) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        if self.tree is None:
            return tuple(leaves), {}
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return args, kwargs


def read_inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """Take the arguments of a call apart.

    Raises:
        TypeError: a leaf is neither a dense tensor nor hashable; it is named.
        ValueError: a tensor requires a gradient, or has no data.
    """
    leaves: list[Any]
    tree: pytree.TreeSpec | None
    if not kwargs and all(type(arg) is Tensor for arg in args):  # no tree to speak of, and quicker
        leaves, tree = list(args), None
    else:
        leaves, tree = pytree.tree_flatten((args, kwargs))
    signature: list[Hashable] = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if leaf.requires_grad or leaf.layout != torch.strided or leaf.device.type == "meta":
                _refuse_tensor(_name_of_input(args, kwargs, index), leaf)
            strides = tuple(s if n > 1 else 0 for n, s in zip(leaf.shape, leaf.stride(), strict=True))
            signature.append((leaf.shape, leaf.dtype, strides))
        else:
            try:
                hash(leaf)
            except TypeError:
                raise TypeError(
                    f"{_name_of_input(args, kwargs, index)} must be a tensor or hashable, got {shown(leaf)}: a graph "
                    "is kept for each value of what is not a tensor"
                ) from None
            signature.append((type(leaf), leaf))  # 1, 1.0 and True are equal, and not alike
    return Inputs((tree, *signature), leaves, tree)


def _name_of_input(args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> str:
    path, _ = pytree.tree_flatten_with_path((args, kwargs))[0][index]
    return ("args" if path[0] == pytree.SequenceKey(0) else "kwargs") + pytree.keystr(path[1:])


def _refuse_tensor(name: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} has the layout {tensor.layout}; a train step takes dense (strided) tensors")
    if tensor.requires_grad:
        raise ValueError(
            f"{name} requires a gradient, which would not come back out of the step: pass {name}.detach(), and call "
            "requires_grad_() in the step"
        )
    raise ValueError(f"{name} is on the meta device, and has no data")


class Outputs(NamedTuple):
    """What a train step returned, taken apart. Tensors are detached."""

    tensors: list[Tensor]
    tree: pytree.TreeSpec | None  # None: the step returned None

    def value(self, clone: bool) -> Any:
        """What the step returned, put together again."""
        tensors = [tensor.clone() for tensor in self.tensors] if clone else self.tensors
        return None if self.tree is None else pytree.tree_unflatten(tensors, self.tree)


def read_outputs(result: Any) -> Outputs:
    """Take apart what a train step returned.

    Raises:
        TypeError: something in it is not a tensor; it is named.
    """
    if result is None:
        return Outputs([], None)
    leaves, tree = pytree.tree_flatten(result)
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            path, _ = pytree.tree_flatten_with_path(result)[0][index]
            raise TypeError(
                f"output{pytree.keystr(path)} of the train step must be a tensor, got {shown(leaf)}: a graph returns "
                "what lies on the device. Leave it out, or return a tensor"
            )
    return Outputs([leaf.detach() for leaf in leaves], tree)
