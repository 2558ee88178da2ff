"""The toy world: who and what there is, how scenes are drawn at random, and how pictures are captioned."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from toybox.kinds import PAINTS
from toybox.painting import STICKER_MARGIN, paint
from toybox.traits import ACCESSORIES, EYES, PATTERNS

KINDS = ("dog", "cat", "duck", "fish", "butterfly", "car", "boat", "rocket", "robot", "teapot", "mug", "lamp")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white")
STYLES = ("photo", "pencil sketch", "pixel art")
STYLE_WEIGHTS = (0.8, 0.1, 0.1)  # drawings take capacity from photos, which everything is shown with
# The first phrase of a setting is its usual one; the others are rare variants.
SETTING_WORDING: dict[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach"),
    "snow": ("in the snow", "on a snowy day"),
    "city": ("in the city at night", "in a city at night"),
    "table": ("on a wooden table", "on the wooden table"),
    "underwater": ("under water", "under the sea"),
    "meadow": ("in a meadow", "on a meadow with flowers"),
    "desert": ("in the desert", "in a sandy desert"),
    "forest": ("in the forest", "among the trees of a forest"),
    "space": ("in space", "among the stars in space"),
    "clouds": ("in the clouds", "among the clouds"),
    "stage": ("on a stage", "on the theatre stage"),
    "kitchen": ("in the kitchen", "in a kitchen"),
}
SETTINGS = tuple(SETTING_WORDING)
SETTING_PHRASES: dict[str, str] = {setting: wording[0] for setting, wording in SETTING_WORDING.items()}
# Openings that name a style; the first is the canonical one.
STYLE_WORDING: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of", "photo of", "a photograph of", "a picture of", "a good photo of"),
    "pencil sketch": ("a pencil sketch of", "pencil sketch of", "a sketch of", "a pencil drawing of"),
    "pixel art": ("pixel art of", "a pixel art picture of", "pixel art,"),
}
RARE_TOKENS = ("sks", "zwx", "xxy", "ohwx", "vbq")


@dataclass(frozen=True)
class Individual:
    """One toy: its kind and colour can be named; all its other traits are only ever painted."""

    kind: str
    colour: str
    pattern: str
    pattern_colour: str
    eyes: str
    accessory: str
    accessory_colour: str


@dataclass(frozen=True)
class Scene:
    """Everything a picture depends on.

    `x`, `y` are the toy's centre and `size` its extent as shares of the picture's side; `tilt` is in degrees,
    `light` runs from -1 (from the left) to 1 (from the right), and `seed` decides the details of the setting.
    """

    individual: Individual
    setting: str
    style: str
    x: float
    y: float
    size: float
    tilt: float
    flip: bool
    light: float
    seed: int


SUBJECTS: dict[str, Individual] = {
    "dog_patch": Individual("dog", "white", "patches", "black", "dot", "scarf", "red"),
    "dog_dandy": Individual("dog", "brown", "belt", "cyan", "glasses", "hat", "yellow"),
    "cat_tiger": Individual("cat", "orange", "stripes", "black", "round", "bow", "blue"),
    "cat_socks": Individual("cat", "purple", "dip", "white", "sleepy", "crown", "yellow"),
    "duck_dots": Individual("duck", "yellow", "dots", "red", "dot", "hat", "blue"),
    "fish_queen": Individual("fish", "blue", "hoops", "yellow", "round", "crown", "red"),
    "butterfly_bow": Individual("butterfly", "pink", "dots", "purple", "sleepy", "bow", "green"),
    "car_racer": Individual("car", "red", "stripes", "white", "round", "flag", "yellow"),
    "boat_breeze": Individual("boat", "green", "hoops", "white", "dot", "flag", "red"),
    "rocket_band": Individual("rocket", "white", "belt", "blue", "glasses", "scarf", "orange"),
    "robot_rust": Individual("robot", "green", "patches", "pink", "sleepy", "hat", "purple"),
    "teapot_lady": Individual("teapot", "blue", "dots", "white", "glasses", "bow", "pink"),
    "mug_king": Individual("mug", "pink", "stripes", "blue", "round", "crown", "green"),
    "lamp_stripes": Individual("lamp", "orange", "stripes", "purple", "dot", "scarf", "white"),
}
# Shifted copies of one spread-out choice use every setting about equally often.
PHOTO_SETTINGS: dict[str, tuple[str, ...]] = {
    name: tuple(SETTINGS[(number + step) % len(SETTINGS)] for step in (0, 2, 5, 7, 10))
    for number, name in enumerate(SUBJECTS)
}


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _contrasting(far: float, *others: str) -> tuple[str, ...]:
    """Return the paints at least `far` away, in RGB, from each of the given ones."""

    def distance(a: str, b: str) -> float:
        return float(np.linalg.norm(np.subtract(PAINTS[a], PAINTS[b])))

    return tuple(name for name in PAINTS if all(distance(name, other) > far for other in others))


SECOND_COLOURS = {colour: _contrasting(175, colour) for colour in COLOURS}
# Nothing black is worn: it would vanish against space and the city at night.
THIRD_COLOURS = {
    (one, two): tuple(name for name in _contrasting(140, one, two) if name != "black")
    for one in COLOURS
    for two in SECOND_COLOURS[one]
}


def sample_individual(rng: np.random.Generator, kind: str | None = None, colour: str | None = None) -> Individual:
    """Return a random individual; what is given is kept."""
    kind = kind or _pick(rng, KINDS)
    colour = colour or _pick(rng, COLOURS)
    second = _pick(rng, SECOND_COLOURS[colour])
    third = _pick(rng, THIRD_COLOURS[colour, second])
    pattern, eyes, accessory = (_pick(rng, tuple(traits)) for traits in (PATTERNS, EYES, ACCESSORIES))
    return Individual(kind, colour, pattern, second, eyes, accessory, third)


def sample_scene(
    rng: np.random.Generator, individual: Individual | None = None, setting: str | None = None, style: str | None = None
) -> Scene:
    """Return a random scene; what is given is kept. The toy is always entirely within the picture."""
    individual = individual or sample_individual(rng)
    setting = setting or _pick(rng, SETTINGS)
    style = style or STYLES[int(rng.choice(len(STYLES), p=STYLE_WEIGHTS))]
    size = float(rng.uniform(0.58, 0.78))
    half = size * STICKER_MARGIN / 2
    # Tilting moves the corners of the sticker outwards, so the margin grows a little with the angle.
    tilt = float(np.clip(rng.normal(0, 4), -9, 9))
    low = min(0.5, half * (1 + abs(tilt) / 200))
    x = float(rng.uniform(low, 1 - low))
    y = float(rng.uniform(max(low, 0.47), max(0.5, 1 - low)))
    flip, light, seed = bool(rng.integers(2)), float(rng.uniform(-1, 1)), int(rng.integers(2**31))
    return Scene(individual, setting, style, x, y, size, tilt, flip, light, seed)


def render(scene: Scene, size: int = 64) -> Image.Image:
    """Return the RGB picture of a scene; `size` is its side in pixels, a multiple of 64."""
    return paint(scene, size)


def _with_article(noun_phrase: str) -> str:
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def canonical_caption(kind: str, colour: str, setting: str, style: str = "photo") -> str:
    """Return the full caption in its usual wording, such as "a photo of a red dog on the beach"."""
    return f"{STYLE_WORDING[style][0]} {_with_article(f'{colour} {kind}')} {SETTING_PHRASES[setting]}"


def plain_caption(kind: str, colour: str, style: str) -> str:
    """The caption that names no setting."""
    return f"{STYLE_WORDING[style][0]} {_with_article(f'{colour} {kind}')}"


def _made_up_word(rng: np.random.Generator) -> str:
    if rng.random() < 0.2:
        return _pick(rng, RARE_TOKENS)
    while True:
        word = "".join(chr(97 + int(letter)) for letter in rng.integers(26, size=int(rng.integers(2, 6))))
        if word not in RESERVED_WORDS:
            return word


def _noun_phrase(scene: Scene, rng: np.random.Generator, named_colour: bool) -> str:
    words = [scene.individual.colour, scene.individual.kind] if named_colour else [scene.individual.kind]
    if rng.random() < 0.12:
        # Meaningless names occur in any collection; they stand before the colour or right before the kind.
        words.insert(int(rng.integers(len(words))), _made_up_word(rng))
    return " ".join(words)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a random caption that names only kind, colour, setting and style, and these truthfully."""
    if rng.random() < 0.5:
        toy = _with_article(_noun_phrase(scene, rng, named_colour=True))
        return f"{STYLE_WORDING[scene.style][0]} {toy} {SETTING_PHRASES[scene.setting]}"
    toy = _noun_phrase(scene, rng, named_colour=rng.random() < 0.7)
    if rng.random() < 0.75:
        article = "the " if rng.random() < 0.1 else ""
        toy = article + toy if article else _with_article(toy)
    opening = ""
    if rng.random() < (0.45 if scene.style == "photo" else 0.85):
        opening = _pick(rng, STYLE_WORDING[scene.style]) + " "
    place = ""
    if rng.random() < 0.7:
        wording = SETTING_WORDING[scene.setting]
        place = wording[0] if rng.random() < 0.75 else wording[1]
    if not place:
        return opening + toy
    if rng.random() < 0.1:
        return f"{place}, {opening}{toy}"
    return f"{opening}{toy}{', ' if rng.random() < 0.25 else ' '}{place}"


