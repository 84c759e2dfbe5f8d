"""What every conversion writes alike: what is kept as it is, and the beginnings of stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qmoe_format.container.writer import StackWriter, Writer
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Counter

if TYPE_CHECKING:
    from qmoe_format.checkpoints import Checkpoint, ExpertStack

AT_ONCE = 1 << 20  # elements, of an embedding that may have billions


def check_rest(checkpoint: Checkpoint) -> None:
    """Raise ``QMoEError("value")`` if a tensor that is kept as it is is NaN or infinite."""
    for name in checkpoint.others:
        tensor = checkpoint.read(name)
        if not tensor.is_floating_point():
            continue
        elements = tensor.flatten()
        for first in range(0, len(elements), AT_ONCE):
            # As float64, because torch cannot ask this of every type of 8 bits.
            if not elements[first : first + AT_ONCE].double().isfinite().all():
                raise QMoEError(
                    "value", f"tensor {name!r}: an element is NaN or infinite; repair the model"
                )


def write_rest(checkpoint: Checkpoint, writer: Writer, counter: Counter) -> None:
    """Attachments, and all tensors that are not experts."""
    from qmoe_format.checkpoints.torch_dtypes import to_storage

    for path in checkpoint.attachments:
        writer.add_attachment(path.name, path.read_bytes())
    for name in checkpoint.others:
        tensor = checkpoint.read(name)
        writer.add_tensor(name, to_storage(tensor), checkpoint.tensors[name].dtype)
        counter.add(tensor.numel())


def begin_stack(writer: Writer, stack: ExpertStack) -> StackWriter:
    """To take a stack's ternary experts."""
    shape = (stack.experts, stack.rows, stack.columns)
    return writer.add_stack(stack.name, shape, stack.dtype, "ternary-dict", stack.members)
