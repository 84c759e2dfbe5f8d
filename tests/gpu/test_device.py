"""The calls on a GPU: ``pytest -m gpu``. The shim does the same on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.utils.dlpack

from qmoe_format import gpu
from qmoe_format.codec import EncodedMatrix, decode, dequantize, encode_matrix
from qmoe_format.dtypes import from_float32, to_float32
from qmoe_format.errors import QMoEError
from qmoe_format.gpu.packing import Matrix
from tests.gpu import run_reference
from tests.gpu.layers import Layer, layer_call, near
from tests.gpu.problems import (
    KINDS,
    NAMES,
    DictKind,
    Floats,
    GroupKind,
    Kind,
    Shape,
    matrix,
    rounded,
    vectors,
    within_tolerance,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu.available(), reason="CuPy finds no GPU"),
]
needs_torch = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
all_kinds = pytest.mark.parametrize("kind", KINDS, ids=range(len(KINDS)))

BF16 = DictKind(((0.885, 12), None), 2, False, "bf16", 1, False, False)
FP32 = replace(BF16, dtype="fp32")
REFINED = replace(BF16, strings=((0.6, 12), (0.7, 12)))
FOUR_BITS = GroupKind(4, ("linear", False), "bf16", 1, False, False)
# Rows, columns: no multiples of anything, up to 16384 and beyond.
SHAPES = [
    *[(1, 1), (1, 7), (3, 2), (257, 1), (129, 31), (1000, 33), (17, 255), (5, 257), (1023, 511)],
    *[(768, 3072), (2047, 769), (2049, 1409), (4095, 1537), (333, 7169), (127, 14337)],
    *[(11, 16383), (16384, 130), (16383, 17), (7, 16385), (3, 70001)],
]


def on_gpu(values: Floats, dtype: str) -> Any:
    """A CuPy array; bf16 is uint16."""
    return gpu.require().asarray(from_float32(np.ascontiguousarray(values), NAMES[dtype]))


def numbers(array: Any, dtype: str) -> Floats:
    """float32, on the CPU."""
    return to_float32(array.get(), NAMES[dtype])


def as_torch(array: Any) -> torch.Tensor:
    """The same memory."""
    if array.dtype.name == "uint16":
        return as_torch(array.view("int16")).view(torch.bfloat16)
    return torch.utils.dlpack.from_dlpack(array)


def bits(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A tensor's bytes, on the CPU."""
    return tensor.contiguous().view(torch.uint8).cpu().numpy()


def stack_of(
    kind: Kind, shape: Shape, experts: int, runs: bool = True
) -> tuple[list[Matrix], gpu.DeviceStack]:
    members = [matrix(kind, shape, seed) for seed in range(experts)]
    return members, gpu.upload(members, runs=runs)


# -- Results ---------------------------------------------------------------------------------------


with_and_without_runs = pytest.mark.parametrize("runs", [False, True], ids=["codewords", "runs"])


@all_kinds
@with_and_without_runs
@pytest.mark.parametrize("tokens", [1, 3, 8, 13, 64])
def test_matmul(kind: Kind, tokens: int, runs: bool) -> None:
    for exact in (False, True):
        shape = Shape(70, 1000, 0.8, None, 0, exact)
        coded, x = matrix(kind, shape), vectors(kind, shape, tokens)
        stack = gpu.upload(coded, runs=runs)
        y = numbers(gpu.matmul(stack[0], on_gpu(x, kind.dtype)), kind.dtype)
        if exact:
            assert np.array_equal(y, rounded(x @ dequantize(coded).T, kind.dtype))
        else:
            assert within_tolerance(coded, x, y, kind.dtype)


@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("tokens", [1, 5, 33])
@with_and_without_runs
@pytest.mark.parametrize("kind", [BF16, REFINED, FOUR_BITS], ids=["ternary", "refined", "groups"])
def test_shapes(kind: Kind, size: tuple[int, int], tokens: int, runs: bool) -> None:
    shape = Shape(*size, 0.885, None, 0)
    coded, x = matrix(kind, shape), vectors(kind, shape, tokens)
    out = gpu.require().empty((tokens, size[0]), "float32")
    y = gpu.matmul(gpu.upload(coded, runs=runs), on_gpu(x, "bf16"), out=out)
    assert within_tolerance(coded, x, numbers(y, "fp32"))


