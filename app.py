"""The page on which one trains, generates and shares adapters.  All it knows is in svfit_dreambooth."""

import sys

from svfit_dreambooth.web.page import main

if __name__ == "__main__":
    sys.exit(main())
