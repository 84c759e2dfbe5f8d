"""The quality report: what each expert has lost, and why.

It is an attachment of the file, ``quality.json``, and also lies beside it. It contains no times and
no paths: the same conversion gives the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, get_type_hints

from qmoe_format.container.shard_list import file_stem
from qmoe_format.errors import QMoEError
from qmoe_format.remote import AnyLocation

if TYPE_CHECKING:
    from qmoe_format.container.reader import QMoEFile

REPORT_NAME = "quality.json"


class ExpertQuality(TypedDict):
    """One matrix of an expert.

    ``relative_error`` is tr((W-Q) S (W-Q)^T) / tr(W S W^T), S the sum over the tokens.
    """

    tokens: int  # in the Hessian
    damping: float | None  # of the Hessian for GPTQ, over the mean of its diagonal
    fallback: str | None  # why the recipe could not be followed
    relative_error: float | None  # None if the tokens do not tell
    bits: float  # of the extent per weight, without the dictionary
    kurtosis: float | None  # of the weights before, 3 if they are normal; None if all are equal
    levels: int  # between the largest magnitude and minus that
    zeros: float  # the share of weights that became 0


# "lambda" cannot be the name of an attribute, so this is not a class.
StackQuality = TypedDict(
    "StackQuality", {"name": str, "lambda": float | None, "experts": list[ExpertQuality]}
)


class Quality(TypedDict):
    """``settings``: what was asked for, the text by its hash. ``totals``: of the result."""

    settings: dict[str, Any]
    totals: dict[str, Any]
    stacks: list[StackQuality]


def rounded(value: float | None) -> float | None:
    """To six significant digits: further ones depend on the machine."""
    return None if value is None else float(f"{value:.6g}")


def report_path(destination: AnyLocation) -> AnyLocation:
    """The report's path beside a file."""
    return destination.with_name(f"{file_stem(destination)}.{REPORT_NAME}")


def dump_report(quality: Quality) -> bytes:
    """The report as JSON, with a line for each expert."""
    stacks = ",\n".join(
        f'{{"name":{_json(stack["name"])},"lambda":{_json(stack["lambda"])},"experts":[\n'
        + ",\n".join(map(_json, stack["experts"]))
        + "]}"
        for stack in quality["stacks"]
    )
    first = f'"settings":{_json(quality["settings"])},\n"totals":{_json(quality["totals"])}'
    return f'{{{first},\n"stacks":[\n{stacks}]}}\n'.encode()


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def read_report(file: QMoEFile) -> Quality:
    """The report in a file.

    Raises:
        QMoEError: ``not-found`` if there is none; ``malformed`` if this version does not
            understand it.
    """
    if REPORT_NAME not in file.attachments:
        raise QMoEError(
            "not-found",
            f"{file.path}: has no quality report",
            "convert the model with calibration text",
        )
    try:
        quality: Quality = json.loads(file.attachment(REPORT_NAME))
        _check(quality, {"settings": dict, "totals": dict, "stacks": list})
        expert_fields = get_type_hints(ExpertQuality)
        for stack in quality["stacks"]:
            _check(stack, {"name": str, "lambda": float | None, "experts": list})
            for expert in stack["experts"]:
                _check(expert, expert_fields)
    except QMoEError:
        raise
    except (ValueError, RecursionError) as error:
        raise QMoEError(
            "malformed",
            f"{file.path}: its attachment {REPORT_NAME!r} is not a quality report ({error})",
        ) from error
    return quality


@dataclass(frozen=True, slots=True)
class FewTokens:
    """Experts with fewer tokens than columns in a matrix, so that its Hessian says too little.

    Attributes:
        experts: how many.
        of: how many there are, in the blocks that the model runs.
        fewest: tokens of one.
    """

    experts: int
    of: int
    fewest: int


def few_tokens(quality: Quality, columns: Mapping[str, int]) -> FewTokens | None:
    """Experts with few tokens, if there are any; ``columns`` by the names of stacks."""
    every: set[tuple[str, int]] = set()
    few: dict[tuple[str, int], int] = {}
    for stack in quality["stacks"]:
        block = re.sub(r"(.*\.\d+\.)?.*", r"\1", stack["name"], count=1)
        seen = [expert["tokens"] for expert in stack["experts"]]
        for number, tokens in enumerate(seen if any(seen) else []):  # or else it does not run
            every.add((block, number))
            if tokens < columns.get(stack["name"], 0):
                few[block, number] = tokens
    return FewTokens(len(few), len(every), min(few.values())) if few else None


def _check(value: object, fields: Mapping[str, Any]) -> None:
    """Check that an object has these keys, of these types."""
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is not an object")
    for key, kind in fields.items():
        found = value.get(key, ...)
        whole = isinstance(found, int) and isinstance(0.0, kind)  # JSON has one type of number
        if isinstance(found, bool) or not (whole or isinstance(found, kind)):
            raise ValueError(f"{key!r} is missing or of the wrong type")
