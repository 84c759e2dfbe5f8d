"""The file: preamble, index, extents, shards, and the encodings of what extents hold."""

from qmoe_format.container.reader import QMoEFile, open
from qmoe_format.container.writer import StackWriter, Writer

__all__ = ["QMoEFile", "StackWriter", "Writer", "open"]
