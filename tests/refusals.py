"""Check that a call is refused with a certain code."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qmoe_format.errors import QMoEError


def refusal(call: Callable[[], object], code: str) -> str:
    """The message of the ``QMoEError`` that ``call`` must raise."""
    with pytest.raises(QMoEError) as caught:
        call()
    assert caught.value.code == code, caught.value
    return str(caught.value)
