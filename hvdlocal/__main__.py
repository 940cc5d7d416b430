"""`python -m hvdlocal …` is the command `hvdlocal`."""

import sys

from hvdlocal.cli import main

sys.exit(main())
