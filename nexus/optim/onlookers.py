"""Who else looks at a step: what reads or clips gradients before the update, and what traces or compiles it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.optim.optimizer as torch_optimizer
from torch._C._functorch import TransformType, peek_interpreter_stack

if TYPE_CHECKING:
    from nexus.optim.fused_adamw import FusedAdamW


_FUSED_ADAMW = "nexus.optim.fused_adamw"  # the module of the step that is not overridden


def sees_gradients_first(optimizer: FusedAdamW, asking: FrameType) -> bool:
    """Whether somebody may look at the gradients before the update, and wants them unscaled by then.

    That is a subclass that overrides `step`, a method put in its place, or a hook. A wrapper that passes on what it
    is asked counts, too: `GradScaler` would leave its scale with the wrapper, where the update does not find it.

    Args:
        optimizer: the optimizer.
        asking: the frame of who asks `_step_supports_amp_scaling`.
    """
    step, own = optimizer.__dict__.get("step"), _own_step(optimizer)
    if getattr(step, "__module__", None) == "accelerate.optimizer":
        # It takes a step for skipped if GradScaler does not call it, so GradScaler decides. float16 gradients are
        # left to the update, since GradScaler refuses to unscale them.
        grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
        return not any(grad is not None and grad.dtype == torch.float16 for grad in grads)
    is_replaced = step is not None and getattr(step, "__module__", None) != _FUSED_ADAMW
    if not own or (is_replaced and not hasattr(step, "_wrapped_by_lr_sched")):
        return True
    hooks = (*optimizer._optimizer_step_pre_hooks.values(), *torch_optimizer._global_optimizer_pre_hooks.values())
    return any(getattr(hook, "looks_at_gradients", True) for hook in hooks) or asking.f_code.co_name == "__getattr__"


def runs_hooks(optimizer: FusedAdamW) -> bool:
    """Whether `FusedAdamW.step` is to run the hooks: not if torch has wrapped a subclass's `step`, which calls it."""
    return _own_step(optimizer) or not getattr(type(optimizer).step, "hooked", False)


def _own_step(optimizer: FusedAdamW) -> bool:
    return getattr(type(optimizer).step, "__module__", None) == _FUSED_ADAMW


def refuse_traces() -> None:
    """Raise where a tracer is at work: it records the operations of torch, of which the kernels are none.

    Raises:
        RuntimeError: with the remedy.
    """
    if not torch._C._len_torch_dispatch_stack() and peek_interpreter_stack() is None:
        return
    keys = torch._C._TorchDispatchModeKey
    modes = (torch._C._get_dispatch_mode(key) for key in (keys.PROXY, keys.FUNCTIONAL))
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if any(mode is not None for mode in modes) or any(level.key() == TransformType.Functionalize for level in levels):
        raise RuntimeError(
            "FusedAdamW.step() runs in a function that is traced (by make_fx or functionalize). A tracer sees "
            "nothing of what the kernels write, and the trace would train nothing. Step outside of the traced "
            "function, or make the optimizer with backend='reference', whose step is made of PyTorch's operations"
        )


def step_outside(optimizer: FusedAdamW, closure: Callable[[], Any] | None) -> Any:
    """A step that a compiled function makes; see `mark_for_dynamo`."""
    return optimizer.step(closure)


@functools.cache
def mark_for_dynamo() -> None:
    """Keep Dynamo out of the step, whose kernels it cannot see; a compiled function is in two parts around it.

    Once there is an optimizer, and not at import: this loads Dynamo, for about a second, as torch's `Optimizer` does
    in any case when the first is made. A process that only imports this, such as a spawned worker, goes without.
    """
    global step_outside
    reason = "a compiler cannot see what the kernels of FusedAdamW.step write; leave fullgraph=True out"
    step_outside = torch.compiler.disable(step_outside, reason=reason)  # type: ignore[no-untyped-call]