@all_kinds
@with_and_without_runs
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (2, 4), (5, 2), (40, 3)])
def test_expert_matvec(kind: Kind, tokens: int, k: int, runs: bool) -> None:
    shape = Shape(70, 1000, 0.8, None, 0, exact=True)
    members, stack = stack_of(kind, shape, 5, runs)
    rng = np.random.default_rng(0)
    experts = rng.choice([0, 1, 1, 1, 1, 4], (tokens, k)).astype(np.int32)
    weights = rng.choice([-2.0, 0.5, 1.0], (tokens, k)).astype(np.float32)
    decoded = np.stack([dequantize(member) for member in members])[experts]
    for own in (False, True):
        x = vectors(kind, shape, tokens, k) if own else vectors(kind, shape, tokens)
        by_pair = x if own else np.repeat(x[:, None], k, axis=1)
        products = np.einsum("tkc,tkrc->tkr", by_pair, decoded)
        call = (stack, on_gpu(x, kind.dtype), gpu.require().asarray(experts))
        y = numbers(gpu.expert_matvec(*call), kind.dtype)
        assert np.array_equal(y, rounded(products, kind.dtype))
        y = numbers(gpu.expert_matvec(*call, on_gpu(weights, kind.dtype)), kind.dtype)
        sums = np.einsum("tk,tkr->tr", weights, products)
        assert np.array_equal(y, rounded(sums, kind.dtype))


@with_and_without_runs
@pytest.mark.parametrize("tokens", [1, 3, 60])
@pytest.mark.parametrize("stacks", [1, 2])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gated_experts(dtype: str, stacks: int, tokens: int, runs: bool) -> None:
    kind = replace(BF16, dtype=dtype, column_scale=stacks == 1)
    layer = Layer(kind, 769, 1025, stacks, ())
    *inputs, output = (gpu.upload(matrices, runs=runs) for matrices in layer.stored)
    x, experts, weights = layer_call(kind, tokens, 3, "int64", 769)
    given = on_gpu(x, dtype), gpu.require().asarray(experts), on_gpu(weights, "fp32")
    y = gpu.gated_experts(inputs, output, *given, out=on_gpu(0 * x, "fp32")).get()
    # The GPU's exp is an approximation.
    assert near(y, layer.expected(x, experts, weights), "bf16" if dtype == "bf16" else "fp16")


@with_and_without_runs
@pytest.mark.parametrize("tokens", [1, 50])
def test_experts_outside_the_stack(tokens: int, runs: bool) -> None:
    shape = Shape(33, 300, 0.885, None, 0, exact=True)
    members, stack = stack_of(FP32, shape, 3, runs)
    experts = np.random.default_rng(0).integers(-3, 7, (tokens, 4), np.int32)
    experts[0, :2] = -(2**31), 2**31 - 1
    x = vectors(FP32, shape, tokens)
    y = numbers(gpu.expert_matvec(stack, on_gpu(x, "fp32"), gpu.require().asarray(experts)), "fp32")
    there = (experts >= 0) & (experts < 3)
    assert np.isnan(y[~there]).all()
    decoded = np.stack([dequantize(member) for member in members])[experts.clip(0, 2)]
    assert np.array_equal(y[there], np.einsum("tc,tkrc->tkr", x, decoded)[there])


@all_kinds
@with_and_without_runs
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("columns", [1001, 1000])
def test_decode(kind: Kind, dtype: str, columns: int, runs: bool) -> None:
    members, stack = stack_of(kind, Shape(37, columns, 0.8, 3, 0), 3, runs)
    expected = from_float32(np.stack([dequantize(member) for member in members]), NAMES[dtype])
    assert gpu.decode(stack, dtype).get().tobytes() == expected.tobytes()
    assert gpu.decode(stack[1], dtype).get().tobytes() == expected[1].tobytes()
    at = gpu.require().empty(expected.size + 1, expected.dtype)[1:].reshape(expected.shape)
    assert gpu.decode(stack, dtype, out=at).get().tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"{size[0]}x{size[1]}")
@with_and_without_runs
@pytest.mark.parametrize("kind", [BF16, REFINED], ids=["ternary", "refined"])
def test_decoded_shapes(kind: Kind, size: tuple[int, int], runs: bool) -> None:
    members, stack = stack_of(kind, Shape(*size, 0.885, None, 0), 2, runs)
    expected = from_float32(np.stack([dequantize(member) for member in members]), "BF16")
    assert gpu.decode(stack).get().tobytes() == expected.tobytes()


def test_codewords_go_when_runs_are_there() -> None:
    """Their memory is free for others: CuPy's pool does not keep it."""
    coded = matrix(BF16, Shape(2048, 4096, 0.885, None, 0))
    pool = gpu.require().get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    stack = gpu.upload([coded] * 16)
    assert stack.packed.runs
    assert stack.bytes < 16 * 2048 * 4096 * 0.9 / 8
    assert pool.total_bytes() - before < stack.bytes + (8 << 20)


