"""Results of the kernels, compared with the codec and with float64 arithmetic."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings

import qmoe_format
from qmoe_format.codec import EncodedBits, EncodedMatrix, dequantize, encode_matrix, pack_groups
from qmoe_format.conformance import runner
from qmoe_format.dtypes import from_float32
from qmoe_format.gpu.packing import Matrix, PackedStack, pack
from tests.gpu import shim
from tests.gpu.problems import (
    DICT_KINDS,
    KINDS,
    LONG,
    NAMES,
    DictKind,
    Floats,
    Kind,
    Machine,
    Shape,
    decode,
    dictionary,
    expert_matvec,
    matmul,
    matrix,
    random_levels,
    rounded,
    shapes,
    vectors,
    within_tolerance,
)

pytestmark = shim.needs_compiler

machines = st.builds(Machine, st.sampled_from([shim.FORWARD, shim.BACKWARD, 2, 3, 4]))


def kinds(step: int) -> pytest.MarkDecorator:
    """Every ``step``-th kind: compiling for all of them takes long."""
    return pytest.mark.parametrize("kind", KINDS[::step], ids=range(0, len(KINDS), step))


few = settings(deadline=None, max_examples=4)


def check_product(coded: Matrix, x: Floats, y: Floats, dtype: str, exact: bool = False) -> None:
    """[M-1] or [M-2]."""
    if exact:
        assert np.array_equal(y, rounded(x @ dequantize(coded).T, dtype))
    else:
        assert within_tolerance(coded, x, y, dtype)


# -- Products --------------------------------------------------------------------------------------


@kinds(1)
@given(shape=shapes, machine=machines)
@example(LONG, Machine(2))
@few
def test_matmul(kind: Kind, shape: Shape, machine: Machine) -> None:
    coded, x = matrix(kind, shape), vectors(kind, shape, kind.tokens)
    check_product(coded, x, matmul(kind, pack([coded]), x, machine), kind.dtype, shape.exact)


@kinds(2)
@given(shape=shapes, k=st.integers(1, 2), own=st.booleans(), machine=machines)
@few
def test_expert_matvec(kind: Kind, shape: Shape, k: int, own: bool, machine: Machine) -> None:
    """Some experts come often, some never; with ``own``, each pair has its own x."""
    shape = replace(shape, exact=True)
    members = [matrix(kind, shape, seed) for seed in range(5)]
    rng = np.random.default_rng(shape.seed)
    pairs = (kind.tokens, k)
    experts = rng.choice([0, 1, 1, 1, 1, 4], pairs).astype(np.int32)
    weights = rng.choice(np.array([-2, 0.5, 1], np.float32), pairs) if kind.weighted else None
    x = vectors(kind, shape, *pairs) if own else vectors(kind, shape, kind.tokens)
    y = expert_matvec(kind, pack(members), x, experts, weights, machine)
    by_pair = x if own else np.repeat(x[:, None], k, axis=1)
    decoded = np.stack([dequantize(member) for member in members])
    products = np.einsum("tkc,tkrc->tkr", by_pair, decoded[experts])
    expected = products if weights is None else np.einsum("tk,tkr->tr", weights, products)
    assert np.array_equal(y, rounded(expected, kind.dtype))


@pytest.mark.parametrize("tokens", [2, 20])
def test_experts_outside_the_stack(tokens: int) -> None:
    """Their products are NaN, the others right, and nothing is read out of bounds."""
    kind, shape = KINDS[0], Shape(20, 50, 0.5, 3, 0, exact=True)
    members = [matrix(kind, shape, seed) for seed in range(2)]
    listed = [[0, 2], [1, -1], [1, 2**31 - 1], [-(2**31), 0]]
    experts = np.array(listed * 5, np.int32)[:tokens]
    x = vectors(kind, shape, tokens)
    y = expert_matvec(kind, pack(members), x, experts)
    for token, pair in np.ndindex(experts.shape):
        expert = experts[token, pair]
        if expert in (0, 1):
            check_product(members[expert], x[[token]], y[token, [pair]], kind.dtype, exact=True)
        else:
            assert np.isnan(y[token, pair]).all()


@kinds(6)
def test_the_order_of_threads_and_blocks_does_not_show(kind: Kind) -> None:
    shape = Shape(50, 90, 0.6, 4, 1)
    stack = pack([matrix(kind, shape, seed) for seed in range(3)])
    x = vectors(kind, shape, kind.tokens)
    experts = np.random.default_rng(0).integers(0, 3, (kind.tokens, 2), np.int32)
    weights = np.random.default_rng(1).random((kind.tokens, 2), np.float32)
    results = {
        (
            matmul(kind, stack, x, machine).tobytes(),
            expert_matvec(kind, stack, x, experts, weights, machine).tobytes(),
            decode(stack, kind.dtype, machine).tobytes(),
        )
        for machine in map(Machine, (shim.FORWARD, shim.BACKWARD, 2))
    }
    assert len(results) == 1


# -- Decoding --------------------------------------------------------------------------------------


def check_decoded(members: list[Matrix], bits: np.ndarray, dtype: str) -> None:
    """[V-1] to [V-3], to the bit."""
    expected = from_float32(np.stack([dequantize(m) for m in members]), NAMES[dtype])
    assert bits.tobytes() == expected.tobytes()


@kinds(2)
@given(shape=shapes, machine=machines, offset=st.integers(0, 7))
@example(LONG, Machine(2), 3)
@few
def test_decode(kind: Kind, shape: Shape, machine: Machine, offset: int) -> None:
    members = [matrix(kind, shape, seed) for seed in range(2)]
    stack = pack(members)
    check_decoded(members, decode(stack, kind.dtype, machine, offset=offset), kind.dtype)
    check_decoded(members[1:], decode(stack, kind.dtype, machine, part=(1, 1)), kind.dtype)


ANY_DTYPE = pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
TINY = (1e-38, 1e-39, 3e-40, 1e-30, 1e-4)


def scales(values: object, *shape: int) -> np.ndarray:
    """bf16 [*shape]: ``values`` in turn."""
    return from_float32(np.resize(np.array(values, np.float32), shape), "BF16")


@ANY_DTYPE
@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize("most", [1, 127])
def test_decoding_keeps_subnormal_numbers(dtype: str, column_scale: bool, most: int) -> None:
    """[V-1] and [V-2], although the compiler is told to flush them to zero; large levels, too."""
    rng = np.random.default_rng(0)
    levels = rng.integers(-most, most + 1, (10, 40)).astype(np.int8)
    by_column = scales([0.01, -1, 1e5, 1e-10, 0], 40) if column_scale else None
    coded = encode_matrix(levels, scales([*TINY, -0.0, 0, -1, 3e38], 10, 2), by_column)
    check_decoded([coded], decode(pack([coded]), dtype), dtype)


@ANY_DTYPE
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("grid", ["linear", "log", "zero points"])
def test_every_code(dtype: str, bits: int, grid: str) -> None:
    """[G-6], [G-7], with scales of every kind."""
    codes = np.resize(np.arange(1 << bits, dtype=np.uint8), (9, 270))
    zero_points = np.resize(codes[:, ::-1], (9, 9)) if grid == "zero points" else None
    coded = pack_groups(
        codes,
        scales([*TINY, -0.0, 0, -1, 3e38, 2.5, -1e-5], 9, 9),
        bits,
        grid="log" if grid == "log" else "linear",
        group_size=32,
        zero_points=zero_points,
    )
    check_decoded([coded], decode(pack([coded]), dtype), dtype)


# -- Conformance vectors ---------------------------------------------------------------------------

ENCODINGS = ("int-dict", "int-group")
VECTORS = [
    vector
    for vector in runner.corpus()
    if vector.outcome == "accept"
    and any(tensor["encoding"] in ENCODINGS for tensor in vector.contents["tensors"])
]


@pytest.fixture(scope="module")
def checked() -> dict[str, Future[None]]:
    """All vectors in parallel: there is much to compile."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Products walk as decoding does: of some, to compile less.
        return {
            vector.id: pool.submit(check_vector, vector, number % 3 == 0)
            for number, vector in enumerate(VECTORS)
        }


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector.id)
def test_conformance(vector: runner.Vector, checked: dict[str, Future[None]]) -> None:
    checked[vector.id].result()


