"""A checkpoint's folder, from the Hub if it is not here."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from qmoe_format.container.attachment_files import is_attached
from qmoe_format.errors import QMoEError, os_errors
from qmoe_format.hub.names import parse_name
from qmoe_format.hub.pointers import check_not_pointer
from qmoe_format.hub.repository import find_repository
from qmoe_format.progress import Progress
from qmoe_format.remote import Location

# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# Of checkpoints that QMoE's authors publish, which ``checkpoints.published_qmoe`` reads.
PUBLISHED_DENSE = "noexp.pt"
PUBLISHED_SIZES = "sizes.pt"
_PUBLISHED = re.compile(r"noexp\.pt|exp\d+\.pt|sizes\.pt")


def local_checkpoint(
    source: str | Path, progress: Progress | None = None, *, code: bool = False
) -> Path:
    """The folder of a checkpoint; one that is on the Hub is downloaded into the cache.

    Args:
        source: a folder, or a name on the Hub.
        progress: called with the bytes downloaded and to download, and the file in question; for
            the weights, from zero again.
        code: whether to download Python code, too.

    Returns:
        ``source`` if that exists. Otherwise a folder with configuration, tokenizer, license, and
        the weights that transformers would load.

    Raises:
        QMoEError: ``not-found`` if there is no such folder, model or revision; ``checkpoint`` if
            files are missing, or only pointers; ``io`` if the Hub is out of reach or denies access,
            and the cache does not have the model; ``dependency``.
    """
    path = Path(source)
    if path.exists():
        _check_pointers(path)
        return path
    name = parse_name(source)
    if name is None or name.file:
        raise QMoEError(
            "not-found",
            f"{source}: no such folder",
            "give one with config.json and the weights, or ORG/MODEL of the Hugging Face Hub",
        )
    repository = find_repository(name)
    first = _first_weight_file(repository.sizes)
    if first is None or "config.json" not in repository.sizes:
        wanted = "config.json" if first else f"weights ({', '.join(WEIGHT_FILES)})"
        raise repository.lacks(wanted, "checkpoint", "name a model in the format of transformers")
    index = [first] if first.endswith(".json") else []
    small = _small_files(repository.sizes)
    if code:
        small += [name for name in repository.sizes if name.endswith(".py") and "/" not in name]
    paths = repository.fetch([*small, *index], progress)
    folder = paths[small.index("config.json")].parent
    repository.fetch(_weight_files(folder / first, repository.sizes), progress)
    return folder


def _check_pointers(folder: Path) -> None:
    """Check that the files of a checkpoint, if it is one, are more than pointers."""
    if not folder.is_dir():
        return
    with os_errors(f"cannot read {folder}"):
        names = {path.name for path in folder.iterdir()}
    first = _first_weight_file(names)
    for name in [*_small_files(names), *([first] if first else [])]:
        check_not_pointer(folder / name)
    for name in _weight_files(folder / first, names) if first else []:
        check_not_pointer(folder / name)


def is_published_qmoe(folder: Location) -> bool:
    """Whether a folder has the files that QMoE's authors publish, and no others with weights."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return _first_weight_file(names) == PUBLISHED_DENSE


def published_files(names: Iterable[str]) -> list[str]:
    """Those among a folder's files, in their order."""
    return sorted(name for name in names if _PUBLISHED.fullmatch(name))


def _small_files(names: Iterable[str]) -> list[str]:
    """Those that a conversion attaches to its result."""
    return sorted(name for name in names if is_attached(PurePosixPath(name)))


def _first_weight_file(names: Collection[str]) -> str | None:
    """The file of all weights, or the index of several, that transformers or QMoE would take."""
    return next((name for name in (*WEIGHT_FILES, PUBLISHED_DENSE) if name in names), None)


def _weight_files(first: Path, names: Iterable[str]) -> list[str]:
    """The name of ``first`` or, if that is an index, those in it; ``open_checkpoint`` checks it.

    Args:
        names: of all files beside it; QMoE's have no index.
    """
    if first.name == PUBLISHED_DENSE:
        return published_files(names)
    if first.suffix != ".json":
        return [first.name]
    if not first.is_file():  # reading a pipe or a device might not end
        return []
    try:
        return sorted({str(file) for file in json.loads(first.read_bytes())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return []
