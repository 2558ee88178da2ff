"""The page's functions for programs: endpoints with names that stay, for gradio_client and plain HTTP (docs/web.md)."""

import math
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms import library, pictures
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.laid_out import add_photos
from svfit_dreambooth.web.rooms.orders import AS_TRAINED, Order
from svfit_dreambooth.web.rooms.progress import sum_up
from svfit_dreambooth.web.rooms.workspace import library_of
from svfit_dreambooth.web.tabs.draft import Draft
from svfit_dreambooth.web.tabs.form import ADVANCED, BITS, NUMBERS
from svfit_dreambooth.web.tabs.mistakes import for_programs

API_GRACE = 20.0  # seconds for which a painting goes on while no program reads it


class Endpoints:
    """One method an endpoint; its first lines are the documentation that clients see."""

    def __init__(self, app: App):
        self.app = app
        self.draft = Draft(app)

    @for_programs
    def generate(
        self, prompt: str, adapters: dict[str, float] | None, base: str, negative_prompt: str, num_images: float,
        seed: float, num_inference_steps: float, guidance_scale: float, width: float,
        height: float, scheduler: str, clip_skip: str, pretrained_vae_model_name_or_path: str, quantize: str,
        trained_on: str, guidance_rescale: str, request: gr.Request,
    ) -> Iterator[list[tuple[str, str]]]:  # fmt: skip
        """Paints; adapters: {"name in the library": strength}; 0 as steps, guidance or size: as suits. Returns PNG files."""
        visitor = self.app.visitor(request)
        if not isinstance(adapters or {}, dict):
            raise SVFitError(
                f'adapters is {adapters!r}: write {{"dog": 0.8}}, names in the library with their strengths.'
            )
        order = Order(
            prompt=prompt,
            base=base or AS_TRAINED,
            adapters=[
                (self.app.find_adapter(visitor, name), _number(f"strength of {name!r}", strength))
                for name, strength in (adapters or {}).items()
            ],
            negative_prompt=negative_prompt or "",
            num_images=_whole("num_images", num_images),
            seed=_whole("seed", seed),
            num_inference_steps=_whole("num_inference_steps", num_inference_steps or 0) or None,
            guidance_scale=_number("guidance_scale", guidance_scale or 0) or None,
            width=_whole("width", width or 0) or None,
            height=_whole("height", height or 0) or None,
            scheduler=scheduler or None,
            clip_skip=_whole("clip_skip", clip_skip) if clip_skip else None,
            autoencoder=(pretrained_vae_model_name_or_path or "").strip(),
            quantize=quantize or None,
            trained_on=(trained_on or "").strip(),
            guidance_rescale=_number("guidance_rescale", guidance_rescale) if guidance_rescale else None,
        )
        painting = self.app.paintings.begin(visitor, order, alone=False, grace=API_GRACE)
        seen, shown = 0, -1
        try:
            while not painting.over:
                seen = painting.look(seen)
                if len(painting.made) > shown:
                    shown = len(painting.made)
                    yield [(self.app.serve(one.path), pictures.caption(one.settings)) for one in painting.made]
        finally:
            painting.set()  # also where the program has gone
        if painting.failure is not None:
            raise painting.failure
        yield [(self.app.serve(one.path), pictures.caption(one.settings)) for one in painting.made]

    @for_programs
    def stop_painting(self, request: gr.Request) -> int:
        """Stops what this client paints, within one denoising step; returns how many orders that were."""
        working = self.app.paintings.of(self.app.visitor(request))
        for painting in working:
            painting.set()
        return len(working)

    @for_programs
    def list_adapters(self, request: gr.Request) -> list[dict[str, Any]]:
        """The adapters of the library, then those that all may paint with: name, words, base, bytes."""
        found, _ = library.entries(self.app.visitor(request).library)
        names = [Path(choice).name for choice in self.app.offers() if choice.startswith("offered/")]
        found += [library.entry(library_of(self.app.workspace, ""), name) for name in names]
        return [
            {
                "name": entry.name,
                "instance_prompt": entry.instance_prompt,
                "base_model": entry.base_model,
                "bytes": entry.description["file_bytes"],
            }
            for entry in found
        ]

    @for_programs
    def import_adapter(self, file: str, request: gr.Request) -> str:
        """Puts an adapter file into the library; returns its name there."""
        return library.add(self.app.visitor(request).library, Path(file))

    @for_programs
    def download_adapter(self, name: str, request: gr.Request) -> str:
        """The file of an adapter of the library."""
        return self.app.serve(library.find(self.app.visitor(request).library, name))

    @for_programs
    def train(
        self, photos: list[str], name: str, word: str, kind: str, base: str, preset: str, steps: float,
        options: dict[str, Any] | None, request: gr.Request,
    ) -> str:  # fmt: skip
        """Queues a run on the given photos; returns its id. steps: 0 takes the preset's; options: {"clip_skip": 1}, as in Advanced."""
        visitor = self.app.visitor(request)
        advanced = _advanced(options or {})
        if steps:
            advanced["max_train_steps"] = str(_whole("steps", steps))
        visitor.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".photos-", dir=visitor.folder) as place:  # those on the page stay as they are
            if refused := add_photos(Path(place), [Path(photo) for photo in photos or []]):
                raise SVFitError(" ".join(refused))
            asked = self.draft.options(Path(place), word, kind, base, preset or None, *advanced.values())
            return self.app.jobs.submit(visitor, name, asked, Path(place)).id

    @for_programs
    def run_state(self, id: str, request: gr.Request) -> dict[str, Any]:
        """How a run is: state, step, of, loss, message, adapter (its name in the library once it is there)."""
        job = self.app.jobs.find(self.app.visitor(request), id)
        progress = sum_up(self.app.jobs.run_folder(job))
        return {
            "state": self.app.jobs.state(job),
            "step": progress.step,
            "of": progress.of,
            "loss": progress.losses[-1][1] if progress.losses else None,
            "message": progress.message or self.app.jobs.complaint(job) or None,
            "adapter": result.stem if (result := self.app.jobs.result(job)) else None,
        }

    @for_programs
    def stop_run(self, id: str, request: gr.Request) -> str:
        """Stops a run, which saves what it has learnt; returns its state."""
        job = self.app.jobs.find(self.app.visitor(request), id)
        self.app.jobs.stop(job)
        return self.app.jobs.state(job)

    @for_programs
    def resume_run(self, id: str, request: gr.Request) -> str:
        """Lets a run that was stopped or cut off go on; returns its state."""
        job = self.app.jobs.find(self.app.visitor(request), id)
        self.app.jobs.resume(job)
        return self.app.jobs.state(job)


