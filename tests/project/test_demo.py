"""Whole runs of the demo: what they learn, write and print, how they go on, and what they refuse."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
from gpt import checkpoint, cli, corpus, session, train
from gpt.cli import main
from gpt.model import GPT, GPTConfig
from gpt.run import SCHEDULES, Size, schedule_for
from gpt.train import Training

pytestmark = pytest.mark.xdist_group("demo")  # one corpus for all

MODEL = GPTConfig(layers=1, heads=2, width=16, context=32)
TINY = Size(MODEL, 4, held_out_windows=16, timed_steps=3, sample_bytes=20)
STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def text() -> Iterator[corpus.Corpus]:
    """The corpus, read once; and a tiny model in every run."""
    loaded = corpus.load(torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SIZE", TINY)
        patch.setattr(corpus, "load", lambda device: loaded)
        yield loaded


def demo(out: Path, *options: str, steps: int = STEPS) -> int:
    return main(["--device", "cpu", "--threads", "1", "--steps", str(steps), "--out", str(out), *options])


def saved(out: Path) -> dict[str, object]:
    return checkpoint.read(out / session.CHECKPOINT, torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    assert demo(out) == 0
    return out


def the_line(capsys, *words: str) -> None:
    """One line refuses something, and nothing else was printed."""
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert all(word in err for word in words), err


def assert_same_run(a: dict[str, object], b: dict[str, object]) -> None:
    """Bit for bit, in everything but the clock."""
    assert_same({**a, "seconds": None}, {**b, "seconds": None})


def assert_same(a: object, b: object, where: str = "") -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, (dict, list, tuple)):
        pairs = [dict(x) if isinstance(x, dict) else dict(enumerate(x)) for x in (a, b)]
        assert pairs[0].keys() == pairs[1].keys(), where
        for key, value in pairs[0].items():
            assert_same(value, pairs[1][key], f"{where}.{key}")
    else:
        assert a == b, where


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1) -> None:
    """Send this process what Ctrl-C sends, in the middle of a step."""
    loss = GPT.loss

    def interrupted(model: GPT, *batch: torch.Tensor) -> torch.Tensor:
        nonlocal step
        if torch.is_grad_enabled():
            step -= 1
            for _ in range(times if step == 0 else 0):
                os.kill(os.getpid(), signal.SIGINT)
        return loss(model, *batch)

    monkeypatch.setattr(GPT, "loss", interrupted)


class TestRun:
    @pytest.mark.parametrize("schedule", SCHEDULES.values())
    def test_it_learns_at_the_rates_of_the_formula_and_reports_that(self, schedule, tmp_path, capsys) -> None:
        assert demo(tmp_path, "--schedule", schedule, steps=150) == 0
        state = saved(tmp_path)
        assert state["rates"].tolist() == schedule_for(schedule, 150).values(0, 150)
        assert state["grad_norms"].shape == (150,)
        assert 0 < state["grad_norms"].min() < state["grad_norms"].max() < 100
        assert 7.5 < state["before"] < 8.5
        assert state["after"] < state["before"] - 2
        assert sorted(path.name for path in tmp_path.iterdir()) == [session.CHECKPOINT, session.PICTURE]
        report, progress = capsys.readouterr()
        assert report.isascii()
        assert f"{state['before']:.3f} -> {state['after']:.3f} bits per byte" in report
        assert "differs from the formula by at most 0\n" in report
        assert str(tmp_path / session.PICTURE) in report
        assert "step 150 of 150: " in progress
        assert "tokens/s" in progress

    def test_the_picture_is_one(self, whole: Path) -> None:
        from matplotlib.image import imread

        pixels = imread(whole / session.PICTURE)
        assert pixels.shape[:2] == (900, 1200)
        above, below = pixels[:450], pixels[450:]
        assert above.std() > 0.05 < below.std()

    def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(self, whole: Path, tmp_path: Path) -> None:
        assert demo(tmp_path / "again") == 0
        assert_same_run(saved(whole), saved(tmp_path / "again"))
        assert demo(tmp_path / "other", "--seed", "1") == 0
        assert not torch.equal(saved(whole)["losses"], saved(tmp_path / "other")["losses"])

    def test_steps_go_through_the_capture_and_norms_through_the_history(self, whole, tmp_path, monkeypatch) -> None:
        """As a plain loop has them, which reads them at every step."""
        captured: list[object] = []
        norms: list[float] = []

        def capture(train_step, optimizer):
            captured.append(optimizer)

            def step(*batch: torch.Tensor) -> torch.Tensor:
                loss = train_step(*batch)
                norms.append(float(optimizer.grad_norm))
                return loss.detach()

            return step

        monkeypatch.setattr(train, "capture_train_step", capture)
        assert demo(tmp_path) == 0
        assert len(captured) == 1
        assert_same_run(saved(whole), saved(tmp_path))
        assert torch.tensor(norms).allclose(saved(whole)["grad_norms"].float(), rtol=1e-6)

    @pytest.mark.parametrize("schedule", SCHEDULES.values())
    def test_one_step_leaves_torch_as_it_was(self, schedule: str, tmp_path: Path) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            assert demo(tmp_path, "--schedule", schedule, steps=1) == 0
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(threads)
        assert len(saved(tmp_path)["losses"]) == 1

    def test_an_old_checkpoint_stays_until_there_is_a_new_one(self, whole, tmp_path, monkeypatch) -> None:
        old = (whole / session.CHECKPOINT).read_bytes()
        (tmp_path / session.CHECKPOINT).write_bytes(old)

        def interrupted(self: Training, *_: object) -> None:
            assert (tmp_path / session.CHECKPOINT).read_bytes() == old
            raise KeyboardInterrupt  # as the second Ctrl-C

        monkeypatch.setattr(Training, "train", interrupted)
        assert demo(tmp_path) == 130
        assert (tmp_path / session.CHECKPOINT).read_bytes() == old


class TestResume:
    def test_goes_on_to_the_very_same_numbers(self, whole, tmp_path, monkeypatch, capsys) -> None:
        interrupt_after(monkeypatch, 23)
        assert demo(tmp_path) == 130
        assert saved(tmp_path)["step"] == 23
        assert not (tmp_path / session.PICTURE).exists()
        interrupt_after(monkeypatch, 18)  # and once more
        assert demo(tmp_path, "--resume") == 130
        assert saved(tmp_path)["step"] == 41
        command = capsys.readouterr().err.splitlines()[-1].strip()
        assert shlex.split(command)[:2] == [sys.executable, str(Path(cli.__file__).parent)]
        assert main(shlex.split(command)[2:]) == 0
        assert_same_run(saved(whole), saved(tmp_path))

    def test_takes_over_the_threads_and_tells_of_another_torch(self, tmp_path, monkeypatch, capsys) -> None:
        usual = ["--device", "cpu", "--steps", "4", "--out", str(tmp_path)]
        with monkeypatch.context() as patch:
            interrupt_after(patch, 2)
            assert main([*usual, "--threads", "2"]) == 130
        state = saved(tmp_path)
        checkpoint.write(tmp_path / session.CHECKPOINT, {**state, "made_by": {**state["made_by"], "torch": "1.0"}})
        assert main([*usual, "--resume"]) == 0
        assert saved(tmp_path)["run"]["threads"] == 2
        assert f"torch 1.0 is now {torch.__version__}" in capsys.readouterr().err

    def test_ctrl_c_in_the_report(self, whole, tmp_path, monkeypatch, capsys) -> None:
        def interrupted(training: Training) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(session, "time_step", interrupted)
            assert demo(tmp_path) == 130
        assert "The training is done and saved." in capsys.readouterr().err
        assert demo(tmp_path, "--resume") == 0
        a, b = saved(whole), saved(tmp_path)
        for key in ("model", "losses", "rates", "before", "after"):
            assert_same(a[key], b[key], key)

    def test_a_finished_run_says_so(self, whole: Path, capsys) -> None:
        before = (whole / session.CHECKPOINT).read_bytes()
        assert demo(whole, "--resume") == 0
        assert "finished: 60 steps" in capsys.readouterr().out
        assert (whole / session.CHECKPOINT).read_bytes() == before

    def test_a_second_ctrl_c_stops_at_once(self, tmp_path: Path, monkeypatch, capsys) -> None:
        usual = signal.getsignal(signal.SIGINT)
        interrupt_after(monkeypatch, 1, times=2)
        assert demo(tmp_path) == 130
        assert capsys.readouterr().err.endswith("Stopped at once; nothing was written.\n")
        assert not list(tmp_path.iterdir())
        assert signal.getsignal(signal.SIGINT) is usual


class TestCheckpoint:
    @pytest.fixture
    def refused(self, capsys):
        """Checks that one line with these words refuses `--resume`, and that every file stays as it is."""

        def check(out: Path, *words: str, options: tuple[str, ...] = (), steps: int = STEPS) -> None:
            before = {path: path.read_bytes() for path in out.glob("*")}
            assert demo(out, "--resume", *options, steps=steps) == 2
            assert before == {path: path.read_bytes() for path in out.glob("*")}
            the_line(capsys, *words)

        return check

    def test_damaged(self, whole: Path, tmp_path: Path, refused, capsys) -> None:
        path, data = tmp_path / session.CHECKPOINT, (whole / session.CHECKPOINT).read_bytes()
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        for damaged in (data[:-100], flipped, b"", bytes(range(256)) * 10, b"\x80\x04N."):
            path.write_bytes(damaged)
            refused(tmp_path, f"{path} is damaged", "leave out --resume")
        path.unlink()
        path.mkdir()
        assert demo(tmp_path, "--resume") == 2
        assert str(path) in capsys.readouterr().err

    def test_code_in_it_is_not_run(self, tmp_path: Path, refused) -> None:
        class Attack:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(tmp_path / "attacked"),)

        torch.save({"format": checkpoint.FORMAT, "model": Attack()}, tmp_path / session.CHECKPOINT)
        refused(tmp_path, "is damaged")
        assert not (tmp_path / "attacked").exists()

    def test_of_something_else(self, tmp_path: Path, refused) -> None:
        torch.save({"model": torch.ones(3)}, tmp_path / session.CHECKPOINT)
        refused(tmp_path, "is not a checkpoint of this demo")
        for run in (None, 3, {}, {"threads": "many"}, {"steps": [STEPS]}):
            torch.save({"format": checkpoint.FORMAT, "run": run}, tmp_path / session.CHECKPOINT)
            refused(tmp_path, "was made with")

    def test_none(self, tmp_path: Path, refused) -> None:
        for out in (tmp_path, tmp_path / "nowhere"):
            refused(out, "there is no")
        assert not (tmp_path / "nowhere").exists()

    def test_of_another_run(self, whole: Path, refused, monkeypatch: pytest.MonkeyPatch) -> None:
        refused(whole, "give --steps 60", steps=61)
        for option, other, was in (("--schedule", "cosine", "wsd"), ("--seed", "5", "0"), ("--threads", "2", "1")):
            refused(whole, f"give {option} {was}", options=(option, other))
        monkeypatch.setattr(session, "SIZE", Size(GPTConfig(1, 2, 32, 32), 4))
        refused(whole, "another size of the demo")

    def test_missing_and_misshapen_parts(self, whole: Path, tmp_path: Path, refused) -> None:
        path, state = tmp_path / session.CHECKPOINT, saved(whole)
        for part in ("model", "optimizer", "losses", "grad_norms", "random", "step", "made_by"):
            checkpoint.write(path, {name: value for name, value in state.items() if name != part})
            refused(tmp_path, "does not fit")
        checkpoint.write(path, {**state, "losses": torch.ones(3)})
        refused(tmp_path, "does not fit")

    def test_a_failed_write_leaves_the_old_file(self, tmp_path: Path, monkeypatch, capsys) -> None:
        path = tmp_path / session.CHECKPOINT
        path.write_bytes(b"old")

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        assert demo(tmp_path, steps=1) == 2
        assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]


class TestArguments:
    @pytest.mark.parametrize(
        "options",
        [
            *("--steps 0", "--steps -3", "--steps abc", "--steps 1e3", f"--steps {10**12}"),
            *("--seed -1", f"--seed {2**64}", "--threads 0"),
            *("--schedule linear", "--device tpu", "--nonsense", "more"),
        ],
    )
    def test_nonsense(self, options: str, tmp_path: Path, capsys, monkeypatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            main(options.split())
        assert stopped.value.code == 2
        the_line(capsys, options.split()[0].lstrip("-"))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("out", ["file", "file/below", "/proc/nowhere", "x" * 300])
    def test_a_folder_that_cannot_be(self, out: str, tmp_path: Path, capsys) -> None:
        (tmp_path / "file").write_text("mine")
        assert demo(tmp_path / out, steps=1) == 2
        the_line(capsys, str(tmp_path / out))
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_where_there_is_none(self, tmp_path: Path, capsys) -> None:
        assert main(["--device", "cuda", "--out", str(tmp_path / "out")]) == 2
        assert not list(tmp_path.iterdir())
        the_line(capsys, "--device cpu")

    @pytest.mark.parametrize("name", ["matplotlib", "tqdm"])
    def test_a_package_is_missing(self, name: str, tmp_path: Path, capsys, monkeypatch) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        assert demo(tmp_path) == 2
        the_line(capsys, f"needs {name}", "pip install 'nexus-optim[demo]'")

    def test_it_is_found_from_anywhere(self, tmp_path: Path) -> None:
        command = [sys.executable, str(Path(cli.__file__).parent), "--help"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert run.stdout.startswith("usage: python examples/gpt"), run.stderr