@with_and_without_runs
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize("most", [1, 127])
def test_decoding_keeps_subnormal_numbers(
    dtype: str, column_scale: bool, most: int, runs: bool
) -> None:
    """[V-1] and [V-2], although CuPy tells the compiler to flush them to zero."""
    levels = np.random.default_rng(0).integers(-most, most + 1, (9, 400)).astype(np.int8)
    by_row = np.resize(np.array([1e-38, 1e-40, 1e-30, 1e-4, 3e38], np.float32), (9, 2))
    by_column = np.resize(np.array([0.01, 1e5, 1e-10], np.float32), 400)
    coded = encode_matrix(
        levels,
        from_float32(by_row, "BF16"),
        from_float32(by_column, "BF16") if column_scale else None,
    )
    stack = gpu.upload(coded, runs=runs)
    expected = from_float32(dequantize(coded), NAMES[dtype])
    assert bool(stack.packed.runs) == (runs and most == 1)  # of 127, there are too many landings
    assert gpu.decode(stack[0], dtype).get().tobytes() == expected.tobytes()


@with_and_without_runs
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e-40])
def test_a_token_with_odd_numbers_leaves_others_alone(value: float, runs: bool) -> None:
    shape = Shape(64, 500, 0.885, None, 0, exact=True)
    coded, x = matrix(FP32, shape), vectors(FP32, shape, 9)
    x[4, 3::7] = value
    y = numbers(gpu.matmul(gpu.upload(coded, runs=runs), on_gpu(x, "fp32")), "fp32")
    others = np.arange(9) != 4
    assert np.array_equal(y[others], x[others] @ dequantize(coded).T)
    if value == 1e-40:  # counts as 0 or as itself
        assert within_tolerance(coded, np.where(x == value, 0, x)[4:5], y[4:5])


@with_and_without_runs
@pytest.mark.parametrize("kind", [BF16, replace(REFINED, dtype="fp32"), FOUR_BITS])
def test_the_same_every_time(kind: Kind, runs: bool) -> None:
    shape = Shape(500, 3000, 0.885, None, 0)
    _, stack = stack_of(kind, shape, 8, runs)
    x = on_gpu(vectors(kind, shape, 40), kind.dtype)
    experts = gpu.require().asarray(np.random.default_rng(0).integers(0, 8, (40, 2), np.int32))
    weights = on_gpu(np.random.default_rng(1).random((40, 2), np.float32), kind.dtype)
    calls: list[Callable[[], Any]] = [
        lambda: gpu.matvec(stack[3], x[0]),
        lambda: gpu.matmul(stack[3], x),
        lambda: gpu.expert_matvec(stack, x, experts, weights),
    ]
    for call in calls:
        assert len({call().get().tobytes() for _ in range(20)}) == 1


def test_a_stack_of_more_than_4_gib() -> None:
    """Offsets of experts, scales and decoded weights exceed 32 bits."""
    shape = Shape(4096, 4096, 0.6, None, 0, exact=True)
    coded = matrix(BF16, shape)
    assert isinstance(coded, EncodedMatrix)
    other = replace(coded, row_scale=(coded.row_scale ^ np.uint16(0x8000)))
    experts = (4 << 30) // coded.levels.mask.segment_bytes + 2
    if gpu.require().cuda.runtime.memGetInfo()[0] < 6 << 30:
        pytest.skip("the GPU has less than 6 GiB free")
    stack = gpu.upload([coded] * (experts - 1) + [other], runs=False)
    x = vectors(BF16, shape, 1)
    y = numbers(gpu.matmul(stack[-1], on_gpu(x, "bf16")), "bf16")
    assert np.array_equal(y, rounded(x @ dequantize(other).T, "bf16"))
    expected = from_float32(dequantize(other), "BF16")
    assert gpu.decode(stack[-1]).get().tobytes() == expected.tobytes()


# -- Several tokens an expert, from runs -----------------------------------------------------------

# Sixteen, eight, two and four lanes to a half row.
WIDE = [(515, 14336), (1030, 4097), (4095, 1536), (2047, 771)]


