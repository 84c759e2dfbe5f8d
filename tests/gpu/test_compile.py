"""Every kernel compiles for every architecture, without spills."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from qmoe_format.gpu.launch import Kernel
from tests.gpu import nvrtc, variants
from tests.gpu.nvrtc import Compiler, Resources

REGISTERS = 65536  # of a multiprocessor
ONE_TOKEN = ("product of runs", "inputs of experts", "output of experts")
TWINS = {"sm_89": "sm_86", "sm_90a": "sm_90"}  # the same machine code

if not nvrtc.compilers():
    pytest.skip("the compilers are among the requirements on Linux only", allow_module_level=True)


def check(found: Resources, kernel: Kernel) -> None:
    assert found.spill_stores == found.spill_loads == 0, found
    assert found.registers * kernel.threads <= REGISTERS
    assert found.shared + kernel.shared_bytes <= variants.H200.shared_bytes


def test_both_compilers_are_there() -> None:
    assert [compiler.version for compiler in nvrtc.compilers()] == ["12.9", "13.0"]


def compile_and_check(kernel: Kernel, jobs: Iterable[tuple[Compiler, str]]) -> None:
    """Compile with the compilers and architectures of ``jobs``, in parallel."""
    with ThreadPoolExecutor() as pool:
        for found in pool.map(lambda job: job[0].compile(kernel.source, job[1]), jobs):
            check(found[kernel.name], kernel)


@pytest.mark.parametrize("architecture", [a for a in nvrtc.ARCHITECTURES if a not in TWINS])
@pytest.mark.parametrize("variant", variants.MAIN)
def test_main_kernels_everywhere(variant: str, architecture: str) -> None:
    """The older compiler on the oldest and newest: it compiles them alike, but needs as long."""
    old, new = nvrtc.compilers()
    kernel = variants.MAIN[variant]().kernel
    if architecture not in nvrtc.architectures(kernel):
        pytest.skip("mma of bf16 came with sm_80")
    compilers = (old, new) if architecture in ("sm_75", "sm_120") else (new,)
    if variant in ONE_TOKEN and architecture == "sm_120":
        compilers = (new,)  # NVRTC 12.9 spills up to 48 bytes of them there
    compile_and_check(kernel, [(compiler, architecture) for compiler in compilers])


@pytest.mark.parametrize("architecture", TWINS)
def test_twins_have_the_same_machine_code(architecture: str) -> None:
    """So the kernels that compile for one compile for the other."""
    for compiler in nvrtc.compilers():
        kernel = variants.MAIN["product of 4 bits, 1 token"]().kernel
        there, here = (
            nvrtc.machine_code(compiler.build(kernel.source, name)[0], kernel.name)
            for name in (architecture, TWINS[architecture])
        )
        assert len(there) > 5000
        assert there == here


@pytest.mark.parametrize("variant", variants.MAIN | variants.OTHER)
def test_no_kernel_asks_for_its_architecture(variant: str) -> None:
    """Only whether a GPU's compiler reads it: otherwise twins could differ."""
    source = (variants.MAIN | variants.OTHER)[variant]().kernel.source
    assert "__CUDA_ARCH" not in source.replace("#if defined(__CUDA_ARCH__)", "")


@pytest.mark.parametrize("variant", variants.OTHER)
def test_other_variants(variant: str) -> None:
    """Where they take the most registers; ``benchmarks.gpu_kernels`` covers the others."""
    old, new = nvrtc.compilers()
    kernel = variants.OTHER[variant]().kernel
    compile_and_check(kernel, [(old, nvrtc.architectures(kernel)[0]), (new, "sm_100")])


def test_an_error_in_the_source_is_found() -> None:
    source = variants.MAIN["product, 1 token"]().kernel.source
    for compiler in nvrtc.compilers():
        with pytest.raises(nvrtc.CompileError, match=r"error: expected a"):
            compiler.compile(source + "\nvoid broken( {", "sm_90")


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) spilling(float* a, int n) {
    __shared__ float row[64];
    float v[100];
#pragma unroll
    for (int i = 0; i < 100; i++) v[i] = a[i + threadIdx.x];
    row[threadIdx.x % 64] = v[3];
    __syncthreads();
    for (int k = 0; k < n; k++) {
#pragma unroll
        for (int i = 0; i < 100; i++) v[i] = v[i] * v[(i + 7) % 100] + row[i % 64];
    }
#pragma unroll
    for (int i = 0; i < 100; i++) a[i + threadIdx.x] = v[i];
}
extern "C" __global__ void fine(float* a) { a[threadIdx.x] *= 2.0f; }
"""


@pytest.mark.parametrize("architecture", ["sm_75", "sm_90", "sm_120"])
def test_resources_are_read_from_the_log(architecture: str) -> None:
    for compiler in nvrtc.compilers():
        found = compiler.compile(SPILLING, architecture)
        assert set(found) == {"spilling", "fine"}
        assert found["spilling"].registers == 64  # 65536 for 1024 threads
        assert found["spilling"].shared == 256
        assert min(found["spilling"].spill_stores, found["spilling"].spill_loads) > 50
        assert found["fine"].registers < 64
        assert found["fine"].spill_stores == found["fine"].stack == 0