def check_vector(vector: runner.Vector, products: bool) -> None:
    with qmoe_format.open(vector.path) as file:
        for name, tensor in file.tensors.items():
            if tensor.encoding not in ENCODINGS:
                continue
            experts = list(range(tensor.shape[0])) if tensor.stack else [None]
            if members := [file.encoded(name, expert) for expert in experts]:
                dtype = {"BF16": "bf16", "F16": "fp16"}.get(tensor.dtype, "fp32")
                check_stack(members, dtype, products)


def check_stack(members: list[Matrix], dtype: str, products: bool) -> None:
    stack = pack(members)
    if 0 in (stack.layout.rows, stack.layout.columns):
        assert decode(stack, dtype).size == 0
        return
    check_decoded(members, decode(stack, dtype), dtype)
    weights = np.abs(np.stack([dequantize(member) for member in members]))
    normal = (weights == 0) | ((weights > 2.0**-60) & (weights < 2.0**60))
    if not products or not normal.all():
        return  # [M-1] excludes underflow and overflow
    kind = replace(KINDS[0], dtype="fp32", small=False)
    x = np.random.default_rng(0).standard_normal((1, members[0].columns)).astype(np.float32)
    experts = np.arange(len(members), dtype=np.int32)[None]
    y = expert_matvec(kind, stack, x, experts)
    for e, member in enumerate(members):
        check_product(member, x, y[:, e], "fp32")


