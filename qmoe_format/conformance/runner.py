"""Try a reader on all conformance vectors.

    python -m qmoe_format.conformance                       the package and the second reader
    python -m qmoe_format.conformance --reader CMD [ARG...] a reader program, in any language

A program is started as ``CMD ARG... FILE``. It verifies the whole file and either prints its
contents as JSON, in the form of the manifest, and exits with 0, or prints a line that
begins with ``error[CODE]`` and exits with 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class Vector:
    """A line of the manifest."""

    id: str
    path: Path
    requirements: tuple[str, ...]
    description: str
    outcome: str  # accept, or reject:CODE
    stage: str | None  # when a rejected one is found: open or verify
    contents: Any  # what is in an accepted one
    sha256: dict[Path, str]


@dataclass(frozen=True, slots=True)
class Result:
    """What a reader said; ``stage`` is None if it does not say when it found an error."""

    outcome: str
    stage: str | None = None
    contents: Any = None


Reader = Callable[[Path], Result]


class EmptyCorpus(Exception):
    """No vectors: a run over nothing must not look like a success."""


def corpus(folder: Path = HERE) -> list[Vector]:
    manifest = folder / "manifest.json"
    entries = json.loads(manifest.read_bytes()) if manifest.is_file() else []
    vectors = []
    for entry in entries:
        sums = {entry["file"]: entry["sha256"]} | entry.get("others", {})
        vectors.append(
            Vector(
                entry["id"],
                folder / entry["file"],
                tuple(entry["requirements"]),
                entry["description"],
                entry["outcome"],
                entry.get("stage"),
                entry.get("contents"),
                {folder / name: value for name, value in sums.items()},
            )
        )
    if not vectors:
        raise EmptyCorpus(f"no vectors in {folder}")
    return vectors


def sentences() -> dict[str, str]:
    """The requirements' own words, where the specification is at hand (not in a wheel)."""
    spec = HERE.parent.parent / "SPEC.md"
    text = spec.read_text(encoding="utf-8") if spec.is_file() else ""
    return dict(re.findall(r"^- `\[([A-Z]-\d+)\]` (.+)$", text, re.MULTILINE))


# -- Readers ---------------------------------------------------------------------------------------


