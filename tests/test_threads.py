"""How torch's threads wait for each other."""

import os
import subprocess
import sys

import pytest

from svfit_dreambooth.commands.main import main, main_train
from svfit_dreambooth.web.page import main as main_web

COMMANDS = [(main, ["inspect", "nowhere"]), (main_train, ["--train_batch_size", "0"]), (main_web, ["--no-such-option"])]


@pytest.mark.parametrize(("command", "arguments"), COMMANDS)
def test_threads_of_commands_sleep_unless_a_person_says_otherwise(command, arguments, monkeypatch):
    for given, then in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if given:
            monkeypatch.setenv("OMP_WAIT_POLICY", given)
        try:
            assert command(arguments) == 2
        except SystemExit as ended:  # argparse's own
            assert ended.code == 2
        assert os.environ["OMP_WAIT_POLICY"] == then


def test_that_is_said_before_torch_is_imported():
    """OpenMP reads its environment once, when torch loads it."""
    modules = "svfit_dreambooth.commands.main, svfit_dreambooth.web.page"
    check = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
