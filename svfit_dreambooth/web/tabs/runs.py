"""What the page shows of runs, and what its buttons do with them."""

import html
import math
from typing import Any

import gradio as gr

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.measures import in_words, table
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.web.rooms.app import App
from svfit_dreambooth.web.rooms.jobs import Job
from svfit_dreambooth.web.rooms.progress import Progress, sum_up
from svfit_dreambooth.web.rooms.workspace import Visitor
from svfit_dreambooth.web.tabs.curve import loss_plot
from svfit_dreambooth.web.tabs.draft import Draft
from svfit_dreambooth.web.tabs.forecast import duration, estimate, time_of_runs_like
from svfit_dreambooth.web.tabs.form import in_form_words, worded
from svfit_dreambooth.web.tabs.mistakes import plainly
from svfit_dreambooth.web.tabs.run_list import ACTS, OVER, WORDS, rows, when

NONE = (
    '<div class="empty"><b>No runs yet.</b><br>Add photos, say what they show, and press Start training. '
    "You may close the page meanwhile: the run goes on.</div>"
)
CHOOSE = '<div class="empty">Choose a run in the list.</div>'
LIVE = 13  # things that a tick may show anew: all of the panel but which run is chosen


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
            lines = estimate(self.app, visitor, self.draft.options(visitor.photos, *form))
        return "\n".join(f"- {html.escape(line)}" for line in lines)

    @plainly
    def open_page(self, id: str | None, request: gr.Request) -> tuple[Any, ...]:
        """The panel of the newest run, unless the person was faster."""
        return self._chosen(self.app.visitor(request), id)

    @plainly
    def tick(self, id: str | None, seen: Any, looked: float | None, request: gr.Request) -> tuple[Any, ...]:
        """The panel, but for which run is chosen, while time passes; nothing where nothing has changed."""
        visitor = self.app.visitor(request)
        if id is None and self.app.jobs.listed(visitor):  # the page is only just opening
            return (gr.skip(),) * LIVE
        return self._panel(visitor, id, seen, looked)

    @plainly
    def act(self, event: gr.EventData, request: gr.Request) -> tuple[Any, ...]:
        """What a button in the list asks for: the panel; then what undo needs, its row, and what it says."""
        visitor, act = self.app.visitor(request), event._data.get("act")
        job = self.app.jobs.find(visitor, str(event._data.get("run")))
        if act == "remove":
            return self._remove(visitor, job)
        if act in ACTS:
            {"stop": self.app.jobs.stop, "resume": self.app.jobs.resume}[act](job)
        return *self._chosen(visitor, job.id), *[gr.skip()] * 3

    def _remove(self, visitor: Visitor, job: Job) -> tuple[Any, ...]:
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
    def look(self, id: str | None, step: float, request: gr.Request) -> tuple[Any, ...]:
        """The pictures of the look nearest to `step`, the button that makes it the adapter, and `step`, to be remembered."""
        job = self.app.jobs.find(self.app.visitor(request), id or "")
        progress = sum_up(self.app.jobs.run_folder(job))
        return self._look(progress, step), self._use(job, progress, step, self.app.jobs.state(job)), step

    @plainly
    def use_step(self, id: str | None, step: float | None, request: gr.Request) -> tuple[Any, ...]:
        """The panel after the look nearest to `step` became the adapter."""
        visitor = self.app.visitor(request)
        job = self.app.jobs.find(visitor, id or "")
        nearest = _nearest(sum_up(self.app.jobs.run_folder(job)), step or 0.0)
        if nearest is None:
            raise SVFitError(f"{job.name} was not looked at on the way: there is no step to choose.")
        self.app.jobs.take_step(job, nearest)
        result = self.app.jobs.result(job)
        gr.Info(html.escape(f"{result.stem if result else job.name} in the library is that of step {nearest} now."))
        return self._panel(visitor, id, None, step)

    @plainly
    def again(self, id: str | None, request: gr.Request) -> tuple[Any, ...]:
        """The form as it was for that run; its photos too, where none are laid out."""
        visitor = self.app.visitor(request)
        job = self.app.jobs.find(visitor, id or "")
        return self.draft.take_up(visitor, job)

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
        """The run `id`, or the newest where there is no such run, as the chosen one; then its panel."""
        listed = [job.id for job in self.app.jobs.listed(visitor)]
        id = id if id in listed else next(iter(listed), None)
        return id, *self._panel(visitor, id, None, None)

    def _panel(self, visitor: Visitor, id: str | None, seen: Any, looked: float | None) -> tuple[Any, ...]:
        """List, what was seen, status, curve, slider over looks and where it stands, a look, the button that uses it,
        sheet, log; then the buttons try it, download, again.

        `seen` is what the page showed last; where nothing is new, nothing is sent.  `looked`: where the slider stands: not
        asked of itself, which the server would refuse while a tick still has the bounds of another run.
        """
        jobs = self.app.jobs
        listed = jobs.listed(visitor)
        states = {job.id: jobs.state(job) for job in listed}
        job = next((job for job in listed if job.id == id), None)
        progress = sum_up(jobs.run_folder(job)) if job else Progress()
        state = states[job.id] if job else ""
        ahead = jobs.ahead(job) if job and state == "queued" else 0
        now = [
            [[one.id, states[one.id]] for one in listed] + [[id, ""]],
            [job.id if job else None, state, progress.step, ahead, progress.seconds_a_step, progress.doing],
            [step for step, _ in progress.pictures],
            [str(progress.sheet), len(progress.figures)],
            [job.library_sha256, job.library_step] if job else None,
        ]
        same = [old == new for old, new in zip(seen, now, strict=True)] if seen else [False] * len(now)
        if all(same):
            return (gr.skip(),) * LIVE
        keep = gr.skip()
        shown = keep if same[0] else rows(listed, states, id, self._picture) if listed else ""
        if job is None:
            off, nothing = gr.Button(interactive=False), gr.DownloadButton(value=None, interactive=False)
            hidden = (gr.Slider(visible=False), None, "", gr.Button(visible=False), "", "")
            return (shown, now, CHOOSE if listed else NONE, loss_plot(Progress(), False), *hidden, off, nothing, off)
        over = state in OVER
        result = jobs.result(job) if over else None
        following = not seen or not seen[2] or looked is None or looked >= seen[2][-1]
        step = float(progress.pictures[-1][0]) if following and progress.pictures else (looked or 0.0)
        if following and over and progress.kept_step is not None:
            step = float(job.library_step or progress.kept_step)
        return (
            shown,
            now,
            keep if same[1] and same[4] else self._status(visitor, job, state, progress, ahead),
            keep if same[1] else loss_plot(progress, over),
            keep if same[2] and same[1] else _slider(progress, step),
            keep if same[2] and same[1] else step,
            keep if same[2] and same[1] else self._look(progress, step),
            self._use(job, progress, step, state),
            keep if same[1] and same[3] else self._sheet(progress, over),
            keep if same[1] else f'<pre class="log">{html.escape(jobs.log(job))}</pre>',
            gr.Button(interactive=result is not None),
            gr.DownloadButton(value=self.app.serve(result) if result else None, interactive=result is not None),
            gr.Button(interactive=True),
        )

    def _picture(self, job: Job) -> str:
        path = self.app.jobs.picture(job)
        return self.app.url(path) if path else ""

    def _look(self, progress: Progress, step: float) -> str:
        """The pictures of the look nearest to `step`; large when they are pressed."""
        nearest = _nearest(progress, step)
        if nearest is None:
            return ""
        url = self.app.url(dict(progress.pictures)[nearest])
        return f"<p class='note'>Painted at step {nearest}:</p>{_image(url, f'pictures of step {nearest}', 'look')}"

    def _use(self, job: Job, progress: Progress, step: float, state: str) -> gr.Button:
        """The button that makes the look nearest to `step` the adapter: there where a run is over and has its values."""
        nearest, held = _nearest(progress, step), job.library_step or progress.kept_step
        there = bool(nearest) and RunFolder(self.app.jobs.run_folder(job)).look_adapter(nearest or 0).is_file()
        possible = state in OVER and there and (nearest != held or self.app.jobs.result(job) is None)
        said = f"Make step {nearest} the adapter" if nearest and nearest != held else "This step is the adapter"
        return gr.Button(said, visible=state in OVER and there, interactive=possible)

    def _status(self, visitor: Visitor, job: Job, state: str, progress: Progress, ahead: int) -> str:
        share = progress.step / progress.of if progress.of else 0.0
        left = f"<b>{html.escape(job.name)}</b> · {WORDS.get(state, html.escape(state))} · {when(job)}"
        right = ""
        if state == "queued":
            right = f"{ahead} run{'s' * (ahead != 1)} before it" if ahead else "starts in a moment"
        elif progress.of:
            right = f"step {progress.step} of {progress.of}"
            kept = progress.kept_step if state in OVER else None
            if kept is not None and kept != progress.step:
                right += f" · kept: step {kept}, the best measured"
            if job.library_step is not None:
                right += f" · in the library: step {job.library_step}, by your choice"
            if state == "running" and (progress.doing or progress.step == progress.of):
                right += f" · {html.escape(progress.doing or 'measuring and painting the result')}"
            if state == "running" and progress.seconds_left:
                alone = "" if progress.knows_looks else " for the steps alone"
                right += f" · about {duration(progress.seconds_left)} left{alone}"
        elif state == "running":
            last = [line for line in self.app.jobs.log(job).splitlines() if line.strip()][-1:]
            right = html.escape(progress.doing or "preparing photos and base model")
            right += f" · {html.escape(last[0][:100])}" if last and not last[0].startswith("started ") else ""
        if state in ("queued", "running") and progress.seconds_left is None:  # what is known before the first step
            steps = TrainConfig(**job.options).max_train_steps
            if told := time_of_runs_like(self.app, visitor, job.options, steps):
                right += f" · {html.escape(told)}"
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

    def _sheet(self, progress: Progress, over: bool) -> str:
        """At the end: the photos, the base's answers, the adapter's; and the figures."""
        parts = []
        if over and progress.sheet is not None:
            parts.append("<p class='note'>Photos, what the base paints for them, and what the adapter paints:</p>")
            what = "photos, the base's pictures, the adapter's pictures"
            parts.append(_image(self.app.url(progress.sheet), what, "sheet"))
        if over and progress.figures:
            parts.append(_figures(progress.figures))
        return f'<div class="sheet">{"".join(parts)}</div>'


