"""Sources of commands, downloaded from the Hugging Face Hub if they are not here."""

from __future__ import annotations

from qmoe_format.cli.progress_line import ProgressLine
from qmoe_format.errors import QMoEError
from qmoe_format.hub import find_checkpoint, find_qmoe_file
from qmoe_format.remote import Location


def qmoe_file(source: str) -> Location:
    """The path of a ``.qmoe`` file; see ``find_qmoe_file``."""
    with ProgressLine("download", "B") as progress:
        return find_qmoe_file(source, progress)


def original(source: str) -> Location:
    """The folder of the checkpoint that a file was made from; see ``find_checkpoint``."""
    with ProgressLine("download", "B") as progress:
        try:
            return find_checkpoint(source, progress)
        except QMoEError as error:
            raise error.at("the original checkpoint") from error
