"""Many pictures for many people: each job has a prompt and adapters of its own, and all are painted on one base.

Pictures of different jobs share batches (see `mixes`).  Adapters are loaded when a batch needs them, and those that
were used longest ago leave memory: what is held beside the base stays below a bound, however many there are.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svfit_dreambooth.adapter.file import Adapter, read_adapter
from svfit_dreambooth.adapter.source import distinct_names, find_adapter, split_strength
from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.opening import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import size_text
from svfit_dreambooth.painting.generate import (
    check_numbers,
    open_for_adapters,
    open_named_base,
    paint,
    picture_settings,
)
from svfit_dreambooth.painting.loading import load_adapter, set_adapters, unload_adapter
from svfit_dreambooth.painting.matching import check_adapter
from svfit_dreambooth.painting.mixes import adapter_mixes
from svfit_dreambooth.painting.picture import Picture
from svfit_dreambooth.painting.prompts import check_text, prompt_arguments
from svfit_dreambooth.painting.registry import clip_skips, reading

KEYS = {"prompt": str, "adapters": list, "seed": int, "count": int, "negative_prompt": str}
MOST_BYTES = 256_000_000  # of adapters in memory: about 450 of Stable Diffusion 1.5 at full rank
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


def read_jobs(path: str | Path) -> list[Job]:
    """The jobs of a file of JSON lines: {"prompt": ..., "adapters": ["PATH[:WEIGHT]"], "seed": 0, "count": 1,
    "negative_prompt": ...}, of which only the prompt must be there; empty lines count and say nothing.

    Raises SVFitError with the numbers of the lines that cannot be read, and for adapters that are none.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SVFitError(f"jobs {path} cannot be read ({error}): give a file of JSON lines.", "jobs") from None
    jobs, mistakes, readable = [], [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            job = _read_job(line, number)
            for name, _ in job.adapters:
                if name not in readable:
                    read_adapter(find_adapter(name))
                    readable.add(name)
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
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **base_options: Any,
) -> BaseModel:
    """Opens `base` (None: the one that the first adapter names, see `open_for_adapters`) without any adapter.

    `dtype`: float32 or float16, of which both tell which base they are.
    """
    named = next((name for job in jobs for name, _ in job.adapters), None)
    if base is None and named is not None:
        path = find_adapter(named)
        model = open_named_base(read_adapter(path).base_model, path, **base_options)
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


class Shelf:
    """The adapters that are in memory, at rest on a pipeline; those used longest ago make room for new ones."""

    def __init__(
        self,
        model: BaseModel,
        most_bytes: int = MOST_BYTES,
        *,
        allow_other_base: bool = False,
        basis_cache_dir: str | Path | None = None,
    ) -> None:
        """`most_bytes`: of all values held at once, in float32; the base and its directions come on top of that."""
        self.model = model
        self.most_bytes = most_bytes
        self.sizes: dict[str, int] = {}  # name -> bytes, the one used longest ago first
        self.allow_other_base = allow_other_base
        self.basis_cache_dir = basis_cache_dir
        self.known_hashes: dict[str, str] = {}  # the base's weights stay as they are

    def check(self, jobs: Iterable[Job]) -> None:
        """Raises SVFitError for an adapter of another base than this, with the number of its line."""
        seen: set[str] = set()
        for job in jobs:
            for name in (name for name, _ in job.adapters if name not in seen):
                try:
                    check_adapter(
                        self.model.pipeline,
                        read_adapter(find_adapter(name)),
                        name,
                        allow_other_base=self.allow_other_base,
                        known_hashes=self.known_hashes,
                    )
                except SVFitError as error:
                    raise SVFitError(f"line {job.line}: {error}") from None
                seen.add(name)

    def bring(self, names: Sequence[str]) -> None:
        """Loads those of the adapters `names` that are not here."""
        pipeline = self.model.pipeline
        for name in names:
            if name in self.sizes:
                self.sizes[name] = self.sizes.pop(name)
        missing = {name: read_adapter(find_adapter(name)) for name in names if name not in self.sizes}
        sizes = {name: _size(adapter) for name, adapter in missing.items()}
        needed = sum(sizes.values()) + sum(size for name, size in self.sizes.items() if name in names)
        if needed > self.most_bytes:
            raise SVFitError(
                f"the {len(names)} adapters of one batch hold {size_text(needed)}, and {size_text(self.most_bytes)} are "
                "allowed for adapters: allow more, or paint fewer pictures at once with batch_size.",
            )
        for name in [name for name in self.sizes if name not in names]:
            if sum(self.sizes.values()) + sum(sizes.values()) <= self.most_bytes:
                break
            unload_adapter(pipeline, name)
            del self.sizes[name]
        for name, adapter in missing.items():
            load_adapter(
                pipeline,
                adapter,
                0.0,
                name,
                allow_other_base=self.allow_other_base,
                basis_cache_dir=self.basis_cache_dir,
                known_hashes=self.known_hashes,
            )
            self.sizes[name] = sizes[name]


