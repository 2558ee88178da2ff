"""The tab that trains: photos, words, settings, and the runs as they go."""

from typing import Any

import gradio as gr

from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.training.presets import DEFAULT, preset_names
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.laid_out import bundled_subjects
from svfit_dreambooth.web.rooms.progress import Progress
from svfit_dreambooth.web.tabs.curve import loss_plot
from svfit_dreambooth.web.tabs.draft import Draft
from svfit_dreambooth.web.tabs.drawing import COLOUR, canvas
from svfit_dreambooth.web.tabs.form import ADVANCED, BITS
from svfit_dreambooth.web.tabs.generate import PRIVATE, GenerateTab
from svfit_dreambooth.web.tabs.run_list import ON_LOAD
from svfit_dreambooth.web.tabs.runs import NONE, Runs

PRESETS = {
    "fast": "a first look",
    "balanced": "for most subjects",
    "faithful": "closer to the photos, slower",
    "style": "a manner of drawing instead of a thing",
}
EVERY = 1.5  # seconds between looks at a run
LIVE: dict[str, Any] = {**PRIVATE, "queue": False}


def build_train(app: App, page: gr.Blocks, tabs: gr.Tabs, generate_tab: GenerateTab) -> None:
    draft = Draft(app)
    runs = Runs(app, draft)
    selected, seen, removed, chosen, looked = (gr.State(None) for _ in range(5))
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            drop = gr.File(
                label="Photos: 3 to 10 of one subject", file_count="multiple", file_types=["image"],
                height=170, elem_id="photos",
            )  # fmt: skip
            thumbs = gr.Gallery(
                visible=False, show_label=False, elem_classes="photos", elem_id="thumbs", interactive=False,
                allow_preview=False, object_fit="cover", columns=6, height="auto", buttons=[],
            )  # fmt: skip
            remarks = gr.Markdown(elem_classes="note", elem_id="photo-remarks")
            with gr.Row(elem_classes="actions", visible=False) as photo_actions:
                rotate = gr.Button("Rotate", size="sm", interactive=False)
                remove = gr.Button("Remove", size="sm", interactive=False)
                clear = gr.Button("Remove all", size="sm")
            said_of = gr.Textbox(
                label="Caption", visible=False, max_lines=3, elem_id="caption", interactive=True,
                placeholder="as below", info="What this photo shows, with its word, in place of the prompt below.",
            )  # fmt: skip
            with gr.Accordion("Mask", open=False, visible=False, elem_id="mask") as masking:
                gr.Markdown("Draw over the subject: what is not drawn over is not learnt. Nothing drawn: all of it is learnt.", elem_classes="note")  # fmt: skip
                editor = canvas(
                    show_label=False, height=420, canvas_size=(512, 512), sources=(), transforms=(),
                    brush=gr.Brush(default_size=24, colors=[(COLOUR, 0.6)], color_mode="fixed"), interactive=True,
                )  # fmt: skip
                draw = gr.Button("Keep this mask", size="sm", elem_id="keep-mask")
            with gr.Accordion("What training sees", open=False, visible=False, elem_id="windows") as seeing:
                windows = gr.Gallery(
                    show_label=False, interactive=False, allow_preview=False, object_fit="contain", columns=4,
                    height="auto", buttons=[], elem_id="window-pictures",
                )  # fmt: skip
            gr.HTML("<div class='note'>No photos at hand? Take those of a toy:</div>")
            with gr.Row(elem_classes="toys"):
                toy = gr.Dropdown(
                    bundled_subjects(), value="dog_patch", show_label=False, container=False, label="Toy", min_width=120
                )
                take = gr.Button("Take its photos", size="md", min_width=130, elem_id="take-toy")
            with gr.Group():
                name = gr.Textbox(
                    label="Name", placeholder="my-dog", info="What the adapter and its file are called.", elem_id="name"
                )
                with gr.Row():
                    word = gr.Textbox(
                        "sks", label="Its word", min_width=120, elem_id="word",
                        info="A rare word to call it by: its trigger word.",
                    )  # fmt: skip
                    kind = gr.Textbox(
                        label="What it is", placeholder="dog", min_width=120, elem_id="kind",
                        info="A plain word: dog, mug.",
                    )  # fmt: skip
                shown_prompt = gr.Markdown(value=_say_prompt("sks", ""), elem_classes=["note", "inset"])
            base = gr.Dropdown(
                [DEFAULT_BASE], value=DEFAULT_BASE, label="Base model", allow_custom_value=True, elem_id="train-base",
                info="The model that learns. Type a hub id such as owner/name for another one: it is downloaded.",
            )  # fmt: skip
            preset = gr.Radio(
                [(f"{name}: {PRESETS[name]}" if name in PRESETS else name, name) for name in preset_names()],
                value=DEFAULT, label="Preset",
                elem_id="preset",
            )  # fmt: skip
            advanced = _advanced()
            with gr.Row(elem_classes="in-sight"):
                estimate = gr.Button("What will it take?", size="md", min_width=170, scale=1)
                start = gr.Button(
                    "Start training", variant="primary", size="md", min_width=170, scale=2, elem_id="start-training"
                )
            estimated = gr.Markdown(elem_classes="note", elem_id="estimate")
        with gr.Column(scale=6, min_width=300):
            status = gr.HTML(NONE, elem_id="run-status")
            with gr.Row(elem_classes="actions"):
                try_it = gr.Button("Try it", size="sm", interactive=False, elem_id="try-run")
                download = gr.DownloadButton("Download", size="sm", interactive=False, elem_id="download-run")
                again = gr.Button("Same settings again", size="sm", interactive=False, elem_id="again")
            listed = gr.HTML(elem_id="runs", js_on_load=ON_LOAD, apply_default_css=False)
            with gr.Row(visible=False, elem_classes="undo") as undo_row:
                said = gr.Markdown(elem_classes="note")
                undo = gr.Button("Undo", size="sm", elem_id="undo-remove-run", min_width=80, scale=0)
            curve = loss_plot(Progress(), False)
            slider = gr.Slider(
                0, 1, 0, step=1, label="Looks on the way", info="The pictures of earlier steps.", visible=False,
                elem_id="looks", interactive=True, buttons=[],
            )  # fmt: skip
            look = gr.HTML(elem_id="look", elem_classes="sheet")
            use_step = gr.Button("This step is the adapter", size="sm", visible=False, elem_id="use-step")
            sheet = gr.HTML(elem_id="sheet")
            with gr.Accordion("Log", open=False):
                log = gr.HTML()
    live = [listed, seen, status, curve, slider, looked, look, use_step, sheet, log, try_it, download, again]
    panel = [chosen, *live]
    shown = [thumbs, remarks, selected, photo_actions]
    words = [word, kind, base, preset, *advanced]

    remembered, trained_at = [name, *words], [base, advanced[ADVANCED.index("resolution")]]
    page.load(draft.show, None, [*shown, *remembered], **PRIVATE)
    page.load(lambda: gr.Dropdown(app.studio.bases.for_training()), None, base, **PRIVATE)
    page.load(runs.open_page, chosen, panel, **PRIVATE)
    drop.upload(draft.add, [drop, *trained_at], [drop, *shown], **PRIVATE)
    thumbs.select(draft.select, None, [selected, rotate, remove, said_of, masking, seeing], **PRIVATE)
    masking.expand(draft.edit, selected, editor, **PRIVATE)
    cut = [selected, *trained_at, advanced[ADVANCED.index("seed")]]
    seeing.expand(draft.windows, cut, windows, **PRIVATE)
    said_of.blur(draft.say, [said_of, selected, *trained_at], [thumbs, remarks], **PRIVATE)
    draw.click(draft.draw, [editor, selected, *trained_at], [thumbs, remarks], **PRIVATE)
    selected.change(
        lambda one: [gr.skip()] * 3 if one is not None else [gr.Textbox(visible=False), *[gr.Accordion(visible=False)] * 2],
        selected, [said_of, masking, seeing], **LIVE,
    )  # fmt: skip
    rotate.click(draft.rotate, [selected, *trained_at], [*shown, masking, seeing], **PRIVATE)
    remove.click(draft.remove, [selected, *trained_at], shown, **PRIVATE)
    clear.click(draft.clear, None, shown, **PRIVATE)
    take.click(draft.take_bundled, [toy, trained_at[1]], [*shown, name, word, kind, base], **PRIVATE)
    for changed in (trained_at[0].change, trained_at[1].blur):
        changed(draft.remark, trained_at, remarks, **LIVE)
    for field in remembered:
        for leave in (field.blur, field.input) if field is base else [getattr(field, "blur", field.input)]:
            leave(draft.remember, remembered, None, **LIVE)
    for field in (word, kind):
        field.change(_say_prompt, [word, kind], shown_prompt, **LIVE)
    estimate.click(runs.estimate, words, estimated, **{**PRIVATE, "show_progress": "minimal"})
    start.click(runs.submit, [name, *words], panel, **PRIVATE)
    # "multiple": a click while another one is being answered, of whichever row, counts too
    listed.click(runs.act, None, [*panel, removed, undo_row, said], trigger_mode="multiple", **LIVE)
    undo.click(runs.undo, removed, [*panel, removed, undo_row], **PRIVATE)
    try_it.click(runs.try_it, chosen, [tabs, generate_tab.adapters], **PRIVATE)
    again.click(runs.again, chosen, [*shown, *remembered], **PRIVATE)
    slider.input(runs.look, [chosen, slider], [look, use_step, looked], **LIVE)
    use_step.click(runs.use_step, [chosen, looked], live, **PRIVATE)
    gr.Timer(EVERY).tick(runs.tick, [chosen, seen, looked], live, **LIVE)


