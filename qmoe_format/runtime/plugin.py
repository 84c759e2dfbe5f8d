"""What transformers calls to load or save a model whose ``quant_method`` is ``qmoe``."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from qmoe_format import container
from qmoe_format.checkpoints.expert_stacks import LayerStacks
from qmoe_format.checkpoints.name_map import NameMap
from qmoe_format.errors import QMoEError
from qmoe_format.export.compressed_folder import (
    CONFIG_FILE,
    DENSE_FILE,
    EXPERTS_FILE,
    QUANT_METHOD,
    marked_config,
    write_experts,
)
from qmoe_format.progress import Counter
from qmoe_format.runtime import switch
from qmoe_format.runtime.bf16_linear import speed_up_linear
from qmoe_format.runtime.expert_memory import place_experts
from qmoe_format.runtime.experts import CompressedExperts
from qmoe_format.runtime.lazy_stack import LazyStack
from qmoe_format.runtime.model_of_file import layers_of


@register_quantization_config(QUANT_METHOD)
class QMoEConfig(QuantizationConfigMixin):  # type: ignore[misc] # transformers is not followed
    """``quantization_config`` of a folder with compressed experts; ``file`` has those."""

    def __init__(self, file: str = EXPERTS_FILE, quant_method: str = QUANT_METHOD) -> None:
        self.file = file
        self.quant_method = quant_method


@register_quantizer(QUANT_METHOD)
class QMoEQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives a model its compressed experts."""

    requires_calibration = True  # only a model that is compressed already can be loaded

    def update_attn_implementation(self, config: Any) -> Any:
        """The only call before weights are looked for and the model is built."""
        config.transformers_weights = DENSE_FILE
        switch.build_without_experts(config)
        return config

    update_tp_plan = update_attn_implementation  # the only call in older releases

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        name = self.quantization_config.file
        if checkpoint_files:
            path = Path(checkpoint_files[0]).parent / name
            if not path.exists():
                _download(model.config.name_or_path, path)
        self.file = container.open(path if checkpoint_files else name)
        _install(model, self.file)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        _check_complete(model, self.file.path)
        place_experts(model)
        speed_up_linear(model)
        self.quantization_config.file = EXPERTS_FILE  # where save_pretrained will write them
        model.save_pretrained = partial(_save, self.file, model, model.save_pretrained)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained; the experts themselves stay as they are."""
        return True


def _download(model: str, path: Path) -> None:
    """Add a file to the cache ``…/models--NAME/snapshots/COMMIT`` where the others are."""
    if not Path(model).is_dir() and path.parent.parent.name == "snapshots":
        cached_file(model, path.name, cache_dir=path.parents[3], revision=path.parent.name)


def _install(model: Any, file: container.QMoEFile) -> None:
    """Let every experts module of a model without weights use the stacks of ``file``."""
    for each in layers_of(file, NameMap(model)):
        if not each.runs:
            continue
        inputs = tuple(LazyStack(file, stack.name) for stack in each.inputs)
        output = LazyStack(file, each.output.name)
        compressed = CompressedExperts(inputs, output, silu_gate=each.is_silu_gate())
        each.layer.install(model, compressed, partial(_forward, compressed, each))


def _forward(
    compressed: CompressedExperts,
    layer: LayerStacks,
    tokens: Tensor,
    index: Tensor,
    weights: Tensor,
    *biases: Tensor,
) -> Tensor:
    return compressed.forward(tokens, index, weights, lambda y: layer.hidden([y]), *biases)


def _check_complete(model: Any, path: str) -> None:
    """Refuse missing weights: transformers marks what it loaded, and initializes the rest."""
    missing = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not getattr(tensor, "_is_hf_initialized", False)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise QMoEError(
            "checkpoint",
            f"{path}: there are no weights for {missing[0]}{more}",
            "convert the checkpoint again, or update transformers",
        )


def _save(
    file: container.QMoEFile,
    model: Any,
    save: Any,
    folder: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Any] | None = None,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """``save_pretrained`` of a model with compressed experts."""
    if push_to_hub:
        raise QMoEError("argument", "save_pretrained cannot push this model", "call push_to_hub")
    if getattr(model, "_hf_peft_config_loaded", False):  # only adapters are saved
        save(folder, is_main_process, state_dict, **options)
        return
    # The name that transformers makes of this variant is DENSE_FILE.
    options |= {"variant": DENSE_FILE.split(".")[1], "max_shard_size": 1 << 60}
    save(folder, is_main_process, state_dict, **options)
    if is_main_process:
        path = Path(folder) / CONFIG_FILE
        path.write_bytes(marked_config(json.loads(path.read_text("utf-8"))))
        write_experts(file, Path(folder) / EXPERTS_FILE, Counter(None, 0))
