"""Two processes share the work of one."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from svfit_dreambooth import TrainConfig, read_adapter, train
from svfit_dreambooth.training.processes import make_accelerator

ROOT = Path(__file__).parent.parent


def test_processes_wait_as_long_as_painting_takes(tmp_path):
    handler = make_accelerator(TrainConfig(output_dir=str(tmp_path))).init_handler
    assert handler.to_kwargs()["timeout"] >= timedelta(hours=12)  # the default, 10 or 30 minutes, would end the run


def on_two_processes(script, options, timeout):
    """What two CPU processes that share the run print; they must end well."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(script), *(f"--{name}={value}" for name, value in options.items())],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_what_one_trains_with_twice_the_batch(tiny_base, photo_folder, tmp_path):
    options = {
        "pretrained_model_name_or_path": str(tiny_base),
        "instance_data_dir": str(photo_folder),
        "instance_prompt": "a photo of sks dog",
        "output_dir": str(tmp_path / "two"),
        "max_train_steps": 5,
        "train_batch_size": 2,
        "keep_base": True,
        "resolution": 16,
        "aspect_ratio": "square",
        "learning_rate": 5e-2,
        "adam_epsilon": 1e-3,  # or the sign of gradients near 0, which rounding decides, would make whole steps
        "fixed_loss_examples": 2,
        "validation_steps": 0,
        "checkpointing_steps": 2,
        "save_dtype": "float32",
        "final_pictures": False,
    }
    output = on_two_processes(ROOT / "train_dreambooth_svfit.py", options, timeout=200)
    assert output.count("singular values trained") == 1  # only the main process speaks and writes
    one = train(TrainConfig(**{**options, "train_batch_size": 4, "output_dir": str(tmp_path / "one")}))
    first, second = read_adapter(tmp_path / "two" / "my-dog.safetensors").shifts, read_adapter(one.adapter_path).shifts
    assert all(torch.allclose(first[name], second[name], rtol=1e-3, atol=1e-5) for name in second)
    assert any(shift.abs().max() > 1e-3 for shift in second.values())


STOPPING = """
import os, sys
from svfit_dreambooth import train
from svfit_dreambooth.method import basis
from svfit_dreambooth.commands.arguments import parse_config

decomposed, decompose = [], basis.decompose
basis.decompose = lambda *args, **options: decomposed.append(1) or decompose(*args, **options)

alone = os.environ["RANK"] == "1"  # asked to stop a step earlier than the other, as by a signal
result = train(parse_config(sys.argv[1:], prog="train"), on_step=lambda step: step.step == (2 if alone else 3))
print("steps", result.steps, result.stopped, "decomposed", len(decomposed))
"""


@pytest.mark.slow
def test_when_one_process_is_asked_to_stop_all_do_and_one_alone_decomposes(tiny_base, photo_folder, tmp_path):
    (tmp_path / "stopping.py").write_text(STOPPING)
    options = {
        "pretrained_model_name_or_path": str(tiny_base),
        "instance_data_dir": str(photo_folder),
        "instance_prompt": "a photo of sks dog",
        "output_dir": str(tmp_path / "two"),
        "basis_cache_dir": str(tmp_path / "cache"),
        "max_train_steps": 6,
        "train_batch_size": 1,
        "resolution": 16,
        "budget": 30,
        "fixed_loss_examples": 0,
        "validation_steps": 0,
    }
    output = on_two_processes(tmp_path / "stopping.py", options, timeout=100)
    assert output.count("steps 2 True decomposed") == 2 and output.count("decomposed 0\n") == 1
