"""What ``quantization_config`` of a model's configuration says about its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from qmoe_format.errors import QMoEError

# Quantization methods whose tensors mean what their names and dtypes say.
METHODS = (
    "fp8", "mxfp8", "fbgemm_fp8", "mxfp4", "compressed-tensors", "modelopt", "gptq", "gptqmodel",
    "awq", "auto-round",
)  # fmt: skip


class Quantization:
    """A model's ``quantization_config``; empty if it has none.

    Attributes:
        settings: its contents.
        method: ``quant_method``, in lower case; ``""`` if there is none.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """From the contents of ``config.json``, of which ``text_config`` may have it."""
        settings: Any = {}
        for place in (config.get("text_config"), config):
            if isinstance(place, Mapping):
                settings = place.get("quantization_config") or settings
        if not isinstance(settings, Mapping):
            raise _wrong(f"'quantization_config' is {settings!r}, not an object")
        self.settings: Mapping[str, Any] = settings
        self.method = self.word("quant_method")

    def word(self, *keys: str) -> str:
        """The first of some settings that is there, in lower case; ``""`` if none is."""
        value = next((self.settings[key] for key in keys if self.settings.get(key)), "")
        return str(value).lower()

    def block(self, module: str) -> tuple[int, int] | None:
        """Rows and columns that share a scale in a module, if the configuration says so."""
        size = self.settings.get("weight_block_size") or self.scheme(module).get("block_structure")
        if size is None:
            group = self.group_size(module)
            return (1, group) if group else None
        if not (isinstance(size, list) and len(size) == 2 and all(map(_is_count, size))):
            raise _wrong(f"a block of weights has size {size!r}, not two positive numbers")
        return size[0], size[1]

    def group_size(self, module: str) -> int | None:
        """Columns that share a scale in a module; None for all."""
        size = self.scheme(module).get("group_size", self.settings.get("group_size"))
        if not (size in (None, -1) or _is_count(size)):
            raise _wrong(f"'group_size' is {size!r}, not a positive number")
        return None if size == -1 else size

    def scheme(self, module: str) -> Mapping[str, Any]:
        """How ``config_groups`` says that a module's weights are stored; empty if it does not."""
        exact, patterns, schemes = self._targets
        if len(schemes) == 1:
            return schemes[0]
        if module in exact:
            return exact[module]
        for pattern, scheme in patterns:
            if pattern.match(module):
                return scheme
        return exact.get("Linear", {})

    @cached_property
    def _targets(
        self,
    ) -> tuple[
        dict[str, Mapping[str, Any]],
        list[tuple[re.Pattern[str], Mapping[str, Any]]],
        list[Mapping[str, Any]],
    ]:
        """Schemes by exact name or class, by pattern, and the different ones."""
        groups = self.settings.get("config_groups") or {}
        try:
            pairs = [
                (target, group["weights"])
                for group in groups.values()
                if group.get("weights")
                for target in group["targets"]
            ]
            exact = {target: scheme for target, scheme in pairs if not target.startswith("re:")}
            patterns = [
                (re.compile(target[3:]), scheme)
                for target, scheme in sorted(pairs, key=lambda pair: pair[0])
                if target.startswith("re:")
            ]
        except (AttributeError, KeyError, TypeError, re.error) as error:
            raise _wrong(f"'config_groups' cannot be understood ({error!r})") from error
        different: list[Mapping[str, Any]] = []
        for _, scheme in pairs:
            if scheme not in different:
                different.append(scheme)
        return exact, patterns, different


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _wrong(problem: str) -> QMoEError:
    return QMoEError("checkpoint", f"config.json: {problem}", "correct config.json")
