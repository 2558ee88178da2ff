"""A whole training run, from photos to file: this package against the loop of diffusers' DreamBooth LoRA script.

    python benchmarks/whole_run.py --config_dir FOLDER [--photos PHOTOS] [--steps 4] [--precision fp32] [--output F.json]

The other loop is written here from the documentation of `train_dreambooth_lora.py` with its defaults: LoRA r=4 on the
attention projections, AdamW, gradients clipped to 1, and in every step the autoencoder encodes the photo and the text
encoder the prompt.  FOLDER is a diffusers model folder of which only configs and tokenizer are needed: the base gets
random weights and is written to disk first.  Each contestant has a process of its own.  "start" is all that is not a
step: opening the base, encoding, the basis (decomposed, or from the cache), writing the file.  The last column,
a run of 400 steps, is computed from start and median step, not run.  --clock cpu, with OMP_NUM_THREADS=1, counts each
process's own seconds, for a machine that others use too.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageOps
from random_base import random_base
from training_step import resident

from svfit_dreambooth import TrainConfig, train
from svfit_dreambooth.photos.reading import find_photos

clock = time.process_time if "cpu" in sys.argv else time.perf_counter
PROMPT = "a photo of sks dog"
CONTESTANTS = ("diffusers LoRA", "svfit")
LONG = 400


def diffusers_lora(base: Path, options: argparse.Namespace, output: Path) -> list[float]:
    """The documented loop; returns when each step ended, the first entry when the first began."""
    dtype = torch.float32 if options.precision == "fp32" else torch.bfloat16
    pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=dtype)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    unet, vae, text_encoder = pipeline.unet, pipeline.vae, pipeline.text_encoder
    for module in (unet, vae, text_encoder):
        module.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=1e-2)
    photos = [photo.path for photo in find_photos(str(options.photos))]
    tokens = pipeline.tokenizer(PROMPT, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    unet.train()
    times = [clock()]
    for step in range(options.steps):
        pixels = torch.stack([load(photos[step % len(photos)], options.resolution)]).to(dtype)  # (1, 3, h, w)
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            hidden = text_encoder(tokens.input_ids)[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            predicted = unet(noisy, timesteps, hidden, return_dict=False)[0]
        torch.nn.functional.mse_loss(predicted.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(clock())
    StableDiffusionPipeline.save_lora_weights(
        output, unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    )
    return times


def load(path: Path, resolution: int) -> torch.Tensor:
    """The photo's middle square, (3, resolution, resolution) in [-1, 1]."""
    image = ImageOps.fit(Image.open(path).convert("RGB"), (resolution, resolution))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(resolution, resolution, 3).permute(2, 0, 1).float() / 127.5 - 1


def svfit(base: Path, options: argparse.Namespace, output: Path) -> list[float]:
    """This package's training command with its defaults, less what the other loop does not do either."""
    times: list[float] = []
    train(
        TrainConfig(
            pretrained_model_name_or_path=str(base),
            instance_data_dir=str(options.photos),
            instance_prompt=PROMPT,
            output_dir=str(output),
            basis_cache_dir=str(options.cache_dir) if options.cache_dir else None,
            max_train_steps=options.steps + 1,
            train_batch_size=1,
            target_modules=["attention"],
            resolution=options.resolution,
            crops_per_photo=1,
            mixed_precision="no" if options.precision == "fp32" else "bf16",
            fixed_loss_examples=0,
            validation_steps=0,
            final_pictures=False,
        ),
        on_step=lambda step: times.append(clock()),
    )
    return times


def child(options: argparse.Namespace) -> dict:
    """One contestant: seconds of each step and of all else, bytes at the peak."""
    started = clock()
    with tempfile.TemporaryDirectory() as temporary:
        act = svfit if options.child == "svfit" else diffusers_lora
        times = act(options.base, options, Path(temporary) / "out")
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    whole = clock() - started
    start = whole - sum(steps) - (statistics.median(steps) if options.child == "svfit" else 0)  # its first step
    return {"steps": steps, "start": start, "whole": whole, "peak": resident("VmHWM")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config_dir", type=Path, required=True)
    parser.add_argument("--photos", type=Path, default=REPOSITORY / "toybox" / "subjects" / "dog_patch")
    parser.add_argument("--steps", type=int, default=4, help="that are timed; SVFit makes one more")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--base", type=Path, help="where the random base is or shall be kept; None: a temporary folder")
    parser.add_argument("--cache_dir", type=Path, help="of the bases; None: the user's own")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--child", choices=CONTESTANTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(child(options)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        base = random_base(options.config_dir, options.base or Path(temporary) / "base")
        for name in CONTESTANTS:
            command = [sys.executable, __file__, "--config_dir", str(options.config_dir), "--base", str(base)]
            command += ["--photos", str(options.photos), "--steps", str(options.steps), "--child", name]
            command += [
                "--clock",
                options.clock,
                "--resolution",
                str(options.resolution),
                "--precision",
                options.precision,
            ]
            command += ["--cache_dir", str(options.cache_dir)] if options.cache_dir else []
            answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[name] = own = json.loads(answer.strip().splitlines()[-1])
            own["long"] = own["start"] + LONG * statistics.median(own["steps"])
            print(
                f"{name:16} start {own['start']:7.1f} s   step {statistics.median(own['steps']):6.2f} s   "
                f"peak {own['peak'] / 1e9:5.2f} GB   {LONG} steps {own['long'] / 60:6.1f} min",
                flush=True,
            )
    for what in ("long", "peak"):
        print(f"{what}, svfit of diffusers LoRA: {results['svfit'][what] / results['diffusers LoRA'][what]:.2f}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
