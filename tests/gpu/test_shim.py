"""The shim that runs kernels on the CPU: right results, and every planted fault is found."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from qmoe_format.dtypes import from_float32
from qmoe_format.gpu.kernel_text import source
from qmoe_format.gpu.launch import Kernel, Launch
from tests.gpu import shim
from tests.gpu.problems import NAMES

pytestmark = shim.needs_compiler

ORDERS = (shim.FORWARD, shim.BACKWARD, 2, 3)

SUM = """
// Sums of x, one per block.
extern "C" __global__ void __launch_bounds__(128) sum(
    const float* __restrict__ x,  // [n]
    float* sums,                  // [blocks]
    int n) {
    __shared__ float of_warp[4];
    float mine = 0;
    for (int i = blockIdx.x * 128 + threadIdx.x; i < n; i += gridDim.x * 128) mine += x[i];
    for (int lanes = 16; lanes > 0; lanes >>= 1) mine += __shfl_xor_sync(~0u, mine, lanes);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
    __syncthreads();
    if (threadIdx.x == 0) sums[blockIdx.x] = of_warp[0] + of_warp[1] + of_warp[2] + of_warp[3];
}
"""

SCAN = """
// A stable partition of x [n] by its lowest bit; one block of n threads.
extern "C" __global__ void partition(const unsigned* x, unsigned* out, int n) {
    extern __shared__ unsigned char shared[];
    unsigned* warps = (unsigned*)shared;      // [n / 32]: ones in each warp
    unsigned* sorted = warps + n / 32;        // [n]
    unsigned lane = threadIdx.x & 31, warp = threadIdx.x / 32, bit = x[threadIdx.x] & 1;
    unsigned ones = bit;
    for (int d = 1; d < 32; d <<= 1) {
        unsigned below = __shfl_up_sync(~0u, ones, d);
        if (lane >= d) ones += below;
    }
    if (lane == 31) warps[warp] = ones;
    __syncthreads();
    unsigned all = 0, before = ones - bit;
    for (unsigned w = 0; w < n / 32; w++) {
        if (w < warp) before += warps[w];
        all += warps[w];
    }
    sorted[bit ? n - all + before : threadIdx.x - before] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = sorted[threadIdx.x];
}
"""

COUNT = """
// counts[x[i] % 8]++, then every block's first warp reverses its own 32 numbers.
extern "C" __global__ void count(unsigned* x, unsigned* counts) {
    __shared__ unsigned mine[8], turned[32];
    if (threadIdx.x < 8) mine[threadIdx.x] = 0;
    __syncthreads();
    unsigned* here = x + blockIdx.x * 64;
    atomicAdd(&mine[here[threadIdx.x] % 8], 1u);
    __syncthreads();
    if (threadIdx.x < 8) atomicAdd(counts + threadIdx.x, mine[threadIdx.x]);
    if (threadIdx.x < 32) {
        turned[threadIdx.x] = here[threadIdx.x];
        __syncwarp();
        here[threadIdx.x] = turned[31 - threadIdx.x];
    }
}
"""

HALF_WARP = """
extern "C" __global__ void lanes(unsigned* out) { out[threadIdx.x] = __ballot_sync(0xFFFFu, 1); }
"""


def run_sum(source: str = SUM, order: int = shim.FORWARD) -> None:
    x = np.arange(1000, dtype=np.float32)
    sums = np.zeros(3, np.float32)
    launch = Launch(Kernel("sum", source, 128), 3, (x, sums, np.int32(x.size)))
    shim.execute(launch, order)
    assert sums.sum() == x.sum()


def run_scan(source: str = SCAN, order: int = shim.FORWARD) -> None:
    x = np.random.default_rng(0).integers(0, 100, 96, dtype=np.uint32)
    out = np.zeros_like(x)
    shared = 4 * (3 + 96)
    launch = Launch(Kernel("partition", source, 96, shared), 1, (x, out, np.int32(x.size)))
    shim.execute(launch, order)
    assert np.array_equal(out, np.concatenate([x[x % 2 == 0], x[x % 2 == 1]]))


def run_count(source: str = COUNT, order: int = shim.FORWARD) -> None:
    x = np.random.default_rng(0).integers(0, 100, 128, dtype=np.uint32)
    expected = np.concatenate([x[31::-1], x[32:64], x[95:63:-1], x[96:]])
    counts = np.zeros(8, np.uint32)
    histogram = np.bincount(x % 8, minlength=8)
    shim.execute(Launch(Kernel("count", source, 64), 2, (x, counts)), order)
    assert np.array_equal(counts, histogram)
    assert np.array_equal(x, expected)


def run_half_warp(source: str = HALF_WARP, order: int = shim.FORWARD) -> None:
    shim.execute(Launch(Kernel("lanes", source, 16), 1, (np.zeros(16, np.uint32),)), order)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("run", [run_sum, run_scan, run_count])
def test_right_kernels_run_in_any_order(run: Any, order: int) -> None:
    run(order=order)


# Depending on the order, the reader may come first.
UNORDERED = "race: .* shared memory|which was never written"

FAULTS = {
    "no barrier": (run_sum, SUM, "mine;\n    __syncthreads();", "mine;", UNORDERED),
    "no second barrier": (
        run_scan, SCAN, "__syncthreads();\n    out", "out", UNORDERED,
    ),
    "no warp barrier": (run_count, COUNT, "__syncwarp();", "", UNORDERED),
    "a shuffle is no barrier": (
        run_count, COUNT, "__syncwarp();", "__shfl_sync(~0u, 0, 0);", UNORDERED,
    ),
    "a barrier of half a warp": (
        run_count, COUNT,
        "__syncwarp();",
        "__syncwarp(threadIdx.x < 16 ? 0xFFFFu : 0xFFFF0000u);",
        UNORDERED,
    ),
    "an addition that is not atomic": (
        run_count, COUNT, "atomicAdd(counts + threadIdx.x, mine[threadIdx.x]);",
        "counts[threadIdx.x] += mine[threadIdx.x];",
        r"race: thread (\d) .* counts\[\1\] in source:10; thread \1 of another block wrote it",
    ),
    "two blocks write one word": (
        run_sum, SUM, "sums[blockIdx.x] =", "sums[blockIdx.x / 2] =",
        r"race: thread 0 writes sums\[0\] .* thread 0 of another block wrote",
    ),
    "a block reads what another writes": (
        run_count, COUNT, "blockIdx.x * 64;", "blockIdx.x * 32;", r"race: .* x\[\d+\]",
    ),
    "a lane has returned": (
        run_scan, SCAN, "unsigned ones", "if (lane == 5) return; unsigned ones",
        r"__shfl_up_sync\(mask ffffffff\) in source:10: lane 5 returned",
    ),
    "a lane is not in its mask": (
        run_scan, SCAN, "__shfl_up_sync(~0u", "__shfl_up_sync(0xFFFFu",
        r"lane \d+ is not in its own mask",
    ),
    "lanes with different masks": (
        run_count, COUNT, "__syncwarp();", "__syncwarp(threadIdx.x ? ~0u : 0xFFFFu);",
        r"lane \d+ is at __syncwarp\(mask (0000ffff|ffffffff)\)",
    ),
    "lanes in different lines": (
        run_count, COUNT, "__syncwarp();",
        "if (threadIdx.x == 3) __syncwarp();\nelse __syncwarp();",
        "in source:1[34]: lane .* is at __syncwarp.* in source:1[34]",
    ),
    "a lane that does not exist": (
        run_half_warp, HALF_WARP, "0xFFFFu", "~0u", "lane 16 does not exist",
    ),
    "the value of an absent lane": (
        run_scan, SCAN, "__shfl_up_sync(~0u, ones, d)",
        "__shfl_sync(lane < 16 ? 0xFFFFu : 0xFFFF0000u, ones, 20)",
        "takes the value of lane 20, which is absent",
    ),
    "different barriers": (
        run_count, COUNT, "1u);\n    __syncthreads();",
        "1u);\nif (threadIdx.x < 32) __syncthreads();\nelse __syncthreads();",
        "threads 0 to 31 at __syncthreads in source:9; threads 32 to 63 at .* in source:10",
    ),
    "a barrier that some do not reach": (
        run_count, COUNT, "        __syncwarp();",
        "if (threadIdx.x) __syncwarp(~1u); else __syncthreads();\nif (0)",
        "deadlock: ",
    ),
    "beyond dynamic shared memory": (
        run_scan, SCAN, "n - all + before", "n - all + before + 1",
        "writes 4 bytes outside all arrays in source:20, 396 bytes from the beginning of dynamic",
    ),
    "beyond static shared memory": (
        run_count, COUNT, "turned[31 - threadIdx.x]", "*((volatile unsigned*)mine + 40)",
        "reads 4 bytes outside all arrays in source:14",
    ),
    "beyond a local bound": (
        run_count, COUNT, "turned[31 -", "turned[32 -", "index out of bounds in source:14",
    ),
    "shared memory that was never written": (
        run_count, COUNT, "threadIdx.x < 8) mine", "threadIdx.x < 7) mine", "was never written",
    ),
    "beyond an array": (run_sum, SUM, "i < n", "i <= n", "4000 bytes from the beginning of x"),
    "before an array": (run_sum, SUM, "x[i]", "x[i - 1]", "-4 bytes from the beginning of x"),
    "a write to a const array": (
        run_sum, SUM, "mine += x[i]", "*(float*)(x + i) = 0", r"writes x\[\d+\], which is const",
    ),
    "not aligned": (
        run_sum, SUM, "mine += x[i]", "mine += *(float*)((char*)x + 2)", "is not aligned",
    ),
    "a vector that is not aligned": (
        run_sum, SUM, "mine += x[i]", "{ float4 v = *(float4*)(x + 2); mine += v.w; }",
        "not aligned",
    ),
    "a shift by 32": (run_scan, SCAN, "ones = bit;", "ones = bit << (n - 64);", "a shift by too"),
    "a division by zero": (run_sum, SUM, "i < n", "i < n / (int)blockIdx.y", "division by zero"),
    "an endless loop": (run_sum, SUM, "i += gridDim.x * 128", "i += 0", "does not end"),
    "float atomics": (run_sum, SUM, "mine += x[i]", "atomicAdd(sums, x[i])", "g\\+\\+ says"),
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(fault: str, order: int) -> None:
    run, source, old, new, message = FAULTS[fault]
    assert source.count(old) == 1
    with pytest.raises(shim.Fault) as error:
        run(source.replace(old, new), order)
    assert re.search(message, str(error.value)), error.value


RANDOM = np.random.default_rng(1).integers(0, 1 << 32, 32, dtype=np.uint32)
RANDOM[:3] = 0, 1, 0x8000_0000
BITS = [f"{word:032b}" for word in RANDOM.tolist()]
NUMBERS = {
    "__popc(x)": [bits.count("1") for bits in BITS],
    "__ffs(x)": [32 - (bits.rfind("1") if "1" in bits else 32) for bits in BITS],
    "__clz(x)": [len(bits.split("1")[0]) for bits in BITS],
    "__brev(x)": [int(bits[::-1], 2) for bits in BITS],
    "__funnelshift_r(x, ~x, 35)": [(w | (~w & 0xFFFFFFFF) << 32) >> 3 for w in RANDOM.tolist()],
    "__funnelshift_l(x, ~x, 3)": [(w | (~w & 0xFFFFFFFF) << 32) >> 29 for w in RANDOM.tolist()],
    "__byte_perm(x, 0x44332211, 0x7051)": [
        0x44 << 24 | (w & 255) << 16 | 0x22 << 8 | w >> 8 & 255 for w in RANDOM.tolist()
    ],
    "__byte_perm(x, 0, 0xBBBB)": [0xFFFFFFFF * (w >> 31) for w in RANDOM.tolist()],
    "__umulhi(x, x)": [w * w >> 32 for w in RANDOM.tolist()],
    "__float_as_uint(__uint_as_float(x))": RANDOM.tolist(),
    "__ballot_sync(~0u, lane % 3 == 0)": [sum(1 << i for i in range(0, 32, 3))] * 32,
    "__any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane < 31)": [1] * 32,
    "__match_any_sync(~0u, lane % 16)": [0x10001 << i % 16 for i in range(32)],
    "__shfl_sync(~0u, lane, 9)": [9] * 32,
    "__shfl_sync(~0u, lane, lane + 1, 8)": [i & 24 | i + 1 & 7 for i in range(32)],
    "__shfl_up_sync(~0u, lane, 3, 8)": [i - 3 if i % 8 >= 3 else i for i in range(32)],
    "__shfl_down_sync(~0u, lane, 3, 8)": [i + 3 if i % 8 < 5 else i for i in range(32)],
    "__shfl_xor_sync(~0u, lane, 5)": [i ^ 5 for i in range(32)],
    "__shfl_sync(~0u, (unsigned long long)x << 32, 31 - lane) >> 32": RANDOM[::-1].tolist(),
    "__syncthreads_count(lane > 9) + __syncthreads_or(lane > 30) * __syncthreads_and(1)": [23] * 32,
    "__dp4a(x, 0x01000201u, 5u)": [
        (w >> 24) + 2 * (w >> 8 & 255) + (w & 255) + 5 for w in RANDOM.tolist()
    ],
    # As with -ftz=true.
    "__float_as_uint(__uint_as_float(lane) * 2.0f)": [0] * 32,
    "__float_as_uint(__fmaf_ieee_rn(__uint_as_float(lane), 2.0f, -0.0f))": list(range(0, 64, 2)),
}


@pytest.fixture(scope="module")
def numbers() -> dict[str, list[int]]:
    """Values of these expressions for each of 32 words ``x``, in one warp."""
    stores = "".join(f"*out++ = {body};\n" for body in NUMBERS)
    source = f"""
