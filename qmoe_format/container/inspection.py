"""What is in a file and how small it is, from the index and the headers of extents alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from qmoe_format.container.reader import QMoEFile
    from qmoe_format.container.shards import ShardedFile

BF16_BYTES = 2


class FormatReport(TypedDict):
    """``version``: the file's, such as ``0.1``."""

    version: str


class TensorReport(TypedDict):
    """One tensor or stack of experts.

    ``bytes``: its extents, without alignment. Payload is codewords, signs and the rounding of
    segments to bytes; total is all of ``bytes``, with scales and lengths, but without the
    dictionary, which tensors share. ``zero_fraction`` is None where the encoding does not tell, the
    bits are None where there are no weights.
    """

    name: str
    encoding: str
    shape: list[int]
    dtype: str
    bytes: int
    payload_bits_per_weight: float | None
    total_bits_per_weight: float | None
    zero_fraction: float | None


class PartReport(TypedDict):
    """Some of the file's bytes beside what the same weights take in bfloat16.

    ``ratio`` is ``bf16_bytes / bytes``; it and the bits are None where there are no weights.
    """

    weights: int
    bytes: int
    bf16_bytes: int
    ratio: float | None
    total_bits_per_weight: float | None


class ExpertReport(PartReport):
    """The expert weights; ``bytes`` and total bits include the dictionaries."""

    payload_bits_per_weight: float | None
    zero_fraction: float | None


class TotalsReport(TypedDict):
    """``file`` has everything: alignment, index, attachments, and all shards."""

    experts: ExpertReport
    others: PartReport
    dictionary_bytes: int
    attachment_bytes: int
    file: PartReport


class Report(TypedDict):
    """What ``qmoe inspect --json`` prints."""

    format: FormatReport
    tensors: list[TensorReport]
    totals: TotalsReport


def describe(file: QMoEFile | ShardedFile) -> Report:
    """Measure an open file. 32 bytes of each expert are read, and nothing is verified.

    Open it with ``memory_map=False``: otherwise a page of each expert stays in memory.

    Raises:
        QMoEError: what is wrong with the file.
    """
    tensors = []
    weights = {"experts": 0, "others": 0}
    stored = {"experts": 0, "others": 0}
    payload = nonzeros = ternary = 0
    for name, entry in file.tensors.items():
        is_ternary = entry.encoding == "ternary-dict"
        segment_bytes, tensor_nonzeros = entry.stored_bytes, 0
        if is_ternary:
            segment_bytes, tensor_nonzeros = file.ternary_counts(name)
        part = "experts" if entry.stack or is_ternary else "others"
        weights[part] += entry.elements
        stored[part] += entry.stored_bytes
        if part == "experts":
            payload += segment_bytes
        if is_ternary:
            nonzeros += tensor_nonzeros
            ternary += entry.elements
        tensors.append(
            TensorReport(
                name=name,
                encoding=entry.encoding,
                shape=list(entry.shape),
                dtype=entry.dtype,
                bytes=entry.stored_bytes,
                payload_bits_per_weight=_ratio(8 * segment_bytes, entry.elements),
                total_bits_per_weight=_ratio(8 * entry.stored_bytes, entry.elements),
                zero_fraction=_zeros(tensor_nonzeros, entry.elements) if is_ternary else None,
            )
        )
    dictionaries = file.dictionary_bytes
    experts = ExpertReport(
        **_part(weights["experts"], stored["experts"] + dictionaries),
        payload_bits_per_weight=_ratio(8 * payload, weights["experts"]),
        zero_fraction=_zeros(nonzeros, ternary),
    )
    return Report(
        format=FormatReport(version=".".join(map(str, file.version))),
        tensors=tensors,
        totals=TotalsReport(
            experts=experts,
            others=_part(weights["others"], stored["others"]),
            dictionary_bytes=dictionaries,
            attachment_bytes=sum(entry.stored_bytes for entry in file.attachments.values()),
            file=_part(sum(weights.values()), file.file_length),
        ),
    )


def _part(weights: int, stored: int) -> PartReport:
    return PartReport(
        weights=weights,
        bytes=stored,
        bf16_bytes=BF16_BYTES * weights,
        ratio=_ratio(BF16_BYTES * weights, stored) if weights else None,
        total_bits_per_weight=_ratio(8 * stored, weights),
    )


def _zeros(nonzeros: int, weights: int) -> float | None:
    return 1 - nonzeros / weights if weights else None


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
