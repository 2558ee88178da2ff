"""What the commands do about terminals and pipes, and how they speak of options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from svfit_dreambooth.commands.main import _plainly, main, main_train

ROOT = Path(__file__).parents[1]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def test_errors_of_the_library_name_flags(capsys):
    assert main_train(["--learning_rate", "0"]) == 2
    assert capsys.readouterr().err == "error: --learning_rate is 0.0: it must be above 0 and at most 1,000.\n"
    assert main_train(["--energy", "0.5", "--rank", "3"]) == 2
    assert "error: --energy chooses the ranks itself: leave --rank out." in capsys.readouterr().err
    assert main(["generate", "--prompt", "a", "--output_dir", "x", "--num_images", "0"]) == 2
    assert "--num_images" in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_error(tmp_path):
    code = (
        "import os, sys; from svfit_dreambooth.commands import main as m\n"
        "def long(arguments, names):\n    for _ in range(10**5): print('x' * 100)\n"
        "sys.exit(m._plainly(long, []))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, cwd=ROOT) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "error: out of memory: try "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory: try "),
        (
            PermissionError(13, "Permission denied", "/read/only"),
            "error: '/read/only' cannot be used (Permission denied)",
        ),
    ],
)
def test_what_the_machine_lacks_is_one_sentence(capsys, error, sentence):
    def command(arguments, names):
        raise error

    assert _plainly(command, []) == 2
    said = capsys.readouterr().err
    assert said.startswith(sentence) and said.count("\n") == 1


def test_mistakes_of_our_own_stay_visible():
    def command(arguments, names):
        raise RuntimeError("a shape does not fit")

    with pytest.raises(RuntimeError, match="a shape does not fit"):
        _plainly(command, [])
