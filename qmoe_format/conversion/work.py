"""The work folder of a calibrated conversion, where finished blocks survive an interruption.

    .NAME.work/lock              locked by the working process
    .NAME.work/state.json        the fingerprint of the conversion
    .NAME.work/survey-0003.json  a block is surveyed
    .NAME.work/probe-0000.json   what an error in each block does
    .NAME.work/block-0003.importance  how much an error in each row of its experts matters
    .NAME.work/block-0003.json   a block is quantized
    .NAME.work/stack-0007*.qmoe  a quantized stack, see ``staging``
    .NAME.work/*.rows            hidden states, see ``calibration.activations``
    .NAME.work/ranks             what rank 0 has written for the others to see

A record appears when everything that it stands for is durable, so the number of records tells how
far the work has come. Of several ranks, rank 0 reads and writes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qmoe_format.atomic_file import atomic_write, partial_files
from qmoe_format.calibration.ranks import ALONE, Ranks, wait_for
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
_LOCK_S = 120.0  # after which a file server forgets the lock of a machine that was lost


class Work:
    """The folder while a process, or all ranks together, work in it; a context manager.

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
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            destination: the file to be written; if it is elsewhere, the folder is made in the
                current one.
            fingerprint: everything that the result depends on, JSON values by name.
            resume, overwrite: see ``ConvertOptions``.
            ranks: that work together.

        Raises:
            QMoEError: ``argument`` if the folder exists or is another conversion's, or if ranks
                have different fingerprints; ``not-found`` if there is none to resume; ``malformed``
                if it is damaged; ``io``, also if a rank does not see the folder.
        """
        self.folder = work_folder(destination)
        self._ranks = ranks
        self._lock = -1
        _check_same(ranks, fingerprint)
        here = self.folder.with_name(destination.name)
        ranks.share(lambda: self._open(here, fingerprint, resume, overwrite))
        try:
            self._check_seen()
        except BaseException:
            if ranks.leads and not self._begun():
                self._remove()
            self._release()
            raise

    def _open(
        self, destination: Path, fingerprint: Mapping[str, Any], resume: bool, overwrite: bool
    ) -> None:
        folder = self.folder
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

    def _check_seen(self) -> None:
        """Refuse ranks that have another folder of this name."""
        if self._ranks.count == 1:
            return
        path = self.path("ranks")

        def write() -> bytes:
            token = secrets.token_bytes(16)
            with atomic_write(path) as file:
                file.write(token)
            return token

        token = self._ranks.share(write)

        def see() -> None:
            if not wait_for(path, lambda: path.exists() and path.read_bytes() == token):
                raise QMoEError(
                    "io",
                    f"{self.folder}: is not the folder of that name that rank 0 works in",
                    "write to a folder that all machines share",
                )

        self._ranks.settle(see)

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
            sizable = before.get(SIZE) and fingerprint.get(SIZE) and not self._records("block")
            free = (SIZE,) if sizable else ()
            if different := _differences(before, fingerprint, "then", "now", *free):
                raise QMoEError(
                    "argument",
                    f"{self.folder}: belongs to another conversion, different in {different}",
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
        end = time.monotonic() + (_LOCK_S if self._ranks.launched else 0.0)
        while not (locked := self._try_lock()) and time.monotonic() < end:
            time.sleep(1)
        # Its last owner may have removed the folder in the meantime.
        if not (locked and path.exists() and os.path.samestat(os.fstat(self._lock), path.stat())):
            self._release()
            raise QMoEError(
                "argument",
                f"{self.folder}: another process is working in it",
                "wait until it is done",
            )

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

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

    def _remove(self) -> None:
        """Remove the folder if possible."""
        with contextlib.suppress(OSError):
            self._discard()

    def _begun(self) -> bool:
        """Whether anything in the folder is finished."""
        return any(self.path(f"{name}-0000.json").exists() for name in KINDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        code = error.code if isinstance(error, QMoEError) else ""
        if error is None or code in ("checkpoint", "value") or not self._begun():
            if self._ranks.leads:
                self._remove()
            self._release()
            return
        self._release()
        if isinstance(error, QMoEError):
            # What is damaged or missing is the work: the checkpoint's own errors have other codes.
            damaged = code in {*FORMAT_CODES, "not-found"}
            resume = "continue with --resume"
            known = [error.advice] if error.advice else []
            advice = ", then ".join(known if resume in error.advice else [*known, resume])
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
        """Those of the finished blocks, for all ranks; ``kind`` is one of ``KINDS``."""
        return self._ranks.share(lambda: self._records(kind))

    def _records(self, kind: str) -> list[Any]:
        names = (f"{kind}-{number:04}" for number in count())
        done = takewhile(lambda name: self.path(f"{name}.json").exists(), names)
        return [self.load(name) for name in done]

    def record(self, kind: str, number: int, value: object) -> None:
        """Note that a block is finished, on all ranks."""
        self._ranks.share(lambda: self._save(f"{kind}-{number:04}", value))


def work_folder(destination: Location) -> Path:
    """Where the work on a file lies; that on a file elsewhere is in the current folder."""
    if isinstance(destination, RemotePath):
        destination = Path.cwd() / destination.name
    return destination.with_name(f".{destination.name[:200]}.work")


def _check_same(ranks: Ranks, fingerprint: Mapping[str, Any]) -> None:
    """Refuse ranks that would do something else than rank 0."""
    found = ranks.gather((str(ranks), fingerprint))
    first = found[0][1]
    for where, other in found:
        if other != first:
            raise QMoEError(
                "argument",
                f"{where}: differs from rank 0 in {_differences(first, other, 'there', 'here')}",
                "give all ranks the same release, options, model and text",
            )


def _differences(
    first: Mapping[str, Any], second: Mapping[str, Any], one: str, other: str, *but: str
) -> str:
    """In which values two fingerprints differ, ``but`` for those of some names."""
    return ", ".join(
        f"{key} ({_short(first.get(key))} {one}, {_short(second.get(key))} {other})"
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key) and key not in but
    )


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
