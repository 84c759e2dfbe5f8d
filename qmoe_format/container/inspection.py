"""What is in a file and how small it is, from its index and the headers of its extents."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, TypedDict

from qmoe_format.dtypes import STORAGE
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.container.reader import QMoEFile

BF16_BYTES = 2
SOURCE_NAME = "source.json"


class SourceSize(TypedDict):
    """The attachment ``SOURCE_NAME`` of a file that was made from a quantized checkpoint.

    Attributes:
        format: of its experts, such as ``fp8``.
        expert_bytes, other_bytes: what tensors took there, with scales.
        other_weights: how many are not experts; the file may pack several into an element.
    """

    format: str
    expert_bytes: int
    other_bytes: int
    other_weights: int


class FormatReport(TypedDict):
    """``version`` is that of the file, such as ``0.2``."""

    version: str


class PayloadReport(TypedDict):
    """What holds the weights themselves.

    Attributes:
        payload_bits_per_weight: of codewords, signs and the rounding of segments to bytes; None if
            there are no weights.
        zero_fraction: of the weights; None if the encoding does not tell.
        refinement_bits_per_weight: the part of the payload for magnitudes above 1.
        refinement_zero_fraction: of the bits that this part encodes; None without any.
    """

    payload_bits_per_weight: float | None
    zero_fraction: float | None
    refinement_bits_per_weight: float | None
    refinement_zero_fraction: float | None


class TensorReport(PayloadReport):
    """One tensor or stack of experts.

    Attributes:
        bytes: its extents, without alignment.
        total_bits_per_weight: of all ``bytes``, with scales and lengths, but without the
            dictionary, which tensors share; None if there are no weights.
    """

    name: str
    encoding: str
    shape: list[int]
    dtype: str
    bytes: int
    total_bits_per_weight: float | None


class PartReport(TypedDict):
    """A part of the file compared with the same weights in bfloat16 and in the checkpoint.

    Attributes:
        ratio: ``bf16_bytes / bytes``. Ratios and bits are None if there are no weights.
        source_bytes: of the tensors in the checkpoint as it came.
        source_ratio: ``source_bytes / bytes``.
    """

    weights: int
    bytes: int
    bf16_bytes: int
    ratio: float | None
    source_bytes: int
    source_ratio: float | None
    total_bits_per_weight: float | None


class ExpertReport(PartReport, PayloadReport):
    """The expert weights; ``bytes`` and total bits include the dictionaries."""


class TotalsReport(TypedDict):
    """Totals; ``file`` is everything: alignment, index, attachments, and all shards."""

    experts: ExpertReport
    others: PartReport
    dictionary_bytes: int
    attachment_bytes: int
    file: PartReport


class Report(TypedDict):
    """What ``qmoe inspect --json`` prints.

    Attributes:
        source_format: of the checkpoint's experts: a quantized format, or their dtypes.
    """

    format: FormatReport
    source_format: str
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
    dtypes: set[str] = set()
    for name, entry in file.tensors.items():
        weights, payload = entry.elements, file.payload(name)
        held = Counter(
            weights=weights,
            payload=payload.bytes,
            refinement=payload.refinement_bytes,
            refinement_zeros=payload.refinement_zeros,
            refinement_ones=payload.refinement_ones,
        )
        if payload.nonzeros is not None:
            held.update(nonzeros=payload.nonzeros, of=weights)
        part = experts if entry.stack or payload.nonzeros is not None else others
        part.update(held)
        part.update(bytes=entry.stored_bytes, source=_element_bytes(entry.dtype) * weights)
        if part is experts:
            dtypes.add(entry.dtype)
        tensors.append(
            TensorReport(
                name=name,
                encoding=entry.encoding,
                shape=list(entry.shape),
                dtype=entry.dtype,
                bytes=entry.stored_bytes,
                total_bits_per_weight=_ratio(8 * entry.stored_bytes, weights),
                **_payload(held),
            )
        )
    source_format = ", ".join(sorted(dtypes))
    if SOURCE_NAME in file.attachments:
        source = _read_source(file)
        source_format = source["format"]
        experts["source"], others["source"] = source["expert_bytes"], source["other_bytes"]
        others["weights"] = source["other_weights"]
    return Report(
        format=FormatReport(version=".".join(map(str, file.version))),
        source_format=source_format,
        tensors=tensors,
        totals=TotalsReport(
            experts=ExpertReport(
                **_part(
                    experts["weights"], experts["bytes"] + file.dictionary_bytes, experts["source"]
                ),
                **_payload(experts),
            ),
            others=_part(others["weights"], others["bytes"], others["source"]),
            dictionary_bytes=file.dictionary_bytes,
            attachment_bytes=sum(entry.stored_bytes for entry in file.attachments.values()),
            file=_part(
                experts["weights"] + others["weights"],
                file.file_length,
                experts["source"] + others["source"],
            ),
        ),
    )


def _read_source(file: QMoEFile) -> SourceSize:
    try:
        found = json.loads(file.attachment(SOURCE_NAME))
        size = SourceSize(
            format=str(found["format"]),
            expert_bytes=int(found["expert_bytes"]),
            other_bytes=int(found["other_bytes"]),
            other_weights=int(found["other_weights"]),
        )
        if not size["format"].isprintable():
            raise ValueError("'format' has control characters")
        numbers = size["expert_bytes"], size["other_bytes"], size["other_weights"]
        if not all(0 <= number < 1 << 63 for number in numbers):
            raise ValueError("a number is out of range")
        return size
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise QMoEError(
            "malformed",
            f"{file.path}: attachment {SOURCE_NAME!r} does not say how large the source was "
            f"({error!r})",
        ) from error


def _element_bytes(dtype: str) -> int:
    return STORAGE[dtype].itemsize if dtype in STORAGE else BF16_BYTES


def _part(weights: int, stored: int, source: int) -> PartReport:
    return PartReport(
        weights=weights,
        bytes=stored,
        bf16_bytes=BF16_BYTES * weights,
        ratio=_ratio(BF16_BYTES * weights, stored) if weights else None,
        source_bytes=source,
        source_ratio=_ratio(source, stored) if weights else None,
        total_bits_per_weight=_ratio(8 * stored, weights),
    )


def _payload(held: Counter[str]) -> PayloadReport:
    weights, zeros = held["weights"], held["refinement_zeros"]
    return PayloadReport(
        payload_bits_per_weight=_ratio(8 * held["payload"], weights),
        zero_fraction=_ratio(held["of"] - held["nonzeros"], held["of"]),
        refinement_bits_per_weight=_ratio(8 * held["refinement"], weights),
        refinement_zero_fraction=_ratio(zeros, zeros + held["refinement_ones"]),
    )


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
