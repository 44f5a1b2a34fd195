"""Low-memory state on a GPU: the bits that the reference has on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from low_memory_cases import MODES, optimizer_of
from low_memory_ends import check_ends, numel_beyond
from references import params_of, same_bits, set_grads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
SHAPES = [(16_384 + 130,), (7,), (0,), (67, 65), (256, 1024)]  # of whole turns, and not
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.5, 0.75), "seed": 2**40 + 1}  # powers of these betas are exact


@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_streams_have_the_bits_of_the_reference(name: str, mode: str, amsgrad: bool) -> None:
    dtype = MODES[mode].param
    torch.manual_seed(0)
    params = [torch.randn(shape).to(dtype) for shape in SHAPES]
    rounds = [[(torch.randn(shape).exp() * torch.randn(shape)).to(dtype) for shape in SHAPES] for _ in range(4)]
    ends = []
    for way, device in ((name, "cuda"), ("reference", "cpu")):
        ours = [torch.nn.Parameter(param.to(device, copy=True)) for param in params]
        optimizer = optimizer_of(way, ours, MODES[mode], amsgrad=amsgrad, **OPTIONS)
        for grads in rounds:
            set_grads(ours, [grad.to(device) for grad in grads])
            optimizer.step()
        states = (optimizer.state[param] for param in params_of(optimizer))
        ends.append([{"param": each.detach(), **state} for each, state in zip(ours, states, strict=True)])
    for index, (found, expected) in enumerate(zip(*ends, strict=True)):
        for stream in expected:
            assert same_bits([found[stream].cpu()], [expected[stream].cpu()]), f"{stream} of parameter {index}"


@pytest.mark.parametrize("offset", [1, 8])
@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.exp_avg_dtype == torch.int8])
def test_what_is_not_aligned_has_the_same_bits(mode: str, offset: int) -> None:
    dtype = MODES[mode].param
    start, grad = torch.randn(40_960).to(dtype).cuda(), torch.randn(40_960).to(dtype).cuda()
    ends = []
    for place in (0, offset):
        param = torch.nn.Parameter(torch.zeros(41_000, dtype=dtype, device="cuda")[place : place + 40_960])
        param.data.copy_(start)
        optimizer = optimizer_of("cuda", [param], MODES[mode], **OPTIONS)
        for _ in range(3):
            set_grads([param], [grad])
            optimizer.step()
        ends.append([param.detach(), *optimizer.state[param].values()])
    assert same_bits(*ends)


@pytest.mark.parametrize("mode", ["bf16 + 8, 8-bit moments by chance", "bf16 + 16, bf16 moments"])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_tensor_of_more_elements_than_31_bits_count(name: str, mode: str) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of the GPU's memory")

    def allocate(numel: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype, device="cuda")

    check_ends(name, MODES[mode], numel_beyond(2**31), allocate)
