"""What the page shows of runs, and what its buttons do with them."""

import html
import time
from typing import Any

import gradio as gr

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.measures import in_words, table
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.jobs import Job
from svfit_dreambooth.web.rooms.progress import Progress, sum_up
from svfit_dreambooth.web.rooms.workspace import Visitor
from svfit_dreambooth.web.tabs.curve import loss_plot
from svfit_dreambooth.web.tabs.draft import Draft, duration
from svfit_dreambooth.web.tabs.form import in_form_words, worded
from svfit_dreambooth.web.tabs.mistakes import plainly

NONE = (
    '<div class="empty"><b>No runs yet.</b><br>Add photos, say what they show, and press Start training. '
    "You may close the page meanwhile: the run goes on.</div>"
)
CHOOSE = '<div class="empty">Choose a run in the list.</div>'
WORDS = {
    "queued": "waiting",
    "running": "running",
    "stopping": "stopping, what it learnt is being saved",
    "finished": "finished",
    "stopped": "stopped",
    "failed": "failed",
    "cut off": "cut off",
}
OVER = ("finished", "stopped", "failed", "cut off")


class Runs:
    """The handlers; all that is known stands in the folders of the runs."""

    def __init__(self, app: App, draft: Draft):
        self.app = app
        self.draft = draft

    @plainly
    def submit(self, request: gr.Request, name: str, *form: Any) -> tuple[Any, ...]:
        """Puts a run into the queue; then the list with it selected, and the panel."""
        visitor = self.app.visitor(request)
        before = {job.id for job in self.app.jobs.listed(visitor)}
        with worded():
            job = self.app.jobs.submit(visitor, name, self.draft.options(visitor.photos, *form))
        if job.id in before:
            gr.Info(html.escape(f"{job.name} is running or waiting already, with the same photos and settings."))
        return self._chosen(visitor, job.id)

    @plainly
    def estimate(self, request: gr.Request, *form: Any) -> str:
        """What the run would take."""
        visitor = self.app.visitor(request)
        with worded():
            lines = self.draft.estimate(visitor, self.draft.options(visitor.photos, *form))
        return "\n".join(f"- {html.escape(line)}" for line in lines)

    @plainly
    def open_page(self, id: str | None, request: gr.Request) -> tuple[Any, ...]:
        """The list with the newest run chosen, unless the person was faster, and the panel."""
        return self._chosen(self.app.visitor(request), id)

    @plainly
    def tick(self, id: str | None, seen: Any, request: gr.Request) -> tuple[Any, ...]:
        """The same while time passes; nothing where nothing has changed.  It never chooses another run."""
        return self._panel(self.app.visitor(request), id, seen)

    @plainly
    def look(self, id: str | None, request: gr.Request) -> tuple[Any, ...]:
        """The panel of another run, which was chosen in the list."""
        return self._panel(self.app.visitor(request), id, None)

    @plainly
    def stop(self, id: str | None, request: gr.Request) -> tuple[Any, ...]:
        visitor = self.app.visitor(request)
        self.app.jobs.stop(self.app.jobs.find(visitor, id or ""))
        return self._panel(visitor, id, None)

    @plainly
    def resume(self, id: str | None, request: gr.Request) -> tuple[Any, ...]:
        visitor = self.app.visitor(request)
        self.app.jobs.resume(self.app.jobs.find(visitor, id or ""))
        return self._panel(visitor, id, None)

    @plainly
    def remove(self, id: str | None, request: gr.Request) -> tuple[Any, ...]:
        """The panel without it; then its id, and the row that offers to bring it back."""
        visitor = self.app.visitor(request)
        job = self.app.jobs.find(visitor, id or "")
        left = "; its adapter is still in the library" if self.app.jobs.result(job) else ""
        self.app.jobs.remove(job)
        said = f"The run of {html.escape(job.name)} was removed{left}."
        return *self._chosen(visitor, None), job.id, gr.Row(visible=True), said

    @plainly
    def undo(self, removed: str | None, request: gr.Request) -> tuple[Any, ...]:
        """The panel with the run that was removed last, which is back."""
        visitor = self.app.visitor(request)
        self.app.jobs.restore(visitor, removed or "")
        return *self._chosen(visitor, removed), None, gr.Row(visible=False)

    @plainly
    def try_it(self, id: str | None, request: gr.Request) -> tuple[Any, Any]:
        """The painting tab, with the run's adapter chosen."""
        visitor = self.app.visitor(request)
        job = self.app.jobs.find(visitor, id or "")
        result = self.app.jobs.result(job)
        if result is None:
            raise SVFitError("the adapter of this run is not in the library any more: import its file.")
        choices = self.app.adapter_choices(visitor)
        return gr.Tabs(selected="generate"), gr.Dropdown(choices, value=[f"library/{result.stem}"])

    def _chosen(self, visitor: Visitor, id: str | None) -> tuple[Any, ...]:
        """The panel of the run `id`, or of the newest where there is no such run, which is chosen in the list."""
        listed = [job.id for job in self.app.jobs.listed(visitor)]
        id = id if id in listed else next(iter(listed), None)
        panel = self._panel(visitor, id, None)
        return gr.Dropdown(panel[1][0], value=id), *panel[1:]

    def _panel(self, visitor: Visitor, id: str | None, seen: Any) -> tuple[Any, ...]:
        """List, what was seen, status, curve, pictures, log, and the buttons stop, resume, try it, download, remove.

        `seen` is what the page showed last; where nothing is new, nothing is sent.
        """
        jobs = self.app.jobs
        listed = jobs.listed(visitor)
        states = {job.id: jobs.state(job) for job in listed}
        job = next((job for job in listed if job.id == id), None)
        choices = [
            (f"{job.name} · {WORDS.get(states[job.id], states[job.id])} · {_when(job)}", job.id) for job in listed
        ]
        progress = sum_up(jobs.run_folder(job)) if job else Progress()
        state = states[job.id] if job else ""
        ahead = jobs.ahead(job) if job and state == "queued" else 0
        now = [
            choices,
            [job.id if job else None, state, progress.step, ahead, progress.seconds_a_step, progress.doing],
            [str(path) for _, path in progress.pictures[-1:]] + [str(progress.sheet), len(progress.figures)],
            job.library_sha256 if job else None,
        ]
        same = [old == new for old, new in zip(seen, now, strict=True)] if seen else [False] * len(now)
        if all(same):
            return (gr.skip(),) * 11
        if job is None:
            off = gr.Button(interactive=False)
            nothing = gr.DownloadButton(value=None, interactive=False)
            said = CHOOSE if listed else NONE
            return (gr.Dropdown(choices), now, said, loss_plot(progress, False), "", "", off, off, off, nothing, off)
        over = state in OVER
        result = jobs.result(job) if over else None
        return (
            gr.skip() if same[0] else gr.Dropdown(choices),
            now,
            gr.skip() if same[1] else self._status(job, state, progress, ahead),
            gr.skip() if same[1] else loss_plot(progress, over),
            gr.skip() if same[1] and same[2] else self._pictures(progress, over),
            gr.skip() if same[1] else f'<pre class="log">{html.escape(jobs.log(job))}</pre>',
            gr.Button(interactive=state in ("queued", "running")),
            gr.Button(interactive=state in ("stopped", "failed", "cut off")),
            gr.Button(interactive=result is not None),
            gr.DownloadButton(value=self.app.serve(result) if result else None, interactive=result is not None),
            gr.Button(interactive=over or state == "queued"),
        )

    def _status(self, job: Job, state: str, progress: Progress, ahead: int) -> str:
        share = progress.step / progress.of if progress.of else 0.0
        left = f"<b>{html.escape(job.name)}</b> · {WORDS.get(state, html.escape(state))} · {_when(job)}"
        right = ""
        if state == "queued":
            right = f"{ahead} run{'s' * (ahead != 1)} before it" if ahead else "starts in a moment"
        elif progress.of:
            right = f"step {progress.step} of {progress.of}"
            kept = progress.kept_step if state in OVER else None
            if kept is not None and kept != progress.step:
                right += f" · kept: step {kept}, the best measured"
            if state == "running" and (progress.doing or progress.step == progress.of):
                right += f" · {html.escape(progress.doing or 'measuring and painting the result')}"
            if state == "running" and progress.seconds_left:
                alone = "" if progress.knows_looks else " for the steps alone"
                right += f" · about {duration(progress.seconds_left)} left{alone}"
        elif state == "running":
            last = [line for line in self.app.jobs.log(job).splitlines() if line.strip()][-1:]
            right = html.escape(progress.doing or "preparing photos and base model")
            right += f" · {html.escape(last[0][:100])}" if last and not last[0].startswith("started ") else ""
        notes = []
        if state in ("failed", "cut off", "stopped"):
            why = in_form_words(progress.message or self.app.jobs.complaint(job))
            if state == "cut off":
                why = "it ended without a word: the computer went down, or the memory was full. Resume goes on."
            if why:
                notes.append(why)
        notes += progress.remarks[-2:]
        warned = "".join(f'<div class="warn">{html.escape(note)}</div>' for note in notes)
        return (
            f'<div class="status" role="status"><div class="head"><span>{left}</span><span>{right}</span></div>'
            f'<div class="bar"><i style="width:{share:.1%}"></i></div>{warned}</div>'
        )

    def _pictures(self, progress: Progress, over: bool) -> str:
        """The newest validation pictures while it runs; at the end the photos, the base's answers, the adapter's."""
        parts = []
        if over and progress.sheet is not None:
            parts.append("<p class='note'>Photos, what the base paints for them, and what the adapter paints:</p>")
            parts.append(_image(self.app.url(progress.sheet), "photos, the base's pictures, the adapter's pictures"))
        elif progress.pictures:
            step, path = progress.pictures[-1]
            parts.append(f"<p class='note'>Painted at step {step}:</p>{_image(self.app.url(path), f'step {step}')}")
        if over and progress.figures:
            parts.append(_figures(progress.figures))
        return f'<div class="sheet">{"".join(parts)}</div>'


def _when(job: Job) -> str:
    """When a run was asked for; on another day than today, which."""
    asked = time.localtime(job.created)
    today = asked[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if today else "%d %b %Y, %H:%M", asked)


def _image(url: str, what: str) -> str:
    return f'<img src="{html.escape(url)}" alt="{html.escape(what)}">'


def _figures(figures: dict[str, dict[str, float | None]]) -> str:
    """Likeness, obedience and drift of the base and of the adapter."""
    head, rows = table(list(figures.items()))
    cells = ["".join(f"<td>{html.escape(cell) or '–'}</td>" for cell in row) for row in rows]
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    titles = "".join(f"<th>{title}</th>" for title in in_words(head))
    return f'<table class="figures"><tr>{titles}</tr>{lines}</table>'
