"""The migrations in examples/ train the same before and after, and their README counts the lines that differ."""

from __future__ import annotations

import difflib
import os
import re
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

MIGRATIONS = Path(__file__).resolve().parents[2] / "examples" / "migrations"
README = (MIGRATIONS.parent / "README.md").read_text("utf-8")
EACH = sorted(path.name for path in MIGRATIONS.iterdir() if (path / "before.py").exists())


@pytest.fixture(autouse=True)
def on_one_thread_of_the_cpu(monkeypatch: pytest.MonkeyPatch, restored_threads: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(1)


def code(path: Path) -> list[str]:
    """The lines of a script without its docstring and without empty ones."""
    text = re.sub(r'^""".*?"""\n', "", path.read_text("utf-8"), flags=re.DOTALL)
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", EACH)
def test_the_readme_counts_the_lines_that_differ(name: str) -> None:
    before, after = (code(MIGRATIONS / name / f"{each}.py") for each in ("before", "after"))
    differences = [line[:1] for line in difflib.ndiff(before, after)]
    counted = re.findall(rf"^\| `migrations/{name}` \|.*\| (\d+) \| (\d+) \|$", README, re.MULTILINE)
    assert counted == [(str(differences.count("-")), str(differences.count("+")))]
    assert differences.count("+") < differences.count("-") or name == "trainer"


def lines_of(
    name: str, script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> list[str]:
    """What a script prints, run in this process beside the model that it imports."""
    path = MIGRATIONS / name / f"{script}.py"
    capsys.readouterr()
    with monkeypatch.context() as context, warnings.catch_warnings():
        context.syspath_prepend(path.parent)
        context.delitem(sys.modules, "model", raising=False)
        context.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        sys.modules.pop("model", None)
    return capsys.readouterr().out.splitlines()


def numbers(lines: list[str]) -> list[float]:
    return [float(number) for line in lines for number in re.findall(r"\d+(?:\.\d+)?(?:e-?\d+)?", line)]


def assert_same(before: list[str], after: list[str], most: float) -> None:
    """The same lines, with rates and losses that agree to the digits shown, and a last loss of at most `most`."""
    number = re.compile(r"\d+\.\d+")
    assert [number.sub("", line) for line in before] == [number.sub("", line) for line in after]
    assert numbers(after) == pytest.approx(numbers(before), rel=2e-3)
    assert 0 < float(re.findall(r"loss[\w ]* (\d+\.\d+)", after[-1])[0]) < most


def test_a_loop_of_nanogpt_trains_the_same_also_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (lines_of("nanogpt", script, monkeypatch, capsys) for script in ("before", "after"))
    assert_same(before, after, most=1.9)
    (shown,) = re.findall(r"^\$ python examples/migrations/nanogpt/after\.py\n(.*?)^```$", README, re.M | re.S)
    assert numbers(after) == pytest.approx(numbers(shown.splitlines()), rel=0.2)

    saved = ("--checkpoint", str(tmp_path / "saved.pt"))
    began = lines_of("nanogpt", "before", monkeypatch, capsys, *saved, "--max_iters", "60")
    assert began == before[:3]
    assert_same(before[3:], lines_of("nanogpt", "after", monkeypatch, capsys, *saved), most=1.9)


def test_the_trainer_trains_the_same(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    before, after = (
        [line for line in lines_of("trainer", script, monkeypatch, capsys) if line.startswith("step")]
        for script in ("before", "after")
    )
    assert_same(before, after, most=0.25)
    assert len(after) == 5


def test_images_train_the_same_also_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (
        lines_of("images", script, monkeypatch, capsys, "--checkpoint", str(tmp_path / f"{script}.pt"))
        for script in ("before", "after")
    )
    assert_same(before, after, most=0.2)

    path = tmp_path / "killed.pt"
    command = [sys.executable, "after.py", "--checkpoint", str(path)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen(
        command, cwd=MIGRATIONS / "images", env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        printed = [next(process.stdout) for _ in range(3)]
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert [line.rstrip() for line in printed] == after[:3]

    rest = lines_of("images", "after", monkeypatch, capsys, "--checkpoint", str(path))
    assert 0 < len(rest) < len(after)
    assert rest == after[-len(rest) :]
    whole, resumed = (torch.load(each) for each in (tmp_path / "after.pt", path))
    pairs = list(zip(tree_leaves(resumed), tree_leaves(whole), strict=True))
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)
    assert sum(isinstance(a, torch.Tensor) for a, _ in pairs) > 100  # parameters, moments, averages
