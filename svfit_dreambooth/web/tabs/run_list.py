"""The list of runs: a row each, with a picture, the time, the state, and buttons of its own."""

import html
import time
from collections.abc import Callable, Sequence

from svfit_dreambooth.web.rooms.jobs import Job
from svfit_dreambooth.web.tabs.cards import readable

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
# what can be done with a run: act -> (what its button says, the states in which it is there)
ACTS = {
    "stop": ("Stop and keep", ("queued", "running")),
    "resume": ("Resume", ("stopped", "failed", "cut off")),
    "remove": ("Remove", (*OVER, "queued")),
}
# every click on a button of a row tells which act, on which run
ON_LOAD = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-act]");
  if (button) trigger("click", { act: button.dataset.act, run: button.dataset.run });
});
"""


def rows(jobs: Sequence[Job], states: dict[str, str], chosen: str | None, picture: Callable[[Job], str]) -> str:
    """The list, newest first; `picture`: where a browser finds that of a run, "" where it has none."""
    return f'<div class="runs" role="list">{"".join(_row(job, states[job.id], job.id == chosen, picture(job)) for job in jobs)}</div>'


def _row(job: Job, state: str, chosen: bool, picture: str) -> str:
    name, run = html.escape(readable(job.name, 60)), html.escape(job.id)
    face = f'<img src="{html.escape(picture)}" alt="">' if picture else ""
    buttons = "".join(
        f'<button class="small" data-act="{act}" data-run="{run}" aria-label="{said}: {name}">{said}</button>'
        for act, (said, there) in ACTS.items()
        if state in there
    )
    word = WORDS.get(state, html.escape(state)).partition(",")[0]
    return (
        f'<div role="listitem" class="run{" chosen" * chosen}"><button class="show" data-act="look" data-run="{run}" '
        f'aria-current="{str(chosen).lower()}"><span class="face">{face}</span><span><b>{name}</b><br>{word} · {when(job)}'
        f"</span></button>{buttons}</div>"
    )


def when(job: Job) -> str:
    """When a run was asked for; on another day than today, which."""
    asked = time.localtime(job.created)
    today = asked[:3] == time.localtime()[:3]
    return time.strftime("%H:%M" if today else "%d %b %Y, %H:%M", asked)