# -- Hostile segments ------------------------------------------------------------------------------


def hostile_bits(bits: EncodedBits, rng: np.random.Generator, fill: int | None) -> EncodedBits:
    """Segments of random lengths, of random bytes or of one byte repeated."""
    lengths = rng.integers(0, 130, bits.lengths.size, np.uint8)
    size = int(lengths.sum())
    bytes_ = rng.integers(0, 256, size, np.uint8) if fill is None else np.full(size, fill, np.uint8)
    segments = np.concatenate([bytes_, np.zeros(8, np.uint8)])
    return replace(bits, length_base=0, lengths=lengths, segments=segments, segment_bytes=size)


def hostile(kind: DictKind, rng: np.random.Generator, fill: int | None) -> EncodedMatrix:
    coded = matrix(kind, Shape(30, 90, kind.strings[0][0], 4, 0))
    assert isinstance(coded, EncodedMatrix)
    levels, refinement = coded.levels, coded.levels.refinement
    return replace(
        coded,
        levels=replace(
            levels,
            mask=hostile_bits(levels.mask, rng, fill),
            refinement=refinement and hostile_bits(refinement, rng, fill),
        ),
    )


def run_everything(kind: Kind, stack: PackedStack) -> None:
    x = vectors(kind, Shape(0, stack.layout.columns, 0, None, 0), kind.tokens)
    experts = np.zeros((kind.tokens, 1), np.int32)
    for machine in (Machine(shim.FORWARD), Machine(2)):
        matmul(kind, stack, x, machine)
        expert_matvec(kind, stack, x, experts, None, machine)
        decode(stack, kind.dtype, machine)


@pytest.mark.parametrize("kind", DICT_KINDS[::3], ids=range(0, len(DICT_KINDS), 3))
def test_any_bytes_in_the_segments(kind: DictKind) -> None:
    """No access out of bounds, no race, no endless loop: the shim checks that."""
    rng = np.random.default_rng(0)
    for fill in (None, 0, 255, None):
        run_everything(kind, pack([hostile(kind, rng, fill)]))


@pytest.mark.parametrize("refinement", [(0.998, 8), (0.7, 12), (0.3, 8)])
def test_a_long_refinement(refinement: tuple[float, int]) -> None:
    """It goes around the ring seven times, a few or many codewords at a time."""
    kind = DictKind(((0.01, 8), refinement), 1, False, "fp32", 3, False, False)
    levels = random_levels(3, 5000, 0.0, np.random.default_rng(0), 1 - refinement[0])
    levels[:, [0, 7, 2000, 4999]] = [127, -127, 2, 126]
    coded = encode_matrix(
        levels,
        scales([1], 3, 1),
        dictionary=dictionary(*kind.strings[0]),
        refinement_dictionary=dictionary(*refinement),
        rows_per_segment=3,
    )
    stack = pack([coded])
    x = vectors(kind, Shape(3, 5000, 0, None, 0, exact=True), 3)
    check_product(coded, x, matmul(kind, stack, x), "fp32", exact=True)
    check_decoded([coded], decode(stack, "bf16"), "bf16")
