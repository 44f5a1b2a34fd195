"""What nvcc makes of the kernels: registers, spills, and their accesses to memory in order. It needs no GPU."""

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
ARCHS = ("80", "90", "100")
SOURCES = {"adamw_uniform": "update", "sum_squares": "grad_norm"}

THREADS = 256  # of a block
REGISTERS = 65536  # of a multiprocessor
SIZES = {"float": 4, "double": 8, "BFloat16": 2, "Float16": 2}
WIDTHS = {2: ".U16", 4: "", 8: ".64", 16: ".128"}  # of an access, in bytes

pytestmark = pytest.mark.xdist_group("cuda_compiled")  # so that each source is compiled once


class Kernel(NamedTuple):
    name: str
    types: tuple[str, ...]  # its template arguments
    registers: int
    local_bytes: int  # of the stack frame, spilled registers among them
    accesses: list[str]  # SASS's instructions for memory, in order


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
    """Compiles a source, for all GPUs at once: the folder of its PTX and cubins, and what ptxas reported."""

    @functools.cache
    def compile_source(source):
        folder = tmp_path_factory.mktemp(source)
        command = [nvcc, *shlex.split(setup.NVCC_FLAGS), "-fatbin", "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        command += [str(ROOT / f"csrc/cuda/{source}.cu"), "-o", str(folder / "fatbin")]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return folder, run.stdout + run.stderr

    return compile_source


@pytest.fixture(scope="module")
def kernels(compiled, disassemble):
    """The kernels of one name, as compiled for a GPU."""

    @functools.cache
    def all_kernels(arch, source):
        folder, report = compiled(source)
        sass = disassemble(folder / f"{source}.compute_{arch}.cubin")
        code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S))
        reports = re.findall(rf"entry function '(\w+)' for 'sm_{arch}'(.*?)(?=entry function|\Z)", report, re.S)
        return [kernel(symbol, properties, code[symbol]) for symbol, properties in reports]

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
        re.findall(r"\b((?:LD|ST|LDG|STG|LDL|STL)(?:\.\w+)*) [^;]*;", code),
    )


def accesses(instruction, size, elements, turns):
    """The accesses of a thread to one stream: as few as take `turns` times so many adjacent elements."""
    width = min(size * elements, 16)
    return Counter({f"{instruction}.E{WIDTHS[width]}": size * elements // width * turns})


def loop(param, grad, amsgrad, wide):
    """The loads and stores of a loop of the update: 16 bytes of each moment a turn, or one element."""
    size = 8 if param == "double" else 4
    elements, turns = (16 // size, 2) if wide else (1, 4)
    moments = (size,) * (3 if amsgrad else 2)
    stores = sum((accesses("STG", n, elements, turns) for n in (SIZES[param], *moments)), Counter())
    loads = (accesses("LDG", n, elements, turns) for n in (SIZES[param], SIZES[grad], *moments))
    return sum(loads, Counter()), stores


def stretches(instructions):
    """Loads and the stores that follow them, as often as there are such."""
    words = " ".join(instructions)
    return [
        (loads.split(), Counter(stores.split()))
        for loads, stores in re.findall(r"((?:LD\S* ?)+)((?:ST\S* ?)+)", words)
    ]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SOURCES)
def test_registers_allow_the_occupancy_and_none_is_spilled(kernels, name, arch):
    for kernel in kernels(arch, name):
        # Blocks that are to share a multiprocessor, so that enough loads are on their way at once.
        blocks = 2 if "double" in kernel.types else 4
        assert kernel.registers <= REGISTERS // (THREADS * blocks), kernel
        assert kernel.local_bytes == 0, kernel
        assert not [text for text in kernel.accesses if text.startswith(("LDL", "STL"))], kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_the_update_loads_two_whole_turns_before_it_stores(kernels, arch):
    """A turn is 16 bytes of each moment, in whole accesses; of what is not aligned, four elements come at a time."""
    found = kernels(arch, "adamw_uniform")
    assert len(found) == len(SIZES) ** 2
    for kernel in found:
        last = stretches(kernel.accesses)[-4:]  # the first are of the counters and the table
        for amsgrad, wide in ((True, True), (True, False), (False, True), (False, False)):
            loads, stores = loop(*kernel.types, amsgrad, wide)
            found_loops = [(Counter(ls[-loads.total() :]), s) for ls, s in last]
            assert (loads, stores) in found_loops, (kernel, amsgrad, wide)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_norm_has_four_loads_of_128_bits_on_the_way_for_every_type(kernels, arch):
    """And once more for the sums in float64, of the types that are added in two floats."""
    (kernel,) = kernels(arch, "sum_squares")
    assert kernel.accesses.count("LDG.E.128") == 4 * (2 * len(SIZES) - 1)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SOURCES)
def test_memory_is_accessed_as_global_memory(kernels, name, arch):
    """Generic loads and stores find out at run time which memory an address is in."""
    for kernel in kernels(arch, name):
        assert not [text for text in kernel.accesses if text.startswith(("LD.", "ST."))], kernel


@pytest.mark.parametrize("source", SOURCES.values())
def test_no_product_and_sum_are_contracted(compiled, source):
    """So that a GPU gives the bits that the other backends give."""
    folder, _ = compiled(source)
    ptx = (folder / f"{source}.compute_{ARCHS[0]}.ptx").read_text()
    assert ".rn.f32" in ptx or ".rn.f64" in ptx
    # ptxas contracts what does not say how it rounds. The norm asks for what a float loses of a square.
    assert set(re.findall(r"\bfma\.\S*", ptx)) <= ({"fma.rn.f32"} if source == "grad_norm" else set())
    assert not re.findall(r"\b(?:mul|add|sub)\.(?:ftz\.)?f(?:32|64)\b", ptx)
