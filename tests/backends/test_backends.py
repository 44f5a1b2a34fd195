"""Which backend runs where, and what is said if none does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nexus import backends
from nexus.backends import cuda, native, reference, triton
from nexus.backends import extension as extension_module

CPU, GPU, OTHER_GPU = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets why a GPU's backends cannot run; None where they can."""

    def set_reasons(**reasons: str | None) -> None:
        for module in (cuda, triton):
            name = module.__name__.rpartition(".")[2]
            monkeypatch.setattr(module, "unavailable", lambda devices=(), name=name: reasons[name])
        monkeypatch.setattr(triton, "DEVICE_TYPES", frozenset({"cuda"}))

    return set_reasons


@pytest.mark.parametrize(
    ("reasons", "expected"),
    [({"cuda": None, "triton": None}, cuda), ({"cuda": "no nvcc", "triton": None}, triton)],
)
def test_auto_takes_the_best_there_is(there: Any, reasons: dict[str, str | None], expected: Any) -> None:
    there(**reasons)
    assert backends.select("auto", [GPU, OTHER_GPU]) is expected
    assert backends.select("auto", [CPU]) is native
    assert backends.select("reference", [GPU, CPU]) is reference
    assert backends.select("triton", [GPU]) is triton


def test_without_kernels_for_a_gpu_the_error_says_how_to_get_them(there: Any) -> None:
    there(cuda="the extension has no CUDA code: nvcc was not found", triton="run 'pip install triton'")
    with pytest.raises(RuntimeError, match=r"no kernels for parameters on cuda.*nvcc was.*pip install"):
        backends.select("auto", [GPU])
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run here: the extension has no CUDA code"):
        backends.select("cuda", [GPU])
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here: run 'pip install triton'"):
        backends.select("triton", [GPU])


@pytest.mark.parametrize(
    ("name", "devices", "words"),
    [
        ("cuda", [CPU], "backend='cuda' runs on cuda, but the tensors are on cpu"),
        ("triton", [CPU], "backend='triton' runs on cuda, but the tensors are on cpu"),
        ("native", [GPU], "backend='native' runs on cpu, but the tensors are on cuda"),
        ("cuda", [CPU, GPU], "backend='cuda' runs on cuda, but the tensors are on cpu and cuda"),
        ("auto", [CPU, GPU], "parameters are on cpu and cuda; make an optimizer for each of them"),
        ("auto", [torch.device("mps")], "no kernels for mps; backend='reference' runs there"),
        ("gpu", [GPU], "backend must be one of .*'native', 'cuda', 'triton', 'reference'.*got 'gpu'"),
    ],
)
def test_what_cannot_be_is_refused(there: Any, name: str, devices: list[torch.device], words: str) -> None:
    there(cuda=None, triton=None)
    with pytest.raises(ValueError, match=words):
        backends.select(name, devices)


class TestCuda:
    """Why the CUDA backend cannot run, in the order in which it is found out."""

    @pytest.fixture
    def extension(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """That of a machine with a GPU."""
        cuda._unavailable_on.cache_clear()
        extension = SimpleNamespace(
            CudaRecords=None, cuda_architectures="sm_80 sm_90", cuda_missing_code=lambda index: ""
        )
        monkeypatch.setattr(cuda, "extension", extension)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla V100")
        return extension

    def test_nothing_is_missing(self, extension: SimpleNamespace) -> None:
        assert cuda.unavailable([GPU, OTHER_GPU]) is None

    def test_no_extension(self, extension: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(extension_module, "extension", None)
        monkeypatch.setattr(extension_module, "_import_error", "no such file", raising=False)
        assert "the extension" in (cuda.unavailable() or "")

    def test_no_code(self, extension: SimpleNamespace) -> None:
        del extension.CudaRecords
        assert (cuda.unavailable() or "").startswith("the extension has no CUDA code: ")

    def test_a_torch_without_cuda(self, extension: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        assert cuda.unavailable() == "this PyTorch is not built for CUDA"

    def test_no_device(self, extension: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert cuda.unavailable() == "PyTorch finds no CUDA device"

    def test_an_older_driver(self, extension: SimpleNamespace) -> None:
        extension.cuda_missing_code = lambda index: "cudaErrorInsufficientDriver (CUDA driver version is ...)"
        assert "InsufficientDriver (CUDA driver version is ...). Update the driver" in (cuda.unavailable([GPU]) or "")

    def test_an_older_gpu(self, extension: SimpleNamespace) -> None:
        extension.cuda_missing_code = lambda index: "cudaErrorNoKernelImageForDevice" if index == 1 else ""
        assert cuda.unavailable([GPU]) is None
        reason = cuda.unavailable([GPU, OTHER_GPU])
        assert reason is not None
        for words in ("sm_80 sm_90", "cuda:1 (Tesla V100, sm_70)", "NEXUS_CUDA_ARCHS=sm_70", "NoKernelImage"):
            assert words in reason
