"""Compressed experts in place of those that transformers builds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from qmoe_format.checkpoints import adapter_for
from qmoe_format.checkpoints.wiring import check_experts, expert_modules, family_for
from qmoe_format.export.compressed_folder import METHOD
from qmoe_format.runtime.experts import CompressedExperts, SwitchExperts, experts_forward
from qmoe_format.runtime.lazy_stack import Stack

if TYPE_CHECKING:
    from qmoe_format.container import QMoEFile, ShardedFile

ALL_EXPERTS_FUNCTIONS.register(METHOD, experts_forward)


def build_without_experts(config: Any) -> None:
    """Before a model is built: let it have no module for each expert.

    Only Switch Transformers have. Elsewhere the experts of a layer are two parameters, and a model
    is built where parameters take no memory.
    """
    if config.model_type != "switch_transformers":
        return
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    experts = switch.SwitchTransformersExperts
    if hasattr(experts, "init_with_experts"):
        return

    def init(self: Any, config: Any) -> None:
        quantization = getattr(config, "quantization_config", None)
        if getattr(quantization, "quant_method", None) == METHOD:
            nn.ModuleDict.__init__(self)
        else:
            experts.init_with_experts(self, config)

    experts.init_with_experts = experts.__init__
    experts.__init__ = init


def install(model: Any, file: QMoEFile | ShardedFile) -> None:
    """Let every experts module of a model without weights use the stacks of ``file``.

    Raises ``QMoEError``: ``checkpoint`` for an unknown family or experts of other shapes,
    ``not-found`` if a stack is missing, ``argument`` for one that is not ``ternary-dict``.
    """
    described = {"model_type": model.config.model_type}
    adapter = adapter_for(described)
    family = family_for(described)
    for path, module, inputs, output in expert_modules(model):
        head = family.on_disk(path)
        stacks = [
            Stack(file, adapter.stack_name(head, matrix))
            for matrix in (*family.inputs, family.output)
        ]
        for part, expected in ((stacks[:-1], inputs), (stacks[-1:], output)):
            check_experts(file.path, {stack.name: stack.shape for stack in part}, expected)
        if isinstance(module, nn.ModuleDict):
            parent = model.get_submodule(path.rpartition(".")[0])
            parent.experts = module = SwitchExperts(model.config)
            parent._is_hf_initialized = True  # it would look for weights of experts
        else:
            del module.gate_up_proj, module.down_proj
            module.config._experts_implementation = METHOD
        module.compressed = CompressedExperts(tuple(stacks[:-1]), stacks[-1])
        module._is_hf_initialized = True


def upload(model: Any, device: int) -> None:
    """Copy the experts of a model to a GPU, where its layers find them; raises as ``Stack.upload``.

    Otherwise a layer does so when it is first used there.
    """
    for module in model.modules():
        if hasattr(module, "compressed"):
            for stack in (*module.compressed.inputs, module.compressed.output):
                stack.upload(device)
