"""Updates in the backward pass: gradients are never all there at once."""

from __future__ import annotations

import json
import runpy
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus.optim import FusedAdamW
from nexus.training import step_in_backward


@pytest.mark.parametrize("in_backward", [False, True])
def test_one_gradient_at_a_time(backend: str, in_backward: bool) -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(10)))
    optimizer = FusedAdamW(model.parameters(), backend=backend)
    params = list(model.parameters())
    sizes: list[int] = []
    storages: list[Any] = []

    def look(param: Tensor) -> None:
        sizes.append(sum(param.grad.nbytes for param in params if param.grad is not None))
        storages.append(weakref.ref(param.grad.untyped_storage()))

    for param in params:
        param.register_post_accumulate_grad_hook(look)  # before the one that steps
    if in_backward:
        step_in_backward(model, optimizer)
    for _ in range(3):
        model(torch.ones(2, 16)).sum().backward()
        assert [storage() is None for storage in storages] == [in_backward] * len(params)
        assert all((param.grad is None) == in_backward for param in params)
        storages.clear()
        optimizer.step()
        optimizer.zero_grad()
    assert max(sizes) == (16 * 16 * 4 if in_backward else 10 * (16 * 16 + 16) * 4)  # the largest alone, or all


@pytest.mark.skipif(sys.platform != "linux", reason="reads what glibc was told to give back")
def test_the_process_takes_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "backward_memory.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--width", "1024", "--layers", "10", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):  # which measures in other processes
        runpy.run_path(str(script), run_name="__main__")
    (path,) = tmp_path.iterdir()
    measured = json.loads(path.read_text("utf-8"))
    plain, in_backward = (row["peak_mib"] for row in measured["rows"])
    assert measured["gradients_mib"] == 40
    assert plain - in_backward > 25


@pytest.mark.gpu
def test_peak_memory_on_a_gpu() -> None:
    def peak(in_backward: bool) -> int:
        model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16))).cuda()
        optimizer = FusedAdamW(model.parameters())
        handle = step_in_backward(model, optimizer) if in_backward else None
        for step in range(3):
            if step == 2:
                torch.cuda.reset_peak_memory_stats()
            model(torch.ones(2, 2048, device="cuda")).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        if handle is not None:
            handle.remove()
        return torch.cuda.max_memory_allocated()

    of_one = 2048 * 2048 * 4
    assert peak(False) - peak(True) > 12 * of_one
