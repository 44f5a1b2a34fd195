"""What backends do on every device, and that it reads nothing back: a fake tensor has no value to be read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from nexus.backends import reference
from nexus.backends.sharding import total_everywhere
from nexus.backends.watched import as_float32
from nexus.schedules import WSD, Cosine
from nexus.schedules.table import ScheduleTable


def test_every_device_gets_the_sum_of_all_and_reads_nothing_back() -> None:
    sums = [torch.tensor(value, dtype=torch.float64) for value in (1.5, 2.0, 4.0)]
    total_everywhere(sums)
    total_everywhere(sums[:1])
    assert sums == [7.5] * 3
    with FakeTensorMode():
        total_everywhere([torch.zeros((), dtype=torch.float64) for _ in range(2)])


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3)])
def test_the_reference_evaluator_reads_nothing_back(shape: tuple[int, ...]) -> None:
    with FakeTensorMode():
        table = torch.zeros(2, 3, 9, dtype=torch.float64)
        values = reference.evaluate(table, torch.zeros(shape, dtype=torch.int64))
    assert values.shape == shape


def test_edits_of_a_schedule_read_nothing_back() -> None:
    with FakeTensorMode():
        table = ScheduleTable(WSD(warmup_steps=3, stable_steps=4, decay_steps=5, peak_lr=1.0), torch.device("cpu"))
        completed = torch.zeros((), dtype=torch.int64)
        table.begin_decay(completed, reference.evaluate(table.rows, completed))
        table.extend_stable(3, completed)
        ScheduleTable(Cosine(peak_lr=1.0, total_steps=5), torch.device("cpu")).replace(
            Cosine(peak_lr=2.0, total_steps=5)
        )


class Copies(TorchFunctionMode):
    """Notes where scalars are to be copied to, and whether nobody waits for that."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, bool]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.to:
            return func(*args, **(kwargs or {}))
        self.asked.append((args[1].type, kwargs["non_blocking"]))
        return args[0]


def test_the_cpu_waits_for_what_it_reads_at_once_and_a_gpu_does_not() -> None:
    scalar = torch.ones(())
    with Copies() as copies:
        as_float32(scalar, torch.device("cpu"))
        as_float32(scalar, torch.device("cuda"))
    assert copies.asked == [("cpu", False), ("cuda", True)]
