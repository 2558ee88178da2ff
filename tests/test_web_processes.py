"""Processes are known again by number and creation time."""

import subprocess
import sys

from svfit_dreambooth.web.rooms.processes import created_at, is_running, working_on


def test_a_process_is_known_again(tmp_path):
    config, other = tmp_path / "job.yaml", tmp_path / "other.yaml"
    script = "print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", script, str(config)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()  # only then does the system know its whole command line
        created = created_at(child.pid)
        assert is_running(child.pid, created, config) and is_running(child.pid, created + 0.5, other)
        assert is_running(child.pid, created - 3600, config) and is_running(child.pid, None, config)
        assert not is_running(child.pid, created - 3600, other) and not is_running(child.pid, None, other)
        assert working_on(config) == child.pid and working_on(other) is None
    finally:
        child.communicate(b"\n")
    assert not is_running(child.pid, created, config) and created_at(child.pid) is None
    assert not is_running(None, None, config) and working_on(config) is None


def test_a_process_that_ended_unasked_for_is_gone(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    created = created_at(child.pid)
    while is_running(child.pid, created, tmp_path):  # nobody waits for it: on POSIX it stays as a zombie
        pass
    assert child.poll() == 0