@pytest.mark.parametrize("size", WIDE, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize(
    ("dtype", "scales", "column_scale", "zeros", "ones"),
    [
        *[("bf16", 2, False, 0.6, 0.0), ("bf16", 1, True, 0.885, 0.0)],
        *[
            ("fp16", 1, False, 0.885, 0.0),
            ("fp16", 2, True, 0.6, 0.0),
            ("fp32", 2, False, 0.885, 0.0),
        ],
        # Levels in 4 bits, and in 8.
        *[
            ("bf16", 1, True, 0.6, 0.02),
            ("fp16", 2, False, 0.6, 0.02),
            ("fp32", 1, False, 0.6, 0.3),
        ],
    ],
)
def test_batches(
    dtype: str, scales: int, column_scale: bool, zeros: float, ones: float, size: tuple[int, int]
) -> None:
    """[M-1] and [M-2] with the shapes of real experts; 80 tokens are two tiles."""
    strings = ((0.885, 12), (1 - ones, 12) if ones else None)
    kind = replace(BF16, strings=strings, scales=scales, column_scale=column_scale, dtype=dtype)
    for exact in (False, True):
        shape = Shape(*size, zeros, None, 0, exact)
        coded, x = matrix(kind, shape), vectors(kind, shape, 80)
        stack, dense = gpu.upload(coded), dequantize(coded)
        for tokens in (8, 16, 80):
            y = numbers(gpu.matmul(stack, on_gpu(x[:tokens], dtype)), dtype)
            if exact:
                assert np.array_equal(y, rounded(x[:tokens] @ dense.T, dtype))
            else:
                assert within_tolerance(coded, x[:tokens], y, dtype)


@pytest.mark.parametrize("column_scale", [False, True])
def test_batches_of_experts(column_scale: bool) -> None:
    """Some experts have 60 tokens, some one, some none."""
    kind = replace(BF16, scales=1, column_scale=column_scale)
    shape = Shape(301, 2050, 0.7, None, 0, exact=True)
    members, stack = stack_of(kind, shape, 6)
    experts = np.tile(np.array([0, 4], np.int32), (60, 1))
    experts[7] = 2, 9
    x = vectors(kind, shape, 60)
    out = gpu.require().empty((60, 2, 301), "float32")
    gpu.expert_matvec(stack, on_gpu(x, "bf16"), gpu.require().asarray(experts), out=out)
    there = experts < 6
    decoded = np.stack([dequantize(member) for member in members])
    for token, pair in np.argwhere(there):
        expected = decoded[experts[token, pair]] @ x[token]
        assert np.array_equal(out[token, pair].get(), expected)
    assert np.isnan(out.get()[~there]).all()


# -- Streams and graphs ----------------------------------------------------------------------------


def layer(kind: Kind = BF16) -> tuple[gpu.DeviceStack, Shape, Any, Any, Any]:
    """A stack and what the calls take, for 20 tokens of two experts each."""
    shape = Shape(300, 1000, 0.885, None, 0, exact=True)
    _, stack = stack_of(kind, shape, 4)
    x = on_gpu(vectors(kind, shape, 20), kind.dtype)
    experts = gpu.require().asarray(np.arange(40, dtype=np.int32).reshape(20, 2) % 4)
    weights = on_gpu(np.full((20, 2), 0.5, np.float32), kind.dtype)
    gpu.require().cuda.Device().synchronize()  # they are used on other streams
    return stack, shape, x, experts, weights


def test_a_cupy_graph() -> None:
    """Captured once, it uses what is in x at each launch."""
    cupy = gpu.require()
    stack, shape, x, experts, weights = layer()
    out = [cupy.empty((20, 300), "uint16"), cupy.empty((20, 300), "uint16")]
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        gpu.matmul(stack[1], x, out=out[0])  # compiles the kernels
        gpu.expert_matvec(stack, x, experts, weights, out=out[1])
        stream.begin_capture()
        gpu.matmul(stack[1], x, out=out[0])
        gpu.expert_matvec(stack, x, experts, weights, out=out[1])
        graph = stream.end_capture()
    stream.synchronize()
    for seed in range(3):
        x[:] = on_gpu(vectors(BF16, replace(shape, seed=seed), 20), "bf16")
        experts[:] = (experts + 1) % 4
        cupy.cuda.Device().synchronize()
        junk = [cupy.full(1000, 7, "int32") for _ in range(50)]  # may reuse freed memory
        graph.launch(stream)
        stream.synchronize()
        assert len(junk) == 50
        assert np.array_equal(out[0].get(), gpu.matmul(stack[1], x).get())
        expected = gpu.expert_matvec(stack, x, experts, weights)
        assert np.array_equal(out[1].get(), expected.get())


@needs_torch
def test_a_torch_graph() -> None:
    stack, shape, x, experts, weights = layer()
    tensors = as_torch(x), as_torch(experts), as_torch(weights)
    gpu.expert_matvec(stack, *tensors)
    gpu.expert_matvec(stack, tensors[0], *tensors[1:])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gpu.expert_matvec(stack, tensors[0], *tensors[1:])
    for seed in range(3):
        x[:] = on_gpu(vectors(BF16, replace(shape, seed=seed), 20), "bf16")
        gpu.require().cuda.Device().synchronize()
        graph.replay()
        torch.cuda.synchronize()
        expected = gpu.expert_matvec(stack, x, experts, weights)
        assert bits(y).tobytes() == expected.get().tobytes()


def test_the_current_stream_of_cupy() -> None:
    """A call runs on the caller's stream: after a slow kernel there, not beside it."""
    cupy = gpu.require()
    stack, _, x, _, _ = layer()
    expected = gpu.matmul(stack[0], x).get()
    slow = cupy.ones(1 << 27, "float32")
    late = cupy.zeros_like(x)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(100):
            slow *= 0.99
        late.data.copy_from_device_async(x.data, x.nbytes)  # no kernel to compile meanwhile
        y = gpu.matmul(stack[0], late)
    stream.synchronize()
    assert np.array_equal(y.get(), expected)


@needs_torch
def test_the_current_stream_of_torch() -> None:
    stack, _, x, _, _ = layer()
    expected = gpu.matmul(stack[0], x).get()
    source = as_torch(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        slow = torch.rand(4000, 4000, device="cuda")
        for _ in range(20):
            slow = slow @ slow * 1e-3
        y = gpu.matmul(stack[0], source.clone())
        torch.cuda.current_stream().synchronize()
    assert bits(y).tobytes() == expected.tobytes()


# -- torch -----------------------------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("dtype", NAMES)
def test_torch_tensors(dtype: str) -> None:
    stack, _, x, experts, weights = layer(replace(BF16, dtype=dtype))
    tensor = as_torch(x)
    y = gpu.matmul(stack[2], tensor)
    assert isinstance(y, torch.Tensor)
    assert (y.dtype, y.device) == (tensor.dtype, tensor.device)
    assert bits(y).tobytes() == gpu.matmul(stack[2], x).get().tobytes()
    out = torch.empty_like(y)
    assert gpu.matmul(stack[2], tensor, out=out) is out
    assert torch.equal(out, y)
    assert torch.equal(gpu.matvec(stack[2], tensor[7]), gpu.matmul(stack[2], tensor[7:8])[0])
    sums = gpu.expert_matvec(stack, tensor, as_torch(experts), as_torch(weights))
    expected = gpu.expert_matvec(stack, x, experts, weights)
    assert bits(sums).tobytes() == expected.get().tobytes()
    whole = torch.empty(stack.shape, dtype=tensor.dtype, device="cuda")
    gpu.decode(stack, dtype, out=whole)
    assert bits(whole).tobytes() == gpu.decode(stack, dtype).get().tobytes()


@needs_torch
def test_cupy_and_torch_in_one_call_are_refused() -> None:
    stack, _, x, experts, _ = layer()
    with pytest.raises(QMoEError, match="another library than x"):
        gpu.expert_matvec(stack, as_torch(x), experts)


# -- Several GPUs ----------------------------------------------------------------------------------


@pytest.mark.skipif(
    not gpu.available() or gpu.require().cuda.runtime.getDeviceCount() < 2, reason="one GPU only"
)
def test_each_array_stays_on_its_gpu() -> None:
    shape = Shape(70, 500, 0.885, None, 0)
    coded, x = matrix(BF16, shape), vectors(BF16, shape, 3)
    there = gpu.upload(coded, device=1)
    with gpu.require().cuda.Device(1):
        given = on_gpu(x, "bf16")
    y = gpu.matmul(there, given)  # while GPU 0 is current
    assert y.device.id == 1
    assert within_tolerance(coded, x, numbers(y, "bf16"), "bf16")


# -- Runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_transcoding(size: tuple[int, int]) -> None:
    """As numpy does it."""
    members = [matrix(REFINED, Shape(*size, 0.885, None, 0), seed) for seed in range(2)]
    runs = gpu.upload(members).packed.runs
    if runs is None:  # x of 70001 columns does not fit
        assert size[1] > 26_000
        return
    levels = np.stack([decode(m.levels) for m in members if isinstance(m, EncodedMatrix)])
    for name, expected in run_reference.runs(levels, runs.layout).items():
        assert np.array_equal(runs.arrays[name].get(), expected), name
