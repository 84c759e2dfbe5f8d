"""What may lie in a file's place: a pointer of Git LFS, or a link whose target is gone."""

from __future__ import annotations

from pathlib import Path

from qmoe_format.errors import QMoEError, os_errors

_GIT_LFS = b"version https://git-lfs"


def check_not_pointer(path: Path) -> None:
    """Refuse a file that a clone or a cache has only announced; a missing one is not refused.

    Raises:
        QMoEError: ``checkpoint``; ``io`` if the file cannot be read.
    """
    with os_errors(f"cannot read {path}"):
        if path.is_symlink() and not path.exists():
            raise QMoEError(
                "checkpoint",
                f"{path}: a link to {path.readlink()}, which is missing",
                "download it again",
            )
        if not path.is_file():
            return
        with path.open("rb") as file:
            beginning = file.read(len(_GIT_LFS))
    if beginning == _GIT_LFS:
        raise QMoEError(
            "checkpoint",
            f"{path}: a pointer of Git LFS, not the file itself",
            f"run `git lfs pull` in {path.parent}",
        )
