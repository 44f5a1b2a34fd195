"""What nvcc makes of the kernels: registers, spills, and their accesses to memory in order. It needs no GPU."""

import fcntl
import hashlib
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_shim.build import ROOT, imported

ARCHS = ("80", "90", "100")
SOURCES = {"update_tensors": "update", "update_encoded": "update_encoded", "sum_squares": "grad_norm"}

THREADS = 256  # of a block
REGISTERS = 65536  # of a multiprocessor
SIZES = {"float": 4, "double": 8, "BFloat16": 2, "Float16": 2}
# The encodings of kinds.h: bytes of an element of the parameter and its gradient, of its low bits, of each moment.
ENCODED = {"0": (4, 0, 2), "1": (4, 0, 1), "2": (2, 2, 4), "3": (2, 2, 2), "4": (2, 1, 1), "5": (2, 0, 1)}
WIDTHS = {2: ".U16", 4: "", 8: ".64", 16: ".128"}  # of an access, in bytes

pytestmark = pytest.mark.xdist_group("cuda_compiled")  # one worker compiles


class Kernel(NamedTuple):
    name: str
    types: tuple[str, ...]  # its template arguments
    registers: int
    local_bytes: int  # of the stack frame, spilled registers among them
    accesses: list[str]  # SASS's instructions for memory, in order


