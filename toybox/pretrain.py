"""Pre-train the toybox model from nothing: `python -m toybox.pretrain all --work_dir WORK`.

Stages, each of which can be run alone and goes on where it was when killed:
render, autoencoder, text, unet, judge, export. All of them together take about half a day on two processor cores.

Several processes share the work: on a CPU that others use too, one process of one thread for each core
(`ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 -m toybox.pretrain unet --num_threads 1 --batch_size 24`) is much
faster than one process of several threads, which wait for each other hundreds of times a step.
On a CPU, `MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000` in the environment saves 15 %.
"""

import argparse
import signal
from pathlib import Path

from svfit_dreambooth.threads import wait_asleep

wait_asleep()  # before torch is imported

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from torch import nn
from transformers import CLIPTokenizer

from toybox import stages
from toybox.architecture import (
    FULL,
    TINY,
    WEIGHTS,
    assemble,
    build_autoencoder,
    build_text_encoder,
    build_unet,
    export_pipeline,
    load_pipeline,
)
from toybox.dataset import caption_corpus, load_pictures, load_scenes, render_dataset
from toybox.denoiser import train_unet
from toybox.judge import WEIGHTS as JUDGE_WEIGHTS
from toybox.loop import Budget, averaged_state
from toybox.tokenizer import build_tokenizer, frequent_words, save_tokenizer

STAGES = ("render", "autoencoder", "text", "unet", "judge", "export")
MINUTES = {"autoencoder": 60.0, "text": 4.0, "unet": 600.0, "judge": 12.0}  # default budgets on a processor
GPU_MINUTES = {"autoencoder": 2.0, "text": 1.0, "unet": 8.0, "judge": 3.0}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m toybox.pretrain", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--work_dir", type=Path, default=Path.home() / ".cache" / "toybox", help="data, checkpoints")
    parser.add_argument("--output_dir", type=Path, default=WEIGHTS, help="where export writes the pipeline folder")
    parser.add_argument("--judge_dir", type=Path, default=JUDGE_WEIGHTS, help="where the judge is written")
    parser.add_argument(
        "--time_budget_minutes", type=float, help=f"of the stage; by default {MINUTES}, on a GPU {GPU_MINUTES}"
    )
    parser.add_argument("--max_steps", type=int, help="end after so many steps if that is sooner; None: no limit")
    parser.add_argument("--init_from", type=Path, help="a pipeline folder to start from instead of nothing")
    parser.add_argument("--num_pictures", type=int, default=120_000, help="pictures to render")
    parser.add_argument("--batch_size", type=int, help="pictures a step; None: what suits the stage")
    parser.add_argument("--learning_rate", type=float, help="peak rate; None: what suits the stage")
    parser.add_argument("--sample_every", type=int, default=400, help="steps between contact sheets of the UNet")
    parser.add_argument("--log_every", type=int, default=50, help="steps between lines of the log")
    parser.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="None: bf16 on a GPU, else no: most processors compute bf16 ten times slower",
    )
    parser.add_argument("--num_threads", type=int, help="processor threads of torch; None: all cores")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: only to try the program")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def precision(args: argparse.Namespace) -> str:
    """accelerate's word for the type in which networks compute."""
    return args.mixed_precision or ("bf16" if torch.cuda.is_available() else "no")


def stage_minutes(stage: str, args: argparse.Namespace) -> float:
    """The longest that the stage may take."""
    return args.time_budget_minutes or (GPU_MINUTES if torch.cuda.is_available() else MINUTES)[stage]


def open_tokenizer(args: argparse.Namespace) -> CLIPTokenizer:
    """The tokenizer of this run, learned from its captions the first time."""
    if args.init_from:
        return CLIPTokenizer.from_pretrained(args.init_from / "tokenizer")
    folder = args.work_dir / "tokenizer"
    if not folder.exists():
        words = frequent_words(caption_corpus(load_scenes(args.work_dir / "data")))
        save_tokenizer(build_tokenizer(words), folder)
    return CLIPTokenizer.from_pretrained(folder)


def open_pipeline(args: argparse.Namespace) -> StableDiffusionPipeline:
    """The pipeline in its present state: the averaged weights of every stage that has a checkpoint."""
    torch.manual_seed(args.seed)
    sizes = FULL if args.size == "full" else TINY
    if args.init_from:
        pipeline = load_pipeline(args.init_from)
    else:
        tokenizer = open_tokenizer(args)
        text_encoder = build_text_encoder(tokenizer, sizes)
        pipeline = assemble(build_autoencoder(sizes), text_encoder, tokenizer, build_unet(sizes))
    vae, text_encoder = pipeline.vae, pipeline.text_encoder
    if (checkpoint := args.work_dir / "autoencoder.pt").exists():
        averaged_state(checkpoint, nn.ModuleDict({"encoder": vae.encoder, "decoder": vae.decoder}), ["decoder"])
    if (scale := args.work_dir / "scaling_factor.npy").exists():
        vae.register_to_config(scaling_factor=float(np.load(scale)))
    if (checkpoint := args.work_dir / "text.pt").exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["modules"]
        prefix = "text_encoder."
        text_encoder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    if (checkpoint := args.work_dir / "unet.pt").exists():
        averaged_state(checkpoint, nn.ModuleDict({"unet": pipeline.unet}), ["unet"])
    return pipeline


def run_stage(stage: str, args: argparse.Namespace) -> None:
    """Run one stage with the settings of the command line."""
    data, work = args.work_dir / "data", args.work_dir
    if stage == "render":
        render_dataset(data, args.num_pictures, args.seed)
        return
    if stage == "judge":
        from toybox.train_judge import train_judge

        train_judge(args)
        return
    pipeline = open_pipeline(args)
    if stage == "export":
        export_pipeline(pipeline, args.output_dir)
        return
    accelerator = Accelerator(mixed_precision=precision(args))
    common = {
        "budget": Budget(stage_minutes(stage, args), args.max_steps),
        "accelerator": accelerator,
        "checkpoint": work / f"{stage}.pt",
        "log_every": args.log_every,
    }
    common |= {"batch_size": args.batch_size} if args.batch_size else {}
    common |= {"learning_rate": args.learning_rate} if args.learning_rate else {}
    if stage == "autoencoder":
        stages.train_autoencoder(pipeline.vae, load_pictures(data), **common)
    elif stage == "text":
        stages.train_text_encoder(pipeline.text_encoder, pipeline.tokenizer, load_scenes(data), **common)
    else:
        with accelerator.main_process_first():
            if not (work / "latents.npy").exists():
                latents = stages.encode_pictures(pipeline.vae, load_pictures(data), accelerator)
                np.save(work / "scaling_factor.npy", pipeline.vae.config.scaling_factor)
                np.save(work / "latents.npy", latents.numpy())
        pipeline.vae.register_to_config(scaling_factor=float(np.load(work / "scaling_factor.npy")))
        latents = torch.from_numpy(np.load(work / "latents.npy"))
        train_unet(pipeline, latents, load_scenes(data), sample_every=args.sample_every, **common)


def main(arguments: list[str] | None = None) -> None:
    """Run the stage that the command line names, or all of them in order."""
    args = parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being stopped by a system is like Ctrl-C: save first
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        print(f"stage: {stage}", flush=True)
        run_stage(stage, args)


if __name__ == "__main__":
    main()
