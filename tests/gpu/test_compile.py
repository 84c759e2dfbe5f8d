"""Every kernel compiles for every architecture, with both compilers, and spills nothing."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pytest

from qmoe_format.gpu.launch import Launch
from tests.gpu import nvrtc, variants
from tests.gpu.nvrtc import Compiler, Resources

REGISTERS = 65536  # of a multiprocessor

if not nvrtc.compilers():
    pytest.skip("the compilers are among the requirements on Linux only", allow_module_level=True)


def check(found: Resources, launch: Launch) -> None:
    assert found.spill_stores == found.spill_loads == 0, found
    assert found.registers * launch.block[0] <= REGISTERS
    assert found.shared + launch.shared_bytes <= variants.H200.shared_bytes


def test_both_compilers_are_there() -> None:
    assert [compiler.version for compiler in nvrtc.compilers()] == ["12.9", "13.0"]


def compile_and_check(launch: Launch, jobs: Iterable[tuple[Compiler, str]]) -> None:
    """With compilers and architectures of ``jobs``, on as many threads."""
    with ThreadPoolExecutor() as pool:
        for found in pool.map(lambda job: job[0].compile(launch.source, job[1]), jobs):
            check(found[launch.kernel], launch)


@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
@pytest.mark.parametrize("variant", variants.MAIN)
def test_main_kernels_everywhere(variant: str, architecture: str) -> None:
    launch = variants.MAIN[variant]()
    compile_and_check(launch, [(compiler, architecture) for compiler in nvrtc.compilers()])


@pytest.mark.parametrize("variant", variants.OTHER)
def test_other_variants(variant: str) -> None:
    """Where they spill first; ``benchmarks.gpu_kernels`` looks at the other architectures."""
    old, new = nvrtc.compilers()
    launch = variants.OTHER[variant]()
    compile_and_check(launch, [(old, "sm_75"), (new, "sm_86"), (new, "sm_100")])


def test_an_error_in_the_source_is_found() -> None:
    launch = variants.MAIN["product, 1 token"]()
    for compiler in nvrtc.compilers():
        with pytest.raises(nvrtc.CompileError, match=r"error: expected a"):
            compiler.compile(launch.source + "\nvoid broken( {", "sm_90")


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
def test_what_a_kernel_takes_is_read_from_the_log(architecture: str) -> None:
    for compiler in nvrtc.compilers():
        found = compiler.compile(SPILLING, architecture)
        assert set(found) == {"spilling", "fine"}
        assert found["spilling"].registers == 64  # 65536 for 1024 threads
        assert found["spilling"].shared == 256
        assert min(found["spilling"].spill_stores, found["spilling"].spill_loads) > 50
        assert found["fine"].registers < 64
        assert found["fine"].spill_stores == found["fine"].stack == 0