@pytest.fixture(scope="module")
def nvcc():
    """The compiler, and the flags that setup.py gives it."""
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module)
    setup = imported("nexus_setup", ROOT / "setup.py")
    try:
        return [setup.find_nvcc(), *shlex.split(setup.NVCC_FLAGS)]
    except setup.CompileError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def nvdisasm(nvcc):
    """Of the toolkit or of triton."""
    spec = importlib.util.find_spec("triton")
    triton = Path(spec.origin).parent / "backends/nvidia/bin" if spec else None
    dry_run = subprocess.run([nvcc[0], "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    toolkit = re.search(r"_HERE_=(.*)", dry_run)
    places = [toolkit[1] if toolkit else None, triton, os.environ.get("PATH")]
    tool = next(filter(None, (shutil.which("nvdisasm", path=str(place)) for place in places)), None)
    if tool is None:
        pytest.skip("no nvdisasm: it comes with the CUDA toolkit, and with triton")
    return tool


@pytest.fixture(scope="module")
def compiled(nvcc):
    """Of each source, compiled for all GPUs at once: the folder of its PTX and cubins, and of ptxas's report.

    What has been compiled from the same sources, by the same compiler, is taken from build/inspected.
    """
    version = subprocess.run([nvcc[0], "--version"], check=True, capture_output=True).stdout
    headers = b"".join(path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*.h")))

    def compile_source(source):
        path, folder = ROOT / f"csrc/cuda/{source}.cu", ROOT / "build/inspected" / source
        command = [*nvcc, "-fatbin", "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
        command += [str(path), "-o", str(folder / "fatbin")]
        key = hashlib.sha256(version + headers + path.read_bytes() + str(command).encode()).hexdigest()
        if not (folder / key).exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            (folder / "report").write_text(run.stdout + run.stderr)
            (folder / key).touch()
        return folder

    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build/inspected.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return {source: compile_source(source) for source in SOURCES.values()}


@pytest.fixture(scope="module")
def kernels(compiled, nvdisasm):
    """Of each GPU and name: the kernels of this name."""

    def read(name, arch):
        source = SOURCES[name]
        folder = compiled[source]
        cubin, report = folder / f"{source}.compute_{arch}.cubin", (folder / "report").read_text()
        sass = subprocess.run([nvdisasm, "-c", cubin], check=True, capture_output=True, text=True).stdout
        code = dict(re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S))
        reports = re.findall(rf"entry function '(\w+)' for 'sm_{arch}'(.*?)(?=entry function|\Z)", report, re.S)
        symbols = [symbol for symbol, _ in reports]
        signatures = subprocess.run(["c++filt", *symbols], check=True, capture_output=True, text=True).stdout
        found = [
            kernel(signature, properties, code[symbol])
            for (symbol, properties), signature in zip(reports, signatures.splitlines(), strict=True)
        ]
        assert {each.name for each in found} == {name}
        return found

    return {(arch, name): read(name, arch) for name in SOURCES for arch in ARCHS}


def kernel(signature, properties, code):
    """A kernel from its signature, what ptxas reported of it, and its SASS."""
    name, _, types = re.search(r"(\w+)(<(.*?)>)?\((?!anonymous)", signature).groups()
    return Kernel(
        name,
        tuple(re.findall(r"\w+(?=,|$|> $)", types or "")),
        int(re.search(r"Used (\d+) registers", properties)[1]),
        int(re.search(r"(\d+) bytes stack frame", properties)[1]),
        re.findall(r"\b((?:LD|ST|LDG|STG|LDL|STL)(?:\.\w+)*) [^;]*;", code),
    )


def accesses(instruction, size, elements, turns):
    """The accesses of a thread to one stream: as few as take `turns` times so many adjacent elements."""
    width = min(size * elements, 16)
    return Counter({f"{instruction}.E{WIDTHS[width]}": size * elements // width * turns})


def loop(param, grad, amsgrad, averaged, wide):
    """The loads and stores of a loop of the update: 16 bytes of each moment a turn, or one element."""
    size = 8 if param == "double" else 4
    elements, turns = (16 // size, 1 if amsgrad and averaged else 2) if wide else (1, 4)
    moments = (size,) * (2 + amsgrad + averaged)
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
    for kernel in kernels[arch, name]:
        # Blocks that are to share a multiprocessor, so that enough loads are on their way at once.
        blocks = 2 if {"double", "Told"} & {*kernel.types} else 3 if name == "update_encoded" else 4
        blocks = 1 if "ToldAveraged" in kernel.types else blocks
        assert kernel.registers <= REGISTERS // (THREADS * blocks), kernel
        assert kernel.local_bytes == 0, kernel


@pytest.mark.parametrize("arch", ARCHS)
def test_the_update_loads_two_whole_turns_before_it_stores(kernels, arch):
    """A turn is 16 bytes of each moment, in whole accesses; of what is not aligned, four elements come at a time."""
    found = kernels[arch, "update_tensors"]
    assert len(found) == len(SIZES) ** 2
    for kernel in found:
        last = stretches(kernel.accesses)[-8:]  # the first are of the counters and the table
        for which in itertools.product((True, False), repeat=3):  # amsgrad, averaged, wide
            loads, stores = loop(*kernel.types, *which)
            found_loops = [(Counter(ls[-loads.total() :]), s) for ls, s in last]
            # An average is copied, or moved, in a branch of its own for each.
            twice = [(loads, stores + stores)] if which[1] else []
            assert any(each in found_loops for each in [(loads, stores), *twice]), (kernel, which)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_update_of_an_encoding_loads_a_whole_turn_before_it_stores(kernels, arch):
    """Of 16 bytes of its widest stream, in whole accesses, and of a scale for each moment in 8 bits."""
    found = {kernel.types[0]: kernel for kernel in kernels[arch, "update_encoded"]}
    assert {*found} == {*ENCODED, "Told", "ToldAveraged"}
    for index, (param, low, moment) in ENCODED.items():
        elements = 16 // max(param, moment)
        scales = [(4, 1)] * 2 if moment == 1 else []
        written = [*((size, elements) for size in (param, low, moment, moment) if size), *scales]
        loads = sum((accesses("LDG", *each, 1) for each in [(param, elements), *written]), Counter())
        stores = sum((accesses("STG", *each, 1) for each in [*written, (4, elements)]), Counter())
        # The average comes last: where a turn of it is more than 16 bytes, it and its weight are looked up for it.
        average = accesses("LDG", 4, elements, 1)
        looked_up = Counter({"LDG.E": 2, "LDG.E.64": 2}) if elements > 4 else Counter()
        last_loads, last_stores = stretches(found[index].accesses)[-1]
        last = last_loads[-(loads + looked_up + average).total() :]
        assert Counter(last) == loads + looked_up + average, found[index]
        if looked_up:
            assert Counter(last[: loads.total()]) == loads, found[index]
        # A scale, which one lane writes, comes in more than one branch; so may what follows an average.
        assert stores <= last_stores, found[index]
        assert {*stores} == {*last_stores}, found[index]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_norm_has_four_loads_of_128_bits_on_the_way_for_every_type(kernels, arch):
    """And once more for the sums in float64, of the types that are added in two floats."""
    (kernel,) = kernels[arch, "sum_squares"]
    assert kernel.accesses.count("LDG.E.128") == 4 * (2 * len(SIZES) - 1)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SOURCES)
def test_memory_is_accessed_as_global_memory(kernels, name, arch):
    """Not as a thread's own, and not by generic accesses, which find out at run time which memory it is."""
    for kernel in kernels[arch, name]:
        assert not [text for text in kernel.accesses if not text.startswith(("LDG", "STG"))], kernel


@pytest.mark.parametrize("source", SOURCES.values())
def test_no_product_and_sum_are_contracted(compiled, source):
    """So that a GPU gives the bits that the other backends give."""
    ptx = (compiled[source] / f"{source}.compute_{ARCHS[0]}.ptx").read_text()
    assert ".rn.f32" in ptx or ".rn.f64" in ptx
    # ptxas contracts what does not say how it rounds. The norm asks for what a float loses of a square.
    assert set(re.findall(r"\bfma\.\S*", ptx)) <= ({"fma.rn.f32"} if source == "grad_norm" else set())
    assert not re.findall(r"\b(?:mul|add|sub)\.(?:ftz\.)?f(?:32|64)\b", ptx)
