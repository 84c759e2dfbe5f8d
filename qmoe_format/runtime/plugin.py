"""What transformers calls when it loads or saves a model whose ``quant_method`` is ``qmoe``."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from qmoe_format import container
from qmoe_format.errors import QMoEError
from qmoe_format.export.compressed_folder import (
    CONFIG,
    DENSE,
    EXPERTS,
    METHOD,
    marked,
    write_experts,
)
from qmoe_format.runtime.install import build_without_experts, install


@register_quantization_config(METHOD)
class QMoEConfig(QuantizationConfigMixin):  # type: ignore[misc] # transformers is not followed
    """``quantization_config`` of a folder (``qmoe_format.export.compressed_folder``).

    ``file``: what has the experts, in the folder.
    """

    def __init__(self, file: str = EXPERTS, quant_method: str = METHOD) -> None:
        self.file = file
        self.quant_method = quant_method


@register_quantizer(METHOD)
class QMoEQuantizer(HfQuantizer):  # type: ignore[misc]
    """Gives a model its compressed experts."""

    requires_calibration = True  # only a model that is compressed already can be loaded

    def update_attn_implementation(self, config: Any) -> Any:
        """The one call before weights are looked for and the model is built."""
        config.transformers_weights = DENSE
        build_without_experts(config)
        return config

    update_tp_plan = update_attn_implementation  # that one call in older releases

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        path = Path(self.quantization_config.file)
        if checkpoint_files:
            path = Path(checkpoint_files[0]).parent / path
            if not path.exists():
                _fetch(model.config.name_or_path, path)
        self.file = container.open(path)
        install(model, self.file)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        _check_complete(model, self.file.path)
        self.quantization_config.file = EXPERTS  # as it will be where the model is saved
        model.save_pretrained = partial(_save, self.file, model, model.save_pretrained)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are; the experts themselves stay as they are."""
        return True


def _fetch(model: str, path: Path) -> None:
    """Into the cache ``…/models--NAME/snapshots/COMMIT``, where all else was downloaded to."""
    if not Path(model).is_dir() and path.parent.parent.name == "snapshots":
        cached_file(model, path.name, cache_dir=path.parents[3], revision=path.parent.name)


def _check_complete(model: Any, path: str) -> None:
    """transformers marks what it has loaded, and initialises what is missing at random."""
    missing = [
        name
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not getattr(tensor, "_is_hf_initialized", False)
    ]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise QMoEError(
            "checkpoint",
            f"{path}: there are no weights for {missing[0]}{more}; convert the checkpoint again, "
            "or update transformers",
        )


def _save(
    file: Any,
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
        raise QMoEError("argument", "save_pretrained cannot push this model: call push_to_hub")
    if getattr(model, "_hf_peft_config_loaded", False):  # only adapters are saved
        save(folder, is_main_process, state_dict, **options)
        return
    # The name that transformers makes of this variant is DENSE.
    options |= {"variant": DENSE.split(".")[1], "max_shard_size": 1 << 60}
    save(folder, is_main_process, state_dict, **options)
    if is_main_process:
        path = Path(folder) / CONFIG
        config = marked(json.loads(path.read_text("utf-8")))
        path.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        write_experts(file, Path(folder) / EXPERTS)
