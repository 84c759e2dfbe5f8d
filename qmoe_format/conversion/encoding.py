"""From quantized weights to a file's experts, and how many bytes these take."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from qmoe_format.codec import (
    Dictionary,
    EncodedMatrix,
    GroupedMatrix,
    Profile,
    encode_matrix,
    pack_groups,
)
from qmoe_format.container.encodings import INT_DICT, INT_GROUP, ZSTD, int_dict, int_group
from qmoe_format.container.entries import Item
from qmoe_format.container.writer import StackWriter, Writer
from qmoe_format.quantize.group_weights import GroupWeights

if TYPE_CHECKING:
    from qmoe_format.checkpoints import ExpertStack
    from qmoe_format.quantize.level_weights import LevelWeights

Matrix: TypeAlias = EncodedMatrix | GroupedMatrix


def begin_stack(writer: Writer, stack: ExpertStack, encoding: str) -> StackWriter:
    """Open a stack of ``writer`` for the encoded experts of a checkpoint's."""
    shape = (stack.experts, stack.rows, stack.columns)
    return writer.add_stack(
        stack.name, shape, stack.dtype, encoding, stack.members, transposed=stack.transposed
    )


def encode(
    weights: LevelWeights | GroupWeights, place: int, profile: Profile, threads: int
) -> Matrix:
    """Encode the matrix of one expert, the batch's number ``place``."""
    from qmoe_format.checkpoints.torch_dtypes import to_storage

    if isinstance(weights, GroupWeights):
        zero_points = weights.zero_points
        return pack_groups(
            weights.codes[place].cpu().numpy(),
            to_storage(weights.scales[place].cpu()),
            weights.bits,
            grid=weights.grid,
            group_size=weights.group_sizes[place],
            zero_points=None if zero_points is None else zero_points[place].cpu().numpy(),
        )
    column_scale = weights.column_scale
    return encode_matrix(
        weights.levels[place].cpu().numpy(),
        to_storage(weights.row_scale[place].cpu()),
        None if column_scale is None else to_storage(column_scale[place].cpu()),
        width=profile.width,
        rows_per_segment=profile.rows_per_segment(weights.levels.shape[2]),
        threads=threads,
    )


def stored_bytes(matrix: Matrix) -> int:
    """The length of a matrix's extent."""
    if isinstance(matrix, GroupedMatrix):
        item = Item("F32", matrix.shape, INT_GROUP.parameters_of(matrix))
        return int_group.extent_length(item, matrix.group_size)
    item = Item("F32", matrix.shape, INT_DICT.parameters_of(matrix))
    strings = matrix.levels.strings
    sizes = [(each.lengths.itemsize, each.segment_bytes) for each in strings]
    return int_dict.extent_length(item, sizes)


def expected_bytes(sample: Matrix, rows: int, profile: Profile) -> int:
    """Estimate the length of a matrix's extent from ``sample``, some of its ``rows``."""
    if isinstance(sample, GroupedMatrix):
        item = Item("F32", (rows, sample.columns), INT_GROUP.parameters_of(sample))
        return int_group.extent_length(item, sample.group_size)
    parameters = INT_DICT.parameters_of(sample)
    parameters["rows_per_segment"] = min(profile.rows_per_segment(sample.columns), rows)
    item = Item("F32", (rows, sample.columns), parameters)
    sizes = [
        (each.lengths.itemsize, each.segment_bytes * rows // max(sample.rows, 1))
        for each in sample.levels.strings
    ]
    return int_dict.extent_length(item, sizes)


def dictionaries(matrix: Matrix) -> dict[str, int]:
    """Bytes of a matrix's dictionaries, by a hash of each."""
    if isinstance(matrix, GroupedMatrix):
        return {}
    used = (each.dictionary for each in matrix.levels.strings)
    return {sha256(each.tree).hexdigest()[:16]: dictionary_bytes(each) for each in used}


@cache
def dictionary_bytes(dictionary: Dictionary) -> int:
    """The length of a dictionary in a file."""
    tree = np.frombuffer(dictionary.tree, np.uint8)
    sink = _Length()
    ZSTD.encode(tree, Item("U8", tree.shape), sink)
    return min(sink.length, tree.size)


class _Length:
    """A ``Sink`` that only counts."""

    length = 0

    def write(self, data: bytes | memoryview) -> None:
        self.length += len(data)

    def restart(self) -> None:
        self.length = 0

    def dictionary_number(self, dictionary: Dictionary) -> int:
        raise NotImplementedError