def _advanced() -> list[Any]:
    """The fields that most people leave alone, in the order of ADVANCED."""
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        with gr.Row():
            steps = _field("Steps", "the preset's", elem_id="train-steps")
            rate = _field("Learning rate", "the preset's")
            rank = _field("Rank", "full", info="Values a layer.")
        with gr.Row():
            resolution = _field("Resolution", "the base's", info="Pixels.")
            batch = _field("Batch", "the preset's", info="Pictures a step.")
            seed = _field("Seed", "0", info="Fixes all chance.")
        with gr.Row():
            every = _field("Pictures on the way", "as suits", info="Steps between them.", elem_id="train-every")
            painting = _field("Their steps", "as suits", info="Denoising steps.", elem_id="train-painting")
        prompts = gr.Textbox(
            label="Prompts of those pictures", placeholder="four places where it has no photo", lines=2, max_lines=6,
            info="One a line, with its word.",
        )  # fmt: skip
        precision = gr.Radio(["no", "fp16", "bf16"], value="no", label="Mixed precision", info="fp16 or bf16 halve the memory on a GPU.")  # fmt: skip
        text = gr.Checkbox(False, label="Teach the text encoder too")
        flip = gr.Checkbox(False, label="Mirror photos at random; not for writing or faces")
        checkpointing = gr.Checkbox(False, label="Less memory, slower (gradient checkpointing)")
        prior = gr.Checkbox(
            False, label="Keep others of its kind apart (prior preservation): about twice as long",
        )  # fmt: skip
        keep = gr.Checkbox(
            False, label="Leave the rest as it is (held to what the model paints now): 1.7 times as long",
        )  # fmt: skip
        with gr.Row():
            skip = _field("Clip skip", "0", info="Last layers of CLIP left out: 1 is what others call 2.")
            vae = gr.Textbox(
                label="Another autoencoder (VAE)", placeholder="the base's own", max_lines=1, min_width=150,
                info="A hub id, or one of the models here.",
            )  # fmt: skip
        bits = gr.Radio(
            list(BITS), value=next(iter(BITS)), label="Base in fewer bits", info="For transformer bases larger than the memory."
        )  # fmt: skip
    return [
        steps, rate, rank, resolution, batch, every, painting, seed, prompts, precision, text, flip, checkpointing, prior,
        keep, skip, vae, bits,
    ]  # fmt: skip


def _field(label: str, placeholder: str, **more: Any) -> gr.Textbox:
    """A number that may be left empty."""
    return gr.Textbox(label=label, placeholder=placeholder, max_lines=1, min_width=110, **more)


def _say_prompt(word: str, kind: str) -> str:
    """What the words come to, for reading."""
    plain = "".join(letter for letter in Draft.prompt_for(word or "…", kind or "…") if letter not in "`\n")
    return f"Your photos will be called `{plain}`, and so will your prompts."
