"""One training step of a UNet of real size: SVFit, PEFT's LoRA and the frozen network, time and peak memory.

    python benchmarks/training_step.py --config_dir FOLDER [--batch_size 1 4] [--precision fp32 bf16] [--output F.json]

FOLDER is a diffusers model folder of which only `unet/config.json` is needed: weights and bases are random, as time
and memory do not depend on their values.  The contestants:

    frozen   forward, and backward down to the first adapted projection: what no method can go below
    lora     PEFT LoRA r=4 on the attention projections
    svfit    SVFit at full rank on the same, as the training command sets the network up
    slimlora lora, on the network that keeps only what is needed, as svfit's does; only where --methods names it
    kept     svfit with keep_base: a second pass, of half the batch, against the base's answers; only where named

Time: all in one process, on the same weights, taking turns; the fastest of the rounds is what the machine can do
undisturbed, and ratios are of those; all rounds are in the JSON.  On a machine that others use too, --clock cpu with
OMP_NUM_THREADS=1 counts the process's own seconds.
Memory: a process for each, its peak resident size in a step less what it held before it loaded the network; on a
GPU what torch allocated.  Precision, attention kernel and AdamW are the same for all.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svfit_dreambooth.bases.families import apply_svfit, find_projections
from svfit_dreambooth.training.keep_base import kept_batch_size
from svfit_dreambooth.training.slim import slim

METHODS = ("frozen", "lora", "svfit", "slimlora", "kept")
COMPARED = (("svfit", "lora"), ("svfit", "frozen"), ("kept", "svfit"))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_unet(config_dir: Path, dtype: torch.dtype) -> nn.Module:
    """The UNet of `config_dir`/unet with random weights, frozen, as the training command keeps it in `dtype`."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config_dir / "unet"))
    finally:
        torch.set_default_dtype(torch.float32)
    return unet.to(DEVICE).train().requires_grad_(False)


def adapt(unet: nn.Module, method: str, rank: int | None) -> list[nn.Parameter]:
    """Makes `unet` ready for `method`; returns what it trains.  `rank`: of svfit, None: full."""
    if method == "frozen":
        first = next(iter(find_projections(unet).values()))[2]
        first.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        return []
    if method in ("lora", "slimlora"):
        if method == "slimlora":
            slim(unet)
        unet.add_adapter(  # type: ignore[operator]
            LoraConfig(
                r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"]
            )
        )
        trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        return trained
    basis = {}
    for name, (_, _, layer) in find_projections(unet).items():
        out, into = layer.weight.shape
        r = min(out, into, rank or out)
        basis[name] = (torch.randn(out, r) / out**0.5, torch.randn(r, into) / into**0.5)
    shifts = list(apply_svfit(unet, basis=basis).values())
    slim(unet)
    return [shift.requires_grad_(True) for shift in shifts]


def stepper(
    unet: nn.Module,
    trained: list[nn.Parameter],
    batch: int,
    options: argparse.Namespace,
    dtype: torch.dtype,
    kept: bool,
) -> Callable:
    """A function that makes one step and returns its seconds; `kept`: with a pass to keep the base."""
    optimizer = torch.optim.AdamW(trained, lr=1e-3) if trained else None
    side = options.resolution // 8
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    config: Any = unet.config
    noise = torch.randn(batch, config.in_channels, side, side, device=DEVICE)
    timesteps = torch.full((batch,), 500, device=DEVICE)
    hidden = torch.randn(batch, 77, config.cross_attention_dim, device=DEVICE)

    def differentiate(count: int) -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype != torch.float32):
            predicted = unet(noise[:count].to(dtype), timesteps[:count], hidden[:count].to(dtype), return_dict=False)[0]
        (predicted.float() - noise[:count]).square().mean().backward()

    def step() -> float:
        started = clock()
        differentiate(batch)
        if kept:
            differentiate(kept_batch_size(batch))
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    return step


