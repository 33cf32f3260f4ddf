"""`python -m mmpeft_fast` is the command `mmpeft-fast`."""

import sys

from mmpeft_fast.cli import main

sys.exit(main())
