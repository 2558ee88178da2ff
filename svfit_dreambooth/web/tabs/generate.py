"""The tab that paints: prompt, adapters with a strength each, pictures, and their settings taken up again."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.orders import AS_TRAINED
from svfit_dreambooth.web.tabs.cards import readable
from svfit_dreambooth.web.tabs.compare import AXES, GRID, MODES, NOTHING
from svfit_dreambooth.web.tabs.drawing import canvas
from svfit_dreambooth.web.tabs.form import BITS
from svfit_dreambooth.web.tabs.gallery import UNSELECTED
from svfit_dreambooth.web.tabs.mistakes import told
from svfit_dreambooth.web.tabs.painting import IDLE, Painter
from svfit_dreambooth.web.tabs.reuse import ONCE, OWN_SAMPLER, SAMPLERS

PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
# a dragged slider tells of every place on its way: what counts is where it came to rest
LAST: dict[str, Any] = {"queue": False, "trigger_mode": "always_last"}
LEFT: dict[type, tuple[str, ...]] = {  # kind of a field -> when a person is done with it
    gr.Textbox: ("blur",), gr.Number: ("blur",), gr.Slider: ("input",), gr.Checkbox: ("input",), gr.Dropdown: ("input", "blur"),
}  # fmt: skip
OPEN: dict[str, Any] = {"interactive": True}  # which Gradio cannot see where only a rendered event reads a field


@dataclass
class GenerateTab:
    """What other tabs need of this one."""

    adapters: gr.Dropdown
    painting: Painter


def build_generate(app: App, page: gr.Blocks) -> GenerateTab:
    painting = Painter(app)
    offered, value = painting.at_the_start()
    shown = gr.State([])  # names of the visitor's pictures in the gallery
    selected = gr.State([])  # names of those that are chosen among them
    filled = gr.State("")  # what was last written into the prompt for the person
    taken_up = gr.State({})  # strengths of adapters that a picture's settings ask for, or that were chosen before
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            prompt = gr.Textbox(
                label="Prompt", lines=3, max_lines=8, placeholder="a photo of sks dog on the beach", elem_id="prompt",
                info="Say the subject's own words; what else is in the picture is up to you. Ctrl+Enter paints.",
            )  # fmt: skip
            before = gr.Dropdown(
                [], label="Earlier prompts", info="Choose one to write it above again.", elem_id="said-before", **OPEN,
            )  # fmt: skip
            adapters = gr.Dropdown(
                offered, value=value, multiselect=True, label="Adapters", elem_id="adapters", **OPEN,
                info="The subjects that it knows. None: the base model alone.",
            )  # fmt: skip

            @gr.render(
                inputs=[adapters, taken_up],
                triggers=[page.load, adapters.change, taken_up.change],
                show_progress="hidden",
            )
            def strengths(values: list[str] | None, wanted: dict[str, float], request: gr.Request) -> None:
                visitor, rows = app.visitor(request), []
                for value in values or []:
                    try:
                        file = app.adapter_file(visitor, value)
                        words = library.entry(file.parent, file.stem).instance_prompt
                        words = readable(words).replace(
                            "](", "]\u200b("
                        )  # a stranger's file puts no links into the page
                    except SVFitError as error:
                        raise told(error) from None
                    row = _strength(file.stem, words, wanted.get(value, 1), (value, str(wanted.get(value))))
                    row.input(painting.remember_strength, [gr.State(value), row], None, **LAST, **PRIVATE)
                    rows.append(row)
                for trigger in (paint.click, prompt.submit):
                    trigger(
                        painting.generate,
                        [*form, *rows],
                        [status, gallery, shown, selected, details, seed, paint, stop, *actions, whole],
                        concurrency_limit=None,
                        **PRIVATE,
                    ).then(painting.said_before, None, before, **PRIVATE)

            upload = gr.UploadButton("Use an adapter file once", size="sm", file_types=[".safetensors"])
            with gr.Row():
                count = gr.Slider(
                    1, 12, 4, step=1, label="Pictures", min_width=130, elem_id="count", buttons=[], **OPEN
                )
                steps = gr.Textbox(
                    label="Sampling steps", placeholder="as suits the base", max_lines=1, min_width=130,
                    elem_id="steps", **OPEN,
                )  # fmt: skip
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, min_width=110, elem_id="seed", **OPEN)
                new_seed = gr.Checkbox(True, label="A new seed each time", min_width=130, elem_id="new-seed", **OPEN)
            mode = gr.Radio(list(MODES), value=ONCE, label="Compare", elem_id="mode", **OPEN)
            axes: list[Any] = []
            with gr.Group(visible=False) as grid:
                for side in ("Rows", "Columns"):
                    with gr.Row():
                        axis = gr.Dropdown(list(AXES), value=NOTHING, label=side, min_width=110, **OPEN)
                        values = gr.Textbox(label="Values", placeholder="0.5, 1", max_lines=1, min_width=110, **OPEN)
                    axis.input(lambda name: AXES[name], axis, values, queue=False, **PRIVATE)
                    axes += [axis, values]
            mode.change(lambda mode: gr.Group(visible=mode == GRID), mode, grid, queue=False, **PRIVATE)
            with gr.Accordion("Begin with a picture", open=False, elem_id="begin"):
                gr.Markdown(
                    "Draw over what alone is to be painted anew; nothing drawn: all of it is.", elem_classes="note"
                )
                begin = canvas(
                    label="Picture to begin with", show_label=False, height=300,
                    sources=("upload", "clipboard"), transforms=("crop",),
                    brush=gr.Brush(default_size=24, colors=[("#ffffff", 0.7)], color_mode="fixed"), **OPEN,
                )  # fmt: skip
                anew = gr.Slider(0.05, 1, 0.6, step=0.05, label="How much is painted anew", info="Denoising strength: 1 keeps nothing.", **OPEN)  # fmt: skip
            with gr.Accordion("More settings", open=False, elem_id="more-settings"):
                base = gr.Dropdown(
                    [AS_TRAINED], value=AS_TRAINED, label="Base model", allow_custom_value=True, elem_id="base", **OPEN,
                    info="The model that paints. Type a hub id such as owner/name for another one: it is downloaded.",
                )  # fmt: skip
                negative = gr.Textbox(label="Negative prompt", placeholder="what should not be there", lines=1, **OPEN)
                sampler = gr.Dropdown(
                    [OWN_SAMPLER, *SAMPLERS], value=OWN_SAMPLER, label="Sampler", elem_id="sampler", **OPEN
                )
                with gr.Row():
                    width = gr.Textbox(label="Width", placeholder="as suits", max_lines=1, min_width=90, **OPEN)
                    height = gr.Textbox(label="Height", placeholder="as suits", max_lines=1, min_width=90, **OPEN)
                with gr.Row():
                    guidance = gr.Textbox(label="Guidance", placeholder="as suits", max_lines=1, min_width=120, info="How much the words count.", **OPEN)  # fmt: skip
                    rescale = gr.Textbox(label="Guidance rescale", placeholder="as suits", max_lines=1, min_width=120, info="0 to 1, for softer colours.", **OPEN)  # fmt: skip
                with gr.Row():
                    skip = gr.Textbox(label="Clip skip", placeholder="as trained", max_lines=1, min_width=90, info="1 is what others call 2.", **OPEN)  # fmt: skip
                    autoencoder = gr.Textbox(label="Another autoencoder (VAE)", placeholder="the base's own", max_lines=1, min_width=150, info="A hub id, or a model here.", **OPEN)  # fmt: skip
                with gr.Row():
                    bits = gr.Dropdown(list(BITS), value=next(iter(BITS)), label="Base in fewer bits", min_width=110, info="For large transformers.", **OPEN)  # fmt: skip
                    trained_on = gr.Textbox(label="Trained on", placeholder="the base model above", max_lines=1, min_width=150, info="For a base that was distilled from it.", **OPEN)  # fmt: skip
                relatives = gr.Checkbox(False, label="Allow adapters of a related base, such as a fine-tune", **OPEN)
        with gr.Column(scale=6, min_width=300):
            with gr.Row(elem_classes="in-sight top"):
                paint = gr.Button("Generate", variant="primary", elem_id="generate-button", scale=3, min_width=140)
                stop = gr.Button("Stop", interactive=False, elem_id="stop-button", scale=1, min_width=80)
            status = gr.HTML(IDLE, elem_id="generate-status")
            gallery = gr.Gallery(
                label="Pictures", show_label=False, elem_classes="pictures", elem_id="gallery", interactive=False,
                object_fit="contain", height=460, columns=4, buttons=["download", "fullscreen"],
            )  # fmt: skip
            details = gr.HTML(UNSELECTED, elem_id="settings")
            with gr.Row(elem_classes="actions"):
                reuse = gr.Button("Reuse these settings", size="sm", interactive=False, elem_id="reuse")
                download = gr.DownloadButton("Download PNG", size="sm", interactive=False, elem_id="download")
                cover = gr.Button("Use as the adapter's picture", size="sm", interactive=False)
                remove = gr.Button("Delete", size="sm", interactive=False)
            whole = gr.DownloadButton(
                "Download as one sheet", size="sm", visible=False, elem_id="download-sheet"
            )  # fmt: skip
            with gr.Row(elem_classes="actions"):
                several = gr.Checkbox(False, label="Choose several", elem_id="several", min_width=160, **OPEN)
                words = gr.Textbox(
                    placeholder="Find earlier pictures: words of the prompt, an adapter, a seed", show_label=False,
                    label="Find earlier pictures", container=False, max_lines=1, scale=3, elem_id="find", **OPEN,
                )  # fmt: skip
                more = gr.Button("Show more", size="sm", elem_id="more")
            with gr.Row(elem_classes="actions"):
                from_png = gr.UploadButton("Settings from a PNG file", size="sm", file_types=[".png"])
    form = [
        prompt,
        negative,
        base,
        adapters,
        count,
        steps,
        guidance,
        seed,
        new_seed,
        width,
        height,
        mode,
        relatives,
        sampler,
        begin,
        anew,
        skip,
        rescale,
        autoencoder,
        bits,
        trained_on,
        *axes,
    ]
    actions = [reuse, download, cover, remove]

    opened = page.load(
        painting.open_page, None, [base, adapters, gallery, shown, prompt, filled, taken_up, stop], **PRIVATE
    )
    opened.then(
        painting.follow,
        None,
        [status, gallery, shown, selected, details, seed, paint, stop, *actions, whole],
        concurrency_limit=None,
        **PRIVATE,
    )
    kept: list[Any] = [
        prompt, negative, count, steps, guidance, seed, new_seed, width, height, sampler, base, skip, rescale, autoencoder, bits,
        trained_on, relatives,
    ]  # fmt: skip
    page.load(painting.recall, None, kept[1:], **PRIVATE)
    for field in kept:
        for leave in LEFT[type(field)]:
            getattr(field, leave)(painting.remember, kept, None, **LAST, **PRIVATE)
    adapters.change(painting.fill_in, [adapters, prompt, filled], [prompt, filled], **PRIVATE)
    upload.upload(painting.upload, [upload, adapters], adapters, **PRIVATE)
    stop.click(painting.stop, None, [status, stop], queue=False, **PRIVATE)
    kept_pictures, pictured = painting.pictures, [selected, details, *actions]
    gallery.select(kept_pictures.select, [shown, selected, several], [gallery, *pictured], **PRIVATE)
    several.input(kept_pictures.choose_several, [several, shown], [gallery, *pictured], **PRIVATE)
    fields = [
        prompt, negative, base, adapters, steps, guidance, seed, new_seed, width, height, mode, count, sampler, skip,
        rescale, autoencoder, bits, trained_on, begin, anew, taken_up,
    ]  # fmt: skip
    for taken in (
        reuse.click(painting.reuse, selected, fields, **PRIVATE),
        from_png.upload(painting.reuse_file, from_png, fields, **PRIVATE),
        before.input(lambda said: said, before, prompt, queue=False, **PRIVATE),
    ):
        taken.then(painting.remember, kept, None, queue=False, **PRIVATE)
    remove.click(kept_pictures.delete, [selected, shown], [gallery, shown, *pictured], **PRIVATE)
    cover.click(kept_pictures.cover, selected, None, **PRIVATE)
    words.submit(kept_pictures.find, words, [gallery, shown, *pictured], **PRIVATE)
    more.click(kept_pictures.more, [words, shown], [gallery, shown, *pictured], **PRIVATE)
    page.load(painting.said_before, None, before, **PRIVATE)
    return GenerateTab(adapters, painting)


def _strength(name: str, words: str, value: float, key: Any) -> gr.Slider:
    """The slider of one adapter; a picture that asks for more than is usual gets it."""
    return gr.Slider(
        min(0, value), max(1.5, value), value, step=0.05, label=f"Strength of {name}", interactive=True,
        info=f"answers to “{words}”" if words else None, elem_classes="strength", key=key,
    )  # fmt: skip
