"""Size and speed of the codec beside QMoE's scheme, plain packing, zstd and dense products.

    python -m benchmarks.codec [--quick] [--levels]

Writes benchmarks/results/codec.json and codec.png; with --levels, of levels beyond -1 to 1, only
levels.json. All figures of one source are of the same levels; all speeds of one table are medians
of one run, in which the schemes take turns.

Sizes, in bits per weight:

    payload  codewords and signs (ours: with segments padded to bytes), or the packed or compressed
             levels; no metadata
    total    ours: the tensor in a finished file, with its dictionary, lengths, offsets, two bf16
             scales per row and alignment; QMoE: payload, and per row 32 bits of offset and 32 of
             scales, as in its files; packed and zstd: payload and 32 bits of scales per row
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard

import qmoe_format
from benchmarks import qmoe_scheme, report
from qmoe_format import codec
from qmoe_format.dtypes import from_float32

Levels = npt.NDArray[np.int8]

SHARES = (0.60, 0.75, 0.85, 0.885, 0.92, 0.95)
WIDTHS = (768, 2080, 3072, 6144)
OURS = {
    "ours fast (12 bit)": codec.PROFILES["fast"],
    "ours size (16 bit)": codec.PROFILES["size"],
    "ours 8 bit": codec.Profile(8, 4096),
}
SWITCH_MINI = Path(__file__).parents[2] / "shared" / "data" / "switch-mini"


# Sources of levels


def independent(rows: int, columns: int, zero_fraction: float) -> Levels:
    """Levels drawn one by one."""
    rng = np.random.default_rng(0)
    signs = rng.integers(0, 2, (rows, columns), dtype=np.int8) * 2 - 1
    levels: Levels = np.where(rng.random((rows, columns)) < zero_fraction, 0, signs)
    return levels


def gaussian(rows: int, columns: int) -> Levels:
    """Rows of normal weights, rounded at half of their largest and half of their smallest one."""
    weights = np.random.default_rng(0).standard_normal((rows, columns))
    high = weights > weights.max(axis=1, keepdims=True) / 2
    low = weights < weights.min(axis=1, keepdims=True) / 2
    levels: Levels = high.astype(np.int8) - low.astype(np.int8)
    return levels


def multilevel(kind: str, bits: float, rows: int, columns: int) -> Levels:
    """Normal or Laplacian weights, rounded to multiples of a step, of this order-0 entropy."""
    weights = getattr(np.random.default_rng(0), kind)(size=(rows, columns))

    def rounded(step: float) -> Levels:
        levels: Levels = np.rint(weights / step).astype(np.int8)
        return levels

    least, most = 0.1, 10.0
    while most / least > 1.0001:
        step = (least * most) ** 0.5
        least, most = (step, most) if entropy(rounded(step)) > bits else (least, step)
    return rounded(most)


def switch_mini() -> Iterator[tuple[str, list[Levels]]]:
    """The experts of a small trained Switch Transformer after rounding, if its folder exists."""
    if not SWITCH_MINI.is_dir():
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "switch-mini.qmoe"
        qmoe_format.convert(SWITCH_MINI, path)
        with qmoe_format.open(path) as model:
            for kind in ("wi", "wo"):
                matrices = [
                    codec.decode(model.encoded(name, expert).levels)
                    for name, entry in model.tensors.items()
                    if entry.stack and name.endswith(kind)
                    for expert in range(0, entry.shape[0], 4)
                ]
                yield f"switch-mini {kind}", matrices


def sources(weights: int) -> Iterator[tuple[str, list[Levels]]]:
    """Name and matrices of everything that is measured, about ``weights`` of each."""
    for columns in WIDTHS:
        rows = weights // columns
        for share in SHARES:
            yield f"iid {share:g}", [independent(rows, columns, share)]
        yield "gaussian", [gaussian(rows, columns)]
    yield from switch_mini()


# Other ways to store levels


def symbols(levels: Levels) -> npt.NDArray[np.uint8]:
    """uint8, flat: 0 for 0, 1 for +1, 2 for -1."""
    return np.where(levels < 0, 2, levels).astype(np.uint8).ravel()


def pack(levels: Levels, base: int, count: int) -> bytes:
    """``count`` levels per byte, as digits of a number in ``base``."""
    flat = symbols(levels)
    flat = np.concatenate([flat, np.zeros(-flat.size % count, np.uint8)])
    powers = np.array([base**i for i in range(count)], np.uint8)
    return bytes((flat.reshape(-1, count) * powers).sum(axis=1, dtype=np.uint8))


def unpacker(base: int, count: int) -> npt.NDArray[np.int8]:
    """int8 [256, count]: the levels of a byte."""
    digits = np.arange(256)[:, None] // [base**i for i in range(count)] % base
    table: Levels = np.array([0, 1, -1, 0], np.int8)[digits]
    return table


PACKINGS = {"2-bit": (4, 4), "base-3": (3, 5)}


def entropy(levels: Levels) -> float:
    """Order-0 entropy of all levels together, bits per weight."""
    counts = np.bincount(levels.ravel() + np.int16(127))
    shares = counts[counts > 0] / levels.size
    return float(-(shares * np.log2(shares)).sum())


# Sizes


def our_size(matrices: list[Levels], profile: codec.Profile) -> tuple[float, float]:
    """Payload and total bits per weight of a stack in a file."""
    rows, columns = matrices[0].shape
    scales = np.full((rows, 2), 0x3C00, np.uint16)
    rows_per_segment = profile.rows_per_segment(columns)
    segment_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.qmoe"
        shape = (len(matrices), rows, columns)
        with (
            qmoe_format.Writer(path) as writer,
            writer.add_stack("w", shape, "BF16", "int-dict") as experts,
        ):
            for levels in matrices:
                matrix = codec.encode_matrix(
                    levels, scales, width=profile.width, rows_per_segment=rows_per_segment
                )
                experts.append(matrix)
                segment_bytes += sum(each.segment_bytes for each in matrix.levels.strings)
        with qmoe_format.open(path) as model:
            stored = model.tensors["w"].stored_bytes + model.dictionary_bytes
            for expert, levels in enumerate(matrices):
                assert np.array_equal(codec.decode(model.encoded("w", expert).levels), levels)
    weights = len(matrices) * rows * columns
    return 8 * segment_bytes / weights, 8 * stored / weights


def sizes(matrices: list[Levels], quick: bool) -> dict[str, tuple[float, float]]:
    """Payload and total bits per weight of every scheme."""
    levels = np.concatenate(matrices)
    columns = levels.shape[1]
    found = {scheme: our_size(matrices, profile) for scheme, profile in OURS.items()}
    codewords, _ = qmoe_scheme.encode(levels)
    qmoe = 16 * codewords.size / levels.size
    found["QMoE"] = (qmoe, qmoe + 64 / columns)
    for packing, (base, count) in PACKINGS.items():
        payloads = {packing: 8 / count}
        packed = pack(levels, base, count)
        for level in (3,) if quick else (3, 19):
            compressed = zstandard.ZstdCompressor(level).compress(packed)
            payloads[f"zstd -{level} of {packing}"] = 8 * len(compressed) / levels.size
        found |= {scheme: (bits, bits + 32 / columns) for scheme, bits in payloads.items()}
    return found


def measure_sizes(weights: int, quick: bool) -> list[dict[str, Any]]:
    """One record per source and width."""
    records = []
    for name, matrices in sources(weights):
        levels = np.concatenate(matrices)
        limit = entropy(levels)
        schemes = {
            scheme: {
                "payload": payload,
                "total": total,
                "above_entropy_percent": 100 * (payload / limit - 1),
            }
            for scheme, (payload, total) in sizes(matrices, quick).items()
        }
        records.append(
            {
                "source": name,
                "columns": levels.shape[1],
                "zero_fraction": 1 - np.count_nonzero(levels) / levels.size,
                "entropy": limit,
                "schemes": schemes,
            }
        )
        line = "  ".join(f"{scheme} {size['payload']:.4f}" for scheme, size in schemes.items())
        print(f"{name:16} {levels.shape[1]:5}  H {limit:.4f}  {line}", flush=True)
    return records


# Speeds


def coding_work(levels: Levels) -> dict[str, Callable[[], Any]]:
    """Encoding and decoding to int8 on one and two threads, beside zstd and QMoE's scheme."""
    work: dict[str, Callable[[], Any]] = {}
    out = np.empty_like(levels)
    for scheme, profile in OURS.items():
        encode = partial(
            codec.encode,
            levels,
            width=profile.width,
            rows_per_segment=profile.rows_per_segment(levels.shape[1]),
        )
        encoded = encode()
        for threads in (1, 2):
            work[f"{scheme}: encode, {threads} thread"] = partial(encode, threads=threads)
            work[f"{scheme}: decode, {threads} thread"] = partial(
                codec.decode, encoded, out, threads
            )
    codewords, offsets = qmoe_scheme.encode(levels)
    work["QMoE: encode, 1 thread"] = partial(qmoe_scheme.encode, levels)
    work["QMoE: decode, 1 thread"] = partial(qmoe_scheme.decode, codewords, offsets, out)
    decompress = zstandard.ZstdDecompressor().decompress

    def to_int8(frame: bytes, table: Levels) -> None:
        np.take(table, np.frombuffer(decompress(frame), np.uint8), axis=0)

    for packing, (base, count) in PACKINGS.items():
        frame = zstandard.ZstdCompressor(19).compress(pack(levels, base, count))
        zstd = f"zstd -19 of {packing}: decompress"
        work[f"{zstd}, still packed"] = partial(decompress, frame)
        work[f"{zstd} and unpack to int8"] = partial(to_int8, frame, unpacker(base, count))
    return work


