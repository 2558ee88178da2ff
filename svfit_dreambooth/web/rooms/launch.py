"""The process of a training run: where it may run, how it is started, and what it printed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import svfit_dreambooth

COMMAND = ("-P", "-m", "svfit_dreambooth.commands.train")
GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # of Windows, which a Ctrl-Break then reaches alone


def launch(folder: Path, device: str, *, resume: bool = False, offline: bool = False) -> subprocess.Popen[bytes]:
    """Starts the training command on `job.yaml` in `folder`; it prints into `log.txt` there.

    `offline`: it asks no hub.
    """
    command = [sys.executable, "-u", *COMMAND, "--config", str(folder / "job.yaml")]
    if resume:
        command += ["--resume_from_checkpoint", "latest"]
    with open(folder / "log.txt", "ab") as log:
        log.write(f"started {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        log.flush()
        return subprocess.Popen(
            command,
            env=_environment(device, offline),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C for the server is none for the run
            creationflags=GROUP,
        )


def _environment(device: str, offline: bool) -> dict[str, str]:
    here = str(Path(svfit_dreambooth.__file__).parents[1])  # this very package, installed or not
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONIOENCODING": "utf-8"}
    if device:
        own["CUDA_VISIBLE_DEVICES"] = device
    if offline:
        own["HF_HUB_OFFLINE"] = "1"
    return {**os.environ, **own}


def devices() -> list[str]:
    """What runs are spread over: the numbers of several GPUs, or [""] for whatever there is."""
    import torch

    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    return names[:count] if count > 1 else [""]


def log_end(path: Path, size: int = 8000) -> str:
    """The end of what a run printed, "" where it has not been started."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    # a progress bar writes over its own line: only the last state of each is kept
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))


def complaint(log: str) -> str:
    """The sentence with which the command gave up when it was last started, "" if there is none."""
    for line in reversed(log.splitlines()):
        if line.startswith("error: "):
            return line.removeprefix("error: ")
        if line.startswith("started "):
            break
    return ""