extern "C" __global__ void numbers(const unsigned* words, unsigned* out) {{
    int lane = threadIdx.x;
    unsigned x = words[lane];
    out += lane * {len(NUMBERS)};
    {stores}
}}
"""
    out = np.zeros((32, len(NUMBERS)), np.uint32)
    shim.execute(Launch(Kernel("numbers", source, 32), 1, (RANDOM, out)))
    return dict(zip(NUMBERS, out.T.tolist(), strict=True))


@pytest.mark.parametrize("body", NUMBERS)
def test_functions_of_the_programming_guide(body: str, numbers: dict[str, list[int]]) -> None:
    assert numbers[body] == [number & 0xFFFFFFFF for number in NUMBERS[body]]


MMA = (
    source("types", "mma")
    + """
extern "C" __global__ void mma(
    const TYPE* a,  // [16, 16]
    const TYPE* b,  // [16, 8]
    float* sums) {  // [16, 8]
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    u32 pairs[6];
    for (int i = 0; i < 4; i++) {
        pairs[i] = *(const u32*)(a + 16 * (g + i % 2 * 8) + 2 * t + i / 2 * 8);
    }
    for (int i = 0; i < 2; i++) {
        const TYPE* const two = b + 8 * (2 * t + 8 * i) + g;
        pairs[4 + i] = two[0].bits | (u32)two[8].bits << 16;
    }
    float four[4];
    for (int i = 0; i < 4; i++) four[i] = sums[8 * (g + i / 2 * 8) + 2 * t + i % 2];
    multiply_add(TYPE(), four, {pairs[0], pairs[1], pairs[2], pairs[3]}, pairs[4], pairs[5]);
    for (int i = 0; i < 4; i++) sums[8 * (g + i / 2 * 8) + 2 * t + i % 2] = four[i];
}
"""
)


def mma(dtype: str, a: Any, b: Any, sums: Any) -> Any:
    """sums + a b"""
    given = [from_float32(np.array(each, np.float32), NAMES[dtype]) for each in (a, b)]
    found = np.array(sums, np.float32)
    kernel = Kernel("mma", MMA.replace("TYPE", dtype), 32)
    shim.execute(Launch(kernel, 1, (*(each.view(np.uint16) for each in given), found)))
    return found


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_matrices(dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-99, 99, (16, 16)), rng.integers(-99, 99, (16, 8)) * 2.0**-20
    sums = rng.integers(-99, 99, (16, 8)) * 2.0**-5
    assert np.array_equal(mma(dtype, a, b, sums), sums + a @ b)
    b[0, 0] = np.inf
    assert np.isinf(mma(dtype, np.ones((16, 16)), b, sums)[:, 0]).all()


def test_matrices_are_added_without_rounding() -> None:
    """What is more than a bit below the last one of the greatest term is lost."""
    a, b, sums = np.zeros((16, 16)), np.eye(16, 8), np.full((16, 8), 2.0**23)
    a[0, :3] = 0.75, 0.5, 1.5
    a[1, 0] = -0.25
    found = mma("bf16", a, b, sums) - 2**23
    assert found[0, :3].tolist() == [0, 0, 1]
    assert not found[1:].any()


@pytest.mark.parametrize(
    "arguments",
    [
        (np.zeros(9), np.zeros(1, np.float32), np.int32(9)),
        (np.zeros(9, np.float32), np.zeros(1, np.float32), np.int64(9)),
        (np.zeros(9, np.float32), np.float32(1), np.int32(9)),
        (np.zeros(9, np.float32), np.zeros(1, np.float32)),
        (np.zeros(18, np.float32)[::2], np.zeros(1, np.float32), np.int32(9)),
    ],
)
def test_arguments_that_do_not_fit(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(shim.Fault):
        shim.execute(Launch(Kernel("sum", SUM, 128), 1, arguments))


def test_an_array_that_is_not_given_is_not_used() -> None:
    arguments = (None, np.zeros(1, np.float32))
    shim.execute(Launch(Kernel("sum", SUM, 128), 1, (*arguments, np.int32(0))))
    with pytest.raises(shim.Fault, match="outside all arrays"):
        shim.execute(Launch(Kernel("sum", SUM, 128), 1, (*arguments, np.int32(1))))


def test_one_array_for_two_parameters() -> None:
    x = np.ones(100, np.float32)
    shim.execute(Launch(Kernel("sum", SUM, 128), 1, (x, x, np.int32(100))))
    assert x[0] == 100


def test_arrays_that_overlap() -> None:
    x = np.ones(100, np.float32)
    with pytest.raises(shim.Fault, match="overlaps"):
        shim.execute(Launch(Kernel("sum", SUM, 128), 1, (x, x[50:], np.int32(100))))
