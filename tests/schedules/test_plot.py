"""`python -m nexus plot`: the chart in the terminal, the PNG, and one line for every kind of nonsense."""

import io
import itertools
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from schedule_cases import FAMILIES

from nexus import plot, plot_command
from nexus.__main__ import main
from nexus.schedules import (
    MAX_STEP,
    WSD,
    WSDS,
    Constant,
    Cosine,
    CosineRestarts,
    Cyclic,
    Exponential,
    InverseSqrt,
    Linear,
    MultiStep,
    OneCycle,
    minimum,
)

needs_matplotlib = pytest.mark.skipif(not find_spec("matplotlib"), reason="matplotlib is not installed")


def size_of_png(path: Path) -> tuple[int, int]:
    """Width and height; reads the whole picture."""
    from matplotlib.image import imread

    height, width, _ = imread(path, format="png").shape
    return width, height


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("python -m nexus")
    assert err.endswith("\n")
    return err


@pytest.mark.parametrize("kind", plot_command.KINDS)
def test_terminal_chart(kind, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "64")
    assert main(["plot", kind]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    title, *lines = out.splitlines()
    assert title == repr(plot_command.KINDS[kind])
    assert len(lines) == 13
    assert all(len(line) <= 64 for line in lines)
    assert "█" in "".join(lines[:10])
    assert lines[0].startswith("     0.001 │")
    assert lines[-1].endswith(f"{plot.default_steps(plot_command.KINDS[kind]) - 1:,}")


def test_chart_draws_the_rates_and_names_what_fits() -> None:
    columns = 40
    text = plot.chart(
        WSD(warmup_steps=10, stable_steps=20, decay_steps=10, peak_lr=1.0),
        40,
        width=columns + 12,
        height=10,
        blocks=False,
    )
    rows = [line[12:].ljust(columns) for line in text.splitlines()[:10]]
    heights = ["".join(column).count("#") for column in zip(*rows, strict=True)]
    assert heights == [*range(10), *[10] * 20, *range(10, 0, -1)]

    schedule = CosineRestarts(peak_lr=1.0, cycle_length=100, cycle_mult=2, warmup_steps=10)
    text = plot.chart(schedule, 710, width=12 + 71)
    assert text.splitlines()[-2].split() == ["│cycle", "0", "│cycle", "1", "│cycle", "2"]


def test_terminal_that_knows_ascii_alone(capsys, monkeypatch) -> None:
    monkeypatch.setattr(plot_command, "_prints_blocks", lambda: False)
    assert main(["plot", "cosine-restarts"]) == 0
    assert capsys.readouterr().out.isascii()


@pytest.mark.parametrize("width", [1, 30, 80, 500])
@pytest.mark.parametrize("steps", [2, 3, 1000, MAX_STEP])
@pytest.mark.parametrize(
    "schedule",
    [
        *plot_command.KINDS.values(),
        WSD(warmup_steps=0, stable_steps=0, decay_steps=1, peak_lr=1e-3),
        WSD(warmup_steps=0, stable_steps=None, decay_steps=1, peak_lr=1e-3),
        CosineRestarts(peak_lr=1e-3, cycle_length=1),
    ],
    ids=repr,
)
def test_chart_of_anything(schedule, steps, width) -> None:
    lines = plot.chart(schedule, steps, width=width).splitlines()
    assert len(lines) == 13
    assert all(len(line) <= max(width, 36) for line in lines)


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (WSD(warmup_steps=1000, stable_steps=7000, decay_steps=2000, peak_lr=1e-3), 10_500),
        (WSD(warmup_steps=1000, stable_steps=None, decay_steps=2000, peak_lr=1e-3), 12_000),
        (WSD(warmup_steps=MAX_STEP, stable_steps=MAX_STEP, decay_steps=MAX_STEP, peak_lr=1e-3), MAX_STEP),
        (WSD(warmup_steps=0, stable_steps=0, decay_steps=1, peak_lr=1e-3), 2),
        (CosineRestarts(peak_lr=1e-3, cycle_length=10, cycle_mult=2, warmup_steps=5), 155),
        (CosineRestarts(peak_lr=1e-3, cycle_length=MAX_STEP), MAX_STEP),
        (Cosine(peak_lr=1e-3, total_steps=100), 105),
        (Cosine(peak_lr=1e-3, total_steps=MAX_STEP), MAX_STEP),
        (Constant(1e-3), 1000),
    ],
    ids=repr,
)
def test_default_steps_show_all(schedule, steps) -> None:
    assert plot.default_steps(schedule) == steps


