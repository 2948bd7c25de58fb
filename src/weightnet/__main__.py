"""`python -m weightnet` is the command `weightnet`."""

import sys

from weightnet.cli import main

sys.exit(main())
