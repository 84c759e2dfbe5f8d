"""The quality report: what each expert has lost, and why.

It lies in the file as the attachment ``quality.json`` and beside it. Text, the same to the byte for
the same conversion: no times, no paths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from qmoe_format.atomic_file import atomic_write
from qmoe_format.container.writer import file_stem
from qmoe_format.errors import QMoEError

if TYPE_CHECKING:
    from qmoe_format.container.reader import QMoEFile
    from qmoe_format.container.shards import ShardedFile

REPORT_NAME = "quality.json"
DIGITS = 6


class ExpertQuality(TypedDict):
    """One expert's matrix.

    ``tokens``: those its Hessian is made of. ``damping``: what was added to the Hessian for GPTQ,
    as a share of the mean of its diagonal; None where it was not used. ``fallback``: why the recipe
    could not be followed, or None. ``relative_error``: tr((W-Q) S (W-Q)^T) / tr(W S W^T), S the sum
    over the tokens; None without tokens that tell. ``bits``: those of its extent per weight,
    without the dictionary.
    """

    tokens: int
    damping: float | None
    fallback: str | None
    relative_error: float | None
    bits: float


# "lambda" is no name for an attribute, so these are functional.
StackQuality = TypedDict(
    "StackQuality", {"name": str, "lambda": float | None, "experts": list[ExpertQuality]}
)


class Quality(TypedDict):
    """``settings``: what was asked for, the text by its hash; ``totals``: what came of it."""

    settings: dict[str, Any]
    totals: dict[str, Any]
    stacks: list[StackQuality]


def rounded(value: float | None) -> float | None:
    """To six digits that matter: more would only say on which machine it was computed."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


def report_path(destination: Path) -> Path:
    """Where the report lies beside a file."""
    return destination.with_name(f"{file_stem(destination)}.{REPORT_NAME}")


def dump_report(quality: Quality) -> bytes:
    """The report's text: JSON with a line for each expert."""
    stacks = ",\n".join(
        f'{{"name":{_json(stack["name"])},"lambda":{_json(stack["lambda"])},"experts":[\n'
        + ",\n".join(map(_json, stack["experts"]))
        + "]}"
        for stack in quality["stacks"]
    )
    head = f'"settings":{_json(quality["settings"])},\n"totals":{_json(quality["totals"])}'
    return f'{{{head},\n"stacks":[\n{stacks}]}}\n'.encode()


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def write_report(text: bytes, path: Path) -> None:
    with atomic_write(path) as file:
        file.write(text)


def read_report(file: QMoEFile | ShardedFile) -> Quality:
    """The report in a file.

    Raises:
        QMoEError: ``not-found`` if there is none; ``malformed`` if it is none that this version
            understands.
    """
    if REPORT_NAME not in file.attachments:
        raise QMoEError(
            "not-found",
            f"{file.path} has no quality report; only a conversion with calibration text makes one",
        )
    try:
        quality: Quality = json.loads(file.attachment(REPORT_NAME))
        _check(quality, {"settings": _is(dict), "totals": _is(dict), "stacks": _is(list)})
        for stack in quality["stacks"]:
            _check(stack, {"name": _is(str), "lambda": _NUMBER, "experts": _is(list)})
            for expert in stack["experts"]:
                _check(expert, _EXPERT)
    except QMoEError:
        raise
    except (ValueError, RecursionError) as error:
        raise QMoEError(
            "malformed",
            f"{file.path}: its attachment {REPORT_NAME!r} is no quality report ({error}); another "
            "program may have made it",
        ) from error
    return quality


_Check = Callable[[object], bool]


def _is(*kinds: type) -> _Check:
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


_NUMBER = _is(int, float, type(None))
_EXPERT: Mapping[str, _Check] = {
    "tokens": _is(int),
    "damping": _NUMBER,
    "fallback": _is(str, type(None)),
    "relative_error": _NUMBER,
    "bits": _is(int, float),
}


def _check(value: object, fields: Mapping[str, _Check]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r:.40} is no object")
    for key, right in fields.items():
        if key not in value or not right(value[key]):
            raise ValueError(f"{key!r} is missing or wrong")
