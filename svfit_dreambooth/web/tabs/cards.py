"""The card of an adapter."""

import html
import re
import time
import unicodedata
from typing import Any

from svfit_dreambooth.bases.names import spoken
from svfit_dreambooth.files import size_text
from svfit_dreambooth.web.rooms.library import Entry


def card(entry: Entry, picture_url: str | None) -> str:
    """An adapter: picture, words, base, ranks, size, date, and how strongly each block of the base is changed."""
    total = entry.description["total"]
    ranks = f"rank {total['rank_min']}"
    if total["rank_max"] != total["rank_min"]:
        ranks += f" to {total['rank_max']}"
    facts = [
        f"on {readable(spoken(entry.base_model))}",
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
