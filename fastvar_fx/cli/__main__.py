"""`python -m fastvar_fx.cli` is `fastvar-fx`, where the package is not installed."""

import sys

from fastvar_fx.cli import main

sys.exit(main())
