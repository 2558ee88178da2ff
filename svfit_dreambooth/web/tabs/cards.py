"""What the page draws by itself: a card for every adapter, and the curve of a run."""

import html
import re
import time
import unicodedata
from collections.abc import Sequence
from typing import Any

from svfit_dreambooth.files import size_text
from svfit_dreambooth.training.curves import running_mean
from svfit_dreambooth.web.rooms.library import Entry

WIDTH, HEIGHT, MARGIN = 640, 200, 34  # of a curve, in its own units


def card(entry: Entry, picture_url: str | None) -> str:
    """An adapter: picture, words, base, ranks, size, date, and how strongly each block of the base is changed."""
    total = entry.description["total"]
    ranks = f"rank {total['rank_min']}"
    if total["rank_max"] != total["rank_min"]:
        ranks += f" to {total['rank_max']}"
    facts = [
        f"on {readable(entry.base_model)}",
        ranks,
        f"{total['values']:,} values",
        size_text(entry.description["file_bytes"]),
        time.strftime("%d %b %Y", time.localtime(entry.date)),
    ]
    name = html.escape(readable(entry.name))
    face = (
        f'<div class="face"><img src="{html.escape(picture_url)}" alt="pictures of {name}" loading="lazy"></div>'
        if picture_url
        else '<div class="face none">no picture yet</div>'
    )
    words = f"“{html.escape(readable(entry.instance_prompt))}”" if entry.instance_prompt else "no trigger words"
    return (
        f'{face}<div class="text"><h3>{name}</h3><div class="words">{words}</div>'
        f'<div class="facts">{html.escape(" · ".join(facts))}</div>{_bars(entry.description["blocks"])}</div>'
    )


def readable(text: str, most: int = 300) -> str:
    """A stranger's words without characters that are not seen, or turn the reading direction; long ones are cut."""
    plain = "".join(letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return plain if len(plain) <= most else plain[:most] + " …"


def _bars(blocks: dict[str, Any]) -> str:
    """A bar for each block, as tall as its shifts are strong against the strongest."""
    strongest = max((block["strength"] for block in blocks.values()), default=0) or 1
    bars = "".join(
        f'<span class="{"text-encoder" if name.startswith("text_encoder") else ""}" '
        f'style="height:{100 * block["strength"] / strongest:.0f}%" '
        f'title="{html.escape(_plain(name))}: {block["strength"]:.3f}"></span>'
        for name, block in blocks.items()
    )
    ends = [_plain(name) for name in blocks]
    legend = f"{html.escape(ends[0])} … {html.escape(ends[-1])}" if len(ends) > 1 else html.escape("".join(ends))
    return (
        f'<div class="bars" role="img" aria-label="strength of each block">{bars}</div>'
        f'<div class="legend">change per block: {legend} · strongest {strongest:.3f}</div>'
    )


def _plain(block: str) -> str:
    """'text_encoder layers.0' -> 'text encoder layers.0'; of a denoiser, 'down_blocks.0' -> 'down 0'."""
    component, _, place = block.partition(" ")
    name = block if component.startswith("text_encoder") else place
    return re.sub(r"_blocks?\.?", " ", name).replace("_", " ").strip()


def curve(
    losses: Sequence[tuple[int, float]], fixed: Sequence[tuple[int, float]], of: int, kept: int | None = None
) -> str:
    """Loss over steps as a drawing: faint as measured, bold as a running mean, dots on noise that never changes.

    `kept`: the step whose values were kept, where a line stands.
    """
    if len(losses) < 2:
        return '<div class="empty">The loss curve appears after the first steps.</div>'
    steps = [step for step, _ in losses]
    smooth = list(zip(steps, running_mean([loss for _, loss in losses]), strict=True))
    values = sorted(loss for _, loss in losses)
    low = min(values[0], *(loss for _, loss in fixed)) if fixed else values[0]
    high = (
        max(values[int(len(values) * 0.98)], *(loss for _, loss in fixed)) if fixed else values[int(len(values) * 0.98)]
    )
    span = (high - low) or 1

    def x(step: int) -> float:
        return MARGIN + 8 + (WIDTH - MARGIN - 16) * step / max(of, 1)

    def y(loss: float) -> float:
        return 12 + (HEIGHT - 36) * (1 - min(max((loss - low) / span, 0), 1))

    def line(points: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points)

    thin = losses[:: max(1, len(losses) // 400)]
    bold = smooth[:: max(1, len(smooth) // 400)]
    dots = "".join(
        f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3.5" fill="#d97706"><title>step {s}: {v:.4f}</title></circle>'
        for s, v in fixed
    )
    mark = ""
    if kept:
        anchor = "start" if x(kept) < WIDTH - 90 else "end"
        mark = (
            f'<line x1="{x(kept):.1f}" x2="{x(kept):.1f}" y1="12" y2="{HEIGHT - 22}" stroke="currentColor" '
            f'stroke-dasharray="4 3"/><text x="{x(kept) + (4 if anchor == "start" else -4):.1f}" y="20" '
            f'text-anchor="{anchor}" fill="currentColor">kept: step {kept}</text>'
        )
    key = '<tspan fill="#d97706">●</tspan> on fixed noise' if fixed else ""
    return (
        f'<div class="curve"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss over steps" font-size="11">'
        f'<line x1="{MARGIN + 8}" x2="{WIDTH - 8}" y1="{HEIGHT - 22}" y2="{HEIGHT - 22}" stroke="currentColor" opacity=".4"/>'
        f'<polyline points="{line(thin)}" fill="none" stroke="currentColor" opacity=".3"/>'
        f'<polyline points="{line(bold)}" fill="none" stroke="var(--primary-500)" stroke-width="2.5"/>{dots}{mark}'
        f'<g fill="currentColor"><text x="{MARGIN}" y="{y(high) + 4:.0f}" text-anchor="end">{high:.2f}</text>'
        f'<text x="{MARGIN}" y="{y(low) + 4:.0f}" text-anchor="end">{low:.2f}</text>'
        f'<text x="{MARGIN + 8}" y="{HEIGHT - 6}">0</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">{of} steps</text>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">loss, and its running mean {key}</text></g></svg></div>'
    )
