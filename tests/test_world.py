"""The toy world: its size, its determinism, the truth of its captions and the visibility of its individuals."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from toybox import world
from toybox.kinds import BODY, LIGHT, LINE, PAINTS
from toybox.painting import place_sticker
from toybox.traits import ACCESSORIES, EYES, PATTERNS, roles, sticker_paints

PLAIN = world.Individual("dog", "red", "plain", "white", "round", "none", "blue")
COMBINATIONS = [(k, c, s) for k in world.KINDS for c in world.COLOURS for s in world.SETTINGS]


def scenes(count: int, seed: int = 0) -> list[world.Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng) for _ in range(count)]


def words(text: str) -> list[str]:
    return re.findall("[a-z]+", text)


def pixels(scene: world.Scene) -> np.ndarray:
    return np.asarray(world.render(scene), dtype=float)


def test_the_world_has_the_promised_size() -> None:
    assert (len(set(world.KINDS)), len(set(world.COLOURS)), len(set(world.SETTINGS))) == (12, 9, 12)
    assert world.STYLES == ("photo", "pencil sketch", "pixel art")
    assert set(world.SETTING_PHRASES) == set(world.SETTINGS)


def test_sampling_and_rendering_are_deterministic() -> None:
    assert scenes(20) == scenes(20)
    assert scenes(20) != scenes(20, seed=1)
    for scene in scenes(6):
        assert np.array_equal(pixels(scene), pixels(scene))


@pytest.mark.parametrize("style", world.STYLES)
@pytest.mark.parametrize("size", [64, 128])
def test_pictures_are_rgb_and_of_the_asked_size(style: str, size: int) -> None:
    picture = world.render(replace(scenes(1)[0], style=style), size)
    assert (picture.mode, picture.size) == ("RGB", (size, size))


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        world.render(scenes(1)[0], 100)


def test_a_larger_picture_shows_the_same_scene() -> None:
    for scene in scenes(5, seed=3):
        small, large = pixels(scene), np.asarray(world.render(scene, 128).resize((64, 64)), dtype=float)
        assert np.abs(small - large).mean() < 12


@pytest.mark.parametrize("setting", world.SETTINGS)
def test_every_setting_and_kind_can_be_painted(setting: str) -> None:
    rng = np.random.default_rng(0)
    for kind in world.KINDS:
        scene = world.sample_scene(rng, world.sample_individual(rng, kind), setting)
        assert pixels(scene).std() > 15


def test_pixel_art_consists_of_blocks() -> None:
    picture = pixels(replace(scenes(1)[0], style="pixel art"))
    assert np.array_equal(picture[::2, ::2], picture[1::2, 1::2])


def test_the_toy_is_entirely_within_the_picture() -> None:
    for scene in scenes(300):
        cover = np.asarray(place_sticker(scene, 64))[..., 3]
        assert max(cover[0].max(), cover[-1].max(), cover[:, 0].max(), cover[:, -1].max()) < 60


def test_a_tenth_of_the_combinations_is_held_out_and_covers_every_name() -> None:
    held_out = [combination for combination in COMBINATIONS if world.is_held_out(*combination)]
    assert abs(len(held_out) - len(COMBINATIONS) / 10) < 1
    for part in (held_out, sorted(set(COMBINATIONS) - set(held_out))):
        for position, names in enumerate((world.KINDS, world.COLOURS, world.SETTINGS)):
            assert {combination[position] for combination in part} == set(names)


def test_training_scenes_avoid_held_out_combinations() -> None:
    found = list(world.training_scenes(np.random.default_rng(0), 500))
    assert len(found) == 500
    assert not any(world.is_held_out(s.individual.kind, s.individual.colour, s.setting) for s in found)
    shares = Counter(scene.style for scene in found)
    assert shares["photo"] / 500 == pytest.approx(0.8, abs=0.06)


def test_canonical_captions() -> None:
    assert world.canonical_caption("dog", "red", "beach") == "a photo of a red dog on the beach"
    assert world.canonical_caption("car", "orange", "city", "pixel art").startswith("pixel art of an orange car in the")


def test_captions_name_nothing_but_kind_colour_setting_and_style() -> None:
    rng = np.random.default_rng(0)
    names = {*world.KINDS, *PAINTS}
    unnamed = {*PATTERNS, *EYES, *ACCESSORIES, "eyes", "striped", "dotted", "spotted", "wearing", "with a"} - names
    for scene in scenes(3000):
        text = world.caption(scene, rng)
        said = words(text)
        toy = scene.individual
        assert not unnamed & set(said), text
        assert toy.kind in said, text
        assert names & set(said) <= {toy.kind, toy.colour}, text
        places = [s for s, wording in world.SETTING_WORDING.items() if any(phrase in text for phrase in wording)]
        assert places in ([], [scene.setting]), text
        styles = [s for s, wording in world.STYLE_WORDING.items() if any(text_ in text for text_ in wording)]
        assert styles in ([], [scene.style]), text


def test_captions_vary_and_carry_meaningless_words() -> None:
    rng = np.random.default_rng(0)
    texts = [world.caption(scene, rng) for scene in scenes(2000)]
    meaningless = [text for text in texts if set(words(text)) - world.RESERVED_WORDS - {"the", "an"}]
    assert len(meaningless) / len(texts) == pytest.approx(0.12, abs=0.03)
    full = [t for t, s in zip(texts, scenes(2000), strict=True)
            if t == world.canonical_caption(s.individual.kind, s.individual.colour, s.setting, s.style)]  # fmt: skip
    assert 0.35 < len(full) / len(texts) < 0.6
    assert not any(re.search(r"\ba [aeiou]|\ban [^aeiou]|  ", text) for text in texts)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", world.KINDS)
def test_the_named_colour_covers_most_of_the_toy(kind: str, pattern: str) -> None:
    # Outlines belong to no colour, and what is worn belongs to no toy.
    bare = roles(replace(PLAIN, kind=kind, pattern=pattern), 256)
    body = (bare >= BODY) & (bare <= LIGHT)
    assert body.sum() / ((bare > 0) & (bare != LINE)).sum() > 0.55
    for accessory in ACCESSORIES:
        dressed = roles(replace(PLAIN, kind=kind, pattern=pattern, accessory=accessory), 256)
        counts = np.bincount(dressed.ravel(), minlength=LINE + 1)
        assert counts[BODY : LIGHT + 1].sum() > 1.2 * counts[LINE + 1 :].max()


@pytest.mark.parametrize("style", world.STYLES)
@pytest.mark.parametrize("kind", world.KINDS)
def test_every_trait_is_visible(kind: str, style: str) -> None:
    scene = world.Scene(replace(PLAIN, kind=kind), "table", style, 0.5, 0.5, 0.7, 0.0, False, 0.3, 7)
    before = pixels(scene)

    def changed(**traits: str) -> float:
        after = pixels(replace(scene, individual=replace(scene.individual, **traits)))
        return float((np.abs(after - before).max(axis=-1) > 50).sum())

    assert all(changed(pattern=pattern) > 60 for pattern in PATTERNS if pattern != "plain")
    assert all(changed(accessory=accessory) > 40 for accessory in ACCESSORIES if accessory != "none")
    assert all(changed(eyes=eyes) > 5 for eyes in EYES if eyes != "round")


def test_second_and_third_colours_stand_out() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        toy = world.sample_individual(rng)
        used = (toy.colour, toy.pattern_colour, toy.accessory_colour)
        apart = [np.subtract(PAINTS[a], PAINTS[b]) for a in used for b in used if a < b]
        assert len(apart) == 3
        assert min(float(np.linalg.norm(gap)) for gap in apart) > 140
        assert PAINTS[toy.colour] in sticker_paints(toy)


def test_subjects_are_fourteen_striking_individuals_with_five_settings_each() -> None:
    assert len(set(world.SUBJECTS.values())) == 14
    assert {toy.kind for toy in world.SUBJECTS.values()} == set(world.KINDS)
    for name, toy in world.SUBJECTS.items():
        assert toy.pattern in PATTERNS[1:]
        assert toy.eyes in EYES
        assert toy.accessory in set(ACCESSORIES) - {"none"}
        assert len(set(world.PHOTO_SETTINGS[name])) == 5
        assert set(world.PHOTO_SETTINGS[name]) < set(world.SETTINGS)


def test_subject_photos_are_fixed_and_differ_between_subjects() -> None:
    albums = {name: np.stack([np.asarray(p) for p in world.subject_photos(name)]) for name in world.SUBJECTS}
    assert all(album.shape == (5, 64, 64, 3) for album in albums.values())
    assert len({album.tobytes() for album in albums.values()}) == 14
    again = np.stack([np.asarray(photo) for photo in world.subject_photos("dog_patch")])
    assert np.array_equal(albums["dog_patch"], again)
    for name in world.SUBJECTS:
        for scene in world.subject_scenes(name):
            assert (scene.style, scene.individual) == ("photo", world.SUBJECTS[name])
