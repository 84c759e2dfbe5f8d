"""What has to be said about a family of models; nearly everything is transformers' to say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from qmoe_format.checkpoints.expert_layers import ExpertLayer


@dataclass(frozen=True)
class Family:
    """How a family differs from the others.

    Attributes:
        model_types: of configurations.
        layer: the class of its experts.
        building: a context in which transformers' model is built without weights.
        pass_through: takes a block and the arguments of its forward; returns what the block would
            if it left the hidden states alone.
        kept: parameters of blocks that every forward of the model needs.
        settings: what to change in the configuration for calibration.
    """

    model_types: tuple[str, ...] = ()
    layer: type[ExpertLayer] = ExpertLayer
    building: Callable[[], AbstractContextManager[None]] = nullcontext
    pass_through: Callable[..., Any] = lambda block, hidden, *arguments, **options: hidden
    kept: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
