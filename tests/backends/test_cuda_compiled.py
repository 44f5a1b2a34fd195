"""What nvcc makes of the kernels: registers, spills, and how wide the accesses to memory are. It needs no GPU."""

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90", "sm_100")

THREADS = 256  # of a block
REGISTERS = 65536  # of a multiprocessor
# Blocks that are to share a multiprocessor, so that enough loads are on their way at once: 4 of them are 32 warps.
# Their threads have at most 65536 / (256 * blocks) registers each: 64 for 4 blocks.
BLOCKS = {"adamw_uniform": 4, "adamw_any": 2, "sum_squares": 8}
SOURCES = {"adamw_uniform": "adamw", "adamw_any": "adamw", "sum_squares": "grad_norm"}

SIZES = {"float": 4, "double": 8, "BFloat16": 2, "Float16": 2}

pytestmark = pytest.mark.xdist_group("cuda_compiled")  # so that each source is compiled once


class Kernel(NamedTuple):
    name: str
    types: tuple[str, ...]  # its template arguments
    registers: int
    local_bytes: int  # of the stack frame, spilled registers among them
    accesses: Counter  # how often each of SASS's instructions for memory stands in it


@pytest.fixture(scope="module")
def setup():
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module)
    spec = importlib.util.spec_from_file_location("nexus_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nvcc(setup):
    try:
        return setup.find_nvcc()
    except setup.CompileError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def disassemble(nvcc):
    """Reads a cubin with nvdisasm, of the toolkit or of triton."""
    spec = importlib.util.find_spec("triton")
    triton = Path(spec.origin).parent / "backends/nvidia/bin" if spec else None
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    toolkit = re.search(r"_HERE_=(.*)", dry_run)
    places = [toolkit[1] if toolkit else None, triton, os.environ.get("PATH")]
    tool = next(filter(None, (shutil.which("nvdisasm", path=str(place)) for place in places)), None)
    if tool is None:
        pytest.skip("no nvdisasm: it comes with the CUDA toolkit, and with triton")
    return lambda cubin: subprocess.run([tool, "-c", str(cubin)], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def compiled(setup, nvcc, tmp_path_factory):
    """Compiles a source for a GPU: the folder of its PTX and cubin, and what ptxas reported."""

    @functools.cache
    def compile_for(arch, source):
        folder = tmp_path_factory.mktemp(f"{source}-{arch}")
        command = [nvcc, *shlex.split(setup.NVCC_FLAGS), "-cubin", f"-arch={arch}", "-Xptxas=-v", "--keep"]
        command += [f"--keep-dir={folder}", str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(folder / "cubin")]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return folder, run.stdout + run.stderr

    return compile_for


@pytest.fixture(scope="module")
def kernels(compiled, disassemble):
    """The kernels of one name, as compiled for a GPU."""

    @functools.cache
    def all_kernels(arch, source):
        folder, report = compiled(arch, source)
        code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", disassemble(folder / "cubin"), re.M | re.S))
        symbols = re.findall(r"entry function '(\w+)'(.*?)(?=entry function|\Z)", report, re.S)
        return [kernel(symbol, properties, code[symbol]) for symbol, properties in symbols]

    def kernels_of(arch, name):
        found = [kernel for kernel in all_kernels(arch, SOURCES[name]) if kernel.name == name]
        assert found, f"no kernel {name} among {all_kernels(arch, SOURCES[name])}"
        return found

    return kernels_of


def kernel(symbol, properties, code):
    """A kernel from its mangled name, what ptxas reported of it, and its SASS."""
    signature = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout
    name, _, types = re.search(r"(\w+)(<(.*?)>)?\((?!anonymous)", signature).groups()
    return Kernel(
        name,
        tuple(re.findall(r"\w+(?=,|$)", types or "")),
        int(re.search(r"Used (\d+) registers", properties)[1]),
        int(re.search(r"(\d+) bytes stack frame", properties)[1]),
        Counter(re.findall(r"\b((?:LD|ST|LDG|STG|LDL|STL)(?:\.\w+)*) [^;]*;", code)),
    )


def widest(accesses, instruction):
    return sum(n for text, n in accesses.items() if text.startswith(f"{instruction}.E") and text.endswith(".128"))


def vector_accesses(param, grad, amsgrad):
    """128-bit loads and stores of one turn of the update's loop, of which the narrowest stream fills one."""
    moments = 8 if param == "double" else 4
    elements = 16 // min(SIZES[param], SIZES[grad], moments)
    words = {size: elements * size // 16 for size in (2, 4, 8)}
    stores = words[SIZES[param]] + words[moments] * (3 if amsgrad else 2)
    return words[SIZES[grad]] + stores, stores


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", BLOCKS)
def test_registers_allow_the_occupancy_and_none_is_spilled(kernels, name, arch):
    for kernel in kernels(arch, name):
        assert kernel.registers <= REGISTERS // (THREADS * BLOCKS[name]), kernel
        assert kernel.local_bytes == 0, kernel
        local = [text for text in kernel.accesses if text.startswith(("LDL", "STL"))]
        assert not local, kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_the_update_reads_and_writes_every_stream_by_128_bits(kernels, arch):
    found = kernels(arch, "adamw_uniform")
    assert len(found) == 9
    for kernel in found:
        param, grad = kernel.types
        expected = [vector_accesses(param, grad, amsgrad) for amsgrad in (False, True)]
        loads, stores = (sum(column) for column in zip(*expected, strict=True))
        assert widest(kernel.accesses, "LDG") >= loads, kernel
        assert widest(kernel.accesses, "STG") >= stores, kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_the_update_of_mixed_types_reads_and_writes_every_stream_by_128_bits(kernels, arch):
    (kernel,) = kernels(arch, "adamw_any")
    expected = [vector_accesses(p, g, amsgrad) for p in SIZES for g in SIZES for amsgrad in (False, True)]
    loads, stores = (sum(column) for column in zip(*expected, strict=True))
    assert widest(kernel.accesses, "LDG") >= loads
    assert widest(kernel.accesses, "STG") >= stores


@pytest.mark.parametrize("arch", ARCHS)
def test_the_norm_reads_every_type_by_128_bits(kernels, arch):
    (kernel,) = kernels(arch, "sum_squares")
    assert widest(kernel.accesses, "LDG") >= len(SIZES)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", BLOCKS)
def test_memory_is_accessed_as_global_memory(kernels, name, arch):
    """Generic loads and stores find out at run time which memory an address is in."""
    for kernel in kernels(arch, name):
        generic = {text: n for text, n in kernel.accesses.items() if text.startswith(("LD.", "ST."))}
        assert not generic, kernel


@pytest.mark.parametrize("source", ["adamw", "grad_norm"])
def test_no_product_and_sum_are_contracted(compiled, source):
    """So that a GPU gives the bits that the other backends give."""
    folder, _ = compiled(ARCHS[0], source)
    ptx = (folder / f"{source}.ptx").read_text()
    assert ".rn.f32" in ptx or ".rn.f64" in ptx
    # ptxas contracts what does not say how it rounds.
    assert not re.findall(r"\bfma\.\S*|\b(?:mul|add|sub)\.(?:ftz\.)?f(?:32|64)\b", ptx)
