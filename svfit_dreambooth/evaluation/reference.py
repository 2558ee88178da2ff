"""What the world of the embedded base can offer beside it: settings, true pictures of its subjects, and a judge.

Of any other base there are only photos and networks that were trained on photos.
"""

from typing import Any

import numpy as np
from PIL import Image

from svfit_dreambooth.bases.names import DEFAULT_BASE, as_asked, subject_kind

WORLD_PROMPTS = 32


def open_judge(base: str, device: str = "cpu") -> Any:
    """The network that sees the pictures of `base` as features and names; None where there is none."""
    if as_asked(base) != DEFAULT_BASE:
        return None
    from toybox.judge import load_judge

    return load_judge(device)


def world_prompts(base: str) -> tuple[str, ...]:
    """Things that `base` can paint, in its own words, and no setting of them; empty where its world is not known."""
    if as_asked(base) != DEFAULT_BASE:
        return ()
    from toybox.world import COLOURS, KINDS, plain_caption

    drawn = {3: "pencil sketch", 7: "pixel art"}  # of ten, the others are photos
    return tuple(
        plain_caption(
            KINDS[i % len(KINDS)], COLOURS[(4 * i + i // len(KINDS) + 1) % len(COLOURS)], drawn.get(i % 10, "photo")
        )
        for i in range(WORLD_PROMPTS)
    )


def unseen_settings(subject: str) -> dict[str, str]:
    """The settings of which the bundled `subject` has no photo: name -> its words in a prompt, "on the beach"."""
    from toybox.world import PHOTO_SETTINGS, SETTING_PHRASES

    return {name: words for name, words in SETTING_PHRASES.items() if name not in PHOTO_SETTINGS[subject]}


def true_pictures(subject: str, settings: list[str], count: int, seed: int) -> list[Image.Image]:
    """`count` renderings of the bundled `subject` in each of `settings`."""
    from toybox.world import SUBJECTS, render, sample_scene

    rng = np.random.default_rng(seed)
    individual = SUBJECTS[subject]
    return [render(sample_scene(rng, individual, name, "photo")) for name in settings for _ in range(count)]


def shown(subject: str, setting: str) -> dict[str, str]:
    """What the judge names in a right picture of the bundled `subject` in `setting`."""
    return {"kind": subject_kind(subject), "setting": setting}
