"""The memory of the CUDA backend's tables: when it is asked for, when it is given back, and where there is none."""

from __future__ import annotations

import gc
from typing import Any

import cuda_on_cpu
import pytest
import torch
from cases import CHUNK
from cuda_on_cpu import NAME, captured_step, runner_of
from cuda_shim.controls import Shim
from references import (
    assert_same_run,
    copies,
    make_grads,
    make_params,
    params_of,
    run_beside_torch,
    same_bits,
    set_grads,
    snapshot,
    step_both,
)

from nexus.backends import cuda
from nexus.optim import FusedAdamW
from nexus.optim.engine import engine_of

OUT_OF_MEMORY = 2


def stepped(**options: Any) -> FusedAdamW:
    """An optimizer after a step, with gradients that stay."""
    params = make_params([(5,), (CHUNK + 1,)])
    set_grads(params, make_grads(params))
    optimizer = FusedAdamW(params, backend=NAME, **options)
    optimizer.step()
    return optimizer


class Tables:
    """Counts those that there are, besides what other tests have left."""

    def __init__(self, gpu: Shim) -> None:
        self._gpu = gpu
        self._others = 0
        self._others = self.count()

    def count(self) -> int:
        gc.collect()
        stepped()  # whose memory is given back, with all that nobody holds
        return self._gpu.allocations() - self._others


@pytest.fixture
def tables(gpu: Shim) -> Tables:
    counted = Tables(gpu)
    gpu.reset()
    return counted


# Where there is no memory.


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("steps", [0, 2])
def test_memory_that_cannot_be_had(gpu: Shim, steps: int, max_grad_norm: float | None) -> None:
    """For the first table, and for a larger one."""
    params, added = make_params([(5,)]), make_params([(300_000,)])
    rounds = [make_grads([*params, *added]) for _ in range(steps + 2)]

    def run(fails: bool) -> FusedAdamW:
        optimizer = FusedAdamW(copies(params), backend=NAME, max_grad_norm=max_grad_norm)
        for grads in rounds[:steps]:
            set_grads(params_of(optimizer), grads[:1])
            optimizer.step()
        optimizer.add_param_group({"params": copies(added)})
        for grads in rounds[steps:]:
            set_grads(params_of(optimizer), grads)
            if fails:
                before = [param.detach().clone() for param in params_of(optimizer)]
                gpu.fail(OUT_OF_MEMORY, function="allocate")
                with pytest.raises(torch.cuda.OutOfMemoryError, match=r"the shim does not give \d+ bytes"):
                    optimizer.step()
                assert same_bits(before, params_of(optimizer))
                fails = False
            optimizer.step()
        return optimizer

    undisturbed, disturbed = run(False), run(True)
    assert same_bits(snapshot(undisturbed), snapshot(disturbed))
    assert int(disturbed.state[params_of(disturbed)[0]]["step"]) == steps + 2


def test_torchs_error_says_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(torch.cuda, "caching_allocator_alloc", refuse)
    with pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        cuda.allocate(3, 70_400, 0)
    (message,) = caught.value.args  # one, which trainers read when they look for a smaller batch
    assert message.startswith("CUDA out of memory. Tried to allocate 2.00 MiB. ")
    assert "FusedAdamW asked for 70400 bytes on cuda:3" in message


def test_a_capture_that_finds_no_memory(gpu: Shim, tables: Tables) -> None:
    optimizer, reference = run_beside_torch(make_params([(5,), (7,)]), NAME, steps=1, max_grad_norm=1.0)
    grads = [param.grad for param in params_of(optimizer)]
    before = snapshot(optimizer)
    gpu.fail(OUT_OF_MEMORY, function="allocate")
    with pytest.raises(torch.cuda.OutOfMemoryError):
        captured_step(optimizer)
    assert gpu.capture_mode_is_global()
    assert not runner_of(optimizer).has_captured()
    assert same_bits(before, snapshot(optimizer))
    runner_of(optimizer).stream = 0
    graph = captured_step(optimizer)
    for _ in range(2):
        graph.replay()
        reference.step(grads)
        step_both(optimizer, reference, steps=1)
    assert_same_run(optimizer, reference)


# Tables of steps that run at once.


def test_memory_is_given_back(tables: Tables) -> None:
    optimizer = stepped()
    for size in (3, 300_000, 4):  # another table takes the place of the first
        added = make_params([(size,)])
        set_grads(added, make_grads(added))
        optimizer.add_param_group({"params": added})
        optimizer.step()
    assert tables.count() == 1
    del optimizer
    assert tables.count() == 0


def test_a_table_that_grows_waits_for_nothing(gpu: Shim) -> None:
    optimizer = stepped()
    gpu.reset()
    added = make_params([(300_000,)])
    set_grads(added, make_grads(added))
    optimizer.add_param_group({"params": added})
    optimizer.step()
    assert (gpu.calls("allocate"), gpu.calls("cudaStreamSynchronize")) == (1, 0)


