"""The parameters of a model in groups: without weight decay where it does harm, and with rates by depth."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from nexus.arguments import check_fraction, check_number, shown
from nexus.schedules import Schedule

NO_DECAY = ("bias", "norm", "embedding")


class ParamGroups(list[dict[str, Any]]):
    """Groups for an optimizer, a list of dicts as `torch.optim` takes them. Printed, it is a table."""

    def __repr__(self) -> str:
        lines = [f"{'tensors':>7}  {'elements':>13}  options; first and last parameter"]
        for group in self:
            tensors = [param for _, param in group["params"]]
            options = ", ".join(f"{name}={_written(value)}" for name, value in group.items() if name != "params")
            names = dict.fromkeys((group["params"][0][0], group["params"][-1][0]))
            elements = sum(param.numel() for param in tensors)
            lines.append(f"{len(tensors):7,}  {elements:13,}  {options}; {', '.join(names)}")
        return "\n".join(lines)


def _written(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 1e-2,
    no_decay: tuple[str, ...] = ("bias", "norm"),
    lr: float | None = None,
    layer_decay: float = 1.0,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> ParamGroups:
    r"""The trained parameters of a model in groups of equal options, with their names.

    Args:
        model: of which parameters with `requires_grad=False` are left out.
        weight_decay: of all parameters but those that `no_decay` names.
        no_decay: any of `"bias"` (parameters of one dimension with "bias" in their name), `"norm"` (those of a module
            whose class has "Norm" in its name) and `"embedding"` (those of `nn.Embedding`), which get a weight decay
            of 0.
        lr: the rate of the top layer, where it is a float. A `Schedule` is the optimizer's: leave this out, and each
            group gets an `lr_scale`, which multiplies it.
        layer_decay: with :math:`d` this number, and :math:`L` blocks, the rate of block :math:`i` (from 1) is
            multiplied by :math:`d^{L + 1 - i}`; that of what comes before the first block (embeddings) by
            :math:`d^{L + 1}`, and that of what comes after the last one (the head) by 1. Blocks are the modules of
            one class in a row, in an `nn.ModuleList` or `nn.Sequential`; where these hold such rows themselves, as
            the stages of Swin or ResNet do, those of all. The blocks of a decoder are counted on from those of its
            encoder. What lies between two blocks belongs to the first of them. Source: Clark et al. 2020, ELECTRA,
            arXiv:2003.10555; Bao et al. 2022, BEiT, arXiv:2106.08254.
        overrides: options for the parameters whose name matches a pattern, as in `{"head.*": {"lr_scale": 10.0}}`;
            of several that match, the last one counts. An `lr` or `lr_scale` here is not multiplied by anything.

    Returns:
        A list of groups, in the order of their first parameters.

    Raises:
        TypeError, ValueError: an argument is none, the model has no trained parameter, a pattern matches none, or
            `layer_decay` was asked for and no row of blocks is there.

    >>> import torch
    >>> from nexus.optim import FusedAdamW, param_groups
    >>> from nexus.schedules import Cosine
    >>> block = [torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)) for _ in range(2)]
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Sequential(*block), torch.nn.Linear(8, 1))
    >>> groups = param_groups(model, weight_decay=0.1, layer_decay=0.5)
    >>> groups
    tensors       elements  options; first and last parameter
          1             32  weight_decay=0.1, lr_scale=0.125; 0.weight
          1              8  weight_decay=0, lr_scale=0.125; 0.bias
          3             24  weight_decay=0, lr_scale=0.25; 1.0.0.weight, 1.0.1.bias
          1             64  weight_decay=0.1, lr_scale=0.25; 1.0.1.weight
          3             24  weight_decay=0, lr_scale=0.5; 1.1.0.weight, 1.1.1.bias
          1             64  weight_decay=0.1, lr_scale=0.5; 1.1.1.weight
          1              8  weight_decay=0.1, lr_scale=1; 2.weight
          1              1  weight_decay=0, lr_scale=1; 2.bias
    >>> optimizer = FusedAdamW(groups, lr=Cosine(peak_lr=1e-3, total_steps=100))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {shown(model)}")
    weight_decay = check_number("weight_decay", weight_decay)
    layer_decay = check_fraction("layer_decay", layer_decay, positive=True)
    if isinstance(lr, Schedule):
        raise TypeError(f"lr must be a number or None, got {shown(lr)}; give the Schedule to FusedAdamW, as lr")
    lr = None if lr is None else check_number("lr", lr)
    if isinstance(no_decay, str) or not set(no_decay) <= set(NO_DECAY):
        raise ValueError(f"no_decay must be a tuple of some of {NO_DECAY}, got {shown(no_decay)}")
    overrides = {} if overrides is None else overrides
    if not isinstance(overrides, Mapping) or not all(isinstance(own, Mapping) for own in overrides.values()):
        example = {"head.*": {"lr_scale": 10.0}}
        raise TypeError(f"overrides must be a dict of dicts, as in {example}, got {shown(overrides)}")
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trained:
        raise ValueError("model has no parameter with requires_grad=True, so there is nothing to optimize")
    for pattern in overrides:
        if not any(fnmatchcase(name, pattern) for name, _ in trained):
            raise ValueError(
                f"overrides has {pattern!r}, which no trained parameter matches; one is {trained[0][0]!r}"
            )
    spared = _spared(model, no_decay)
    powers = _powers(model) if layer_decay != 1.0 else {}
    groups: dict[tuple[tuple[str, Any], ...], list[tuple[str, Tensor]]] = {}
    for name, param in trained:
        scale = layer_decay ** powers.get(param, 0)
        options: dict[str, Any] = {"weight_decay": 0.0 if param in spared else weight_decay}
        if lr is not None:
            options["lr"] = lr * scale
        elif layer_decay != 1.0:
            options["lr_scale"] = scale
        for pattern, own in overrides.items():
            if fnmatchcase(name, pattern):
                options |= own
        groups.setdefault(tuple(options.items()), []).append((name, param))
    return ParamGroups({"params": params, **dict(options)} for options, params in groups.items())


