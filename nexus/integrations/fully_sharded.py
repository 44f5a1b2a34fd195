"""What `torch.distributed.fsdp.fully_shard` keeps of parameters. Imports no `torch.distributed`."""

from __future__ import annotations

import sys
from typing import Any


def reshard() -> None:
    """Let every module of `fully_shard` gather its parameters anew in its next forward pass.

    A forward pass without a backward pass leaves the parameters of the outermost one gathered, and the next forward
    pass would use what they were then.
    """
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    if kind is None:
        return
    for module in list(sys.modules["torch.distributed._composable_state"]._module_state_mapping):
        if isinstance(module, kind):
            module.reshard()
