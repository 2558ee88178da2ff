"""`python -m svfit_dreambooth COMMAND`."""

import sys

from svfit_dreambooth.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
