"""The FSDP2 example: stopped, killed while it saves, and gone on with by another number of processes."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import resource
import runpy
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from gpt import corpus
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from worlds import World, Worlds, launch

pytestmark = pytest.mark.xdist_group("distributed")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "fsdp2.py"

load_once = functools.cache(corpus.load)


def run_example(*arguments: str) -> str:
    """What it prints in this process."""
    environment = {"WORLD_SIZE": str(dist.get_world_size()), "CUDA_VISIBLE_DEVICES": ""}
    printed = io.StringIO()
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", [str(EXAMPLE), *arguments]),
        mock.patch.object(dist, "destroy_process_group"),  # the world goes on
        mock.patch.object(corpus, "load", load_once),
        contextlib.redirect_stdout(printed),
    ):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return printed.getvalue()


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)]


def lines_in_readme() -> str:
    readme = (ROOT / "examples" / "README.md").read_text("utf-8")
    (block,) = re.findall(r"^```\n(\$ torchrun .*?)^```$", readme, re.MULTILINE | re.DOTALL)
    return "".join(line for line in block.splitlines(keepends=True) if not line.startswith("$"))


def test_the_example_goes_on_as_if_nothing_had_happened(worlds: Worlds, tmp_path: Path) -> None:
    printed, *silent = worlds(3).run(run_example, "--stop", "30", "--checkpoint", str(tmp_path / "saved"))
    assert not any(silent)
    resumed, _ = worlds(2).run(run_example, "--checkpoint", str(tmp_path / "saved"))
    whole, _ = worlds(2).run(run_example, "--checkpoint", str(tmp_path / "none"))
    pattern = r"^\d processes, "
    together = re.sub(pattern, "", printed + resumed, flags=re.MULTILINE)
    assert together.count("\n") == 6
    assert numbers(together) == pytest.approx(numbers(re.sub(pattern, "", whole, flags=re.MULTILINE)), rel=0.01)
    # The text is the running Python's own source, so another Python prints other losses.
    assert numbers(printed + resumed) == pytest.approx(numbers(lines_in_readme()), rel=0.5)


@pytest.mark.slow
def test_torchrun_launches_the_example(tmp_path: Path) -> None:
    arguments = ["--standalone", "--nproc-per-node", "2", str(EXAMPLE), "--stop", "10", "--checkpoint"]
    printed = launch(tmp_path / "printed", "torch.distributed.run", *arguments, str(tmp_path / "saved"))
    assert "2 processes, step 10: loss" in printed
    assert (tmp_path / "saved" / "step-00000010" / ".metadata").is_file()


HALF = 150_000  # bytes, of about 300,000 that each of two processes writes into one file


def killed_while_saving(folder: Path, limits: tuple[int | None, int | None]) -> None:
    """From step 10 to 20; ended by the kernel in the write of byte `limit` of a file."""
    limit = limits[dist.get_rank()]
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run_example("--stop", "20", "--checkpoint", str(folder))


def killed_while_removing(folder: Path) -> None:
    """The same, and rank 0 ends when it has removed one file of the save before."""

    def remove_one_file(of: Path) -> None:
        (of / "__0_0.distcp").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(shutil, "rmtree", remove_one_file):
        run_example("--stop", "20", "--checkpoint", str(folder))


def gone_ranks(world: World, function: Callable[..., None], *arguments: Any) -> list[int]:
    """Those that ended without an answer."""
    with pytest.raises(AssertionError) as failed:
        world.run(function, *arguments)
    return [int(rank) for rank in re.findall(r"^rank (\d) of 2: (?:EOF|Connection)\w*Error", str(failed.value), re.M)]


@pytest.fixture(scope="module")
def first_save(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    worlds(2).run(run_example, "--stop", "10", "--checkpoint", str(folder))
    return folder


@pytest.fixture(scope="module")
def whole_run(worlds: Worlds, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is saved by a run to step 30 that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    worlds(2).run(run_example, "--stop", "30", "--checkpoint", str(folder))
    return contents(folder / "step-00000030")


def contents(save: Path) -> dict[str, Any]:
    dcp_to_torch_save(save, save / "together.pt")
    found = torch.load(save / "together.pt", weights_only=False)
    assert isinstance(found, dict)
    return found


def assert_goes_on(worlds: Worlds, checkpoint: Path, steps: list[int], expected: dict[str, Any]) -> None:
    """Trained to step 30, it prints these steps and ends with the bits of the whole run, and no other save."""
    printed, _ = worlds(2).run(run_example, "--stop", "30", "--checkpoint", str(checkpoint))
    assert [int(step) for step in re.findall(r"step (\d+):", printed)] == steps
    assert [path.name for path in checkpoint.iterdir()] == ["step-00000030"]
    found = contents(checkpoint / "step-00000030")
    assert found["step"] == expected["step"] == 30
    assert len(found["model"]) > 20
    assert found["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for what in (lambda saved: saved["model"], lambda saved: saved["optimizer"]["state"]):
        torch.testing.assert_close(what(found), what(expected), rtol=0, atol=0)


@pytest.fixture
def checkpoint(tmp_path: Path, first_save: Path) -> Path:
    shutil.copytree(first_save, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("limits", [(None, HALF), (HALF, HALF)], ids=["one", "both"])
def test_a_run_that_is_killed_while_it_saves_goes_on_from_the_save_before(
    worlds: Worlds, checkpoint: Path, whole_run: dict[str, Any], limits: tuple[int | None, int | None]
) -> None:
    killed = [rank for rank, limit in enumerate(limits) if limit is not None]
    assert gone_ranks(World(2, checkpoint.parent), killed_while_saving, checkpoint, limits) == killed
    for rank in killed:
        assert (checkpoint / "step-00000020" / f"__{rank}_0.distcp").stat().st_size == HALF
    assert not (checkpoint / "step-00000020" / ".metadata").exists()
    assert_goes_on(worlds, checkpoint, [20, 30], whole_run)


def test_a_run_that_is_killed_while_it_removes_the_save_before_goes_on_from_the_new_one(
    worlds: Worlds, checkpoint: Path, whole_run: dict[str, Any]
) -> None:
    assert gone_ranks(World(2, checkpoint.parent), killed_while_removing, checkpoint) == [0]
    assert (checkpoint / "step-00000010" / ".metadata").is_file()
    assert not (checkpoint / "step-00000010" / "__0_0.distcp").exists()
    assert_goes_on(worlds, checkpoint, [30], whole_run)
