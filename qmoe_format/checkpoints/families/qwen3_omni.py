"""Qwen3-Omni: a model that reads and writes text, the thinker, and others that make it speech."""

from __future__ import annotations

from qmoe_format.checkpoints.family import Family

FAMILY = Family(model_types=("qwen3_omni_moe",), language="thinker")