def _spared(model: nn.Module, no_decay: tuple[str, ...]) -> set[Tensor]:
    """The parameters without weight decay."""
    spared: set[Tensor] = set()
    for module in model.modules():
        is_spared = ("norm" in no_decay and _is_norm(module)) or (
            "embedding" in no_decay and isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        )
        for name, param in module.named_parameters(recurse=False):
            if is_spared or ("bias" in no_decay and "bias" in name and param.dim() < 2):
                spared.add(param)
    return spared


def _powers(model: nn.Module) -> dict[Tensor, int]:
    """How often the rate of each parameter is multiplied: once for each block from its own on."""
    powers: dict[Tensor, int] = {}
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(
            "layer_decay needs blocks: an nn.ModuleList or nn.Sequential of two or more modules of one class; this "
            f"{type(model).__name__} has none. Give overrides={{pattern: {{'lr_scale': ...}}}} in its place"
        )
    inside = {param: len(blocks) - place for place, block in enumerate(blocks) for param in block.parameters()}
    power = len(blocks) + 1
    for param in model.parameters():
        power = inside.get(param, power)
        powers.setdefault(param, power)
    return powers | {param: 0 for param, power in powers.items() if power == 1 and param not in inside}


def _blocks(module: nn.Module, *, within: bool = False) -> list[nn.Module]:
    """The blocks of a model, in the order in which it holds them; of a row of stages, the blocks of all."""
    children = list(module.children())
    is_row = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1
    same = is_row and len({type(child) for child in children}) == 1 and any(True for _ in module.parameters())
    if not same or (within and not all(map(_is_residual, children))):
        return [block for child in children for block in _blocks(child, within=within)]
    deeper = [_blocks(child, within=True) for child in children]
    return [block for each in deeper for block in each] if all(deeper) else children


def _is_residual(module: nn.Module) -> bool:
    """Whether a module within a row may be a block: an expert has no norm, and a convolution's norm one matrix."""
    matrices = sum(param.dim() > 1 for param in module.parameters())
    return matrices > 1 and any(_is_norm(each) for each in module.modules())


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()
