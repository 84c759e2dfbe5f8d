"""Run a reader on all conformance vectors.

    python -m qmoe_format.conformance                       the package and the second reader
    python -m qmoe_format.conformance --reader CMD [ARG...] a reader program, in any language

A program is started as ``CMD ARG... FILE``. It verifies the whole file and either prints its
contents as JSON, in the form of the manifest, and exits with 0, or prints a line that starts with
``error[CODE]`` and exits with 1.
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
    """A line of the manifest.

    Attributes:
        path: the file to open.
        requirements: those of SPEC.md that it tests.
        outcome: ``accept``, or ``reject:CODE``.
        stage: when the defect of a rejected file is found: ``open`` or ``verify``; otherwise None.
        contents: what an accepted file contains; otherwise None.
        sha256: of each file, in hexadecimal.
    """

    id: str
    path: Path
    requirements: tuple[str, ...]
    description: str
    outcome: str
    stage: str | None
    contents: Any
    sha256: dict[Path, str]


@dataclass(frozen=True, slots=True)
class Result:
    """A reader's answer; ``stage`` is None unless it says when it found an error."""

    outcome: str
    stage: str | None = None
    contents: Any = None


Reader = Callable[[Path], Result]


class EmptyCorpus(Exception):
    """There are no vectors: that must not look like a success."""


def corpus(folder: Path = HERE) -> list[Vector]:
    """Read ``manifest.json`` in ``folder``.

    Raises:
        EmptyCorpus: if it is missing or empty.
    """
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
    """The text of each requirement, where SPEC.md is available (in a wheel it is not)."""
    spec = HERE.parent.parent / "SPEC.md"
    text = spec.read_text(encoding="utf-8") if spec.is_file() else ""
    return dict(re.findall(r"^- `\[([A-Z]-\d+)\]` (.+)$", text, re.MULTILINE))


# -- Readers ---------------------------------------------------------------------------------------


def program(command: Sequence[str]) -> Reader:
    """A program as a reader."""

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
    """The reader that was written from SPEC.md alone."""
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
    """This package as a reader."""
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
        if tensor.encoding in ("int-dict", "int-group"):
            stored = file.encoded(name, expert)
            plain = tensor.encoding == "int-group"
            levels: Any = codec.unpack_groups(stored) if plain else codec.decode(stored.levels)
            result["levels"] = sha256(levels.tobytes())
        return result

    attachments = []
    for name in sorted(file.attachments):
        data = file.attachment(name)
        attachments.append({"bytes": len(data), "name": name, "sha256": sha256(data)})
    tensors = []
    for name, tensor in sorted(file.tensors.items()):
        keys = ("dtype", "encoding", "members", "stack", "transposed")
        entry = {key: getattr(tensor, key) for key in keys}
        experts = range(tensor.shape[0]) if tensor.stack else [None]
        parts = [part(tensor, expert) for expert in experts]
        tensors.append(entry | {"name": name, "parts": parts, "shape": list(tensor.shape)})
    return {"attachments": attachments, "tensors": tensors}


# -- Comparison ------------------------------------------------------------------------------------


def difference(expected: Any, found: Any, place: str = "contents") -> str | None:
    """The first place where two JSON values differ; None if they are equal.

    The levels of a part are compared before its values.
    """
    if isinstance(expected, dict) and isinstance(found, dict) and expected.keys() == found.keys():
        pairs = [(f"{place}.{key}", key) for key in sorted(expected)]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [(f"{place}[{i}]", i) for i in range(len(expected))]
    else:
        same = type(expected) is type(found) and expected == found
        return None if same else f"{place}: {json.dumps(expected)} expected, {json.dumps(found)}"
    inner = (difference(expected[key], found[key], name) for name, key in pairs)
    return next(filter(None, inner), None)


def judge(vector: Vector, result: Result) -> str | None:
    """What is wrong with a reader's answer; None if it is right."""
    if result.outcome != vector.outcome:
        return f"{vector.outcome} expected, {result.outcome}"
    if result.stage != vector.stage and None not in (result.stage, vector.stage):
        return f"{vector.outcome} on {vector.stage} expected, found on {result.stage}"
    return difference(vector.contents, result.contents) if vector.stage is None else None


def run(name: str, reader: Reader, vectors: Sequence[Vector]) -> int:
    """Print the failures of a reader, and return how many there are."""
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
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m qmoe_format.conformance",
        description="Run a reader on all conformance vectors of the .qmoe format.",
        epilog="A reader program prints the contents of the file as JSON, or error[CODE].",
    )
    parser.add_argument(
        "--corpus", type=Path, default=HERE, help="folder with manifest.json", metavar="DIR"
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
                parser.error(f"{path} does not have the SHA-256 of the manifest")
    if options.reader is not None:
        if not options.reader:
            parser.error("--reader must be followed by a program")
        readers = {options.reader[0]: program(options.reader)}
    else:
        readers = {"package": package, "second reader": second_reader}
    return 1 if sum(run(name, reader, vectors) for name, reader in readers.items()) else 0