MULTI_STEP = MultiStep(peak_lr=1.0, milestones=range(2000), gamma=0.99)  # of a long repr
RESTARTS = CosineRestarts(peak_lr=1.0, cycle_length=2, cycle_mult=2, warmup_steps=3)


@pytest.mark.parametrize(
    ("schedule", "steps", "spans"),
    [
        (
            WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1.0),
            20,
            [("warmup", 0, 3), ("stable", 3, 7), ("decay", 7, 12), ("done", 12, 20)],
        ),
        (WSD(warmup_steps=0, stable_steps=0, decay_steps=5, peak_lr=1.0), 3, [("decay", 0, 3)]),
        (RESTARTS, 10, [("warmup", 0, 3), ("cycle 0", 3, 5), ("cycle 1", 5, 9), ("cycle 2", 9, 10)]),
        (RESTARTS, 2, [("warmup", 0, 2)]),
        (CosineRestarts(peak_lr=1.0, cycle_length=2), 1000, [("cosine", 0, 1000)]),
    ],
    ids=repr,
)
def test_spans(schedule, steps, spans) -> None:
    assert plot.spans(schedule, steps) == spans


@pytest.mark.parametrize(
    "schedule", [*FAMILIES, Linear(start_lr=1.0, end_lr=0.0, total_steps=2).repeat(3).warmup(5), MULTI_STEP], ids=type
)
def test_a_title_fits_the_picture(schedule) -> None:
    lines = plot.title(schedule).splitlines()
    assert len(lines) <= plot.TITLE_LINES
    assert all(len(line) <= plot.TITLE_COLUMNS for line in lines)
    shown = " ".join(lines)
    assert shown == repr(schedule) or (shown.endswith(" …") and repr(schedule).startswith(shown[:-2]))


@pytest.mark.parametrize("steps", [2, 4000, 4001, 123_457, MAX_STEP])
def test_sample_keeps_ends_and_jumps(steps: int) -> None:
    schedule = CosineRestarts(peak_lr=1e-3, cycle_length=700, cycle_mult=3, warmup_steps=11)
    points = plot.sample(schedule, steps)
    assert points[0] == 0
    assert points[-1] == steps - 1
    assert points == sorted(set(points))
    assert len(points) <= plot.MAX_POINTS + 40
    for span in plot.spans(schedule, steps):
        assert span.start in points
        assert max(0, span.start - 1) in points or span.name == "cosine"


@needs_matplotlib
@pytest.mark.parametrize("kind", plot_command.KINDS)
def test_png(kind, tmp_path, capsys) -> None:
    path = tmp_path / "lr.png"
    path.write_bytes(b"of an older run")
    assert main(["plot", kind, "--steps", "300", "-o", str(path)]) == 0
    assert capsys.readouterr() == (f"{path}\n", "")
    assert size_of_png(path) == (1200, 540)
    assert list(tmp_path.iterdir()) == [path]


@needs_matplotlib
def test_a_schedule_of_schedules_draws_itself(tmp_path) -> None:
    schedule = minimum(
        Cyclic(base_lr=0.0, peak_lr=1.0, up_steps=20).warmup(10) * Exponential(peak_lr=1.0, gamma=0.5, every=100),
        Constant(0.8),
    )
    schedule.plot(tmp_path / "lr.png", steps=200)
    assert size_of_png(tmp_path / "lr.png") == (1200, 540)


@needs_matplotlib
@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("SVG", b"<?xml"), ("pdf", b"%PDF-")])
def test_other_formats(suffix, start, tmp_path) -> None:
    paths = [tmp_path / f"{number}.{suffix}" for number in range(2)]
    for path in paths:
        assert main(["plot", "wsd", "-o", str(path)]) == 0
    pictures = [path.read_bytes() for path in paths]
    assert pictures[0].startswith(start)
    assert pictures[0] == pictures[1]
    assert (b"<!-- learning rate -->" in pictures[0]) == (suffix.lower() == "svg")


