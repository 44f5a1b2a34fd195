"""The examples run, show what they say that they show, and their README shows what they print."""

import difflib
import math
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
README = (EXAMPLES / "README.md").read_text("utf-8")
THREE = ("plain_torch", "nexus_eager", "nexus_captured")
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture(autouse=True)
def on_one_thread_of_the_cpu(monkeypatch: pytest.MonkeyPatch, restored_threads: None) -> None:
    """Where all machines print nearly the same, and busy ones are not slow."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.set_num_threads(1)


def run(name: str) -> dict[str, object]:
    with warnings.catch_warnings():
        return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def shown(language: str, command: str) -> list[str]:
    """What the README shows below a command."""
    (block,) = re.findall(rf"^```{language}\n\$ {re.escape(command)}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return block.splitlines()


def assert_prints(lines: list[str], name: str) -> None:
    """The words that the README says, with numbers that are alike."""
    number = r"(\d+(?:\.\d+)?(?:e-?\d+)?)"
    expected = shown("", f"python examples/{name}.py")
    assert len(lines) == len(expected)
    for pair in zip(lines, expected, strict=True):
        a, b = (re.split(number, " ".join(line.split())) for line in pair)
        assert a[::2] == b[::2]
        assert [float(x) for x in a[1::2]] == pytest.approx([float(x) for x in b[1::2]], rel=0.2)


def code(name: str) -> list[str]:
    """The lines of an example without its docstring."""
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    return re.sub(r'^""".*?"""\n', "", text, flags=re.DOTALL).splitlines()


@pytest.mark.parametrize(("before", "after", "most"), [(*THREE[:2], 8), (*THREE[1:], 2)])
def test_a_few_lines_differ(before: str, after: str, most: int) -> None:
    differences = difflib.ndiff(code(before), code(after))
    changed = [line for line in differences if line[:1] in "+-" and line[1:].strip()]
    assert 0 < len(changed) <= most
    assert sorted(changed) == sorted(shown("diff", f"diff {before}.py {after}.py"))


def test_three_reach_the_same_losses(capsys: pytest.CaptureFixture[str]) -> None:
    losses = [run(name)["losses"] for name in THREE]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)  # of 300 steps, each rounded in another order
    assert losses[2] == losses[1]
    assert losses[0][-1] < losses[0][0] / 2
    lines = capsys.readouterr().out.splitlines()
    for start in (0, 6, 12):
        assert_prints(lines[start : start + 6], "plain_torch")


def test_longer_decays_of_one_stable_phase_end_lower(capsys: pytest.CaptureFixture[str]) -> None:
    results = run("branch_decays")["results"]
    losses = list(results.values())
    assert len(losses) == 6
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.75 * losses[0]
    assert_prints(capsys.readouterr().out.splitlines(), "branch_decays")


def test_longer_decays_by_tokens_end_lower(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("token_clock")
    losses = list(found["results"].values())
    assert len(losses) == 5
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.98 * losses[0]
    assert found["clock"].count - found["saved_at"] == pytest.approx(400_000, rel=0.01)
    assert_prints(capsys.readouterr().out.splitlines(), "token_clock")


def test_the_ensemble_beats_its_members(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("snapshot_ensemble")
    (accuracy, loss), members = found["ensemble"], found["scores"]
    assert len(members) == 6
    assert all(accuracy > member[0] and loss < member[1] - 0.005 for member in members)
    assert_prints(capsys.readouterr().out.splitlines(), "snapshot_ensemble")


def test_seven_bytes_learn_as_well_as_sixteen(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("low_memory")
    plain, seven, after = found["results"].values()
    assert seven == pytest.approx(plain, rel=0.05)
    assert after < 0.9 * seven  # torch.optim.AdamW goes on
    (megabytes, bytes_each), (fewer_megabytes, fewer_bytes) = found["memory"].values()
    assert (bytes_each, fewer_bytes) == pytest.approx((16.0, 7.1), abs=0.01)
    assert fewer_megabytes / megabytes == pytest.approx(fewer_bytes / bytes_each, rel=1e-3)  # added up, and predicted
    assert_prints(capsys.readouterr().out.splitlines(), "low_memory")


def test_a_rate_is_halved_where_the_loss_stays(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("plateau")
    losses, rates = found["losses"], found["rates"]
    assert rates == sorted(rates, reverse=True)
    assert all(math.log2(rates[0] / rate).is_integer() for rate in rates)
    assert rates[-1] < rates[0] / 16
    assert losses[-1] < losses[0] / 2
    lines = capsys.readouterr().out.splitlines()
    of_numbers = re.compile(r"\d+\.\d+")  # which depend on when a loss is just better, or just not
    assert [of_numbers.sub("", each) for each in lines] == [
        of_numbers.sub("", each) for each in shown("", "python examples/plateau.py")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_short_and_explained(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text("utf-8")
    assert text.count("\n") < 100
    assert text.startswith('"""')
    assert f"`{name}.py`" in README
    needs_trainers = re.search(r"^(?:import|from) (?:accelerate|lightning|transformers)\b", text, re.MULTILINE)
    assert ("\npip install 'nexus-optim[trainers]'\n" in text.split('"""')[1]) == (needs_trainers is not None)


@pytest.mark.parametrize("processes", [None, "5"])
def test_fsdp2_says_how_it_is_started(processes: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    with pytest.raises(SystemExit, match=r"divides 12: torchrun --nproc-per-node 2 examples/fsdp2\.py"):
        run("fsdp2")["train"](60, EXAMPLES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name != "fsdp2" and not name.startswith("with_")]
)  # torchrun launches the one; trainers need not be there
def test_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert run(name)["device"] == "cuda"
