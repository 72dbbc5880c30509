"""`python -m dimefm_edge` is `dimefm-edge`; torchrun starts it so."""

from __future__ import annotations

import sys

from dimefm_edge.cli import main

if __name__ == "__main__":
    sys.exit(main())