@needs_matplotlib
@pytest.mark.parametrize("steps", [2, MAX_STEP])
def test_png_of_extremes(steps, tmp_path) -> None:
    growth, restarts = (
        Exponential(peak_lr=1.0, gamma=1.5),
        CosineRestarts(peak_lr=1e3, cycle_length=1),
    )  # growth goes to 1.8e308
    for number, schedule in enumerate(
        [growth, Constant(0), WSD(warmup_steps=0, stable_steps=0, decay_steps=1, peak_lr=1e-300), restarts]
    ):
        plot.draw(schedule, tmp_path / f"{number}.png", steps)
        assert size_of_png(tmp_path / f"{number}.png") == (1200, 540)


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        (
            "wsd --warmup-steps 3 --stable-steps none --decay-steps 4",
            WSD(warmup_steps=3, stable_steps=None, decay_steps=4, peak_lr=1e-3),
        ),
        (
            "wsd --peak-lr 0.5 --min-lr 0.1 --decay-type sqrt",
            WSD(warmup_steps=1000, stable_steps=7000, decay_steps=2000, peak_lr=0.5, min_lr=0.1, decay_type="sqrt"),
        ),
        (
            "sgdr --cycle-length 7 --cycle-mult 1.5 --warmup-steps 2",
            CosineRestarts(peak_lr=1e-3, min_lr=0.0, cycle_length=7, cycle_mult=1.5, warmup_steps=2),
        ),
    ],
)
def test_arguments_reach_the_schedule(options, schedule, capsys) -> None:
    assert main(["plot", *options.split()]) == 0
    assert capsys.readouterr().out.startswith(f"{schedule!r}\n")


@needs_matplotlib
def test_failed_write_leaves_the_old_picture(tmp_path, monkeypatch, capsys) -> None:
    path = tmp_path / "lr.png"
    path.write_bytes(b"old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    assert "No space left on device" in refused(capsys, "plot", "wsd", "-o", str(path))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@needs_matplotlib
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_path_that_the_terminal_cannot_print_is_escaped(tmp_path, monkeypatch, encoding) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / {"ascii": "\u00e9.png", "utf-8": "\udce9.png"}[encoding]  # no UTF-8 name has the latter
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["plot", "constant", "-o", str(path)]) == 0
    assert path.is_file()
    printed = terminal.buffer.getvalue()  # type: ignore[attr-defined]
    assert printed == f"{path}\n".encode(encoding, "backslashreplace")


def test_unwritable_output(tmp_path, capsys) -> None:
    assert "No such file or directory" in refused(capsys, "plot", "wsd", "-o", str(tmp_path / "no" / "lr.png"))
    (tmp_path / "file").touch()
    assert "Not a directory" in refused(capsys, "plot", "wsd", "-o", str(tmp_path / "file" / "lr.png"))
    (tmp_path / "folder.png").mkdir()
    assert "not a regular file" in refused(capsys, "plot", "wsd", "-o", str(tmp_path / "folder.png"))


def test_matplotlib_missing(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    line = refused(capsys, "plot", "wsd", "-o", str(tmp_path / "lr.png"))
    assert "pip install 'nexus-optim[plot]'" in line
    assert list(tmp_path.iterdir()) == []
    assert main(["plot", "wsd"]) == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("", "COMMAND"),
        ("train", "invalid choice: 'train'"),
        ("--nonsense", "COMMAND"),
        ("plot", "{constant,"),
        ("plot line", "invalid choice: 'line'"),
        ("plot wsd --warmup-steps", "expected one argument"),
        ("plot wsd --warmup-steps ten", "--warmup-steps: invalid int value: 'ten'"),
        ("plot wsd --stable-steps 1.5", "--stable-steps: invalid int value: '1.5'"),
        ("plot wsd --peak-lr fast", "--peak-lr: invalid float value: 'fast'"),
        ("plot wsd --warm 10", "unrecognized arguments: --warm 10"),
        ("plot wsd --warmup-steps -1", "warmup_steps must be an int from 0 to 2**53, got -1"),
        ("plot sgdr --cycle-mult 1.0001", "cycle_mult must be 1.0"),
        ("plot constant --steps 1", "steps must be an int from 2 to 2**53, got 1"),
        ("plot constant --steps 9007199254740993", "steps must be"),
        ("plot wsd -o lr.jpg", "must end in .png, .svg, .pdf, got 'lr.jpg'"),
        ("plot wsd --output=", "must end in .png, .svg, .pdf, got ''"),
    ],
)
def test_nonsense(argv: str, said: str, capsys) -> None:
    assert said in refused(capsys, *argv.split())


