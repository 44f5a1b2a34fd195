"""Updates in the backward pass: gradients are never all there at once, and all is freed with the model."""

from __future__ import annotations

import gc
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


def test_one_gradient_at_a_time(backend: str) -> None:
    most = []
    for in_backward in (False, True):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(10)))
        optimizer = FusedAdamW(model.parameters(), backend=backend)
        params = list(model.parameters())
        seen: list[int] = []

        def look(_: Tensor, params: list[nn.Parameter] = params, seen: list[int] = seen) -> None:
            seen.append(sum(param.grad.nbytes for param in params if param.grad is not None))

        for param in params:
            param.register_post_accumulate_grad_hook(look)  # before the one that steps
        handle = step_in_backward(model, optimizer) if in_backward else None
        for _ in range(3):
            model(torch.ones(2, 16)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        most.append(max(seen))
        assert handle is None or all(param.grad is None for param in params)
    assert most == [10 * (16 * 16 + 16) * 4, 16 * 16 * 4]  # all, and the largest alone


def test_gradients_are_freed_at_once(backend: str) -> None:
    model = nn.Linear(16, 16)
    optimizer = FusedAdamW(model.parameters(), backend=backend)
    graves: list[Any] = []
    model.weight.register_post_accumulate_grad_hook(
        lambda param: graves.append(weakref.ref(param.grad.untyped_storage()))
    )
    with step_in_backward(model, optimizer):
        for _ in range(3):
            model(torch.ones(2, 16)).sum().backward()
            assert graves.pop()() is None
            optimizer.step()


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


def test_all_is_freed_with_the_model(backend: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = FusedAdamW(model.parameters(), backend=backend)
    handle = step_in_backward(model, optimizer)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    graves = [weakref.ref(each) for each in (model, optimizer, handle, model[0].weight)]
    del model, optimizer, handle
    gc.collect()
    assert [grave() for grave in graves] == [None] * 4
