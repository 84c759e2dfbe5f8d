"""A folder of QMoE's authors as a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qmoe_format.checkpoints.attachments import find_attachments
from qmoe_format.checkpoints.checkpoint import Checkpoint
from qmoe_format.checkpoints.expert_stacks import ExpertStack
from qmoe_format.checkpoints.published_qmoe.dictionary import entries
from qmoe_format.checkpoints.published_qmoe.matrix import DOWNLOAD, PublishedMatrix
from qmoe_format.checkpoints.published_qmoe.shard import PublishedShard
from qmoe_format.checkpoints.tensor_info import TensorInfo
from qmoe_format.checkpoints.weight_files import Shard, load_torch_file, open_shard
from qmoe_format.errors import QMoEError, os_errors
from qmoe_format.hub.checkpoints import PUBLISHED_DENSE, PUBLISHED_SIZES, published_files
from qmoe_format.remote import Location

_BLOCK = re.compile(r"(encoder|decoder)\.block\.(\d{1,9})\.")
_LAYERS = {"encoder": "num_layers", "decoder": "num_decoder_layers"}


class PublishedCheckpoint(Checkpoint):
    """Its experts read as bfloat16, or as the ternary matrices that they are."""

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        shards: Sequence[Shard],
        stored: Mapping[str, TensorInfo],
        *,
        trust_remote_code: bool = False,
        matrices_release_after: int = 1 << 29,
    ) -> None:
        """As ``Checkpoint``; reading ``matrix`` maps at most one file.

        Args:
            matrices_release_after: drop that map, too, when so many bytes of it were read. To map
                it again takes seconds where it has thousands of experts.
        """
        super().__init__(folder, config, shards, stored, trust_remote_code=trust_remote_code)
        self._matrices_release_after = matrices_release_after
        self._last: Shard | None = None

    def matrix(self, stack: ExpertStack, expert: int) -> PublishedMatrix:
        """One expert's matrix, views of the memory map, so do not keep it."""
        name = stack.member(expert)
        shard = self._shard(name)
        if shard is not self._last or self._mapped_bytes > self._matrices_release_after:
            self.close()
        self._last = shard
        self._mapped_bytes += shard.sizes[name].bytes
        return shard.matrix(name)

    def stored_bytes(self, names: Iterable[str]) -> int:
        """How many bytes some of ``tensors`` take in the weight files."""
        experts = {stack.member(e) for stack in self.stacks for e in range(stack.experts)}
        return sum(
            self._shard(name).sizes[name].bytes if name in experts else self.stored[name].bytes
            for name in names
        )

    def _shard(self, expert: str) -> PublishedShard:
        shard = self._shards[self.stored[expert].shard]
        assert isinstance(shard, PublishedShard), f"{expert} is no expert"
        return shard


@contextmanager
def open_published(
    folder: Path, *, trust_remote_code: bool = False
) -> Iterator[PublishedCheckpoint]:
    """Open a folder; reads its configuration, and the names and shapes in its weight files.

    Raises:
        QMoEError: ``checkpoint`` if it is incomplete or unreadable, if its parts contradict each
            other, or if this machine cannot make the dictionary.
    """
    entries()
    files = [folder / name for name in published_files(path.name for path in folder.iterdir())]
    for path in files:
        if not path.is_file():  # reading a pipe might not end
            raise _wrong(path, "not a file")
    experts = [PublishedShard(path) for path in files if path.name.startswith("exp")]
    shards = [open_shard(folder / PUBLISHED_DENSE), *experts]
    stored: dict[str, TensorInfo] = {}
    for number, shard in enumerate(shards):
        for name, dtype, shape in shard.tensors():
            if name in stored:
                first = shards[stored[name].shard].path.name
                raise _wrong(shard.path, f"tensor {name!r} is in {first}, too")
            stored[name] = TensorInfo(name, dtype, shape, number)
        shard.release()
    _check_sizes(folder / PUBLISHED_SIZES, experts)
    stored = dict(sorted(stored.items()))
    config = _read_config(folder / "config.json")
    changed = corrected(config, stored)
    code = trust_remote_code
    with (
        nullcontext(folder) if changed == config else _copied(folder, changed, code) as place,
        PublishedCheckpoint(place, changed, shards, stored, trust_remote_code=code) as checkpoint,
    ):
        yield checkpoint


def _check_sizes(path: Path, shards: Iterable[PublishedShard]) -> None:
    """Check that ``sizes.pt`` lists the same numbers of codewords, and no matrix more."""
    if not path.is_file():
        raise _wrong(path, "missing")
    listed = load_torch_file(path)
    if not isinstance(listed, dict):
        raise _wrong(path, "holds something other than numbers by name")
    found = {
        name.removesuffix(".weight"): size.codewords
        for shard in shards
        for name, size in shard.sizes.items()
    }
    for name in (*found, *listed):
        there, stated = found.get(name), listed.get(name)
        if not isinstance(stated, int) or stated != there:
            number = stated if isinstance(stated, int) else "no"
            problem = f"lists {number} codewords of {name!r}, but there are {there or 'none'}"
            raise _wrong(path, problem)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise _wrong(path, "no JSON object")
    return config


@contextmanager
def _copied(folder: Path, config: Mapping[str, Any], code: bool) -> Iterator[Path]:
    """A folder with the small files of another, but with a ``config`` of its own."""
    with TemporaryDirectory() as base:
        place = Path(base, folder.resolve().name)  # which messages name
        with os_errors(f"cannot write {place}"):
            for path in find_attachments(folder, code=code):
                copy = place / path.relative_to(folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            (place / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        yield place


def corrected(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A configuration with which transformers builds a model whose blocks are all sparse.

    Releases of 2023 could not; QMoE patched them and left the configuration wrong.

    Args:
        config: the contents of ``config.json``.
        names: of tensors, experts among them.
    """
    changed = {key: value for key, value in config.items() if key != "is_full_sparse"}
    sparse: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if ".experts." in name and (match := _BLOCK.match(name)):
            sparse[match[1]].add(int(match[2]))
    for part, key in _LAYERS.items():
        blocks = sparse[part]
        if len(blocks) == config.get(key) == max(blocks, default=0) + 1:
            changed[f"num_sparse_{part}_layers"] = len(blocks)
            changed.pop(f"{part}_sparse_step", None)  # transformers derives it
    return changed


def _wrong(path: Location, problem: str) -> QMoEError:
    return QMoEError("checkpoint", f"{path}: {problem}", DOWNLOAD)
