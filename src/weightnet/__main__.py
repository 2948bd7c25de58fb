"""`python -m weightnet` is the command `weightnet`."""

import sys

from weightnet.cli import run

sys.exit(run())
