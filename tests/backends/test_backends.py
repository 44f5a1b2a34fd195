"""Which backend runs where, and what is said if none does."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nexus import backends
from nexus.backends import cuda, native, reference, triton

CPU, GPU, OTHER_GPU = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets why a GPU's backends cannot run; None where they can."""

    def set_reasons(**reasons: str | None) -> None:
        for module in (cuda, triton):
            name = module.__name__.rpartition(".")[2]
            monkeypatch.setattr(module, "unavailable", lambda devices=(), name=name: reasons[name])
        monkeypatch.setattr(triton, "DEVICE_TYPES", frozenset({"cuda"}))
        monkeypatch.setattr(cuda, "has_code", lambda: False)

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


def test_a_gpu_that_the_cuda_kernels_are_not_for_is_named_once(there: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    there(cuda="none for cuda:0 (Tesla T4, sm_75)", triton=None)
    monkeypatch.setattr(cuda, "has_code", lambda: True)
    backends.say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"'triton' runs in the place of backend 'cuda': none for .*Tesla T4"):
        assert backends.select("auto", [GPU]) is triton
    assert backends.select("auto", [GPU]) is triton  # warnings are errors here


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
        ("torch", [GPU], "backend='torch' runs on cpu, but the tensors are on cuda"),
        ("cuda", [CPU, GPU], "backend='cuda' runs on cuda, but the tensors are on cpu and cuda"),
        ("auto", [CPU, GPU], "parameters are on cpu and cuda; make an optimizer for each of them"),
        ("auto", [torch.device("mps")], "no kernels for mps; backend='reference' runs there"),
        ("gpu", [GPU], "backend must be one of .*'native', 'cuda', 'triton', 'torch', 'reference'.*got 'gpu'"),
    ],
)
def test_what_cannot_be_is_refused(there: Any, name: str, devices: list[torch.device], words: str) -> None:
    there(cuda=None, triton=None)
    with pytest.raises(ValueError, match=words):
        backends.select(name, devices)


@pytest.fixture
def extension(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """That of a machine with a GPU for which it has code."""
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


# What is changed of it, and the reason then.
REASONS: dict[str, tuple[str, Any, str]] = {
    "no extension": ("nexus.backends.extension.extension", None, "the extension cannot be imported: no such file"),
    "no code": ("nexus.backends.cuda.extension", SimpleNamespace(), "the extension has no CUDA code: "),
    "a torch without CUDA": (
        "torch.version.cuda",
        None,
        "this PyTorch is not built for CUDA; nexus is compiled for sm_80 sm_90$",
    ),
    "no device": (
        "torch.cuda.is_available",
        lambda: False,
        "PyTorch finds no CUDA device; nexus is compiled for sm_80 sm_90$",
    ),
}


@pytest.mark.parametrize(("where", "value", "words"), REASONS.values(), ids=list(REASONS))
@pytest.mark.usefixtures("extension")
def test_why_cuda_cannot_run(monkeypatch: pytest.MonkeyPatch, where: str, value: Any, words: str) -> None:
    assert cuda.unavailable([GPU, OTHER_GPU]) is None
    monkeypatch.setattr("nexus.backends.extension._import_error", "no such file", raising=False)
    monkeypatch.setattr(where, value)
    assert re.match(words, cuda.unavailable() or "")


def test_an_older_driver_is_named(extension: SimpleNamespace) -> None:
    extension.cuda_missing_code = lambda index: "cudaErrorInsufficientDriver (CUDA driver version is ...)"
    assert "InsufficientDriver (CUDA driver version is ...). Update the driver" in (cuda.unavailable([GPU]) or "")


def test_an_older_gpu_is_named(extension: SimpleNamespace) -> None:
    extension.cuda_missing_code = lambda index: "cudaErrorNoKernelImageForDevice" if index == 1 else ""
    assert cuda.unavailable([GPU]) is None
    reason = cuda.unavailable([GPU, OTHER_GPU]) or ""
    for words in ("sm_80 sm_90", "cuda:1 (Tesla V100, sm_70)", "NEXUS_CUDA_ARCHS=sm_70", "NoKernelImage"):
        assert words in reason
