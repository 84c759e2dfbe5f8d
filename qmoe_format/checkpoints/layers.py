"""Whether a model has the layers that its configuration says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count
from typing import Any

from qmoe_format.errors import QMoEError

# What the names of a layer's tensors begin with, by the key of how many there are.
_HEADS = {
    "num_hidden_layers": "model.layers.",
    "num_layers": "encoder.block.",
    "num_decoder_layers": "decoder.block.",
}
# Layers after these, which ``transformers`` does not run.
_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")


def check_layers(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Raise ``QMoEError("checkpoint")`` if a layer is missing, or is one too many.

    Args:
        config: the contents of ``config.json``; a number that it does not have is not checked.
        names: of the tensors.
    """
    further = any(config.get(key) for key in _FURTHER)
    for key, head in _HEADS.items():
        numbers = {name[len(head) :].partition(".")[0] for name in names if name.startswith(head)}
        found = {int(number) for number in numbers if number.isdecimal()}
        said = config.get(key)
        if said is None or not found:
            continue
        if type(said) is not int or said < 1:
            raise QMoEError(
                "checkpoint",
                f"config.json: {key!r} is {said!r}, no number of layers; fetch the file again",
            )
        first_missing = next(number for number in count() if number not in found)
        if first_missing < said:
            raise QMoEError(
                "checkpoint",
                f"there are no tensors {head}{first_missing}.*, but by config.json {key!r} is "
                f"{said}; fetch the whole checkpoint again",
            )
        if max(found) >= said and not further:
            raise QMoEError(
                "checkpoint",
                f"there are tensors {head}{max(found)}.*, but by config.json {key!r} is {said}; "
                "fetch config.json again",
            )
