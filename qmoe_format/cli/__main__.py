import sys

from qmoe_format.cli import main

sys.exit(main())
