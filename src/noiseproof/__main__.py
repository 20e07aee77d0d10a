"""``python -m noiseproof`` is the command line."""

import sys

from noiseproof.cli import main

sys.exit(main())