def build_endpoints(app: App) -> None:
    """The endpoints, on fields that are not shown: clients learn names, types and defaults from them."""
    ends = Endpoints(app)
    with gr.Group(visible=False):
        go = gr.Button()
        name, id = gr.Textbox(label="name"), gr.Textbox(label="id")
        word, kind = gr.Textbox("sks", label="word"), gr.Textbox(label="kind")
        file = gr.File(label="file", file_types=[".safetensors"])
        photos = gr.File(label="photos", file_count="multiple", file_types=["image"])
        preset, steps = gr.Textbox("balanced", label="preset"), gr.Number(0, label="steps")
        paint = [
            gr.Textbox(label="prompt"),
            gr.JSON({}, label="adapters"),
            gr.Textbox(AS_TRAINED, label="base"),
            gr.Textbox("", label="negative_prompt"),
            gr.Number(1, label="num_images"),
            gr.Number(0, label="seed"),
            gr.Number(0, label="num_inference_steps"),
            gr.Number(0, label="guidance_scale"),
            gr.Number(0, label="width"),
            gr.Number(0, label="height"),
            gr.Textbox("", label="scheduler"),
            gr.Textbox("", label="clip_skip"),
            gr.Textbox("", label="pretrained_vae_model_name_or_path"),
            gr.Textbox("", label="quantize"),
            gr.Textbox("", label="trained_on"),
            gr.Textbox("", label="guidance_rescale"),
        ]
        options = gr.JSON({}, label="options")
        base = gr.Textbox(DEFAULT_BASE, label="base")
        gallery, text, json, download, count = gr.Gallery(), gr.Textbox(), gr.JSON(), gr.File(), gr.Number(precision=0)
    for endpoint, inputs, output in (
        (ends.generate, paint, gallery),
        (ends.stop_painting, [], count),
        (ends.list_adapters, [], json),
        (ends.import_adapter, [file], text),
        (ends.download_adapter, [name], download),
        (ends.train, [photos, name, word, kind, base, preset, steps, options], text),
        (ends.run_state, [id], json),
        (ends.stop_run, [id], text),
        (ends.resume_run, [id], text),
    ):
        go.click(
            endpoint, inputs, output, api_name=endpoint.__name__, api_description=endpoint.__doc__,
            concurrency_limit=None,
        )  # fmt: skip


def _number(name: str, value: Any) -> float:
    """A finite number; JSON lets programs send anything."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise SVFitError(f"{name} is {value!r}: it must be a number.")
    return number


def _whole(name: str, value: Any) -> int:
    number = _number(name, value)
    if number != int(number):
        raise SVFitError(f"{name} is {value!r}: it must be a whole number.")
    return int(value)


def _advanced(options: Any) -> dict[str, Any]:
    """The fields of Advanced for options that a program gives by name.  Raises SVFitError for what they cannot hold."""
    if not isinstance(options, dict):
        raise SVFitError(f'options is {options!r}: write {{"clip_skip": 1}}, names of options with their values.')
    fields: dict[str, Any] = dict.fromkeys(ADVANCED)
    for name, value in options.items():
        if name not in ADVANCED:
            raise SVFitError(f"there is no option called {name!r} here: use {', '.join(ADVANCED)}.")
        if name in NUMBERS and value is not None:
            _number(name, value)
        elif name == "validation_prompts" and isinstance(value, list):
            value = "\n".join(map(str, value))
        elif name == "quantize" and value not in (None, *BITS):
            raise SVFitError(f"quantize is {value!r}: use one of {', '.join(filter(None, BITS.values()))}.")
        elif not isinstance(value, str | int | float | None):
            raise SVFitError(f"{name} is {value!r}: write a text, a number, true or false.")
        fields[name] = value if value is None or isinstance(value, bool) else str(value)
    return fields
