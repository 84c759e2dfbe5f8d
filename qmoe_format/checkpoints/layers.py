"""Whether a model has the layers that its configuration says."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import count
from typing import Any

from qmoe_format.checkpoints.families import family_for
from qmoe_format.errors import QMoEError

# The numbers of further layers, for multi-token prediction, which transformers does not run.
_FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")


def check_layers(config: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse a model that has too few layers or too many.

    Args:
        config: the contents of ``config.json``; a number that it does not have is not checked.
        names: of the model's tensors.

    Raises:
        QMoEError: ``checkpoint``.
    """
    further = any(config.get(key) for key in _FURTHER)
    for stage in family_for(config).stages:
        prefix = f"{stage.stack}.{stage.blocks}."
        numbers = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
        found = {int(n) for n in (rest.partition(".")[0] for rest in numbers) if n.isdecimal()}
        layers = config.get(stage.count)
        if layers is None or not found:
            continue
        claim = f"config.json: {stage.count!r} is {layers!r}"
        if type(layers) is not int or layers < 1:
            raise QMoEError(
                "checkpoint", f"{claim}, not a positive number", "download the file again"
            )
        missing = next(number for number in count() if number not in found)
        if missing < layers:
            raise QMoEError(
                "checkpoint",
                f"{claim}, but there are no tensors {prefix}{missing}.*",
                "download the whole checkpoint again",
            )
        if max(found) >= layers and not further:
            raise QMoEError(
                "checkpoint",
                f"{claim}, but there are tensors {prefix}{max(found)}.*",
                "download config.json again",
            )