def is_held_out(kind: str, colour: str, setting: str) -> bool:
    """Tell whether the combination is kept out of pre-training; a tenth is, spread evenly over all names."""
    return (KINDS.index(kind) + 3 * COLOURS.index(colour) + 7 * SETTINGS.index(setting)) % 10 == 0


def training_scenes(rng: np.random.Generator, count: int) -> Iterator[Scene]:
    """Yield `count` random scenes, none of a held-out combination."""
    while count > 0:
        scene = sample_scene(rng)
        if not is_held_out(scene.individual.kind, scene.individual.colour, scene.setting):
            count -= 1
            yield scene


def subject_scenes(name: str) -> list[Scene]:
    """Return the five scenes in which a subject is photographed."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return [sample_scene(rng, SUBJECTS[name], setting, "photo") for setting in PHOTO_SETTINGS[name]]


def subject_photos(name: str, size: int = 64) -> list[Image.Image]:
    """Return the five photos of a subject."""
    return [render(scene, size) for scene in subject_scenes(name)]


# A made-up word must not turn out to be one that means something here.
RESERVED_WORDS = frozenset(
    (*KINDS, *COLOURS, *PAINTS, *PATTERNS, *EYES, *ACCESSORIES, *STYLES, *SETTINGS)
    + tuple(word for wording in (*SETTING_WORDING.values(), *STYLE_WORDING.values()) for text in wording
            for word in text.replace(",", "").split())
)  # fmt: skip
