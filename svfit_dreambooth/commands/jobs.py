"""`generate --jobs`: a file of prompts with adapters of their own."""

import argparse
from pathlib import Path

from svfit_dreambooth.commands.base import base_options
from svfit_dreambooth.errors import SVFitError

PER_LINE = {
    "prompt": "prompt",
    "adapter": "adapters",
    "negative_prompt": "negative_prompt",
    "num_images": "count",
    "seed": "seed",
}


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """Adds the options of many jobs to `parser`."""
    parser.add_argument(
        "--jobs",
        type=Path,
        metavar="FILE",
        help='in place of prompts and adapters, a line of JSON each: {"prompt": "a photo of sks dog", "adapters": '
        '["dog.safetensors:0.8"], "seed": 0, "count": 2, "negative_prompt": "blur"}',
    )
    parser.add_argument("--batch_size", type=int, help="with jobs: pictures painted at once (default: 4)")
    parser.add_argument("--adapter_memory", type=float, metavar="MB", help="with jobs: MB of adapters (default: 256)")


def generate_jobs(options: argparse.Namespace) -> None:
    """Paints them, and prints each picture's path as soon as it is written."""
    for flag, key in PER_LINE.items():
        if getattr(options, flag) not in (None, []):
            raise SVFitError(f'{flag} does not go with jobs: write "{key}" into its lines.', flag, "jobs")
    for flag in ("scheduler", "image", "strength", "mask_image"):
        if getattr(options, flag) is not None:
            raise SVFitError(f"{flag} does not go with jobs: leave it out.", flag, "jobs")
    from svfit_dreambooth.bases.devices import DTYPES
    from svfit_dreambooth.painting.jobs import Job, open_for_jobs, paint_jobs, read_jobs
    from svfit_dreambooth.painting.picture import Picture, free_path, save_picture
    from svfit_dreambooth.painting.shelf import MOST_BYTES, AdapterFiles, Shelf

    if options.dtype == "bfloat16":
        raise SVFitError("dtype bfloat16 is too coarse to tell an adapter's base by: give float16.", "dtype")
    megabytes = options.adapter_memory
    if megabytes is not None and not 0 < megabytes < 1e9:
        raise SVFitError(f"adapter_memory is {megabytes:g}: give a number of MB above 0.", "adapter_memory")
    most = MOST_BYTES if megabytes is None else int(1e6 * megabytes)
    files = AdapterFiles(most)
    jobs = read_jobs(options.jobs, files)
    model = open_for_jobs(
        jobs, options.pretrained_model_name_or_path, files=files, dtype=DTYPES[options.dtype], **base_options(options)
    )
    shelf = Shelf(
        model, most, files=files, allow_other_base=options.allow_other_base, basis_cache_dir=options.basis_cache_dir
    )

    def save(job: Job, picture: Picture) -> None:
        stem = "-".join(Path(name).stem for name, _ in job.adapters) or model.name.replace("/", "-")
        path = save_picture(picture, free_path(options.output_dir, stem))
        print(f"{path}" + (" (blacked out by the base's content filter)" if picture.filtered else ""), flush=True)

    paint_jobs(
        shelf,
        jobs,
        batch_size=4 if options.batch_size is None else options.batch_size,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        guidance_rescale=options.guidance_rescale,
        prompt_weights=options.prompt_weights,
        clip_skip=options.clip_skip,
        height=options.height,
        width=options.width,
        on_picture=save,
    )
