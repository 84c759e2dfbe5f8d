"""The command ``qmoe`` as ``python -m qmoe_format``."""

import sys

from qmoe_format.cli import main

sys.exit(main())
