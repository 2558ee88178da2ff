"""What the commands do about terminals and pipes, and how they speak of options."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from svfit_dreambooth import TrainConfig
from svfit_dreambooth.commands.arguments import OPTION_NAMES
from svfit_dreambooth.commands.main import _Formatter, _plainly, main, main_train
from svfit_dreambooth.commands.subjects import print_plan
from svfit_dreambooth.training.estimate import estimate_memory

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


def test_warnings_of_the_library_name_flags(caplog):
    TrainConfig(rank="4", learning_rate=1e-4).warn_of_lora_values()
    few, slow = map(_Formatter(set(OPTION_NAMES)).format, caplog.records)
    assert few.startswith(
        "warning: --rank 4 trains only 4 numbers in each layer, far fewer than a LoRA of as much does: "
    )
    assert slow.startswith("warning: --learning_rate 0.0001 suits LoRA matrices")


def test_what_would_fit_into_memory_is_told_as_flags(tiny_run, capsys):
    run = tiny_run(resolution=128, train_batch_size=3)
    for free, advice in (
        (estimate_memory(run).total - 1, "one of --gradient_checkpointing, .*, --resolution 64."),
        (1, "--gradient_checkpointing .* --rank 16 --resolution 64 is too much, use"),
    ):
        print_plan(replace(run, free_memory=free), OPTION_NAMES)
        assert re.search(f"this will hardly fit: (use|even) {advice}", capsys.readouterr().out)


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
