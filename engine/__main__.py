"""`python -m latent_engine` is the command `latent-engine`."""

import sys

from .cli import main

sys.exit(main())
