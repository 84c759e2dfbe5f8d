"""What is in a file and how small it is, from its index and the headers of its extents."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from qmoe_format.container.reader import QMoEFile

BF16_BYTES = 2


class FormatReport(TypedDict):
    """``version`` is that of the file, such as ``0.2``."""

    version: str


class TensorReport(TypedDict):
    """One tensor or stack of experts.

    Attributes:
        bytes: its extents, without alignment.
        payload_bits_per_weight: of codewords, signs and the rounding of segments to bytes. This and
            the next are None if there are no weights.
        total_bits_per_weight: of all ``bytes``, with scales and lengths, but without the
            dictionary, which tensors share.
        zero_fraction: None if the encoding does not tell.
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
    """A part of the file compared with the same weights in bfloat16.

    Attributes:
        ratio: ``bf16_bytes / bytes``. It and the bits are None if there are no weights.
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
    """Totals; ``file`` is everything: alignment, index, attachments, and all shards."""

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


def describe(file: QMoEFile) -> Report:
    """Measure an open file. At most a header of each expert is read, and nothing is verified.

    Open it with ``memory_map=False``: otherwise a page of each expert stays in memory.

    Raises:
        QMoEError: what is wrong with the file.
    """
    tensors = []
    experts: Counter[str] = Counter()
    others: Counter[str] = Counter()
    for name, entry in file.tensors.items():
        weights, (payload, nonzeros) = entry.elements, file.payload(name)
        part = experts if entry.stack or nonzeros is not None else others
        part.update(weights=weights, bytes=entry.stored_bytes, payload=payload)
        if nonzeros is not None:
            part.update(nonzeros=nonzeros, of=weights)
        tensors.append(
            TensorReport(
                name=name,
                encoding=entry.encoding,
                shape=list(entry.shape),
                dtype=entry.dtype,
                bytes=entry.stored_bytes,
                payload_bits_per_weight=_ratio(8 * payload, weights),
                total_bits_per_weight=_ratio(8 * entry.stored_bytes, weights),
                zero_fraction=None if nonzeros is None else _zeros(nonzeros, weights),
            )
        )
    return Report(
        format=FormatReport(version=".".join(map(str, file.version))),
        tensors=tensors,
        totals=TotalsReport(
            experts=ExpertReport(
                **_part(experts["weights"], experts["bytes"] + file.dictionary_bytes),
                payload_bits_per_weight=_ratio(8 * experts["payload"], experts["weights"]),
                zero_fraction=_zeros(experts["nonzeros"], experts["of"]),
            ),
            others=_part(others["weights"], others["bytes"]),
            dictionary_bytes=file.dictionary_bytes,
            attachment_bytes=sum(entry.stored_bytes for entry in file.attachments.values()),
            file=_part(experts["weights"] + others["weights"], file.file_length),
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
