"""`python -m lowmem_npo`, and `accelerate launch -m lowmem_npo`."""

import sys

from lowmem_npo.cli import main

sys.exit(main())
