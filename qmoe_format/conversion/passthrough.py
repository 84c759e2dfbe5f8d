"""Tensors and files that every conversion keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qmoe_format.container.attachment_files import attachment_name
from qmoe_format.container.inspection import SOURCE_NAME, SourceSize
from qmoe_format.container.writer import Writer
from qmoe_format.errors import QMoEError
from qmoe_format.progress import Counter

if TYPE_CHECKING:
    from torch import Tensor

    from qmoe_format.checkpoints import Checkpoint


def check_passthrough(
    checkpoint: Checkpoint, keep_native: bool = False, *, chunk_elements: int = 1 << 20
) -> None:
    """Refuse NaN and infinity in tensors that are not experts.

    Raises:
        QMoEError: ``value``; ``argument`` for quantized ones that would be kept without a word in
            ``config.json``.
    """
    from qmoe_format.checkpoints.native.quantization import Quantization

    kept = keep_native and any(name in checkpoint.packed for name in checkpoint.others)
    if kept and not Quantization(checkpoint.config).settings:
        raise QMoEError(
            "argument",
            f"{checkpoint.where}: what is kept of its quantized weights could not be loaded, for "
            "config.json has no quantization_config",
            "leave out --keep-native",
        )
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


def write_passthrough(
    checkpoint: Checkpoint, writer: Writer, counter: Counter, keep_native: bool = False
) -> None:
    """Write attachments and all tensors that are not experts.

    Args:
        keep_native: keep quantized ones as they are stored, instead of as bfloat16.

    Raises:
        QMoEError: ``checkpoint`` for a stored type that the format does not have.
    """
    from qmoe_format.checkpoints.torch_dtypes import DTYPE_NAMES, to_storage

    for path in checkpoint.attachments:
        data = path.read_bytes()
        if path.name == "config.json" and b"quantization_config" in data:
            data = _config(checkpoint, keep_native)
        writer.add_attachment(attachment_name(path.relative_to(checkpoint.folder)), data)
    if checkpoint.packed:
        writer.add_attachment(SOURCE_NAME, _source(checkpoint))
    for name in checkpoint.others:
        for part, tensor in _stored(checkpoint, name, keep_native):
            writer.add_tensor(part, to_storage(tensor), DTYPE_NAMES[tensor.dtype])
        counter.add(checkpoint.tensors[name].elements)


def _stored(checkpoint: Checkpoint, name: str, keep_native: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file that hold one of the checkpoint's."""
    packed = checkpoint.packed.get(name)
    if packed is None or not keep_native:
        yield name, checkpoint.read(name)
        return
    for part in packed.parts:
        yield part, checkpoint.read_stored(part)


def _config(checkpoint: Checkpoint, keep_native: bool) -> bytes:
    """``config.json`` for the types that the weights have now."""
    from qmoe_format.checkpoints.native.config import without_experts, without_quantization

    if keep_native and any(name in checkpoint.packed for name in checkpoint.others):
        changed = without_experts(checkpoint.config, [each.path for each in checkpoint.layers])
    else:
        changed = without_quantization(checkpoint.config)
    return json.dumps(changed, indent=2).encode() + b"\n"


def _source(checkpoint: Checkpoint) -> bytes:
    """How large the checkpoint was, as JSON."""
    experts = [stack.member(e) for stack in checkpoint.stacks for e in range(stack.experts)]
    names = dict.fromkeys(experts)  # one name for all experts if they are in one tensor
    formats = {checkpoint.packed[name].format for name in names if name in checkpoint.packed}
    size = SourceSize(
        format=", ".join(sorted(formats)) or "float",
        expert_bytes=checkpoint.stored_bytes(names),
        other_bytes=checkpoint.stored_bytes(checkpoint.others),
        other_weights=sum(checkpoint.tensors[name].elements for name in checkpoint.others),
    )
    return json.dumps(size, indent=1).encode() + b"\n"
