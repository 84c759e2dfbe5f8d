"""The work folder of a calibrated conversion: what is done stays done.

    .NAME.work/lock              locked by the process that is at work
    .NAME.work/state.json        the fingerprint: of what conversion this is the work
    .NAME.work/plan-0003.json    a block of the plan is done
    .NAME.work/block-0003.norms  of the block's hidden states in the original model
    .NAME.work/block-0003.json   a block is done; its stacks are block-0003-MATRIX.qmoe
    .NAME.work/*.rows            hidden states, see calibration.buffer

A record appears when everything that it stands for is durable, so the number of records tells how
far the work is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qmoe_format.atomic_file import atomic_write, partial_files
from qmoe_format.conversion.report import report_path
from qmoe_format.errors import FORMAT_CODES, QMoEError, os_errors

try:
    import fcntl
except ImportError:  # Windows, where nobody is kept from starting the same work twice
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from qmoe_format.checkpoints import Checkpoint

AGAIN = "begin again with --force"
WHOLE = 1 << 24  # bytes up to which a file is read whole for its fingerprint
PIECES = 256
SIZE = "bits_per_weight"  # of a fingerprint: it may be another until the first block is quantised


class Work:
    """The folder, while it is worked in; a context manager.

    An exception leaves it as it is, to be resumed, unless nothing in it was done yet, or the same
    would happen again.
    """

    def __init__(
        self, destination: Path, fingerprint: Mapping[str, Any], *, resume: bool, overwrite: bool
    ) -> None:
        """
        Args:
            destination: the file that is to be.
            fingerprint: whatever the result depends on, values of JSON by name.
            resume: go on in the folder that is there; otherwise there must be none.
            overwrite: then that is removed.

        Raises:
            QMoEError: ``argument`` if there is a folder, or if it is another conversion's;
                ``not-found`` if there is none to go on in; ``malformed`` if it is damaged; ``io``.
        """
        self.folder = folder = work_folder(destination)
        self._lock = -1
        with os_errors(f"cannot use {folder}"):
            if resume and not folder.is_dir():
                raise QMoEError(
                    "not-found", f"{folder}: there is no work to resume; leave out --resume"
                )
            if not resume and folder.exists() and not overwrite:
                raise QMoEError(
                    "argument",
                    f"{folder}: is there, of a conversion that was stopped; continue it with "
                    "--resume, or begin again with --force",
                )
            try:
                if not resume and folder.exists():
                    self._take()
                    self._discard()
                folder.mkdir(exist_ok=resume)
                self._take()
                if resume:
                    self._clean(destination)
                self._check(fingerprint)
            except BaseException:
                self._release()
                raise

    def _clean(self, destination: Path) -> None:
        """Delete what a process that was killed left half-written."""
        results = (destination, report_path(destination))
        beside = [path for result in results for path in partial_files(result)]
        for path in [*self.folder.glob(".*.partial"), *beside]:
            path.unlink()

    def _check(self, fingerprint: Mapping[str, Any]) -> None:
        before = self.load("state")
        if before is not None:
            # What was measured holds for every size, so another one may be asked for.
            sizable = before.get(SIZE) and fingerprint.get(SIZE) and not self.records("block")
            different = [
                f"{key} ({_short(before.get(key))} then, {_short(fingerprint.get(key))} now)"
                for key in sorted({*before, *fingerprint})
                if before.get(key) != fingerprint.get(key) and not (sizable and key == SIZE)
            ]
            if different:
                raise QMoEError(
                    "argument",
                    f"{self.folder} is of another conversion, different in {', '.join(different)}; "
                    f"resume with what it was begun with, or {AGAIN}",
                )
        if before != fingerprint:
            self.save("state", fingerprint)

    def _take(self) -> None:
        """Be the only process in the folder."""
        if fcntl is None:
            return
        # A file, opened to write: network file systems lock nothing else.
        path = self.folder / "lock"
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its last owner may have removed the folder in the meantime.
            free = path.exists() and os.path.samestat(os.fstat(self._lock), path.stat())
        except BlockingIOError:
            free = False
        if not free:
            self._release()
            raise QMoEError(
                "argument", f"{self.folder}: another process is at work in it; wait for its end"
            )

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _discard(self) -> None:
        """Remove the folder: first out of the way, at one stroke, or what a process that is killed
        here leaves might be taken for work."""
        old = self.folder.with_name(f"{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        self.folder.rename(old)
        self._release()
        shutil.rmtree(old, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        hopeless = isinstance(error, QMoEError) and error.code == "value"
        begun = any(self.path(f"{kind}-0000.json").exists() for kind in ("plan", "block"))
        if error is None or hopeless or not begun:
            with contextlib.suppress(OSError):
                self._discard()
            self._release()
            return
        self._release()
        # What is damaged is the work: the checkpoint's own errors have other codes.
        damaged = isinstance(error, QMoEError) and error.code in FORMAT_CODES
        advice = AGAIN if damaged else "what is done is kept: continue with --resume"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"interrupted; {advice}") from error
        if isinstance(error, QMoEError):
            message = str(error)
            known = message.endswith(AGAIN)
            raise QMoEError(error.code, message if known else f"{message}; {advice}") from error

    def path(self, name: str) -> Path:
        return self.folder / name

    def load(self, name: str) -> Any:
        """What was saved under that name, or None."""
        path = self.path(f"{name}.json")
        with os_errors(f"cannot read {path}"):
            if not path.exists():
                return None
            try:
                return json.loads(path.read_bytes())
            except ValueError as error:
                raise QMoEError("malformed", f"{path}: is damaged ({error}); {AGAIN}") from error

    def save(self, name: str, value: object) -> None:
        """Write a value of JSON, durable and at one stroke."""
        with atomic_write(self.path(f"{name}.json")) as file:
            file.write(json.dumps(value, allow_nan=False).encode())

    def records(self, kind: str) -> list[Any]:
        """Those of the blocks that are done."""
        found: list[Any] = []
        for number in count():
            record = self.load(f"{kind}-{number:04}")
            if record is None:
                return found
            found.append(record)
        raise AssertionError

    def record(self, kind: str, number: int, value: object) -> None:
        """A block is done."""
        self.save(f"{kind}-{number:04}", value)


def work_folder(destination: Path) -> Path:
    """Where the work for a file is done: beside it."""
    return destination.with_name(f".{destination.name[:200]}.work")


def describe_code() -> str:
    """A hash of this package's source: between releases its version does not tell."""
    hashed = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, str]:
    """A hash of each file by name: of a small one's bytes; of pieces of a large one and of when it
    was changed."""
    paths = [*checkpoint.attachments, *checkpoint.weight_files]
    return {path.name: _file_hash(path) for path in paths}


def _file_hash(path: Path) -> str:
    with os_errors(f"cannot read {path}"), path.open("rb") as file:
        size = path.stat().st_size
        hashed = hashlib.sha256(str(size).encode())
        if size <= WHOLE:
            hashed.update(file.read())
        else:
            hashed.update(str(path.stat().st_mtime_ns).encode())
            length = WHOLE // PIECES
            for piece in range(PIECES):
                file.seek((size - length) * piece // (PIECES - 1))
                hashed.update(file.read(length))
    return hashed.hexdigest()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f"{text[:17]}…"
