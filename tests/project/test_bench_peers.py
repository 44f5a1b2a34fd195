"""Peers from other packages on a CPU, none of which need be installed: beside which cases, how made and how timed."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_gpu import quick_benchmark  # noqa: F401  # a fixture

from benchmarks import cases
from benchmarks.cases import BFLOAT16, CASES, FLOAT32, STEP, Case
from benchmarks.measure import measure
from benchmarks.peers import OPTIONS, PEERS
from benchmarks.report import LeftOut, Row
from benchmarks.timing import PROCESSOR

DEEPSPEEDS = [cases.DEEPSPEED, cases.DEEPSPEED_BFLOAT16]
KAHAN, SLOW = cases.OPTIMI_KAHAN, [cases.TORCHAO_8_BIT, cases.BITSANDBYTES]
FROM_PACKAGES = [*DEEPSPEEDS, KAHAN, cases.TORCHAO, *SLOW]


def beside(name: str, dtype: str = BFLOAT16, repeats: int = 8) -> Row | LeftOut:
    """What comes of timing nexus beside this peer alone."""
    case = Case("small", "", ((40, 30), (7,)), 1, 1, jobs=(STEP,), peers=(name,), dtype=dtype)
    (row,) = measure(case, repeats)
    return row


def provide(monkeypatch: pytest.MonkeyPatch, name: str, optimizer: type[torch.optim.Optimizer]) -> None:
    """Let `optimizer` be the class that this peer is, of a module that stands for its package's."""
    module = ModuleType(PEERS[name].module)
    setattr(module, PEERS[name].name, optimizer)
    parts = module.__name__.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_each_way_of_storing_state_has_its_peers() -> None:
    wide = [cases.NEXUS_FLOAT32, cases.FUSED_FLOAT32, cases.DEEPSPEED]
    narrow = [*wide, cases.DEEPSPEED_BFLOAT16, KAHAN, cases.TORCHAO]
    expected = [wide, [*wide, *SLOW], narrow, narrow, narrow, [*narrow, *SLOW], [*narrow, *SLOW]]
    assert [list(CASES[f"gpt2-{index}"].peers) for index in range(1, 8)] == expected


@pytest.mark.parametrize("name", FROM_PACKAGES)
def test_what_is_not_installed_is_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PEERS[name].module, None)
    left_out = beside(name)
    assert isinstance(left_out, LeftOut)
    assert not left_out.failed
    assert left_out.reason.startswith("not installed")


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("name", DEEPSPEEDS)
def test_deepspeed_is_given_what_it_takes(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class DeepSpeedCPUAdam(torch.optim.AdamW):
        def __init__(  # its arguments
            self,
            model_params: Any,
            lr: float = 1e-3,
            bias_correction: bool = True,
            betas: tuple[float, float] = (0.9, 0.999),
            eps: float = 1e-8,
            weight_decay: float = 0,
            amsgrad: bool = False,
            adamw_mode: bool = True,
            fp32_optimizer_states: bool = True,
        ) -> None:
            assert adamw_mode
            assert fp32_optimizer_states == (name == cases.DEEPSPEED)
            super().__init__(model_params, lr, betas, eps, weight_decay, amsgrad)
            assert {option: self.defaults[option] for option in OPTIONS} == OPTIONS

    provide(monkeypatch, name, DeepSpeedCPUAdam)
    row = beside(name, dtype)
    assert isinstance(row, Row), row.reason
    assert (row.peer, row.dtype, row.pairs) == (name, dtype, 8)


@pytest.mark.parametrize("restored", [True, False])
def test_gradients_are_restored_for_a_peer_that_overwrites_them(
    restored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Overwriting(torch.optim.AdamW):
        def __init__(self, params: Any, kahan_sum: bool, **options: Any) -> None:
            assert kahan_sum
            super().__init__(params, **options)

        @torch.no_grad()
        def step(self) -> None:
            super().step()
            for param in self.param_groups[0]["params"]:
                param.grad.zero_()

    provide(monkeypatch, KAHAN, Overwriting)
    assert PEERS[KAHAN].overwrites_gradients
    if not restored:
        monkeypatch.setattr("benchmarks.contestants._restoring_gradients", lambda params: lambda: None)
    row = beside(KAHAN)
    if restored:
        assert isinstance(row, Row), row.reason
    else:
        assert "differ by" in row.reason


@pytest.mark.parametrize("name", SLOW)
def test_slow_peers_are_timed_less_often(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    provide(monkeypatch, name, torch.optim.AdamW)
    assert [beside(name, repeats=repeats).pairs for repeats in (3, 30)] == [3, 5]


def test_versions_are_kept() -> None:
    kept = PROCESSOR.metadata()["peers"]
    assert kept["torch"] == torch.__version__
    assert {"deepspeed", "torch-optimi", "torchao", "bitsandbytes"} <= kept.keys()
