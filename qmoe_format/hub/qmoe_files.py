"""A ``.qmoe`` file, from the Hub if it is not here."""

from __future__ import annotations

import re
from pathlib import Path

from qmoe_format.errors import QMoEError, located
from qmoe_format.hub.names import parse_name
from qmoe_format.hub.pointers import check_not_pointer
from qmoe_format.hub.repository import Repository, find_repository
from qmoe_format.progress import Progress

_SHARD = re.compile(r".+-[0-9]{5}-of-[0-9]{5}\.qmoe")  # as ``container.shard_list`` names them


def local_qmoe_file(source: str | Path, progress: Progress | None = None) -> Path:
    """The path to open of a ``.qmoe`` file; one that is on the Hub is downloaded into the cache.

    Args:
        source: a file, the file that lists shards, or a name on the Hub.
        progress: called with the bytes downloaded and to download, and the file in question; for
            shards, from zero again.

    Returns:
        ``source`` if that exists or can only be a path. Otherwise a file in the cache, with the
        shards that it lists.

    Raises:
        QMoEError: the codes of ``local_checkpoint``; ``argument`` if the repository has several
            ``.qmoe`` files and none is named; a format code for a bad list of shards.
    """
    path = Path(source)
    name = None if path.exists() else parse_name(source)
    if name is None or (name.file and path.parent.is_dir()):
        check_not_pointer(path)
        return path
    repository = find_repository(name)
    chosen = _choose(repository)
    file = repository.fetch([chosen], progress)[0]
    folder = chosen.removesuffix(file.name)
    repository.fetch([folder + shard for shard in _listed_shards(file)], progress)
    return file


def _choose(repository: Repository) -> str:
    """The file that is named, or the only one."""
    name = repository.name
    files = sorted(
        file
        for file in repository.sizes
        if file.endswith((".qmoe", ".qmoe.json")) and not _SHARD.fullmatch(file)
    )
    if name.file in files:
        return name.file
    if len(files) == 1 and not name.file:
        return files[0]
    if not files:
        advice = f"make one: qmoe convert {name.repo} out.qmoe"
        raise repository.lacks(".qmoe file", "not-found", advice)
    revision = f"@{name.revision}" if name.revision else ""
    advice = f"give one of {', '.join(f'{name.repo}/{file}{revision}' for file in files)}"
    if name.file:
        raise repository.lacks(name.file, "not-found", advice)
    raise QMoEError("argument", f"{name}: there are {len(files)} .qmoe files", advice)


def _listed_shards(file: Path) -> list[str]:
    import numpy as np

    from qmoe_format.container.shard_list import BEGINNING, parse_shard_list

    with file.open("rb") as stream:
        if stream.read(len(BEGINNING)) != BEGINNING:
            return []
    with located(str(file)):
        return [shard.file for shard in parse_shard_list(np.fromfile(file, np.uint8))]
