"""Models that are on the Hugging Face Hub instead of on this machine.

``ORG/MODEL`` is the latest state of a repository, ``ORG/MODEL@REVISION`` that of a branch, tag or
commit; ``ORG/MODEL/FILE.qmoe``, with or without ``@REVISION``, is one of several ``.qmoe`` files
there. Whatever exists at such a path on this machine comes first, and what has a URL stays where it
is.

Nothing but ``huggingface_hub`` is needed, and only for what is not here.
"""

from qmoe_format.hub.checkpoints import local_checkpoint
from qmoe_format.hub.places import find_checkpoint, find_qmoe_file
from qmoe_format.hub.pointers import check_not_pointer
from qmoe_format.hub.qmoe_files import local_qmoe_file

__all__ = [
    "check_not_pointer",
    "find_checkpoint",
    "find_qmoe_file",
    "local_checkpoint",
    "local_qmoe_file",
]
