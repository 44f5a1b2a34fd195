"""Several threads: optimizers that step at the same time, and others that look on."""

from __future__ import annotations

import threading

import pytest
import torch
from references import copies, make_grads, make_params, same_bits, set_grads, snapshot
from side_by_side import param
from torch import Tensor

from nexus.optim import FusedAdamW
from nexus.schedules import Cosine


@pytest.mark.usefixtures("restored_threads")
def test_two_optimizers_on_two_threads(backend: str) -> None:
    torch.set_num_threads(2)
    start = [make_params([(40_000,), (7,)]) for _ in range(2)]
    rounds = [[make_grads(own) for _ in range(8)] for own in start]

    def train(which: int, found: dict[int, list[Tensor]]) -> None:
        own = copies(start[which])
        optimizer = FusedAdamW(own, lr=Cosine(0.1, 20), max_grad_norm=1.0, backend=backend)
        for grads in rounds[which]:
            set_grads(own, grads)
            optimizer.step()
        found[which] = snapshot(optimizer)

    expected: dict[int, list[Tensor]] = {}
    for which in range(2):
        train(which, expected)
    found: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=train, args=(which, found)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert all(same_bits(expected[which], found[which]) for which in range(2))


def test_other_threads_may_read_the_state_in_the_middle_of_a_step() -> None:
    weight, done = param(300_000, dtype=torch.float32), threading.Event()
    optimizer, seen = FusedAdamW([weight], lr=0.1), []
    weight.grad = torch.ones_like(weight)

    def read() -> None:
        while not done.is_set():
            seen.append(len(optimizer.state_dict()["state"]))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    for _ in range(50):
        optimizer.step()
    done.set()
    thread.join()
    assert seen
    assert int(optimizer.state[weight]["step"]) == 50
    assert (weight == weight[0]).all()
