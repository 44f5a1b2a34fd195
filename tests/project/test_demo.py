from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
from gpt import DemoError, checkpoint, cli, corpus, picture, session, train
from gpt.cli import main
from gpt.model import GPT, GPTConfig
from gpt.report import StepCost
from gpt.run import RunConfig, Size, schedule_for
from gpt.train import Training

from nexus.schedules import WSD, Cosine, CosineRestarts

pytestmark = pytest.mark.xdist_group("demo")  # one corpus for all

TINY = Size(
    GPTConfig(layers=1, heads=2, width=16, context=32), 4, held_out_windows=16, timed_steps=3, sample_bytes=20
)
STEPS = 60


@pytest.fixture(scope="module")
def text() -> corpus.Corpus:
    return corpus.load(torch.device("cpu"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, text: corpus.Corpus) -> None:
    monkeypatch.setattr(session, "SIZE", TINY)
    monkeypatch.setattr(corpus, "load", lambda device: text)


def demo(out: Path, *options: str, steps: int = STEPS) -> int:
    return main(["--device", "cpu", "--threads", "1", "--steps", str(steps), "--out", str(out), *options])


def saved(out: Path) -> dict[str, object]:
    return checkpoint.read(out / session.CHECKPOINT, torch.device("cpu"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: corpus.Corpus) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "SIZE", TINY)
        patch.setattr(corpus, "load", lambda device: text)
        assert demo(out) == 0
    return out


def assert_same_run(a: dict[str, object], b: dict[str, object]) -> None:
    """Bit for bit, in everything but the clock."""
    assert a.keys() == b.keys()
    for key in a.keys() - {"seconds"}:
        assert_same(a[key], b[key], key)


def assert_same(a: object, b: object, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


class TestRun:
    @pytest.mark.parametrize("schedule", ["wsd", "sgdr", "cosine"])
    def test_it_learns_at_the_rates_of_the_formula_and_reports_that(
        self, schedule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
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

    def test_steps_go_through_the_capture_and_norms_through_the_history(
        self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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

    def test_one_step(self, tmp_path: Path) -> None:
        for schedule in ("wsd", "sgdr", "cosine"):
            assert demo(tmp_path / schedule, "--schedule", schedule, steps=1) == 0
            assert len(saved(tmp_path / schedule)["losses"]) == 1

    def test_starting_over_keeps_the_old_checkpoint_until_there_is_a_new_one(
        self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = (whole / session.CHECKPOINT).read_bytes()
        (tmp_path / session.CHECKPOINT).write_bytes(old)

        def interrupted(self: Training, *_: object) -> None:
            assert (tmp_path / session.CHECKPOINT).read_bytes() == old
            raise KeyboardInterrupt  # as the second Ctrl-C

        monkeypatch.setattr(Training, "train", interrupted)
        assert demo(tmp_path) == 130
        assert (tmp_path / session.CHECKPOINT).read_bytes() == old

    def test_torch_is_left_as_it_was(self, tmp_path: Path) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            assert demo(tmp_path, steps=1) == 0
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(threads)


class TestResume:
    def interrupt_after(self, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
        """Send this process what Ctrl-C sends, once, in the middle of a step."""
        loss = GPT.loss

        def interrupted(model: GPT, *batch: torch.Tensor) -> torch.Tensor:
            nonlocal step
            if model.training and torch.is_grad_enabled():
                step -= 1
                if step == 0:
                    os.kill(os.getpid(), signal.SIGINT)
            return loss(model, *batch)

        monkeypatch.setattr(GPT, "loss", interrupted)

    def test_goes_on_to_the_very_same_numbers(
        self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.interrupt_after(monkeypatch, 23)
        assert demo(tmp_path) == 130
        assert saved(tmp_path)["step"] == 23
        assert not (tmp_path / session.PICTURE).exists()
        self.interrupt_after(monkeypatch, 18)  # and once more
        assert demo(tmp_path, "--resume") == 130
        assert saved(tmp_path)["step"] == 41
        command = capsys.readouterr().err.splitlines()[-1].strip()
        assert shlex.split(command)[:2] == [sys.executable, str(Path(cli.__file__).parent)]
        assert main(shlex.split(command)[2:]) == 0
        assert_same_run(saved(whole), saved(tmp_path))

    def test_takes_over_the_threads_and_tells_of_another_torch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with monkeypatch.context() as patch:
            self.interrupt_after(patch, 2)
            assert main(["--device", "cpu", "--steps", "4", "--threads", "2", "--out", str(tmp_path)]) == 130
        state = saved(tmp_path)
        checkpoint.write(tmp_path / session.CHECKPOINT, {**state, "made_by": {**state["made_by"], "torch": "1.0"}})
        assert main(["--device", "cpu", "--steps", "4", "--out", str(tmp_path), "--resume"]) == 0
        assert saved(tmp_path)["run"]["threads"] == 2
        assert f"torch 1.0 is now {torch.__version__}" in capsys.readouterr().err

    def test_ctrl_c_in_the_report(
        self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupted(training: Training) -> StepCost:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(session, "time_step", interrupted)
            assert demo(tmp_path) == 130
        assert "The training is done and saved." in capsys.readouterr().err
        assert demo(tmp_path, "--resume") == 0
        a, b = saved(whole), saved(tmp_path)
        for key in ("model", "losses", "rates", "before", "after"):
            assert_same(a[key], b[key], key)

    def test_a_finished_run_says_so(self, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = (whole / session.CHECKPOINT).read_bytes()
        assert demo(whole, "--resume") == 0
        assert "finished: 60 steps" in capsys.readouterr().out
        assert (whole / session.CHECKPOINT).read_bytes() == before

    def test_in_a_process_of_its_own(self, tmp_path: Path, whole: Path) -> None:
        """The real thing: a process, a signal from outside, exit code 130."""
        program = (
            "import sys, time; from gpt import session, model, run; from gpt.cli import main\n"
            f"session.SIZE = run.{TINY!r}\n".replace("GPTConfig", "model.GPTConfig")
            + "loss = model.GPT.loss; model.GPT.loss = lambda *a: (time.sleep(0.05), loss(*a))[1]\n"
            "sys.exit(main(sys.argv[1:]))"
        )
        arguments = [
            "--device",
            "cpu",
            "--threads",
            "1",
            "--steps",
            str(STEPS),
            "--out",
            str(tmp_path),
        ]
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            cwd=Path(cli.__file__).parents[1],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            line = process.stderr.readline()
            assert line.startswith("step 10 of 60"), line + process.stderr.read()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert (process.returncode, out) == (130, ""), err
        assert "Traceback" not in err
        assert 0 < saved(tmp_path)["step"] < STEPS
        assert demo(tmp_path, "--resume") == 0
        assert_same_run(saved(whole), saved(tmp_path))


class TestCheckpoint:
    def refused(self, out: Path, capsys: pytest.CaptureFixture[str], *options: str, steps: int = STEPS) -> str:
        """The one line that refuses `--resume`; the file stays as it is."""
        before = {path: path.read_bytes() for path in out.iterdir()} if out.exists() else {}
        assert demo(out, "--resume", *options, steps=steps) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert before == ({path: path.read_bytes() for path in out.iterdir()} if out.exists() else {})
        return captured.err

    @pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "noise", "pickle", "folder"])
    def test_damaged(self, damage: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path, data = tmp_path / session.CHECKPOINT, (whole / session.CHECKPOINT).read_bytes()
        if damage == "folder":
            path.mkdir()
            assert demo(tmp_path, "--resume") == 2
            assert str(path) in capsys.readouterr().err
            return
        middle = len(data) // 2
        path.write_bytes(
            {
                "cut": data[:-100],
                "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
                "empty": b"",
                "noise": bytes(range(256)) * 10,
                "pickle": b"\x80\x04N.",
            }[damage]
        )
        line = self.refused(tmp_path, capsys)
        assert f"{path} is damaged" in line
        assert "leave out --resume" in line

    def test_code_in_it_is_not_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        class Attack:
            def __reduce__(self) -> tuple[object, tuple[str]]:
                return os.mkdir, (str(tmp_path / "attacked"),)

        torch.save({"format": checkpoint.FORMAT, "model": Attack()}, tmp_path / session.CHECKPOINT)
        assert "is damaged" in self.refused(tmp_path, capsys)
        assert not (tmp_path / "attacked").exists()

    def test_of_something_else(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        torch.save({"model": torch.ones(3)}, tmp_path / session.CHECKPOINT)
        assert "is not a checkpoint of this demo" in self.refused(tmp_path, capsys)
        for run in (None, 3, {}, {"threads": "many"}, {"steps": [STEPS]}):
            torch.save({"format": checkpoint.FORMAT, "run": run}, tmp_path / session.CHECKPOINT)
            assert "was made with" in self.refused(tmp_path, capsys)

    def test_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "there is no" in self.refused(tmp_path, capsys)
        assert "there is no" in self.refused(tmp_path / "nowhere", capsys)
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.parametrize(
        ("options", "steps", "remedy"),
        [
            ([], 61, "give --steps 60"),
            (["--schedule", "cosine"], 60, "give --schedule wsd"),
            (["--seed", "5"], 60, "give --seed 0"),
            (["--threads", "2"], 60, "give --threads 1"),
        ],
    )
    def test_of_another_run(
        self, options: list[str], steps: int, remedy: str, whole: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert remedy in self.refused(whole, capsys, *options, steps=steps)

    def test_of_another_model(
        self, whole: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session, "SIZE", Size(GPTConfig(1, 2, 32, 32), 4))
        assert "another size of the demo" in self.refused(whole, capsys)

    def test_missing_and_misshapen_parts(
        self, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / session.CHECKPOINT
        for part in ("model", "optimizer", "losses", "grad_norms", "random", "step", "made_by"):
            state = saved(whole)
            del state[part]
            checkpoint.write(path, state)
            assert "does not fit" in self.refused(tmp_path, capsys)
        checkpoint.write(path, {**saved(whole), "losses": torch.ones(3)})
        assert "does not fit" in self.refused(tmp_path, capsys)

    def test_a_failed_write_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
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
            ["--steps", "0"],
            ["--steps", "-3"],
            ["--steps", "abc"],
            ["--steps", "1e3"],
            ["--steps", str(10**12)],
            ["--seed", "-1"],
            ["--seed", str(2**64)],
            ["--threads", "0"],
            ["--schedule", "linear"],
            ["--device", "tpu"],
            ["--nonsense"],
            ["more"],
        ],
    )
    def test_nonsense_is_refused_in_one_line(
        self,
        options: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            main(options)
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert options[0].lstrip("-") in captured.err
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("out", ["file", "file/below", "/proc/nowhere", "x" * 300])
    def test_a_folder_that_cannot_be(self, out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("mine")
        assert demo(tmp_path / out, steps=1) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert str(tmp_path / out) in err
        assert (tmp_path / "file").read_text() == "mine"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_cuda_where_there_is_none(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--device", "cuda", "--out", str(tmp_path / "out")]) == 2
        assert not list(tmp_path.iterdir())
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "--device cpu" in err

    @pytest.mark.parametrize("name", ["matplotlib", "tqdm"])
    def test_a_package_is_missing(
        self, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, name, None)
        assert demo(tmp_path) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert f"needs {name}" in err
        assert "pip install 'nexus-optim[demo]'" in err


class TestParts:
    def test_schedules_end_with_the_run(self) -> None:
        for steps in (1, 2, 3, 5, 7, 8, 19, 20, 100, 1000, 12345):
            wsd = schedule_for("wsd", steps)
            assert isinstance(wsd, WSD)
            assert wsd.warmup_steps + wsd.stable_steps + wsd.decay_steps == steps
            cosine = schedule_for("cosine", steps)
            assert isinstance(cosine, Cosine)
            assert cosine.total_steps == steps
            sgdr = schedule_for("sgdr", steps)
            assert isinstance(sgdr, CosineRestarts)
            if steps >= 7:
                assert sgdr.cycle(steps) == (3, 0, 8 * sgdr.cycle_length)

    def test_the_corpus_is_real_text_split_by_file(self, text: corpus.Corpus) -> None:
        assert len(text.train) > 3e6
        assert 0.01 < len(text.held_out) / len(text.train) < 0.2
        assert b"def " in bytes(text.held_out.tolist())
        assert text.files > 200

    def test_no_library_to_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()
        with pytest.raises(DemoError, match="0 bytes of Python source"):
            corpus.load(torch.device("cpu"), tmp_path)

    def test_batches_depend_on_seed_and_step_alone(self, text: corpus.Corpus) -> None:
        inputs, targets = text.batch(3, 7, size=5, context=16)
        assert inputs.shape == targets.shape == (5, 16)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        assert torch.equal(inputs, text.batch(3, 7, size=5, context=16)[0])
        assert not torch.equal(inputs, text.batch(3, 8, size=5, context=16)[0])
        assert not torch.equal(inputs, text.batch(4, 7, size=5, context=16)[0])

    def test_the_model_sees_only_the_past(self) -> None:
        torch.manual_seed(0)
        model = GPT(TINY.model)
        tokens = torch.randint(256, (1, 32))
        changed = tokens.clone()
        changed[0, 20] ^= 1
        a, b = model(tokens), model(changed)
        assert torch.equal(a[0, :20], b[0, :20])
        assert not torch.allclose(a[0, 20:], b[0, 20:])

    def test_the_default_model_has_about_a_million_parameters(self) -> None:
        assert 0.9e6 < sum(p.numel() for p in GPT(GPTConfig()).parameters()) < 1.1e6

    def test_held_out_bits_are_a_mean_over_all_windows(self, text: corpus.Corpus) -> None:
        size = Size(TINY.model, held_out_windows=40)
        config = RunConfig(1, schedule_for("wsd", 1), 0, size, "cpu", 1, "")
        training = Training(config, text)
        losses = []
        with torch.no_grad():
            for inputs, targets in text.held_out_batches(40, 1, 32):
                losses.append(float(training.model.loss(inputs, targets)))
        assert training.held_out_bits() == pytest.approx(sum(losses) / 40 / math.log(2), rel=1e-5)

    def test_smoothing(self) -> None:
        assert picture.smoothed([], 5) == []
        assert picture.smoothed([1.0, 2.0, 3.0, 8.0], 1) == [1.0, 2.0, 3.0, 8.0]
        assert picture.smoothed([1.0, 2.0, 3.0, 8.0, 9.0], 3) == pytest.approx([1.0, 2.0, 13 / 3, 20 / 3, 8.5])

    def test_share(self) -> None:
        assert StepCost(3.0, 1.0, 2.0).of(1.0) == "25.00%  1000.000 ms"


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    from nexus import __version__, backends
    from nexus.__main__ import main as nexus_main

    assert nexus_main(["info"]) == 0
    out = capsys.readouterr().out
    for words in (
        __version__,
        torch.__version__,
        f"{sys.version_info.major}.{sys.version_info.minor}",
        "threads",
    ):
        assert words in out
    for name, _, detail in backends.describe():
        assert name in out
        assert detail in out