def _size(adapter: Adapter) -> int:
    tensors = [*adapter.shifts.values(), *adapter.word_deltas().values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def paint_jobs(
    shelf: Shelf,
    jobs: Sequence[Job],
    *,
    batch_size: int = 4,
    num_inference_steps: int = 25,
    guidance_scale: float | None = None,
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
    if batch_size < 1:
        raise SVFitError(f"batch_size is {batch_size}: give 1 or more.")
    for job in jobs:
        try:
            check_numbers(model, job.count, job.seed, num_inference_steps, guidance_scale, height, width)
        except SVFitError as error:
            raise SVFitError(f"line {job.line}: {error}", *error.parameters) from None
    shelf.check(jobs)
    common: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "height": height,
        "width": width,
    }
    for batch in _batches(shelf, jobs, batch_size, guidance_scale, prompt_weights, clip_skip):
        painted = _paint_batch(shelf, batch, common)
        for (job, seed, _, _), (image, filtered) in zip(batch, painted, strict=True):
            names = distinct_names(Path(name).stem for name, _ in job.adapters)
            strengths = dict(zip(names, (strength for _, strength in job.adapters), strict=True))
            settings = picture_settings(
                model, job.prompt, job.negative_prompt, seed, strengths, prompt_weights=prompt_weights, **common
            )
            if on_picture is not None:
                on_picture(job, Picture(image, settings, filtered))


# a picture to be painted: its job, its seed, what it says to the pipeline, how many layers of CLIP are left out
Sample = tuple[Job, int, dict[str, Any], int]


def _batches(
    shelf: Shelf,
    jobs: Sequence[Job],
    batch_size: int,
    guidance_scale: float,
    prompt_weights: bool,
    clip_skip: int | None,
) -> Iterator[list[Sample]]:
    """Pictures that fit into one call: all as texts, with negative ones or without, or all as embeddings of one length.

    And all read alike by CLIP.

    No negative prompt is not the same as an empty one: SDXL reads zeros for it.
    """
    waiting: dict[Any, list[Sample]] = {}
    for job in jobs:
        words, skipped = _words(shelf, job, guidance_scale, prompt_weights, clip_skip)
        kind = (skipped, *((name, type(value), getattr(value, "shape", None)) for name, value in words.items()))
        for i in range(job.count):
            batch = waiting.setdefault(kind, [])
            batch.append((job, job.seed + i, words, skipped))
            if len(batch) == batch_size:
                yield waiting.pop(kind)
    yield from waiting.values()


def _words(
    shelf: Shelf, job: Job, guidance_scale: float, prompt_weights: bool, clip_skip: int | None
) -> tuple[dict[str, Any], int]:
    """What the pipeline is told of the job's prompt, and with which `clip_skip` that is read.

    Embeddings are made with the job's own adapters.
    """
    pipeline = shelf.model.pipeline
    shelf.bring([name for name, _ in job.adapters])
    set_adapters(pipeline, dict(job.adapters))
    family = shelf.model.family
    trained = clip_skips(pipeline)
    skipped = next((trained[name] for name, _ in job.adapters), 0) if clip_skip is None else clip_skip
    try:
        with reading(pipeline, skipped):
            words = prompt_arguments(pipeline, job.prompt, job.negative_prompt, prompt_weights)
            return family.painting_arguments(words, guidance_scale), skipped
    finally:
        set_adapters(pipeline, {})


def _paint_batch(shelf: Shelf, batch: Sequence[Sample], common: dict[str, Any]) -> list[Any]:
    words: dict[str, Any] = {}
    for name, first in batch[0][2].items():
        values = [arguments[name] for _, _, arguments, _ in batch]
        if isinstance(first, torch.Tensor):
            words[name] = torch.cat(values)
        else:
            words[name] = values if isinstance(first, str) else first  # None, and the guidance, are the same for all
    shelf.bring(list(dict.fromkeys(name for job, *_ in batch for name, _ in job.adapters)))
    with adapter_mixes(shelf.model.pipeline, [dict(job.adapters) for job, *_ in batch]):
        shelf.model.family.read_earlier(batch[0][3])  # it stays so until the pictures' settings are noted
        generators = [torch.Generator().manual_seed(seed) for _, seed, *_ in batch]
        return paint(shelf.model, None, **{**common, **words}, generator=generators) or []
