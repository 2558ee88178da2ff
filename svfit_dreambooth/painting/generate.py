"""Prompt and adapters to pictures."""

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from svfit_dreambooth.adapter.file import read_adapter
from svfit_dreambooth.adapter.source import check_finite, distinct_names, find_adapter
from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.family import Family
from svfit_dreambooth.bases.hub import is_cached
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.names import DEFAULT_BASE, check_held, is_hub_id, split_revision
from svfit_dreambooth.bases.opening import check_base_model, exchange_autoencoder, open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.from_picture import Begin, begin_arguments, pipeline_from
from svfit_dreambooth.painting.loading import load_adapter, merge_adapters
from svfit_dreambooth.painting.numbers import check_numbers, rescale_for, rescaling, size_multiple
from svfit_dreambooth.painting.picture import Picture
from svfit_dreambooth.painting.prompts import check_text, prompt_arguments
from svfit_dreambooth.painting.registry import clip_skips, loaded_adapters, other_base, reading
from svfit_dreambooth.painting.samplers import sampled_with

NAME_THE_BASE = "name the base yourself with pretrained_model_name_or_path"


def open_for_adapters(
    adapters: Sequence[tuple[str | Path, float]],
    base: str | None = None,
    *,
    allow_other_base: bool = False,
    trained_on: str | None = None,
    basis_cache_dir: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    **base_options: Any,
) -> BaseModel:
    """Opens `base` (None: the one that the first adapter names) and loads `adapters`, (file, strength) each.

    A base that an adapter merely names is opened only if it is the embedded one or already on this disk: what a stranger's
    file says never starts a download.  `trained_on`: the base that all the adapters were trained on, see `load_adapter`.  `device`: None takes a GPU if there is one.  `base_options`: see
    `open_base_model`.  Raises SVFitError as `open_base_model` and `load_adapter` do.
    """
    for path, strength in adapters:
        check_finite(f"the strength of {path}", strength)
    found = [(find_adapter(path), strength) for path, strength in adapters]
    read = [(read_adapter(path), path, strength) for path, strength in found]
    if base is not None:
        model = open_base_model(base, **base_options)
    elif not read:
        _check_options(DEFAULT_BASE, base_options)
        model = open_base_model(DEFAULT_BASE, **base_options)
    else:
        model = open_named_base(read[0][0].base_model, Path(read[0][1]), **base_options)
    sibling = None if trained_on is None else open_base_model(trained_on, one_at_a_time=True)
    names = distinct_names(Path(path).stem for _, path, _ in read)
    for (adapter, _, strength), name in zip(read, names, strict=True):
        load_adapter(
            model.pipeline,
            adapter,
            strength,
            name,
            allow_other_base=allow_other_base,
            trained_on=sibling,
            basis_cache_dir=basis_cache_dir,
        )
    model.family.cast(dtype)
    model.pipeline.to(device or default_device())
    return model


