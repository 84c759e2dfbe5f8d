"""Packages that ``import qmoe_format`` does without and parts of it need."""

from __future__ import annotations

import importlib

from qmoe_format.errors import QMoEError


def require(*modules: str) -> None:
    """Import optional packages; raise ``QMoEError("dependency")`` if one is missing."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise QMoEError(
                "dependency",
                f"the package {module} cannot be imported ({error}); "
                "run: pip install 'qmoe-format[convert]'",
            ) from error
