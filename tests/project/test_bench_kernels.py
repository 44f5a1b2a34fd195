"""A step taken apart by kernel: `--case kernels`, with a device that only looks like a GPU."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import fake_gpu
import pytest
import torch
from fake_gpu import FakeGpu, quick_benchmark  # noqa: F401  # the second is a fixture
from torch.profiler import ProfilerActivity, record_function

from benchmarks import __main__ as command
from benchmarks import gpu_summary, kernels, timing
from benchmarks.cases import (
    BFLOAT16,
    CASES,
    CLIP_STEP_SCHEDULE,
    COPY,
    CUDA,
    FUSED,
    NEXUS_TRITON,
    NORM,
    PROLOGUE,
    STEP,
    UPDATE,
)
from benchmarks.kernels import by_part, measure_kernels
from benchmarks.measure import measure
from benchmarks.report import KernelRow, LeftOut, Row
from nexus.backends.native import NativeRunner

ROOT = Path(kernels.__file__).parents[1]
TIMES = {NORM: 2.0, PROLOGUE: 1.0, UPDATE: 5.0, COPY: 4.0}  # of `fake_gpu.KERNELS`


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases with fewer and smaller tensors."""
    for name in kernels.TAKEN_APART:
        monkeypatch.setitem(CASES, name, replace(CASES[name], shapes=((40,), (7,))))


def test_the_cases_that_are_taken_apart_are_beside_a_copy_too() -> None:
    for name in kernels.TAKEN_APART:
        assert {(STEP, COPY), (CLIP_STEP_SCHEDULE, COPY)} <= set(CASES[name].comparisons(CUDA))
    sizes = {len(CASES[name].shapes) for name in kernels.TAKEN_APART if set(CASES[name].shapes) == {(1000,)}}
    assert sizes == {10, 1000, 10_000}


def test_rows(small) -> None:
    rows = list(measure_kernels(4, FakeGpu(), wanted=("native",)))
    assert [(row.case, row.backend, row.steps) for row in rows] == [(n, "native", 4) for n in kernels.TAKEN_APART]
    for row in rows:
        assert isinstance(row, KernelRow), row.reason
        assert {part: spread.median for part, spread in row.times.items()} == TIMES
        shares = {what: spread.median for what, spread in row.shares.items()}
        norm, whole = (2, 24) if row.dtype == BFLOAT16 else (4, 32)  # bytes that an element needs
        assert shares == pytest.approx({NORM: 4 / 2 * norm / whole, UPDATE: 4 / 5 * (1 - norm / whole), STEP: 4 / 8})
        assert row.others == []


def test_kernels_of_triton_and_others() -> None:
    """The norm has two kernels there; a copy of several pieces is one."""
    step = [("norm", 1.0), ("norm_total", 0.5), ("prologue", 2.0), ("update", 3.0), ("Memcpy DtoD (x)", 1.0)]
    launches = [*step, ("Memcpy DtoD (x)", 1.0), ("Memcpy HtoD (Pinned -> Device)", 9.0), *step, step[-1]]
    times, others = by_part(launches, 2)
    assert times == {NORM: [1.5, 1.5], PROLOGUE: [2.0, 2.0], UPDATE: [3.0, 3.0], COPY: [2.0, 2.0]}
    assert others == ["Memcpy HtoD (Pinned -> Device)"]
    with pytest.raises(RuntimeError, match="update was seen 1 times in 2 steps"):
        by_part([each for each in launches if each[0] != "update"] + [("update", 1.0)], 2)


def test_names_are_those_of_the_kernels() -> None:
    for file, word, part in (("grad_norm", "sum_squares", NORM), ("prologue", "prepare", PROLOGUE)):
        assert f" {word}(" in (ROOT / f"csrc/cuda/{file}.cu").read_text()
        assert kernels.WORDS[word] == part
    for file, word in (("update", "update_tensors"), ("update_encoded", "update_encoded")):
        assert f" {word}(" in (ROOT / f"csrc/cuda/{file}.cu").read_text()
    triton = "".join((ROOT / f"nexus/backends/triton_{file}.py").read_text() for file in ("kernels", "update"))
    assert all(f"\ndef {name}(" in triton for name in ("norm", "norm_total", "prologue", "update"))


