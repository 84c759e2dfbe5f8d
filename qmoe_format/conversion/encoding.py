"""From ternary weights to a file's experts, and how many bytes these take."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from qmoe_format.codec import Dictionary, EncodedMatrix, Profile, encode_matrix
from qmoe_format.codec.dictionary import on_grid
from qmoe_format.container.encodings import INT_DICT, ZSTD
from qmoe_format.container.encodings.int_dict import extent_length
from qmoe_format.container.entries import Item
from qmoe_format.container.writer import StackWriter, Writer

if TYPE_CHECKING:
    from qmoe_format.checkpoints import ExpertStack
    from qmoe_format.quantize.level_weights import LevelWeights


def begin_stack(writer: Writer, stack: ExpertStack) -> StackWriter:
    """Open a stack of ``writer`` for the encoded experts of a checkpoint's."""
    shape = (stack.experts, stack.rows, stack.columns)
    return writer.add_stack(
        stack.name, shape, stack.dtype, "int-dict", stack.members, transposed=stack.transposed
    )


def encode(
    ternary: LevelWeights, place: int, scale_dtype: str, profile: Profile, threads: int
) -> EncodedMatrix:
    """Encode the matrix of one expert, the batch's number ``place``."""
    from qmoe_format.checkpoints.torch_dtypes import to_storage

    column_scale = ternary.column_scale
    return encode_matrix(
        ternary.levels[place].cpu().numpy(),
        to_storage(ternary.row_scale[place].cpu()).reshape(ternary.levels.shape[1], -1),
        None if column_scale is None else to_storage(column_scale[place].cpu()),
        width=profile.width,
        rows_per_segment=profile.rows_per_segment(ternary.levels.shape[2]),
        threads=threads,
    )


def stored_bytes(matrix: EncodedMatrix) -> int:
    """The length of a matrix's extent."""
    item = Item("F32", (matrix.rows, matrix.columns), INT_DICT.parameters_of(matrix))
    strings = matrix.levels.strings
    return extent_length(item, [(each.lengths.itemsize, each.segment_bytes) for each in strings])


def expected_bytes(sample: EncodedMatrix, rows: int, profile: Profile) -> int:
    """Estimate the length of a matrix's extent from ``sample``, some of its ``rows``."""
    parameters = INT_DICT.parameters_of(sample)
    parameters["rows_per_segment"] = min(profile.rows_per_segment(sample.columns), rows)
    item = Item("F32", (rows, sample.columns), parameters)
    strings = [
        (each.lengths.itemsize, each.segment_bytes * rows // max(sample.rows, 1))
        for each in sample.levels.strings
    ]
    return extent_length(item, strings)


def grid_step(matrix: EncodedMatrix) -> int:
    """The zero fraction of a matrix's dictionary, in steps; it determines the dictionary."""
    return round(on_grid(matrix.levels.zero_fraction))


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
