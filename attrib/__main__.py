"""`python -m attrib` is the command `attrib`."""

import sys

from .cli import main

sys.exit(main())
