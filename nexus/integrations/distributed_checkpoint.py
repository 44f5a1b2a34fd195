"""What `torch.distributed.checkpoint` does with an optimizer. Imports no `torch.distributed`."""

from __future__ import annotations

from types import FrameType


def is_among_callers(frame: FrameType | None) -> bool:
    """Whether `torch.distributed.checkpoint` makes the step that `frame` runs in.

    It steps an optimizer that has no state, at rate 0 and over gradients of zeros, to have the state made. Its frame
    among the callers shows this whatever other processes do or have imported.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            return True
        frame = frame.f_back
    return False
