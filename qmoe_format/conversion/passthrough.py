"""Tensors and files that every conversion keeps as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmoe_format.container.writer import Writer
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Counter

if TYPE_CHECKING:
    from qmoe_format.checkpoints import Checkpoint


def check_passthrough(checkpoint: Checkpoint, chunk_elements: int = 1 << 20) -> None:
    """Refuse NaN and infinity in tensors that are not experts.

    Raises:
        QMoEError: ``value``.
    """
    for name in checkpoint.others:
        tensor = checkpoint.read(name)
        if not tensor.is_floating_point():
            continue
        elements = tensor.flatten()
        for first in range(0, len(elements), chunk_elements):  # an embedding may have billions
            # In float64, because torch has no isfinite for some 8-bit types.
            if not elements[first : first + chunk_elements].double().isfinite().all():
                raise QMoEError(
                    "value", f"tensor {name!r}: an element is NaN or infinite", "repair the model"
                )


def write_passthrough(checkpoint: Checkpoint, writer: Writer, counter: Counter) -> None:
    """Write attachments and all tensors that are not experts."""
    from qmoe_format.checkpoints.torch_dtypes import to_storage

    for path in checkpoint.attachments:
        writer.add_attachment(path.name, path.read_bytes())
    for name in checkpoint.others:
        tensor = checkpoint.read(name)
        writer.add_tensor(name, to_storage(tensor), checkpoint.tensors[name].dtype)
        counter.add(tensor.numel())
