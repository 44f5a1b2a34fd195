"""State dicts of other libraries' AdamW, which hold the same numbers under other names or in other places.

The count in the group: apex, TransformerEngine and DeepSpeed. `state1` and `state2` for the moments, of newer
releases in a dict of their own: bitsandbytes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nexus.arguments import shown
from nexus.backends.sharding import local

_BITSANDBYTES = {"state1": "exp_avg", "state2": "exp_avg_sq"}
_BITSANDBYTES_OWN = "__bnb_optimizer_quant_state__"
"""Where newer releases of bitsandbytes save what no wrapper is to cast: the moments, too."""


def as_torch_saves(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict as `torch.optim.AdamW` would have saved these numbers; what is given stays as it is.

    Raises:
        ValueError: they are other numbers: 8-bit moments, or an Adam without bias correction.
    """
    groups, states = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, list) or not isinstance(states, dict):
        return state_dict  # as what, is asked later
    states = dict(states)
    groups = [_translated(group, states, f"param_groups[{index}]") for index, group in enumerate(groups)]
    return {**state_dict, "param_groups": groups, "state": states}


def _translated(group: Any, states: dict[Any, Any], where: str) -> Any:
    """A saved group, and in `states` those of its parameters."""
    if not isinstance(group, dict) or not isinstance(group.get("params"), (list, tuple)):
        return group
    for name in ("bias_correction", "correct_bias"):
        if name in group and not group[name]:
            raise ValueError(
                f"{where} of the loaded state dict has {name}={group[name]!r}, and FusedAdamW corrects the bias of "
                "its moments. Go on with the optimizer that saved it, or make the state anew"
            )
    count = group.get("step")
    moved = False
    for key in group["params"]:
        state = states.get(key) if isinstance(key, (int, str)) else None  # what else it is, is refused later
        if not isinstance(state, dict) or not state:
            continue
        if isinstance(state.get(_BITSANDBYTES_OWN), dict):
            own = state[_BITSANDBYTES_OWN]
            state = {name: value for name, value in (state | own).items() if name != _BITSANDBYTES_OWN}
        _check_codes(state, f"state[{key!r}] of the loaded state dict")
        renamed = {_BITSANDBYTES.get(name, name): value for name, value in state.items()}
        if renamed.keys() != state.keys():
            _check_32_bits(state, f"state[{key!r}] of the loaded state dict")
        if "step" not in renamed and "exp_avg" in renamed and count is not None:
            renamed["step"], moved = count, True
        states[key] = renamed
    return {name: value for name, value in group.items() if name != "step"} if moved else group


def _check_codes(state: dict[str, Any], where: str) -> None:
    """Refuse what another library has stored in fewer bits, each in its own way."""
    flash = [name for name in state if name == "error_bits" or str(name).endswith("::quantized")]
    if flash:
        raise ValueError(
            f"{where} is FlashOptim's, with {shown(flash[0])}, whose codes FusedAdamW does not read: save it with "
            "compress_state_dict=False, and delete error_bits, to go on from the parameters as they are; "
            "optimizer.load_master() takes float32 weights"
        )
    for name, value in state.items():
        part = local(value) if isinstance(value, Tensor) else None
        if part is not None and is_traceable_wrapper_subclass(part):
            raise ValueError(
                f"{where} has {name} as a {type(part).__name__}, whose codes FusedAdamW does not read: put "
                f"{name}.dequantize() into the state dict, as torchao's tensors have it, or what else gives float32"
            )


def _check_32_bits(state: dict[str, Any], where: str) -> None:
    for name in _BITSANDBYTES:
        value = state.get(name)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = str(value.dtype) if isinstance(value, Tensor) else shown(value)
            raise ValueError(
                f"{where} is of bitsandbytes, with {name} of {kind}: moments in 8 bits are codes, which FusedAdamW "
                "does not read. Train on with bitsandbytes, or save from an optimizer with optim_bits=32"
            )
