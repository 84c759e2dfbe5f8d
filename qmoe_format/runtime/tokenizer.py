"""The tokenizer in a ``.qmoe`` file."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from qmoe_format import container
from qmoe_format.checkpoints import tokenizers
from qmoe_format.container.attachment_files import attached_files
from qmoe_format.hub import find_qmoe_file
from qmoe_format.remote import RemotePath

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(
    path: str | os.PathLike[str] | RemotePath, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that is attached to a ``.qmoe`` file.

    Args:
        path: named as for ``load_model``.
        trust_remote_code: run Python code in the file, if the tokenizer's class is there.

    Raises:
        QMoEError: the codes of ``open`` and of reading; ``not-found`` if there is none;
            ``checkpoint`` if transformers cannot load it, or not without code that is not trusted;
            ``dependency`` if it needs another package.

    Example::

        ids = load_tokenizer("model.qmoe")("Once upon a time").input_ids
    """
    path = find_qmoe_file(path)
    with container.open(path) as file, attached_files(file) as folder:
        return tokenizers.load_tokenizer(
            folder, where=file.path, trust_remote_code=trust_remote_code
        )
