"""Sources of commands, downloaded from the Hugging Face Hub if they are not here."""

from __future__ import annotations

from pathlib import Path

from qmoe_format.cli.progress_line import ProgressLine
from qmoe_format.errors import QMoEError
from qmoe_format.hub import local_checkpoint, local_qmoe_file


def qmoe_file(source: str) -> Path:
    """The path of a ``.qmoe`` file; see ``local_qmoe_file``."""
    with ProgressLine("download", "B") as progress:
        return local_qmoe_file(source, progress)


def original(source: str) -> Path:
    """The folder of the checkpoint that a file was made from; see ``local_checkpoint``."""
    with ProgressLine("download", "B") as progress:
        try:
            return local_checkpoint(source, progress)
        except QMoEError as error:
            raise error.at("the original checkpoint") from error