def program(command: Sequence[str]) -> Reader:
    def read(path: Path) -> Result:
        try:
            done = subprocess.run(
                [*command, str(path)], capture_output=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return Result(f"no answer in {TIMEOUT_S} s")
        text = (done.stdout + b"\n" + done.stderr).decode(errors="replace")
        if done.returncode == 0:
            try:
                return Result("accept", contents=json.loads(done.stdout))
            except ValueError:
                return Result("exit code 0, but no JSON")
        error = re.search(r"^error\[([a-z-]+)\]", text, re.MULTILINE)
        if done.returncode != 1 or error is None:
            last = (text.strip().splitlines() or [""])[-1]
            return Result(f"exit code {done.returncode}: {last}")
        return Result(f"reject:{error[1]}")

    return read


def second_reader(path: Path) -> Result:
    from qmoe_format.conformance import second_reader as reader

    stage = "open"
    try:
        reader.opened(path)
        stage = "verify"
        return Result("accept", contents=reader.contents(path))
    except reader.Rejected as error:
        return Result(f"reject:{error.code}", stage)
    except Exception as error:
        return Result(f"crash: {error!r}", stage)


def package(path: Path) -> Result:
    import qmoe_format

    stage = "open"
    try:
        with qmoe_format.open(path) as file:
            stage = "verify"
            file.verify()
            stage = "read"
            return Result("accept", contents=_package_contents(file))
    except qmoe_format.QMoEError as error:
        return Result(f"reject:{error.code}", stage)
    except Exception as error:
        return Result(f"crash: {error!r}", stage)


def _package_contents(file: Any) -> dict[str, Any]:
    from qmoe_format import codec

    def sha256(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    def part(tensor: Any, expert: int | None) -> dict[str, str]:
        name = tensor.name
        values = file.read(name) if expert is None else file.read_expert(name, expert)
        result = {"sha256": sha256(values.tobytes())}
        if tensor.encoding == "ternary-dict":
            result["trits"] = sha256(codec.decode(file.encoded(name, expert).trits).tobytes())
        return result

    attachments = []
    for name in sorted(file.attachments):
        data = file.attachment(name)
        attachments.append({"bytes": len(data), "name": name, "sha256": sha256(data)})
    tensors = []
    for name in sorted(file.tensors):
        tensor = file.tensors[name]
        experts = range(tensor.shape[0]) if tensor.stack else [None]
        tensors.append(
            {
                "dtype": tensor.dtype,
                "encoding": tensor.encoding,
                "members": tensor.members,
                "name": name,
                "parts": [part(tensor, expert) for expert in experts],
                "shape": list(tensor.shape),
                "stack": tensor.stack,
            }
        )
    return {"attachments": attachments, "tensors": tensors}


# -- Comparison ------------------------------------------------------------------------------------


def difference(expected: Any, found: Any, place: str = "contents") -> str | None:
    """Where two JSON values differ first: the trits of a part come before its values."""
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        pairs = [(f"{place}.{key}", key) for key in sorted(expected, reverse=True)]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [(f"{place}[{i}]", i) for i in range(len(expected))]
    else:
        same = type(expected) is type(found) and expected == found
        return None if same else f"{place}: {json.dumps(expected)} expected, {json.dumps(found)}"
    inner = (difference(expected[key], found[key], name) for name, key in pairs)
    return next(filter(None, inner), None)


def judge(vector: Vector, result: Result) -> str | None:
    """What is wrong with a reader's answer, or None."""
    if result.outcome != vector.outcome:
        return f"{vector.outcome} expected, {result.outcome}"
    if result.stage != vector.stage and None not in (result.stage, vector.stage):
        return f"{vector.outcome} on {vector.stage} expected, found on {result.stage}"
    return difference(vector.contents, result.contents) if vector.stage is None else None


def run(name: str, reader: Reader, vectors: Sequence[Vector]) -> int:
    """Print what fails; the number of failures."""
    texts = sentences()
    failures = 0
    broken: set[str] = set()
    for vector in vectors:
        problem = judge(vector, reader(vector.path))
        if problem is None:
            continue
        failures += 1
        broken.update(vector.requirements)
        print(f"FAIL {vector.id}: {problem}")
        print(f"     {vector.path.name}: {vector.description}")
        for requirement in vector.requirements:
            print(f"     [{requirement}] {texts.get(requirement, '')}".rstrip())
    print(f"{name}: {len(vectors) - failures} of {len(vectors)} vectors", end="")
    print(f", broken: {' '.join(sorted(broken))}" if broken else "")
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m qmoe_format.conformance",
        description="Try a reader on all conformance vectors of the .qmoe format.",
        epilog="A reader program prints the contents of the file as JSON, or error[CODE].",
    )
    parser.add_argument(
        "--corpus", type=Path, default=HERE, help="folder of manifest.json", metavar="DIR"
    )
    parser.add_argument(
        "--reader", nargs=argparse.REMAINDER, help="a program, started as CMD FILE", metavar="CMD"
    )
    options = parser.parse_args(arguments)
    try:
        vectors = corpus(options.corpus)
    except EmptyCorpus as error:
        parser.error(str(error))
    for vector in vectors:
        for path, expected in vector.sha256.items():
            if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                parser.error(f"{path} is not the file of the manifest")
    if options.reader is not None:
        if not options.reader:
            parser.error("--reader needs a program")
        readers = {options.reader[0]: program(options.reader)}
    else:
        readers = {"package": package, "second reader": second_reader}
    return 1 if sum(run(name, reader, vectors) for name, reader in readers.items()) else 0
