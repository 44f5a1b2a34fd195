"""Who else looks at a step: what reads or clips gradients before the update, and what traces or compiles it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.optim.optimizer as torch_optimizer
from torch._C._functorch import TransformType, peek_interpreter_stack

from nexus.integrations import accelerate

if TYPE_CHECKING:
    from nexus.optim.fused_adamw import FusedAdamW


Step = TypeVar("Step", bound=Callable[..., Any])

_own_steps: list[Callable[..., Any]] = []


def own_step(step: Step) -> Step:
    """Marks `FusedAdamW.step`, as it is defined, to be told from what overrides it."""
    _own_steps.append(step)
    return step


def sees_gradients_first(optimizer: FusedAdamW, asking: FrameType) -> bool:
    """Whether somebody may look at the gradients before the update, and wants them unscaled by then.

    That is a subclass that overrides `step`, a method put in its place, or a hook. A wrapper that passes on what it
    is asked counts, too: `GradScaler` would leave its scale with the wrapper, where the update does not find it.

    Args:
        optimizer: the optimizer.
        asking: the frame of who asks `_step_supports_amp_scaling`.
    """
    step = optimizer.__dict__.get("step")
    if accelerate.is_watched(step):
        # So GradScaler decides. float16 gradients are left to the update, since GradScaler refuses to unscale them.
        grads = [param.grad for group in optimizer.param_groups for param in group["params"]]
        return not any(grad is not None and grad.dtype == torch.float16 for grad in grads)
    if type(optimizer).step not in _own_steps or not (step is None or _steps_alone(step)):
        return True
    hooks = (*optimizer._optimizer_step_pre_hooks.values(), *torch_optimizer._global_optimizer_pre_hooks.values())
    return any(getattr(hook, "looks_at_gradients", True) for hook in hooks) or asking.f_code.co_name == "__getattr__"


def _steps_alone(step: Any) -> bool:
    """Whether what was put in the place of `step` is that very method, or a scheduler's wrapper of it."""
    if getattr(step, "__func__", None) in _own_steps:
        return True
    code = getattr(step, "__code__", None)  # not the names, which functools.wraps copies
    return code is not None and code.co_filename == _SCHEDULERS and step.__wrapped__ in _own_steps


_SCHEDULERS = torch.optim.lr_scheduler.__file__


def runs_hooks(optimizer: FusedAdamW) -> bool:
    """Whether `FusedAdamW.step` is to run the hooks: not if torch has wrapped a subclass's `step`, which calls it."""
    code = getattr(type(optimizer).step, "__code__", None)
    return code is None or code.co_filename != torch_optimizer.__file__


def refuse_traces() -> None:
    """Raise where a tracer is at work: it records the operations of torch, of which the kernels are none.

    Raises:
        RuntimeError: with the remedy.
    """
    before_dispatch = torch._ops._len_torch_dispatch_stack_pre_dispatch()  # type: ignore[no-untyped-call]
    if not torch._C._len_torch_dispatch_stack() and not before_dispatch and peek_interpreter_stack() is None:
        return
    keys = torch._C._TorchDispatchModeKey
    modes = [torch._C._get_dispatch_mode(key) for key in (keys.PROXY, keys.FUNCTIONAL)]
    if before_dispatch:
        before = torch._ops._get_dispatch_mode_pre_dispatch
        modes += [before(key) for key in (keys.PROXY, keys.FUNCTIONAL)]  # type: ignore[no-untyped-call]
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if any(mode is not None for mode in modes) or any(level.key() == TransformType.Functionalize for level in levels):
        raise RuntimeError(
            "FusedAdamW.step() runs in a function that is traced (by make_fx or functionalize). A tracer sees "
            "nothing of what the kernels write, and the trace would train nothing. Step outside of the traced "
            "function, or make the optimizer with backend='reference', whose step is made of PyTorch's operations"
        )


def refuse_fake_mode() -> None:
    """Raise where state would have no memory and parameters have some: kernels would write to none.

    Raises:
        RuntimeError: with the remedy.
    """
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise RuntimeError(
            "FusedAdamW would make its state under FakeTensorMode, for parameters that were made outside of it. Step "
            "outside of the mode; or make the model and the optimizer within it, to estimate memory"
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
