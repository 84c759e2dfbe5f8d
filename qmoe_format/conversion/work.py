"""The work folder of a calibrated conversion, where finished blocks survive an interruption.

    .NAME.work/lock              locked by the working process
    .NAME.work/state.json        the fingerprint of the conversion
    .NAME.work/survey-0003.json  a block is surveyed
    .NAME.work/probe-0000.json   what an error in each block does
    .NAME.work/block-0003.norms  norms of the block's hidden states in the original model
    .NAME.work/block-0003.json   a block is quantized
    .NAME.work/stack-0007.qmoe   a quantized stack, see ``staging``
    .NAME.work/*.rows            hidden states, see ``calibration.activations``

A record appears when everything that it stands for is durable, so the number of records tells how
far the work has come.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qmoe_format.atomic_file import atomic_write, partial_files
from qmoe_format.conversion.report import report_path
from qmoe_format.errors import FORMAT_CODES, QMoEError, os_errors
from qmoe_format.remote import Location, RemotePath

try:
    import fcntl
except ImportError:  # no locking on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from qmoe_format.checkpoints import Checkpoint

BEGIN_AGAIN = "begin again with --force"
KINDS = ("survey", "probe", "block")  # of records, in order
SIZE = "bits_per_weight"  # in a fingerprint: it may change until the first block is quantized


class Work:
    """The folder while a process works in it; a context manager.

    After an exception the folder stays, to be resumed, unless nothing in it was finished or the
    same would happen again.
    """

    def __init__(
        self,
        destination: Location,
        fingerprint: Mapping[str, Any],
        *,
        resume: bool,
        overwrite: bool,
    ) -> None:
        """
        Args:
            destination: the file to be written; if it is elsewhere, the folder is made in the
                current one.
            fingerprint: everything that the result depends on, JSON values by name.
            resume, overwrite: see ``ConvertOptions``.

        Raises:
            QMoEError: ``argument`` if the folder exists or is another conversion's; ``not-found``
                if there is none to resume; ``malformed`` if it is damaged; ``io``.
        """
        if isinstance(destination, RemotePath):
            destination = Path.cwd() / destination.name
        self.folder = folder = destination.with_name(f".{destination.name[:200]}.work")
        self._lock = -1
        with os_errors(f"cannot use {folder}"):
            if resume and not folder.is_dir():
                raise QMoEError(
                    "not-found", f"{folder}: there is no work to resume", "leave out --resume"
                )
            if not resume and folder.exists() and not overwrite:
                raise QMoEError(
                    "argument",
                    f"{folder}: holds the work of an interrupted conversion",
                    f"continue it with --resume, or {BEGIN_AGAIN}",
                )
            try:
                if not resume and folder.exists():
                    self._acquire()
                    self._discard()
                folder.mkdir(exist_ok=resume)
                self._acquire()
                if resume:
                    self._clean(destination)
                self._check(fingerprint)
            except BaseException:
                self._release()
                raise

    def _clean(self, destination: Path) -> None:
        """Delete what a killed process left half-written."""
        results = (destination, report_path(destination))
        beside = [path for result in results for path in partial_files(result)]
        for path in [*self.folder.glob(".*.partial"), *beside]:
            path.unlink()

    def _check(self, fingerprint: Mapping[str, Any]) -> None:
        before: dict[str, Any] | None = None
        if self.path("state.json").exists():
            before = self.load("state")
            # Surveys hold for every size, so another one may be asked for.
            sizable = before.get(SIZE) and fingerprint.get(SIZE) and not self.records("block")
            different = [
                f"{key} ({_short(before.get(key))} then, {_short(fingerprint.get(key))} now)"
                for key in sorted({*before, *fingerprint})
                if before.get(key) != fingerprint.get(key) and not (sizable and key == SIZE)
            ]
            if different:
                raise QMoEError(
                    "argument",
                    f"{self.folder}: belongs to another conversion, different in "
                    f"{', '.join(different)}",
                    f"resume with the options it was begun with, or {BEGIN_AGAIN}",
                )
        if before != fingerprint:
            self._save("state", fingerprint)

    def _acquire(self) -> None:
        """Lock the folder against other processes."""
        if fcntl is None:
            return
        # A file opened for writing: network file systems lock nothing else.
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
                "argument",
                f"{self.folder}: another process is working in it",
                "wait until it is done",
            )

    def _release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _discard(self) -> None:
        """Remove the folder. Renamed first, it is never taken for work when half removed."""
        old = self.folder.with_name(f"{self.folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        self.folder.rename(old)
        self._release()
        shutil.rmtree(old, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        code = error.code if isinstance(error, QMoEError) else ""
        begun = any(self.path(f"{name}-0000.json").exists() for name in KINDS)
        if error is None or code in ("checkpoint", "value") or not begun:
            with contextlib.suppress(OSError):
                self._discard()
            self._release()
            return
        self._release()
        if isinstance(error, QMoEError):
            # What is damaged or missing is the work: the checkpoint's own errors have other codes.
            damaged = code in {*FORMAT_CODES, "not-found"}
            advice = ", then ".join(filter(None, [error.advice, "continue with --resume"]))
            raise QMoEError(code, error.problem, BEGIN_AGAIN if damaged else advice) from error
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(
                "interrupted; finished blocks are kept: continue with --resume"
            ) from error

    def path(self, name: str) -> Path:
        """Of a file in the folder."""
        return self.folder / name

    def load(self, name: str) -> Any:
        """The JSON value in a file that is there."""
        path = self.path(f"{name}.json")
        with os_errors(f"cannot read {path}"):
            try:
                return json.loads(path.read_bytes())
            except ValueError as error:
                raise QMoEError("malformed", f"{path}: not JSON ({error})", BEGIN_AGAIN) from error

    def _save(self, name: str, value: object) -> None:
        with atomic_write(self.path(f"{name}.json")) as file:
            file.write(json.dumps(value, allow_nan=False).encode())

    def records(self, kind: str) -> list[Any]:
        """Those of the finished blocks; ``kind`` is one of ``KINDS``."""
        names = (f"{kind}-{number:04}" for number in count())
        done = takewhile(lambda name: self.path(f"{name}.json").exists(), names)
        return [self.load(name) for name in done]

    def record(self, kind: str, number: int, value: object) -> None:
        """Note that a block is finished."""
        self._save(f"{kind}-{number:04}", value)


def describe_code() -> str:
    """A hash of this package's source, which may change between releases."""
    hashed = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, str]:
    """A hash of each file, by name; of weights elsewhere, what their file system says of them."""
    hashes = {
        path.relative_to(checkpoint.folder).as_posix(): hash_file(path)
        for path in checkpoint.attachments
    }
    return hashes | {
        path.name: path.identity() if isinstance(path, RemotePath) else hash_file(path)
        for path in checkpoint.weight_files
    }


def hash_file(path: Path, whole: int = 1 << 24, pieces: int = 256) -> str:
    """SHA-256 of a file's length and bytes, or if it has more than ``whole`` bytes, of its length,
    modification time, and that many bytes in ``pieces`` spread over the file."""
    with os_errors(f"cannot read {path}"), path.open("rb") as file:
        size = path.stat().st_size
        hashed = hashlib.sha256(str(size).encode())
        if size <= whole:
            hashed.update(file.read())
        else:
            hashed.update(str(path.stat().st_mtime_ns).encode())
            length = whole // pieces
            for piece in range(pieces):
                file.seek((size - length) * piece // (pieces - 1))
                hashed.update(file.read(length))
    return hashed.hexdigest()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 20 else f"{text[:17]}…"