def open_named_base(name: str, path: Path, **options: Any) -> BaseModel:
    """The base that the adapter at `path` calls `name`: the embedded one, or a hub id that is on this disk; never downloaded.

    `options`: see `open_base_model`; a `revision` among them takes the place of the one in `name`.
    """
    check_held(name, str(path))
    repository, revision = split_revision(name)
    if name != DEFAULT_BASE and not is_hub_id(repository):
        raise SVFitError(
            f"{path} was trained on a base called {name!r}, which cannot be found by that name: {NAME_THE_BASE}."
        )
    if name != DEFAULT_BASE and Path(repository).exists():
        raise SVFitError(
            f"{path} names the base {name!r}, which is also a place on this disk, and what a file names is not opened "
            f"unasked: {NAME_THE_BASE}."
        )
    check_base_model(repository)
    _check_options(name, options)
    given = [f"{option} {options[option]}" for option in ("revision", "variant") if options.get(option)]
    vae = options.pop("pretrained_vae_model_name_or_path", None)
    options |= {"revision": options.get("revision") or revision, "local_files_only": True}
    try:
        model = open_base_model(repository, **options)
    except SVFitError as error:
        partly = "only partly" if is_cached(repository, options["revision"]) else "not"
        raise SVFitError(
            f"{path} was trained on {name}, which is {partly} on this disk{' with ' * bool(given)}{' '.join(given)}, and "
            f"what a file names is not downloaded unasked: {NAME_THE_BASE} {repository}."
        ) from error
    exchange_autoencoder(model, vae)
    return model


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises SVFitError for options that the base `name`, which the user did not give, has no use for."""
    for option in ("base_config", *(("revision", "variant") if name == DEFAULT_BASE else ())):
        if options.get(option) is not None:
            raise SVFitError(
                f"{option} {options[option]} does not apply to the base {name}: leave it out, or {NAME_THE_BASE}.",
                option,
            )


def generate(
    model: BaseModel,
    prompts: Sequence[str],
    *,
    num_images: int = 1,
    seed: int = 0,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_rescale: float | None = None,
    negative_prompt: str | None = None,
    prompt_weights: bool = False,
    clip_skip: int | None = None,
    height: int | None = None,
    width: int | None = None,
    scheduler: str | None = None,
    begin: Begin | None = None,
    on_picture: Callable[[Picture], None] | None = None,
    on_denoising_step: Callable[[int, int], bool | None] | None = None,
) -> list[Picture]:
    """`num_images` pictures of every prompt with the adapters that `model` carries.

    Image i of each prompt starts from noise of the seed `seed + i`, drawn on the CPU, whatever the other pictures
    are.  `num_inference_steps`, `guidance_scale`, `guidance_rescale` (see `rescale_for`), and `height` and `width` in
    pixels: None takes the base's own.
    `scheduler`: a name of `SAMPLERS`; None takes the base's.  `begin`: a picture to paint from instead of noise, whose shape
    the pictures then have where no size is given.
    `prompt_weights`: "ball++" and "(red ball)1.3" in a prompt weigh, see `prompt_arguments`.
    `clip_skip`: see `Family.read_earlier`; None takes what the adapters were trained with.
    `on_picture` is told of every picture as soon as it is done.  `on_denoising_step` is told, after each step of a
    picture, how many are done, and of how many; a true value stops there: that picture is dropped, and those that
    were done before are returned.
    Raises SVFitError for numbers that the base cannot paint with.
    """
    pipeline = model.pipeline
    own = (model.resolution, model.resolution) if begin is None else begin.size(size_multiple(model), model.resolution)
    height, width = height or own[1], width or own[0]
    guidance_scale = model.guidance_scale if guidance_scale is None else guidance_scale
    num_inference_steps = model.num_inference_steps if num_inference_steps is None else num_inference_steps
    if begin is not None:
        begin.check_steps(num_inference_steps)
    check_numbers(model, num_images, seed, num_inference_steps, guidance_scale, height, width)
    for prompt in prompts:
        check_text("the prompt", prompt)
    check_text("the negative prompt", negative_prompt)
    pictures: list[Picture] = []
    with reading(pipeline, clip_skip), merge_adapters(pipeline), sampled_with(pipeline, scheduler):
        painter, place = pipeline, {"height": height, "width": width}
        if begin is not None:
            painter = pipeline_from(pipeline, begin)
            place = begin_arguments(painter.__call__, begin, width, height)
        rescale = rescale_for(model, painter, guidance_rescale)
        for prompt in prompts:
            words = prompt_arguments(pipeline, prompt, negative_prompt, prompt_weights)
            words = model.family.painting_arguments(words, guidance_scale)
            for i in range(num_images):
                painted = paint(
                    model,
                    on_denoising_step,
                    painter,
                    **words,
                    **place,
                    **rescaling(rescale),
                    generator=torch.Generator().manual_seed(seed + i),
                    num_inference_steps=num_inference_steps,
                )
                if painted is None:
                    return pictures
                ((image, filtered),) = painted
                settings = picture_settings(
                    model,
                    prompt,
                    negative_prompt,
                    seed + i,
                    loaded_adapters(pipeline),
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    guidance_rescale=rescale,
                    height=height,
                    width=width,
                    prompt_weights=prompt_weights,
                    scheduler=scheduler,
                    begin=begin,
                )
                pictures.append(Picture(image, settings, filtered))
                if on_picture is not None:
                    on_picture(pictures[-1])
    return pictures


def picture_settings(
    model: BaseModel,
    prompt: str,
    negative_prompt: str | None,
    seed: int,
    adapters: Mapping[str, float],
    *,
    num_inference_steps: int,
    guidance_scale: float,
    guidance_rescale: float,
    height: int,
    width: int,
    prompt_weights: bool,
    scheduler: str | None = None,
    begin: Begin | None = None,
) -> dict[str, Any]:
    """What makes a picture again, beside the picture that it began with."""
    more: dict[str, Any] = {"prompt_weights": True} if prompt_weights else {}
    # 0 is told where it is not what goes by itself
    if model.family.clip_skip or any(clip_skips(model.pipeline).values()):
        more["clip_skip"] = model.family.clip_skip
    if guidance_rescale or model.family.guidance_rescale:
        more["guidance_rescale"] = guidance_rescale
    if model.vae_name is not None:
        more["vae"] = model.vae_name
    if model.quantize is not None:
        more["quantize"] = model.quantize
    if (trained_on := other_base(model.pipeline)) is not None:
        more["trained_on"] = trained_on
    if scheduler is not None:
        more["scheduler"] = scheduler
    if begin is not None:
        more |= {"strength": begin.strength, "masked": begin.mask is not None}
    return {
        "prompt": prompt,
        "negative_prompt": negative_prompt or "",
        "seed": seed,
        "adapters": dict(adapters),
        "base_model": model.name,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "width": width,
        "height": height,
    } | more


def paint(
    model: BaseModel,
    on_denoising_step: Callable[[int, int], bool | None] | None,
    pipeline: DiffusionPipeline | None = None,
    **arguments: Any,
) -> list[tuple[Image.Image, bool]] | None:
    """Each picture, and whether the content filter blacked it out; None: `on_denoising_step` stopped them.

    `pipeline`: one on the same components that is called in the place of the model's.
    """
    pipeline, family, steps = pipeline or model.pipeline, model.family, itertools.count(1)

    def after_step(*told: Any) -> Any:
        total = getattr(pipeline, "num_timesteps", None) or len(pipeline.scheduler.timesteps)
        if on_denoising_step is not None and on_denoising_step(next(steps), total):
            raise _Stopped
        return told[-1]  # the tensors, as pipelines of today want them back

    newer = "callback_on_step_end" in inspect.signature(pipeline.__call__).parameters
    arguments |= {"callback_on_step_end" if newer else "callback": after_step, "num_images_per_prompt": 1}
    try:
        return _paint(pipeline, family, arguments)
    except _Stopped:
        pipeline.maybe_free_model_hooks()
        return None


class _Stopped(Exception):
    """The picture is no longer wanted."""


def _paint(pipeline: Any, family: Family, arguments: dict[str, Any]) -> list[tuple[Image.Image, bool]]:
    unfiltered = getattr(pipeline, "safety_checker", None) is None
    if pipeline.vae.dtype != family.denoiser.dtype and unfiltered:  # see `Family.cast`
        latents = pipeline(**arguments, output_type="latent").images
        width, height = (
            arguments[side] if side in arguments else arguments["image"].size[i]
            for i, side in enumerate(("width", "height"))
        )
        images = family.decode_latents(latents, height, width)
        return [(image, False) for image in images]
    output = pipeline(**arguments)
    flags = getattr(output, "nsfw_content_detected", None) or [False] * len(output.images)
    return [(image, bool(flag)) for image, flag in zip(output.images, flags, strict=True)]