def _nearest(progress: Progress, step: float) -> int | None:
    """The look nearest to `step`; None where there was none."""
    return min((look for look, _ in progress.pictures), key=lambda look: abs(look - step), default=None)


def _slider(progress: Progress, step: float) -> gr.Slider:
    """Over the looks that there were."""
    looks = [look for look, _ in progress.pictures]
    return gr.Slider(0, max([1, *looks]), step, step=math.gcd(*looks) or 1, visible=len(looks) > 1)


def _image(url: str, what: str, id: str) -> str:
    """A picture that is shown large when it is pressed, until it is pressed again or Escape is."""
    image = f'<img src="{html.escape(url)}" alt="{html.escape(what)}">'
    return (
        f'<button class="enlarge" popovertarget="large-{id}" aria-label="enlarge {html.escape(what)}">{image}</button>'
        f'<button class="enlarged" popover id="large-{id}" popovertarget="large-{id}" aria-label="close">{image}</button>'
    )


def _figures(figures: dict[str, dict[str, float | None]]) -> str:
    """Likeness, obedience and drift of the base and of the adapter."""
    head, rows = table(list(figures.items()))
    cells = ["".join(f"<td>{html.escape(cell) or '–'}</td>" for cell in row) for row in rows]
    lines = "".join(f"<tr>{row}</tr>" for row in cells)
    titles = "".join(f"<th>{title}</th>" for title in in_words(head))
    return f'<table class="figures"><tr>{titles}</tr>{lines}</table>'
