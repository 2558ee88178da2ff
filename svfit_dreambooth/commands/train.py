"""`python -m svfit_dreambooth.commands.train`: the training command, also where no script lies beside the package."""

import sys

from svfit_dreambooth.commands.main import main_train

if __name__ == "__main__":
    sys.exit(main_train())
