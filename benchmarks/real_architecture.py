"""What Stable Diffusion's real size costs here: start-up with a cold and a warm basis cache, step time, peak memory.

    python benchmarks/real_architecture.py --config_dir FOLDER --photos PHOTOS [--steps 3] [--mixed_precision bf16]

FOLDER is a diffusers model folder of which only configs and tokenizer are needed: weights are random, as time and
memory do not depend on their values.  Prints a table, and JSON with --output.
"""

import argparse
import itertools
import json
import platform
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from svfit_dreambooth import TrainConfig, train
from svfit_dreambooth.basis import cached_files, model_basis
from svfit_dreambooth.preparation import prepare


def random_base(config_dir: Path, folder: Path) -> None:
    """Writes a pipeline of the configs in `config_dir`, with random weights in float16, into `folder`."""
    torch.manual_seed(0)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(config_dir / "vae")),
        text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(config_dir / "text_encoder")),
        tokenizer=CLIPTokenizer.from_pretrained(config_dir / "tokenizer"),
        unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(config_dir / "unet")),
        scheduler=DDIMScheduler.from_config(DDIMScheduler.load_config(config_dir / "scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def measure(base: Path, options: argparse.Namespace, work: Path) -> dict:
    """Seconds and gigabytes of the stages of a run."""
    config = TrainConfig(
        pretrained_model_name_or_path=str(base),
        instance_data_dir=str(options.photos),
        instance_prompt="a photo of sks dog",
        output_dir=str(work / "run"),
        basis_cache_dir=str(work / "cache"),
        max_train_steps=options.steps,
        train_batch_size=options.batch_size,
        resolution=options.resolution,
        crops_per_photo=1,
        train_text_encoder=options.train_text_encoder,
        mixed_precision=options.mixed_precision,
        fixed_loss_examples=0,
        validation_steps=0,
        final_pictures=False,
    )
    figures: dict = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    figures |= {name: getattr(options, name) for name in ("resolution", "batch_size", "mixed_precision")}

    def timed(name: str, act):  # type: ignore[no-untyped-def]
        started = time.perf_counter()
        result = act()
        figures[name] = round(time.perf_counter() - started, 2)
        return result

    weights = timed("open base, s", lambda: prepare(config)).weights
    figures["layers"], figures["values"] = len(weights), sum(min(weight.shape) for weight in weights.values())
    cache = work / "cache"
    timed("basis, cold cache, s", lambda: model_basis(weights, cache_dir=cache))
    timed("basis, warm cache, s", lambda: model_basis(weights, cache_dir=cache))
    figures["basis cache, MB"] = round(sum(size for _, size in cached_files(cache)) / 1e6)
    weights.clear()
    ends: list[float] = []
    started = time.perf_counter()
    result = train(config, on_step=lambda step: ends.append(time.perf_counter()))
    steps = [later - earlier for earlier, later in itertools.pairwise(ends)]
    figures["start to first step done, s"] = round(ends[0] - started, 2)
    figures["later steps, s"] = [round(step, 2) for step in steps]
    figures["adapter, bytes"] = result.file_bytes
    figures["peak memory, GB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config_dir", type=Path, required=True)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--train_text_encoder", action="store_true")
    parser.add_argument("--work_dir", type=Path, help="keeps the random base for the next time; None: a temporary one")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = (options.work_dir or Path(temporary)) / "random-base"
        if not (base / "model_index.json").is_file():
            random_base(options.config_dir, base)
        figures = measure(base, options, Path(temporary))
    for name, value in figures.items():
        print(f"{name:30} {value}")
    if options.output:
        options.output.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
