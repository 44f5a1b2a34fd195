"""Worlds of processes that train together: started once, asked to run functions, killed if they hang."""

from __future__ import annotations

import functools
import importlib
import inspect
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

LIMIT = 60.0  # seconds that a function may take in a world

# Imports torch and nexus once, and has no threads: each process is a fork of it, which takes no time to start.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.tensor.parallel",
        "nexus.training",
    ]
)


class World:
    """`size` processes with a gloo group of them all; on GPUs, one each, with NCCL for what is there.

    Args:
        size: how many.
        folder: for the file over which they find one another.
        device: "cpu" or "cuda".
    """

    def __init__(self, size: int, folder: Path, device: str = "cpu") -> None:
        self.size, self.device = size, device
        file = tempfile.mktemp(dir=folder, prefix="world_")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            mine, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(theirs, rank, size, file, device), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, **given: Any) -> list[Any]:
        """What `function` returns in each process. A failed or a hung process fails the test, by its words.

        Of a test by `in_processes`, it runs the body.
        """
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, args, given)))
        results, errors = [], []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(LIMIT):
                    raise TimeoutError(f"no answer within {LIMIT:.0f} s")
                error, result = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionError, TimeoutError) as gone:
                error, result = repr(gone), None
            results.append(result)
            if error:
                errors.append(f"rank {rank} of {self.size}: {error}")
        if errors:
            self.close()  # the others may wait for one that failed
            raise AssertionError("\n".join(errors))
        return results

    @property
    def is_alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
            process.close()
        for pipe in self._pipes:
            pipe.close()
        self._processes = []


class Worlds:
    """Those of a test session, by their sizes and devices."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._worlds: dict[tuple[int, str], World] = {}

    def __call__(self, size: int, device: str = "cpu") -> World:
        world = self._worlds.get((size, device))
        if world is None or not world._processes or not world.is_alive:
            world = self._worlds[size, device] = World(size, self._folder, device)
        return world

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()


def in_processes(size: int | None = None, **fixed: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A test that runs in each of `size` processes that train together; None: of as many as its case says.

    One is this process, which has no group. `fixed` are arguments that are the same in all cases.
    """

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)  # under its name, each process finds it
        def test(worlds: Worlds, **given: Any) -> None:
            count = size or given.pop("size")
            if count == 1:
                body(**fixed, **given)
            else:
                worlds(count).run(test, **fixed, **given)

        names = ["worlds", *([] if size else ["size"]), *inspect.signature(body).parameters]
        kind = inspect.Parameter.KEYWORD_ONLY
        test.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # what pytest is to give
            [inspect.Parameter(name, kind) for name in names if name not in fixed]
        )
        return pytest.mark.xdist_group("distributed")(test)

    return decorate


def launch(file: Path, module: str, *arguments: str) -> str:
    """What a launcher and the processes that it starts print, into `file`. A fork has imported torch already."""
    launcher = FORKS.Process(target=_launch, args=(file, module, arguments))
    launcher.start()
    launcher.join(2 * LIMIT)
    launcher.terminate()  # if it hangs
    printed = file.read_text("utf-8")
    # Gloo's threads of torch 2.13 sometimes abort a process that has done its work, also with torch's AdamW alone.
    assert launcher.exitcode == 0 or "terminate called without an active exception" in printed, printed
    return printed


def _launch(file: Path, module: str, arguments: tuple[str, ...]) -> None:
    with file.open("w") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    sys.argv = [module, *arguments]
    importlib.import_module(module).main()


def _serve(pipe: Connection, rank: int, size: int, file: str, device: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    groups = "gloo"
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        importlib.import_module("cuda_on_cpu")  # registers it
    else:
        groups = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        groups, init_method=f"file://{file}", rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT / 2)
    )
    while True:
        try:
            function, args, given = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over
            return
        torch.manual_seed(20_240_404)
        try:
            answer = None, getattr(function, "__wrapped__", function)(*args, **given)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send_bytes(pickle.dumps(answer))
