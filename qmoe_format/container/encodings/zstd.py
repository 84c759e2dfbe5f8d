"""Encoding ``zstd``: bytes sorted by significance, then one Zstandard frame (SPEC.md section 5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from qmoe_format.container import limits
from qmoe_format.container.encodings.base import Encoding, GetDictionary, Sink, as_array, as_bytes
from qmoe_format.container.entries import Item
from qmoe_format.dtypes import Bytes
from qmoe_format.errors import QMoEError

# With other values of the next three numbers the same tensor becomes other bytes.
#
# On shuffled bf16 weights level 1 is the fastest and the smallest: it entropy-codes the exponents
# and does not search long for matches that are not there. Weights of a small Mixtral, one core,
# zstd 1.5.7: level 1 gives 0.686 of the size at 230 MB/s, 3 0.714 at 136, 9 0.702 at 24, 19 0.688
# at 1.
LEVEL = 1
_CHUNK = 1 << 20  # elements shuffled at a time: the memory needed beyond the input
# A block for every 2 KiB keeps the frame of all zeros above 1/512 of its content, see [Z-3].
_SMALL_BLOCK = 2048
_MAGIC = b"\x28\xb5\x2f\xfd"
_HEADER = 18  # bytes of the longest frame header


class Zstd(Encoding):
    """Byte 0 of all elements, then byte 1 and so on, in one frame."""

    name = "zstd"
    raw_if_larger = True

    def decode(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> npt.NDArray[Any]:
        size = item.size
        _check_frame(stored, size)
        content = np.frombuffer(_decompress(stored, size), np.uint8)
        width = item.element_size
        if width == 1:
            return as_array(content, item)
        planes = content.reshape(width, -1)
        out = np.empty((planes.shape[1], width), np.uint8)
        for significance in range(width):
            out[:, significance] = planes[significance]
        return as_array(out.reshape(-1), item)

    def verify(
        self, stored: Bytes, item: Item, dictionary: GetDictionary, threads: int = 1
    ) -> None:
        _check_frame(stored, item.size)
        _decompress(stored, item.size)

    def encode(self, value: npt.NDArray[Any], item: Item, sink: Sink) -> None:
        data = as_bytes(value).reshape(-1, item.element_size)
        _compress(data, sink, _CHUNK)
        if data.size > limits.zstd_content(sink.length):  # [Z-3]
            sink.restart()
            _compress(data, sink, _SMALL_BLOCK)


def _check_frame(stored: Bytes, size: int) -> None:
    """Check the frame's header before anything is allocated: [Z-2], [Z-3], [N-3].

    RFC 8878, section 3.1.1.1, parsed here because the library does not tell a window that is too
    large from other errors. The library finds a header that is cut off or has a reserved bit set.
    """
    head = stored[:_HEADER].tobytes()
    if head[:4] != _MAGIC or len(head) < 6:
        raise QMoEError("malformed", "the extent does not begin with a Zstandard frame")
    descriptor = head[4]
    single_segment = bool(descriptor & 0x20)
    dictionary_bytes = (0, 1, 2, 4)[descriptor & 3]
    content_bytes = (int(single_segment), 2, 4, 8)[descriptor >> 6]
    dictionary_at = 5 if single_segment else 6
    content_at = dictionary_at + dictionary_bytes
    if not content_bytes:
        raise QMoEError("malformed", "the Zstandard frame does not give its content size")
    content = int.from_bytes(head[content_at : content_at + content_bytes], "little")
    content += 256 if content_bytes == 2 else 0
    if content != size:
        raise QMoEError("malformed", f"the Zstandard frame holds {content} bytes, not {size}")
    if any(head[dictionary_at:content_at]):
        raise QMoEError("malformed", "the Zstandard frame needs a dictionary")
    window = content
    if not single_segment:
        base = 1 << (10 + (head[5] >> 3))
        window = base + base // 8 * (head[5] & 7)
    limits.check("window of the Zstandard frame", window, 0, limits.ZSTD_WINDOW)
    most = limits.zstd_content(stored.size)
    limits.check("content of the Zstandard frame", size, 0, most)


def _decompress(stored: Bytes, size: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=limits.ZSTD_WINDOW)
    try:
        if size:
            return decompressor.decompress(stored.data, allow_extra_data=False)
        # The call above does not look into a frame that says it is empty. At most 2 MiB come out of
        # 64 bytes before the check below sees them.
        stream = decompressor.decompressobj(read_across_frames=False)
        for start in range(0, stored.size, 64):
            if stream.decompress(stored[start : start + 64].data) or stream.unused_data:
                raise QMoEError("malformed", "the Zstandard frame is not empty")  # [Z-2]
        if not stream.eof:
            raise QMoEError("malformed", "the Zstandard frame is cut off")  # [Z-4]
    except zstandard.ZstdError as error:  # [Z-2] [Z-4]
        raise QMoEError("malformed", f"the Zstandard frame is damaged ({error})") from error
    return b""


def _compress(data: Bytes, sink: Sink, chunk: int) -> None:
    """Shuffle and compress ``data`` uint8 [elements, element size], by ``chunk`` elements."""
    small = chunk == _SMALL_BLOCK
    stream = zstandard.ZstdCompressor(
        level=LEVEL, write_content_size=True, write_checksum=False, write_dict_id=False
    ).compressobj(size=data.size)
    for significance in range(data.shape[1]):
        for start in range(0, data.shape[0], chunk):
            plane = data[start : start + chunk, significance]
            sink.write(stream.compress(np.ascontiguousarray(plane).data))
            if small:
                sink.write(stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK))
    sink.write(stream.flush())