def test_the_command_has_the_name_it_was_called_by(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/nexus"])
    assert main(["plot", "wsd", "--min-lr", "3"]) == 2
    assert capsys.readouterr().err.startswith("nexus plot: min_lr must be")


def test_help_and_version(capsys) -> None:
    for argv in (["--help"], ["--version"], ["plot", "--help"], ["plot", "wsd", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 0
        out, err = capsys.readouterr()
        assert out
        assert err == ""


@pytest.mark.parametrize("schedule", FAMILIES, ids=repr)
@pytest.mark.parametrize("steps", [None, 2, 1000, MAX_STEP])
def test_chart_and_sample_of_every_family(schedule, steps) -> None:
    steps = plot.default_steps(schedule) if steps is None else steps
    assert len(plot.chart(schedule, steps).splitlines()) == 13
    spans = plot.spans(schedule, steps)
    assert (spans[0].start, spans[-1].stop) == (0, steps)
    assert all(a.stop == b.start for a, b in itertools.pairwise(spans))
    assert all(span.name in (schedule.phase(span.start), "cosine") or "cycle" in span.name for span in spans)
    assert len(spans) <= 2 * plot.MAX_CYCLES + 2
    points = plot.sample(schedule, steps)
    assert (points[0], points[-1]) == (0, steps - 1)


@pytest.mark.parametrize(
    ("schedule", "steps", "spans"),
    [
        (Linear(start_lr=0.0, end_lr=1.0, total_steps=100), 105, ["linear", "done"]),
        (Cyclic(base_lr=0.0, peak_lr=1.0, up_steps=20, down_steps=30), 200, ["up", "down"] * 4),
        (Cyclic(base_lr=0.0, peak_lr=1.0, up_steps=20, mode="triangular2"), 160, ["up", "down"] * 4),
        (
            WSDS(warmup_steps=13, cycle_length=50, decay_steps=20, peak_lr=1.0),
            213,
            ["warmup", *["stable", "decay"] * 4],
        ),
        (
            WSDS(warmup_steps=13, cycle_length=50, decay_steps=20, peak_lr=1.0, cycles=2),
            118,
            ["warmup", *["stable", "decay"] * 2, "done"],
        ),
        (OneCycle(peak_lr=1.0, total_steps=101, three_phase=True), 105, ["up", "down", "annihilation", "done"]),
        (MultiStep(peak_lr=1.0, milestones=[10, 20], gamma=0.5), 21, ["stage 0", "stage 1", "stage 2"]),
        (Exponential(peak_lr=1.0, gamma=0.5, every=100), 512, ["exponential"]),
        (InverseSqrt(peak_lr=1.0, timescale=10), 1024, ["inverse"]),
        (Exponential(peak_lr=1.0, gamma=1.5), 1000, ["exponential"]),
    ],
    ids=repr,
)
def test_default_steps_and_spans_of_families(schedule, steps, spans) -> None:
    assert plot.default_steps(schedule) == steps
    assert [span.name for span in plot.spans(schedule, steps)] == spans


@pytest.mark.parametrize("steps", [2, 1000, 10_000, MAX_STEP])
def test_chart_of_growth_without_end(steps) -> None:
    assert len(plot.chart(Exponential(peak_lr=1.0, gamma=1.5), steps).splitlines()) == 13


def test_many_cycles_are_one_span() -> None:
    assert plot.spans(Cyclic(base_lr=0.0, peak_lr=1.0, up_steps=2), 1000) == [("cycles", 0, 1000)]
    assert plot.spans(WSDS(warmup_steps=10, cycle_length=4, decay_steps=2, peak_lr=1.0), 1000) == [
        ("warmup", 0, 10),
        ("cycles", 10, 1000),
    ]