def product_work(levels: Levels) -> dict[str, Callable[[], Any]]:
    """y = W x from the codewords on one and two threads, beside dense matrices."""
    work: dict[str, Callable[[], Any]] = {}
    rows, columns = levels.shape
    x = np.random.default_rng(1).standard_normal((16, columns)).astype(np.float32)
    scales = from_float32(np.random.default_rng(2).random((rows, 2), np.float32), "BF16")
    for scheme, profile in OURS.items():
        matrix = codec.encode_matrix(
            levels,
            scales,
            width=profile.width,
            rows_per_segment=profile.rows_per_segment(columns),
        )
        for threads in (1, 2):
            work[f"{scheme}: matvec, {threads} thread"] = partial(
                codec.matvec, matrix, x[0], threads=threads
            )
        work[f"{scheme}: 16 tokens, 1 thread"] = partial(codec.matmul, matrix, x)
    dense = codec.dequantize(matrix)
    error = np.abs(codec.matvec(matrix, x[0]) - dense @ x[0]).max()
    assert error < 1e-3 * np.sqrt(columns), error

    def matvec(weights: torch.Tensor, vector: torch.Tensor, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.mv(weights, vector)

    def matmul(weights: torch.Tensor, vectors: torch.Tensor) -> None:
        torch.set_num_threads(1)
        torch.matmul(vectors, weights.T)

    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        weights, vectors = torch.from_numpy(dense).to(dtype), torch.from_numpy(x).to(dtype)
        for threads in (1, 2):
            work[f"torch {name}: matvec, {threads} thread"] = partial(
                matvec, weights, vectors[0], threads
            )
        work[f"torch {name}: 16 tokens, 1 thread"] = partial(matmul, weights, vectors)
    return work


def measure_speeds(quick: bool) -> list[dict[str, Any]]:
    """Seconds, and weights per second, of each piece of work on each source."""
    records = []
    # As bf16 the matrix that is multiplied is larger than the caches; ours is not.
    coding_shape, product_shape = ((1024, 3072), (1024, 3072))
    if not quick:
        coding_shape, product_shape = ((4096, 3072), (8192, 14336))
    for share in (0.60, 0.885, 0.95):
        for make, shape in ((coding_work, coding_shape), (product_work, product_shape)):
            levels = independent(*shape, share)
            seconds = report.medians(make(levels), rounds=3 if quick else 9)
            for name, taken in seconds.items():
                rate = levels.size / taken["median"]
                records.append(
                    {"source": f"iid {share:g}", "shape": shape, "work": name, **taken,
                     "weights_per_second": rate}
                )  # fmt: skip
                print(f"iid {share:g} {shape} {name:60} {rate / 1e9:8.3f} Gweights/s", flush=True)
    return records


def measure_levels(quick: bool) -> list[dict[str, Any]]:
    """Size and speed, on one core, of levels beyond -1 to 1, beside a product in bfloat16."""
    torch.set_num_threads(1)
    rows, columns = (256 if quick else 2048), 3072
    x = np.random.default_rng(1).standard_normal(columns).astype(np.float32)
    scales = np.full((rows, 2), 0x3C00, np.uint16)
    records = []
    for kind in ("normal", "laplace"):
        for bits in (1.2, 1.7, 2.0, 2.5):
            levels = multilevel(kind, bits, rows, columns)
            limit = entropy(levels)
            work: dict[str, Callable[[], Any]] = {}
            record: dict[str, Any] = {"source": f"{kind} {bits}", "entropy": limit}
            for width, profile in ((12, codec.PROFILES["fast"]), (16, codec.PROFILES["size"])):
                matrix = codec.encode_matrix(
                    levels, scales, width=width, rows_per_segment=profile.rows_per_segment(columns)
                )
                payload = matrix.levels.payload_bits_per_weight
                record[f"{width} bit"] = {
                    "payload": payload,
                    "above_entropy_percent": 100 * (payload / limit - 1),
                }
                work[f"{width} bit: decode"] = partial(
                    codec.decode, matrix.levels, np.empty_like(levels)
                )
                work[f"{width} bit: matvec"] = partial(codec.matvec, matrix, x)
            dense = torch.from_numpy(codec.dequantize(matrix)).bfloat16()
            vector = torch.from_numpy(x).bfloat16()
            work["torch bfloat16: matvec"] = partial(torch.mv, dense, vector)
            seconds = report.medians(work, rounds=3 if quick else 9)
            record["weights_per_second"] = {
                name: levels.size / taken["median"] for name, taken in seconds.items()
            }
            records.append(record)
            print(json.dumps(record), flush=True)
    return records


def ratios(speeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Claimed speeds relative to the alternative in the same run."""

    def rate(source: str, work: str) -> float:
        return next(
            float(record["weights_per_second"])
            for record in speeds
            if record["source"] == source and record["work"] == work
        )

    found: dict[str, Any] = {}
    for source in dict.fromkeys(record["source"] for record in speeds):
        for scheme in OURS:
            decode = rate(source, f"{scheme}: decode, 1 thread")
            matvec = rate(source, f"{scheme}: matvec, 1 thread")
            zstd = "zstd -19 of base-3: decompress"
            found[f"{source}, {scheme}"] = {
                "decode / zstd to int8": decode / rate(source, f"{zstd} and unpack to int8"),
                "decode / zstd, still packed": decode / rate(source, f"{zstd}, still packed"),
                "decode / QMoE": decode / rate(source, "QMoE: decode, 1 thread"),
                "matvec / torch bf16": matvec / rate(source, "torch bfloat16: matvec, 1 thread"),
                "matvec / torch fp32": matvec / rate(source, "torch float32: matvec, 1 thread"),
                "matvec, 2 threads / 1": rate(source, f"{scheme}: matvec, 2 thread") / matvec,
                "16 tokens / torch bf16": rate(source, f"{scheme}: 16 tokens, 1 thread")
                / rate(source, "torch bfloat16: 16 tokens, 1 thread"),
            }
    return found


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Percent above entropy against the share of zeros, rows of 3072."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    chosen = [r for r in records if r["columns"] == 3072 and r["source"].startswith("iid")]
    figure, axes = pyplot.subplots(figsize=(7, 4.2))
    for scheme, style in (
        ("QMoE", "k--"),
        ("zstd -19 of base-3", "C2:"),
        ("ours 8 bit", "C1-"),
        ("ours fast (12 bit)", "C0-"),
        ("ours size (16 bit)", "C3-"),
    ):
        points = [
            (r["zero_fraction"], r["schemes"][scheme]["above_entropy_percent"])
            for r in chosen
            if scheme in r["schemes"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=scheme)
    axes.set(
        xlabel="share of zeros",
        ylabel="payload, % above entropy",
        ylim=(0, 40),
        title="Independent levels, rows of 3072",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small data, no zstd -19, no files")
    parser.add_argument("--levels", action="store_true", help="levels beyond -1 to 1, only")
    arguments = parser.parse_args()
    quick = arguments.quick
    if arguments.levels:
        levels = measure_levels(quick)
        if not quick:
            report.save("levels", {"levels": levels})
        return
    records = measure_sizes(1 << 18 if quick else 1 << 22, quick)
    speeds = measure_speeds(quick)
    compared = ratios(speeds)
    print(json.dumps(compared, indent=1))
    if not quick:
        report.save("codec", {"sizes": records, "speeds": speeds, "ratios": compared})
        plot(records, report.RESULTS / "codec.png")


if __name__ == "__main__":
    main()
