"""A ``.qmoe`` file back to a folder that transformers loads.

    unpack("model.qmoe", "folder")                     # a checkpoint with dequantized experts
    unpack("model.qmoe", "folder", compressed=True)    # experts stay compressed

Needs neither torch nor safetensors.
"""

from qmoe_format.export.unpacking import unpack

__all__ = ["unpack"]
