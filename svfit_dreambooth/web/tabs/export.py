"""An adapter as a LoRA for other programs: its size first, then the file."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import gradio as gr

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms import library
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.libraries import libraries
from svfit_dreambooth.web.rooms.workspace import place_to_serve
from svfit_dreambooth.web.tabs.generate import PRIVATE
from svfit_dreambooth.web.tabs.mistakes import plainly, whole

LAYOUTS = {"for A1111, Forge, ComfyUI (kohya)": "kohya", "for diffusers": "diffusers"}


class LoraMaker:
    """The handlers; the base is the studio's."""

    def __init__(self, app: App):
        self.app = app

    @plainly
    def plan(self, name: str | None, layout: str, rank: str, request: gr.Request) -> tuple[str, Any]:
        """What the LoRA would hold and weigh; the file made before is taken back."""
        libraries()
        from svfit_dreambooth.adapter.file import read_adapter
        from svfit_dreambooth.sharing.export import layer_shapes
        from svfit_dreambooth.sharing.lora_plan import plan_lora

        path = library.find(self.app.visitor(request).library, name or "")
        with self.app.studio.bare(path) as base:
            adapter = read_adapter(path)
            plan = plan_lora(adapter.shifts, layer_shapes(base, adapter), _layout(layout), rank=_rank(rank))
        return _lines(plan.lines()), gr.DownloadButton(value=None, interactive=False)

    @plainly
    def make(
        self, name: str | None, layout: str, rank: str, without_words: bool, request: gr.Request
    ) -> tuple[str, Any]:
        """Writes it, compared with the adapter; then it can be downloaded."""
        libraries()
        from svfit_dreambooth.sharing.export import export_lora

        path = library.find(self.app.visitor(request).library, name or "")
        output = place_to_serve(self.app.workspace, f"{path.stem}-lora.safetensors")
        said: list[str] = []
        with self.app.studio.bare(path) as base:
            done = export_lora(
                path,
                base,
                output,
                _layout(layout),
                rank=_rank(rank),
                without_words=without_words,
                on_plan=lambda plan: said.extend(plan.lines()),
            )
        said.append(f"read back and compared with the adapter: {done.measured_error:.1e} off in all")
        for embedding in done.embeddings:
            said.append(
                f"the learned word {embedding.word.word} is {embedding.path.name}, for the folder embeddings: in other "
                f"programs write {embedding.called} in its place, in ComfyUI embedding:{embedding.called}"
            )
        if done.embeddings:
            output = _packed(output.with_suffix(".zip"), [done.path, *(each.path for each in done.embeddings)])
        return _lines(said), gr.DownloadButton(value=str(output), interactive=True)


def build_export(app: App) -> gr.Dropdown:
    """The section; returns the dropdown of adapters, which the tab keeps full."""
    maker = LoraMaker(app)
    with gr.Accordion("Make a LoRA of one, for other programs", open=False, elem_id="lora"):
        gr.Markdown(
            "An adapter works wherever this program does. Other programs read a LoRA, which is far larger: a full one "
            "is exact, a shorter one comes close.", elem_classes="note",
        )  # fmt: skip
        with gr.Row():
            adapter = gr.Dropdown([], label="Adapter", interactive=True)
            layout = gr.Dropdown(list(LAYOUTS), value=next(iter(LAYOUTS)), label="Made", interactive=True)
            rank = gr.Textbox(label="Rank", placeholder="all: exact; fewer: smaller", max_lines=1)
        without_words = gr.Checkbox(False, label="Leave out learned words, which come as files of their own")
        said = gr.Markdown(elem_classes="note")
        with gr.Row(elem_classes="actions"):
            plan = gr.Button("How large?", size="sm")
            make = gr.Button("Make it", size="sm")
            download = gr.DownloadButton("Download", size="sm", interactive=False)
    shown = {**PRIVATE, "show_progress": "minimal"}
    plan.click(maker.plan, [adapter, layout, rank], [said, download], **shown)
    make.click(maker.make, [adapter, layout, rank, without_words], [said, download], **shown)
    return adapter


def _packed(path: Path, files: Sequence[Path]) -> Path:
    """Files that belong together, as one."""
    with ZipFile(path, "w") as packed:
        for file in files:
            packed.write(file, file.name)
    return path


def _layout(name: str) -> Any:
    if name not in LAYOUTS:
        raise SVFitError(f"there is no layout called {name!r}: choose one of those offered.")
    return LAYOUTS[name]


def _rank(text: str) -> int | None:
    return whole("Rank", text)


def _lines(lines: list[str]) -> str:
    return "\n".join(f"- {html.escape(line.strip())}" for line in lines)
