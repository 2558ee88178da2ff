"""Photos in, adapter out: the training command.  All it knows is in svfit_dreambooth."""

import sys

from svfit_dreambooth.commands.main import main_train

if __name__ == "__main__":
    sys.exit(main_train())