def measure_time(options: argparse.Namespace, precision: str, batch: int) -> dict[str, list[float]]:
    """Seconds of every round by method, in one process on shared weights."""
    unet = random_unet(options.config_dir, DTYPES[precision])
    steps = {}
    for method in options.methods:
        own = copy.deepcopy(unet, {id(parameter): parameter for parameter in unet.parameters()})
        trained = adapt(own, method, options.rank)
        steps[method] = stepper(own, trained, batch, options, DTYPES[precision], method == "kept")
    for step in steps.values():
        step()  # warms caches up
    seconds: dict[str, list[float]] = {method: [] for method in options.methods}
    for number in range(options.rounds):
        turn = number % len(options.methods)
        order = options.methods[turn:] + options.methods[:turn]
        for method in order:
            seconds[method].append(steps[method]())
    return seconds


def measure_memory(options: argparse.Namespace, precision: str, batch: int, method: str) -> int:
    """Bytes at the peak of a step, the network's own among them; for a process of its own."""
    before = 0 if DEVICE.type == "cuda" else resident("VmRSS")
    unet = random_unet(options.config_dir, DTYPES[precision])
    step = stepper(unet, adapt(unet, method, options.rank), batch, options, DTYPES[precision], method == "kept")
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
    step()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """VmRSS, bytes of this process in memory now, or VmHWM, the most since the peak was reset.  Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {what}")


def in_own_process(options: argparse.Namespace, precision: str, batch: int, method: str | None) -> object:
    """`measure_time` (method None) or `measure_memory` in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--config_dir",
        str(options.config_dir),
        "--resolution",
        str(options.resolution),
    ]
    command += [
        "--methods",
        *options.methods,
        "--rounds",
        str(options.rounds),
        "--precision",
        precision,
        "--batch_size",
        str(batch),
        "--clock",
        options.clock,
        "--child",
    ]
    command += [method or "time"] + (["--rank", str(options.rank)] if options.rank else [])
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def compared(row: dict, figures: dict[str, float], unit: str, prefix: str = "") -> str:
    """Adds the ratios of what was measured to `row`; figures and ratios as text."""
    ratios = {
        f"{one} of {other}": figures[one] / figures[other] for one, other in COMPARED if {one, other} <= set(figures)
    }
    row |= {prefix + name: ratio for name, ratio in ratios.items()}
    shown = "  ".join(f"{method} {figure:.2f}" for method, figure in figures.items())
    return f"   {shown} {unit}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config_dir", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--precision", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--rank", type=int, help="of SVFit; None: full")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each that are timed, after one that is not")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=["frozen", "lora", "svfit"])
    parser.add_argument("--only", choices=["time", "memory"], help="None: both")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", choices=["time", *METHODS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        precision, batch = options.precision[0], options.batch_size[0]
        timed = options.child == "time"
        figures = (
            measure_time(options, precision, batch)
            if timed
            else measure_memory(options, precision, batch, options.child)
        )
        print(json.dumps(figures))
        return
    results = []
    print(f"{os.cpu_count()} processors, {torch.get_num_threads()} threads, {DEVICE.type}, torch {torch.__version__}")
    print("fastest step in seconds, peak in GB")
    for precision in options.precision:
        for batch in options.batch_size:
            row: dict = {"precision": precision, "batch": batch, "resolution": options.resolution, "rank": options.rank}
            text = f"{precision} batch {batch:<3}".ljust(20)
            if options.only != "memory":
                row["seconds"] = seconds = in_own_process(options, precision, batch, None)
                text += compared(row, {method: min(own) for method, own in seconds.items()}, "s")  # type: ignore[attr-defined]
            if options.only != "time":
                row["peak"] = peak = {m: in_own_process(options, precision, batch, m) for m in options.methods}
                text += compared(row, {method: size / 1e9 for method, size in peak.items()}, "GB", "peak, ")  # type: ignore[operator]
            print(text, flush=True)
            results.append(row)
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