def test_what_the_profiler_sees() -> None:
    """On this processor, where a call is an operation of torch's."""
    values = torch.zeros(4)

    def call() -> None:
        for name, _ in fake_gpu.KERNELS:
            with record_function(name):
                values.add_(1.0)

    seen = timing.profiled(call, 3, ProfilerActivity.CPU)
    names = [name for name, _ in fake_gpu.KERNELS]
    assert [name for name, _ in seen if name in names] == names * 3
    assert all(us > 0 for _, us in seen)
    times, others = by_part(seen, 3)
    assert "aten::add_" in others
    assert times[UPDATE] == [us for name, us in seen if name == names[2]]


def test_without_a_profiler_the_others_go_on(small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """A GPU's profiler may be refused, or see nothing."""
    seen = iter([RuntimeError("CUPTI\nis missing"), [], *[[*fake_gpu.KERNELS] * 2] * 3])

    def profiled(self, call, times):
        found = next(seen)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(FakeGpu, "kernels", profiled)
    monkeypatch.setattr(command, "_device", lambda wanted: FakeGpu())
    monkeypatch.setattr(command, "measure_kernels", partial(measure_kernels, wanted=("native",)))
    out = tmp_path / "kernels.json"
    argv = ["--device", "cuda", "--case", "kernels", "--repeats", "2", "--out", str(out)]
    assert command.main(argv) == 0
    data = json.loads(out.read_text())
    assert ([row["case"] for row in data["kernels"]], data["complete"]) == ([*kernels.TAKEN_APART[2:]], True)
    reasons = [each["reason"].partition("apart: ")[2] for each in data["left_out"]]
    assert reasons == ["RuntimeError: CUPTI is missing", "RuntimeError: norm was seen 0 times in 2 steps"]
    printed = capsys.readouterr().out
    assert "billion, kernels, native: left out, the profiler" in printed
    assert "many          native            2.00          1.00" in printed


def test_a_step_that_fails_is_a_failure(small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeRunner, "_run", lambda *arguments: 1 / 0)
    for row in measure_kernels(1, FakeGpu(), wanted=("native",)):
        assert isinstance(row, LeftOut)
        assert (row.reason, row.failed) == ("ZeroDivisionError: division by zero", True)


def test_the_summary_sets_a_steps_parts_beside_the_whole(small) -> None:
    (found,) = measure_kernels(2, FakeGpu(), ["many"], ("native",))
    rows = [row.record() for row in measure(CASES["many"], 1, FakeGpu()) if isinstance(row, Row)]
    fused = next(row for row in rows if (row["job"], row["peer"]) == (CLIP_STEP_SCHEDULE, FUSED))
    triton = {**fused, "peer": NEXUS_TRITON}
    left_out = asdict(LeftOut("ten", "kernels", "cuda", "no profiler", failed=False))
    results = {"kernels": [asdict(found)], "rows": [*rows, triton], "left_out": [left_out]}
    heading, native, other, reason = gpu_summary.steps(results)
    assert heading.split()[-1] == "step/copy"
    assert native.split() == ["many", "native", "2", "1", "5", "10", "10", "5", "10", "5", "10", "1"]
    assert other.split() == ["many", "triton", "–", "–", "–", "10", "–", "5", "–", "–", "–", "–"]
    assert reason.split() == ["ten,", "cuda:", "no", "profiler"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_the_real_profiler() -> None:
    """In a process of its own, to which the profiler may stay attached."""
    code = """
from benchmarks import kernels, timing
for row in kernels.measure_kernels(3, timing.Cuda(), ["ten"]):
    print(row)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    rows = done.stdout.splitlines()
    assert rows
    for row in rows:
        assert row.startswith("KernelRow(")
        assert row.endswith("others=[])")