def test_memory_serves_the_stream_that_it_was_allocated_for(gpu: Shim, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator gives it to whoever comes next on that stream, and asks nobody whether a step is over."""
    asked = []

    def allocate(device: int, nbytes: int, stream: int) -> int:
        asked.append(stream)
        return plain_allocate(device, nbytes, stream)

    plain_allocate = cuda_on_cpu.allocate
    monkeypatch.setattr(cuda_on_cpu, "allocate", allocate)
    optimizer, reference = run_beside_torch(make_params([(5,), (7,)]), NAME, steps=1)
    streams = [gpu.stream(), gpu.stream()]
    for stream in (streams[0], streams[0], streams[1], 0):
        runner_of(optimizer).stream = stream
        step_both(optimizer, reference, steps=1)
    assert asked == [0, *streams, 0]
    assert_same_run(optimizer, reference)
    captured_step(optimizer)
    captured = {launch.stream for launch in gpu.launches() if launch.captured}
    assert len(asked) == 5
    assert captured.isdisjoint(asked)  # or the memory would be the graph's, which earlier kernels of it write to


# Tables of captured steps.


def test_a_table_goes_with_its_graph(tables: Tables) -> None:
    optimizer = stepped()
    graph = captured_step(optimizer)
    assert runner_of(optimizer).has_captured()
    assert tables.count() == 2
    executable = graph.instantiate()
    del graph
    assert tables.count() == 2
    before = snapshot(optimizer)
    executable.replay()
    assert not same_bits(before, snapshot(optimizer))
    del executable
    assert not runner_of(optimizer).has_captured()
    assert tables.count() == 1


def test_graphs_of_the_same_step_share_a_table(gpu: Shim, tables: Tables) -> None:
    optimizer = stepped(max_grad_norm=1.0)
    graphs = [captured_step(optimizer) for _ in range(3)]
    assert tables.count() == 2
    params = params_of(optimizer)
    set_grads(params, make_grads(params))
    graphs.append(captured_step(optimizer))
    assert tables.count() == 3
    while len(graphs) > 2:
        graphs.pop(0)
        assert tables.count() == 3
    before = snapshot(optimizer)
    graphs.pop(0).replay()
    assert not same_bits(before, snapshot(optimizer))
    assert tables.count() == 2
    assert gpu.calls("cudaStreamCreateWithFlags") <= 1  # one for a device, as long as the process


def test_captures_that_are_dropped_leave_nothing(gpu: Shim, tables: Tables) -> None:
    optimizer = stepped()
    params = params_of(optimizer)
    most = 0
    for _ in range(20):
        set_grads(params, make_grads(params))
        captured_step(optimizer).replay()
        most = max(most, gpu.allocations())
    assert tables.count() == 1
    assert most <= gpu.allocations() + 1


def test_a_capture_that_fails_leaves_nothing(gpu: Shim, tables: Tables) -> None:
    optimizer = stepped()
    runner = runner_of(optimizer)

    def capture() -> None:
        with gpu.capture(runner.stream):
            optimizer.step()
            gpu.allocate(0, 4)  # which no capture allows

    runner.stream = gpu.stream()
    with pytest.raises(RuntimeError, match="invalidated: allocate in a capture"):
        capture()
    runner.stream = 0
    assert tables.count() == 1
    assert not runner.has_captured()


@pytest.mark.parametrize("function", ["cudaUserObjectCreate", "cudaGraphRetainUserObject"])
def test_a_graph_that_cannot_hold_its_table_is_refused(gpu: Shim, tables: Tables, function: str) -> None:
    optimizer = stepped()
    gpu.fail(1, function=function)
    with pytest.raises(RuntimeError, match=r"table.* failed: cudaErrorInvalidValue"):
        captured_step(optimizer)
    runner_of(optimizer).stream = 0
    assert tables.count() == 1


def test_a_graph_keeps_its_table_when_the_optimizer_is_gone(tables: Tables) -> None:
    """Its last replay may run when both are dropped."""
    optimizer = stepped()
    kept = vars(optimizer)["state"], engine_of(optimizer).states  # what a replay works on
    graph = captured_step(optimizer)
    del optimizer
    assert tables.count() == 1
    graph.replay()
    del graph
    assert tables.count() == 0
    del kept


def test_memory_waits_for_hyperparameters_that_are_on_their_way(gpu: Shim) -> None:
    """A graph that is dropped waits for its replays, and does not know of them."""
    optimizer = stepped()
    graph = captured_step(optimizer)
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.sync_hyperparameters()
    assert gpu.calls("cudaEventRecord") == gpu.calls("cudaStreamWaitEvent") == gpu.calls("cudaEventDestroy") == 1
    del graph
    optimizer.param_groups[0]["lr"] = 0.6
    optimizer.sync_hyperparameters()
    assert gpu.calls("cudaStreamWaitEvent") == 1


def test_no_graph_writes_hyperparameters_of_another(gpu: Shim) -> None:
    optimizer = stepped()
    graph = captured_step(optimizer)
    optimizer.param_groups[0]["lr"] = 0.5
    runner = runner_of(optimizer)
    runner.stream = gpu.stream()
    with gpu.capture(runner.stream), pytest.raises(RuntimeError, match="between replays, and not while"):
        optimizer.sync_hyperparameters()
    runner.stream = 0
    optimizer.sync_hyperparameters()
    param = params_of(optimizer)[0].detach()
    before = param.clone()
    graph.replay()
    assert float((param - before).abs().max()) > 0.1
