"""Where a model is that a user has named: at a URL, on this machine, or on the Hub."""

from __future__ import annotations

import os

from qmoe_format.hub.checkpoints import local_checkpoint
from qmoe_format.hub.qmoe_files import local_qmoe_file
from qmoe_format.progress import Progress
from qmoe_format.remote import Location, RemotePath, location


def find_checkpoint(
    source: str | os.PathLike[str] | RemotePath,
    progress: Progress | None = None,
    *,
    code: bool = False,
) -> Location:
    """The folder of a checkpoint: that of a URL, or as ``local_checkpoint``.

    Raises:
        QMoEError: the codes of ``local_checkpoint``; of a URL as from ``RemotePath``.
    """
    place = location(source)
    if isinstance(place, RemotePath):
        return place
    return local_checkpoint(_name(source, place), progress, code=code)


def find_qmoe_file(
    source: str | os.PathLike[str] | RemotePath, progress: Progress | None = None
) -> Location:
    """A ``.qmoe`` file: that of a URL, or as ``local_qmoe_file``.

    Raises:
        QMoEError: the codes of ``local_qmoe_file``; of a URL as from ``RemotePath``.
    """
    place = location(source)
    if isinstance(place, RemotePath):
        return place
    return local_qmoe_file(_name(source, place), progress)


def _name(source: object, place: Location) -> str:
    """As it was given, for ``./org/model`` cannot be a name; of ``file://`` the path."""
    given = isinstance(source, str) and "://" not in source
    return str(source if given else place)
