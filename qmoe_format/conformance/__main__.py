import sys

from qmoe_format.conformance.runner import main

sys.exit(main())
