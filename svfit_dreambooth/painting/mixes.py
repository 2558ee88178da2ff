"""A batch in which every picture has its own adapters.

All adapters of a base lie along the same directions, so what is personal is a vector a layer.  A batch of prompts with
a mix of strengths each is then one call: sample i of a layer's input meets the shift of its own mix,

    y_i = x_i W^T + ((x_i Vh^T) * shift_i) U^T + b          shift_i = sum over the mix of strength * shift

and so do the embeddings of learned words.  Samples reach the networks in the order in which pipelines of diffusers put
them: text encoders see one a prompt; the denoiser sees `num_images_per_prompt` a prompt, side by side, and with
classifier-free guidance all of them twice, the negative ones first.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from svfit_dreambooth.adapter.source import check_finite
from svfit_dreambooth.bases.devices import available_memory
from svfit_dreambooth.bases.families import family_of
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.arithmetic import add_shifts, padded
from svfit_dreambooth.method.layer import SVFitLinear
from svfit_dreambooth.method.mixed import Mixed, Room
from svfit_dreambooth.method.targets import set_shifts, svfit_layers
from svfit_dreambooth.method.word import word_embedding
from svfit_dreambooth.painting.matching import check_meanings
from svfit_dreambooth.painting.offloading import layers_exchanged, weights_at_hand
from svfit_dreambooth.painting.registry import adapters_on, check_loaded, refresh, warn_of_clip_skip

Mix = Mapping[str, float]  # name of a loaded adapter -> strength


@contextmanager
def adapter_mixes(pipeline: DiffusionPipeline, mixes: Sequence[Mix], merged_bytes: int | None = None) -> Iterator[None]:
    """Within it `pipeline(prompts, ...)` paints prompt i with the adapters and strengths of `mixes[i]`.

        load_adapter(pipeline, "dog.safetensors", scale=0)
        load_adapter(pipeline, "mug.safetensors", scale=0)
        with adapter_mixes(pipeline, [{"dog": 0.8}, {"mug": 1.0}, {}]):
            images = pipeline(["a photo of sks dog", "a photo of sks mug", "a photo of a cat"]).images

    Adapters that a mix does not name rest for its pictures, {} is the base alone.  The pictures of one prompt
    (`num_images_per_prompt`) share its mix, its negative prompt is read with it too.  Adapters that learned the same
    word may be loaded together, at scale 0, if no mix holds two of them.  Afterwards the strengths are what they were
    before.  Prompts are all read with one `clip_skip`, see `Family.read_earlier`.  `merged_bytes`: memory for merged
    weights of the mixes, which make painting faster; None: a quarter of what is free, none where the pipeline is
    offloaded.  `pipeline`: any that has `encode_prompt`, offloaded or not, with PEFT's LoRAs or without.
    Raises SVFitError for a name that is not loaded, for a strength that is no number, for an adapter of a convolution
    in groups, within `merge_adapters`, and, when the pipeline is called, for another number of prompts than mixes.
    """
    mixes = [dict(mix) for mix in mixes]
    family = family_of(pipeline)
    _check_mixes(pipeline, mixes)
    _check_groups(family.components, mixes)
    encode = getattr(pipeline, "encode_prompt", None)
    if encode is None:
        raise SVFitError(f"a {type(pipeline).__name__} has no encode_prompt: paint its pictures one by one.")
    if encode.__name__ == "encode_prompt_with_mixes":
        raise SVFitError("this pipeline paints with adapter_mixes already: leave that first.")
    if merged_bytes is None:
        merged_bytes = available_memory() // 4 if weights_at_hand(pipeline) else 0
    most_merged = merged_bytes
    signature = inspect.signature(encode)
    encoding = laid_out = False

    def encode_prompt_with_mixes(*args: Any, **kwargs: Any) -> Any:
        nonlocal encoding
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        prompts = _count(call.arguments)
        if prompts != len(mixes):
            raise SVFitError(f"{len(mixes)} mixes of adapters meet {prompts} prompts: give one mix for each prompt.")
        copies = call.arguments.get("num_images_per_prompt") or 1
        together = call.arguments.get("do_classifier_free_guidance") and family.guided_together
        lay_out(copies, 2 if together else 1)
        encoding = True
        try:
            return encode(*args, **kwargs)
        finally:
            encoding = False

    def lay_out(copies: int, passes: int) -> None:
        nonlocal laid_out
        _check_mixes(pipeline, mixes)  # again: one may have been unloaded since
        warn_of_clip_skip(pipeline, {name: None for mix in mixes for name, strength in mix.items() if strength})
        with layers_exchanged(pipeline):
            room = Room(most_merged)
            for name, model in family.components.items():
                if name == family.denoiser_name:
                    _put_mixes(model, mixes, copies, passes, room)
                else:
                    _put_mixes(model, mixes, 1, 1, Room(0))  # it is called once
        laid_out = True

    def check_text_encoder(*_: Any) -> None:
        if not encoding:
            raise SVFitError("within adapter_mixes prompts are read by the encode_prompt of its own pipeline alone.")

    def check_denoiser(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if laid_out:
            return
        if family.adaptable_text_encoders or not inputs:
            raise SVFitError("within adapter_mixes pictures are painted by calling its own pipeline.")
        # Z-Image's pipeline does not ask for prompts that come as embeddings
        passes = 2 if getattr(pipeline, "do_classifier_free_guidance", False) else 1
        copies, left = divmod(len(inputs[0]), passes * len(mixes))
        if left or not copies:
            raise SVFitError(
                f"{len(mixes)} mixes of adapters meet {len(inputs[0]) // passes} pictures: give one mix for each prompt."
            )
        lay_out(copies, passes)

    with ExitStack() as stack:
        for name, model in family.components.items():
            check = check_denoiser if name == family.denoiser_name else check_text_encoder
            stack.callback(model.register_forward_pre_hook(check).remove)
        stack.callback(_restore, pipeline)
        before = vars(pipeline).get("encode_prompt")
        stack.callback(_put_back, pipeline, before)
        pipeline.encode_prompt = encode_prompt_with_mixes  # type: ignore[attr-defined]
        yield


def _put_back(pipeline: DiffusionPipeline, encode_prompt: Any) -> None:
    if encode_prompt is None:
        del pipeline.encode_prompt  # type: ignore[attr-defined]
    else:
        pipeline.encode_prompt = encode_prompt  # type: ignore[attr-defined]


def _restore(pipeline: DiffusionPipeline) -> None:
    """Back to one strength for each adapter."""
    with layers_exchanged(pipeline):
        for model in family_of(pipeline).components.values():
            refresh(model)


def _check_mixes(pipeline: DiffusionPipeline, mixes: Sequence[Mix]) -> None:
    for mix in mixes:
        check_loaded(pipeline, *mix)
        for name, strength in mix.items():
            check_finite(f"the strength of {name}", strength)
        check_meanings(pipeline, [name for name, strength in mix.items() if strength])


def _check_groups(components: Mapping[str, nn.Module], mixes: Sequence[Mix]) -> None:
    """Raises SVFitError for a layer that cannot have a shift for each sample."""
    for component, model in components.items():
        loaded = adapters_on(model)
        grouped = {path: layer.groups for path, layer in svfit_layers(model).items() if getattr(layer, "groups", 1) > 1}
        for name in dict.fromkeys(name for mix in mixes for name in mix if name in loaded):
            for path in loaded[name].shifts.keys() & grouped.keys():
                raise SVFitError(
                    f"the adapter {name!r} changes a convolution of {grouped[path]} groups ({component}.{path}), which "
                    "can have only one mix at a time: paint its pictures one by one."
                )


def _count(arguments: Mapping[str, Any]) -> int:
    """How many prompts `encode_prompt` is called with."""
    if arguments.get("prompt_embeds") is not None:
        return len(arguments["prompt_embeds"])
    prompt = arguments["prompt"]
    return 1 if isinstance(prompt, str) else len(prompt)


def _put_mixes(model: nn.Module, mixes: Sequence[Mix], copies: int, passes: int, room: Room) -> None:
    """Lets `model` compute with a mix a sample: each `copies` times side by side, and all of them `passes` times."""
    if any(layer.unmerged_weight is not None for layer in svfit_layers(model).values()):
        raise SVFitError("merged weights serve one mix of adapters alone: leave merge_adapters before adapter_mixes.")
    loaded = adapters_on(model)
    present = [
        [(loaded[name], float(strength)) for name, strength in mix.items() if strength and name in loaded]
        for mix in mixes
    ]
    shifts = _rows([add_shifts([(adapter.shifts, strength) for adapter, strength in mix]) for mix in present])
    set_shifts(
        model,
        {name: each.repeat_interleave(copies, 0).repeat(passes, 1)[:, None] for name, each in shifts.items()},
    )  # (batch, 1, r)
    for name, layer in svfit_layers(model).items():
        if name in shifts and isinstance(layer, SVFitLinear):
            layer.mixed = Mixed(padded(shifts[name], layer.rank)[:, None], copies, passes, room)
    embedding = word_embedding(model)
    if embedding is not None:
        words = [
            {pieces: s * delta for adapter, s in mix for pieces, delta in adapter.words.items()} for mix in present
        ]
        embedding.put(_rows(words))  # (mixes, k, dim)


def _rows(each: Sequence[Mapping[Any, Tensor]]) -> dict[Any, Tensor]:
    """Key -> (len(each), ...): the tensors of that key one below the other, with zeros where one is missing or shorter."""
    keys = dict.fromkeys(key for one in each for key in one)
    stacked = {}
    for key in keys:
        longest = max((one[key] for one in each if key in one), key=lambda tensor: tensor.shape[-1])
        stacked[key] = torch.stack(
            [padded(one[key], longest.shape[-1]) if key in one else torch.zeros_like(longest) for one in each]
        )
    return stacked
