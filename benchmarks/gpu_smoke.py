"""The first minute on a GPU: what has to work before anything else is worth running. Printed as it goes.

python -m benchmarks.gpu_smoke FILE

Steps of each backend beside the reference, a captured step with attention, and a capture that CUDA ends, after which
another has to succeed. A part that fails does not keep the next from running; FILE says what became of each.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu_checks import ON_GPU, beside_reference
from nexus import backends
from nexus.optim import FusedAdamW
from nexus.optim.storage import MODES
from nexus.schedules import WSD
from nexus.training import capture_train_step

CALLS = 6  # of a captured step: three are plain
STEPS = (("mixed", "mixed", {}), *((mode, str(dtype).removeprefix("torch."), each) for mode, dtype, each in MODES))
"""What is stored, in words: the parameters' dtype, and the options of a group."""


class Attention(nn.Module):
    """A layer of self-attention of four heads."""

    def __init__(self) -> None:
        super().__init__()
        # Without a bias: that of a key has no gradient but rounding, which Adam would scale up.
        self.project = nn.Linear(64, 192, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def captured_attention(device: str, backend: str, disturb: Callable[[int], None] = lambda call: None) -> float:
    """The largest difference of parameters after captured steps from those after plain ones."""
    ends = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = Attention().to(device)
        optimizer = FusedAdamW(
            model.parameters(),
            lr=WSD(warmup_steps=2, stable_steps=None, decay_steps=1, peak_lr=1e-2),
            max_grad_norm=1.0,
            backend=backend,
        )

        def train_step(x: Tensor, model: nn.Module = model, optimizer: FusedAdamW = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(x).square().mean()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            return loss

        step = capture_train_step(train_step, optimizer) if captured else train_step
        for call in range(CALLS):
            if captured:
                disturb(call)
            step(torch.randn(2, 32, 64, device=device))
        ends.append([param.detach().clone() for param in model.parameters()])
    difference = max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True))
    if difference > 1e-6:  # bits are equal, unless the kernel of attention adds in an order that varies
        raise RuntimeError(f"captured steps end {difference:.1e} away from plain ones")
    return difference


def after_a_broken_capture(device: str, backend: str) -> float:
    """The same, where a capture that CUDA ends, since it waits for the device, comes before that of the step."""

    def disturb(call: int) -> None:
        if call != 2:  # while the other captured step makes its plain ones
            return
        weight = nn.Parameter(torch.ones(4, device=device))
        optimizer = FusedAdamW([weight], backend=backend)
        calls = 0

        def train_step() -> None:
            nonlocal calls
            calls += 1
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            if calls == 4 and torch.cuda.is_available():  # in the capture alone
                torch.cuda.synchronize()

        step = capture_train_step(train_step, optimizer)
        for _ in range(3):
            step()
        try:
            step()
        except RuntimeError:
            torch.cuda.empty_cache()  # which an allocator that is still in a capture refuses
        else:
            if torch.cuda.is_available():
                raise RuntimeError("a capture that waits for the device was not ended")

    return captured_attention(device, backend, disturb)


def smoke(device: str = "cuda", names: Sequence[str] = ON_GPU) -> dict[str, str]:
    """What became of each part, in words: empty where it passed."""
    available = [info.name for info in backends.describe() if info.name in names and info.available]
    parts: dict[str, Callable[[], object]] = {}
    for name in available:
        for stored, dtype, options in STEPS:
            parts[f"{name}: a step, {stored}"] = lambda name=name, dtype=dtype, options=options: beside_reference(
                device, name, dtype, options
            )
        parts[f"{name}: captured attention"] = lambda name=name: captured_attention(device, name)
        parts[f"{name}: after a broken capture"] = lambda name=name: after_a_broken_capture(device, name)
    found = {name: "not available" for name in names if name not in available}
    for what, part in parts.items():
        started, found[what] = time.monotonic(), ""
        try:
            part()
        except Exception as error:
            found[what] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        print(f"{what}: {found[what] or 'passed'} ({time.monotonic() - started:.1f} s)", flush=True)
    return found


if __name__ == "__main__":
    outcome = smoke()
    Path(sys.argv[1]).write_text(json.dumps(outcome, indent=1) + "\n", encoding="utf-8")
    sys.exit(any(outcome.values()))
