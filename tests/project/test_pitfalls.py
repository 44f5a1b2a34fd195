"""Every line of docs/pitfalls.md has tests that exist; and those of its tests that belong nowhere else."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path

import cuda_on_cpu
import pytest
import torch
from cases import BLOCK, CHUNK, SHAPES
from references import Float64AdamW, assert_same_run, make_grads, make_params, set_grads, step_both

from nexus.optim import FusedAdamW
from nexus.schedules import WSD, Cosine, CosineRestarts, evaluate

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "pitfalls.md"


def rows() -> Iterator[tuple[str, str]]:
    """(what goes wrong, what keeps it out)."""
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and not cells[0].startswith(("**", "---", "what goes wrong")):
            yield cells[0], cells[-1]


def test_every_pitfall_has_tests_that_exist() -> None:
    found = list(rows())
    paths = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(found) >= 40
    for what, kept_out in found:
        names = re.findall(r"`(test_\w+\.py)::(test_\w+)`", kept_out)
        assert names, what
        assert len(names) == kept_out.count("::"), what
        for file, test in names:
            text = paths[file].read_text("utf-8")
            assert re.search(rf"^ *def {test}\(", text, re.MULTILINE), f"{what}: {file}::{test}"


def test_the_sizes_that_peers_got_wrong_are_among_those_of_the_tests() -> None:
    assert {(), (0,), (1,), *((size + by,) for size in (BLOCK, CHUNK) for by in (-1, 0, 1))} <= set(SHAPES)
    assert any(shape and shape[0] > CHUNK and shape[0] % 2 for shape in SHAPES)


def test_restarts_are_exact_at_a_hundred_million_steps(backend: str) -> None:
    # Without an integer remainder, the place in a cycle is off by whole steps here.
    for length, start in ((997, 10**8), (1000, 2**40 + 1)):
        schedule = CosineRestarts(peak_lr=1.0, cycle_length=length)
        steps = torch.arange(start, start + 2 * length)
        first = torch.tensor([schedule(step % length) for step in steps.tolist()], dtype=torch.float64)
        torch.testing.assert_close(evaluate(schedule, steps, backend=backend), first, rtol=1e-14, atol=1e-14)


def test_decay_and_update_of_a_half_are_rounded_together(backend: str) -> None:
    # From 1 down, bfloat16 goes on by 2**-8. Less than half of that is lost; two halves that are more are not.
    def after(weight_decay: float) -> float:
        param = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        optimizer = FusedAdamW([param], lr=1.5e-3, weight_decay=weight_decay, eps=0.0, backend=backend)
        param.grad = torch.ones_like(param)
        optimizer.step()
        return param[0].item()

    assert after(0.0) == 1.0
    assert after(1.0) == 1.0 - 2**-8


def test_a_load_takes_over_no_implementation(backend: str) -> None:
    params = make_params([(3,)])
    peer = torch.optim.AdamW(params, lr=0.5, capturable=False, foreach=True)
    set_grads(params, make_grads(params))
    peer.step()
    optimizer, reference = FusedAdamW(params, backend=backend), Float64AdamW(params)
    keys = set(optimizer.param_groups[0])
    optimizer.load_state_dict(copy.deepcopy(peer.state_dict()))
    assert set(optimizer.param_groups[0]) == keys
    assert optimizer.backend == backend
    reference.optimizer.load_state_dict(copy.deepcopy(peer.state_dict()))
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)


def test_rates_for_a_log_are_floats(backend: str) -> None:
    schedule = WSD(warmup_steps=2, stable_steps=5, decay_steps=5, peak_lr=1e-3)
    params = make_params([(3,)])
    optimizer = FusedAdamW(params, lr=schedule, weight_decay=Cosine(peak_lr=0.1, total_steps=9), backend=backend)
    history = optimizer.history(10)
    for _ in range(3):
        set_grads(params, make_grads(params))
        optimizer.step()
    group = optimizer.param_groups[0]
    assert json.loads(json.dumps(float(group["lr"]))) == schedule(2)
    assert json.loads(json.dumps(history.read().lr[:, 0].tolist())) == [schedule(t) for t in range(3)]
    saved = optimizer.state_dict()["param_groups"][0]
    assert json.loads(json.dumps(saved))["lr"] == schedule(2)
    for rate in (0.5, torch.tensor(0.5)):
        stock = torch.optim.lr_scheduler.ConstantLR(FusedAdamW(params, lr=rate, backend=backend), 0.5, 3)
        assert [float(rate) for rate in stock.get_last_lr()] == [0.25]


def test_as_many_launches_for_465_groups_as_for_one() -> None:
    shim = cuda_on_cpu.shim()
    shim.reset()
    params = make_params([(1 + index % 5,) for index in range(465)])
    groups = [{"params": [param], "lr": 1e-3 * (index + 1)} for index, param in enumerate(params)]
    reference = Float64AdamW([dict(group) for group in groups])
    optimizer = FusedAdamW(groups, backend=cuda_on_cpu.NAME)
    step_both(optimizer, reference)
    assert_same_run(optimizer, reference)
    shim.reset()
    optimizer.step()
    assert [launch.kernel for launch in shim.launches()] == ["prepare", "update_tensors"]
    shim.reset()


@pytest.mark.parametrize(
    "line", ["| a thing | | `test_pitfalls.py::test_that_is_not_there` |", "| a thing | | none |"]
)
def test_a_line_without_its_test_is_noticed(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "pitfalls.md"
    page.write_text(PAGE.read_text("utf-8") + line + "\n", "utf-8")
    monkeypatch.setattr(f"{__name__}.PAGE", page)
    with pytest.raises(AssertionError, match="a thing"):
        test_every_pitfall_has_tests_that_exist()
