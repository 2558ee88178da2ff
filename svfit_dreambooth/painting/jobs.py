"""Many pictures for many people: each job has a prompt and adapters of its own, and all are painted on one base.

Pictures of different jobs share batches (see `mixes`).  Adapters are loaded when a batch needs them, and those that
were used longest ago leave memory: what is held beside the base stays below a bound, however many there are.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svfit_dreambooth.adapter.source import distinct_names, find_adapter, split_strength
from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.batches import Sample, paint_batch, read_words
from svfit_dreambooth.painting.generate import open_for_adapters, open_named_base, picture_settings
from svfit_dreambooth.painting.numbers import check_numbers, rescale_for, rescaling
from svfit_dreambooth.painting.picture import Picture
from svfit_dreambooth.painting.prompts import check_text
from svfit_dreambooth.painting.shelf import AdapterFiles, Shelf

KEYS = {"prompt": str, "adapters": list, "seed": int, "count": int, "negative_prompt": str}
SHOWN_MISTAKES = 5


@dataclass(frozen=True)
class Job:
    """Pictures of one prompt: number i starts from the noise of seed + i."""

    prompt: str
    adapters: tuple[tuple[str, float], ...] = ()  # (file or hub id, strength)
    seed: int = 0
    count: int = 1
    negative_prompt: str | None = None
    line: int = 0  # of the file it was read from


def read_jobs(path: str | Path, files: AdapterFiles | None = None) -> list[Job]:
    """The jobs of a file of JSON lines: {"prompt": ..., "adapters": ["PATH[:WEIGHT]"], "seed": 0, "count": 1,
    "negative_prompt": ...}, of which only the prompt must be there; empty lines count and say nothing.

    `files`: keeps the adapters that are read.  Raises SVFitError with the numbers of the lines that cannot be read, and
    for adapters that are none.
    """
    files = files or AdapterFiles()
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SVFitError(f"jobs {path} cannot be read ({error}): give a file of JSON lines.", "jobs") from None
    jobs, mistakes = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = _read_job(line, number)
            for name, _ in job.adapters:
                if name not in files.read:
                    files.look(name)
            jobs.append(job)
        except SVFitError as error:
            mistakes.append(f"line {number}: {str(error).rstrip('.')}")
    if mistakes:
        more = f"; and {len(mistakes) - SHOWN_MISTAKES} more" if len(mistakes) > SHOWN_MISTAKES else ""
        raise SVFitError(f"{path} has lines that are no jobs: {'; '.join(mistakes[:SHOWN_MISTAKES])}{more}.")
    if not jobs:
        raise SVFitError(f'{path} holds no jobs: write one a line, such as {{"prompt": "a photo of sks dog"}}.')
    return jobs


def open_for_jobs(
    jobs: Sequence[Job],
    base: str | None = None,
    *,
    files: AdapterFiles | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **base_options: Any,
) -> BaseModel:
    """Opens `base` (None: the one that the first adapter names, see `open_for_adapters`) without any adapter.

    `files`: see `read_jobs`.  `dtype`: float32 or float16, of which both tell which base they are.
    """
    files = files or AdapterFiles()
    named = next((name for job in jobs for name, _ in job.adapters), None)
    if base is None and named is not None:
        model = open_named_base(files.look(named).base_model, find_adapter(named), **base_options)
        model.family.cast(dtype)
        model.pipeline.to(device or default_device())
        return model
    return open_for_adapters([], base, device=device, dtype=dtype, **base_options)


def _read_job(line: str, number: int) -> Job:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SVFitError(f"this is not JSON ({error})") from None
    if not isinstance(entry, dict):
        raise SVFitError(f"{line.strip()[:40]!r} is no object in braces")
    for key, value in entry.items():
        if key not in KEYS:
            raise SVFitError(f"{key!r} is none of {', '.join(KEYS)}")
        if value is None and key != "prompt":
            continue
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            kind = {str: "text", list: "a list of texts", int: "a whole number"}[KEYS[key]]
            raise SVFitError(f"{key} is {value!r}, not {kind}")
    if "prompt" not in entry:
        raise SVFitError("there is no prompt")
    adapters = entry.get("adapters") or []
    if not all(isinstance(text, str) for text in adapters):
        raise SVFitError(f"adapters is {adapters!r}, not a list of texts")
    count = 1 if entry.get("count") is None else entry["count"]
    if count < 1:
        raise SVFitError(f"count is {count}, not 1 or more")
    check_text("the prompt", entry["prompt"])
    check_text("the negative prompt", entry.get("negative_prompt"))
    split = tuple(split_strength(text) for text in adapters)
    if len({name for name, _ in split}) < len(split):
        raise SVFitError(f"adapters {adapters!r} holds one twice")
    return Job(entry["prompt"], split, entry.get("seed") or 0, count, entry.get("negative_prompt"), number)


def paint_jobs(
    shelf: Shelf,
    jobs: Sequence[Job],
    *,
    batch_size: int = 4,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float | None = None,
    prompt_weights: bool = False,
    clip_skip: int | None = None,
    height: int | None = None,
    width: int | None = None,
    on_picture: Callable[[Job, Picture], None] | None = None,
) -> None:
    """Paints all pictures of `jobs` on the shelf's base, `batch_size` at once; `on_picture` gets each when it is done.

    Other arguments: as in `generate`, whose pictures these are to about 1e-4 in float32: in a larger batch sums are
    added up in another order.  Raises SVFitError before the first picture for numbers that the base cannot paint with
    and for adapters of another base.
    """
    model = shelf.model
    height, width = height or model.resolution, width or model.resolution
    guidance_scale = model.guidance_scale if guidance_scale is None else guidance_scale
    num_inference_steps = model.num_inference_steps if num_inference_steps is None else num_inference_steps
    if batch_size < 1:
        raise SVFitError(f"batch_size is {batch_size}: give 1 or more.")
    for job in jobs:
        try:
            check_numbers(model, job.count, job.seed, num_inference_steps, guidance_scale, height, width)
        except SVFitError as error:
            raise SVFitError(f"line {job.line}: {error}", *error.parameters) from None
    rescale = rescale_for(model, model.pipeline, guidance_rescale)
    _check_adapters(shelf, jobs)
    common: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    for batch in _batches(shelf, jobs, batch_size, guidance_scale, prompt_weights, clip_skip):
        shelf.bring(list(dict.fromkeys(name for _, sample in batch for name in sample.mix)))
        painted = paint_batch(model, [sample for _, sample in batch], **common, **rescaling(rescale)) or []
        for (job, sample), (image, filtered) in zip(batch, painted, strict=True):
            names = distinct_names(Path(name).stem for name, _ in job.adapters)
            strengths = dict(zip(names, (strength for _, strength in job.adapters), strict=True))
            settings = picture_settings(
                model,
                job.prompt,
                job.negative_prompt,
                sample.seed,
                strengths,
                guidance_rescale=rescale,
                prompt_weights=prompt_weights,
                **common,
            )
            if on_picture is not None:
                on_picture(job, Picture(image, settings, filtered))


def _check_adapters(shelf: Shelf, jobs: Sequence[Job]) -> None:
    """Raises SVFitError for an adapter of another base than the shelf's, with the number of its line."""
    lines = {name: job.line for job in reversed(jobs) for name, _ in job.adapters}
    for name, line in reversed(lines.items()):
        try:
            shelf.check(name)
        except SVFitError as error:
            raise SVFitError(f"line {line}: {error}") from None


def _batches(
    shelf: Shelf,
    jobs: Sequence[Job],
    batch_size: int,
    guidance_scale: float,
    prompt_weights: bool,
    clip_skip: int | None,
) -> Iterator[list[tuple[Job, Sample]]]:
    """Pictures that fit into one call."""
    waiting: dict[Any, list[tuple[Job, Sample]]] = {}
    for job in jobs:
        shelf.bring([name for name, _ in job.adapters])
        mix = dict(job.adapters)
        words, skipped = read_words(
            shelf.model, job.prompt, job.negative_prompt, mix, guidance_scale, prompt_weights, clip_skip
        )
        for i in range(job.count):
            sample = Sample(words, job.seed + i, mix, skipped)
            batch = waiting.setdefault(sample.kind, [])
            batch.append((job, sample))
            if len(batch) == batch_size:
                yield waiting.pop(sample.kind)
    yield from waiting.values()
