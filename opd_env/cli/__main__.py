"""``python -m opd_env.cli``: the same as ``opd-env``."""

import sys

from opd_env.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
