"""Captions: from which files and folder names, and what they give."""

import pytest
from pictures import picture

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.photos.captions import ORDERS, folder_words, shuffled
from svfit_dreambooth.photos.reading import find_photos, photo_report


def test_captions(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        picture(seed=ord(name[0])).save(tmp_path / name)
    (tmp_path / "a.txt").write_bytes("\ufeffa photo of a süßes dog \n".encode())
    (tmp_path / "b.txt").write_text("  \n")
    (tmp_path / "c.txt").write_text("plain")
    assert [photo.captions for photo in find_photos(tmp_path)] == [("a photo of a süßes dog",), (), ("plain",), ()]
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(SVFitError, match=r"c\.txt.*UTF-8"):
        find_photos(tmp_path)


def captions(folder):
    return {photo.path.name: photo.captions for photo in find_photos(folder)}


@pytest.mark.parametrize("name", ["a.txt", "a.caption", "a.jpg.txt", "a.jpg.caption", "A.TXT", "a.Caption"])
def test_files_beside_the_photo(tmp_path, name):
    picture().save(tmp_path / "a.jpg")
    (tmp_path / name).write_text("a dog\n\n  the dog of my aunt \n", encoding="utf-8")
    assert captions(tmp_path) == {"a.jpg": ("a dog", "the dog of my aunt")}
    assert "captions: 1 of 1, several each of 1" in photo_report(find_photos(tmp_path), 16)


def test_of_different_captions_one_is_named_as_used(tmp_path, caplog):
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "a.caption").write_text("a dog")
    assert captions(tmp_path) == {"a.jpg": ("a dog",)} and not caplog.records
    (tmp_path / "a.caption").write_text("a cat")
    assert captions(tmp_path) == {"a.jpg": ("a dog",)}
    assert "those of a.txt are used, not those of a.caption" in caplog.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "a dog, red"}\n\n{"file_name": "b.jpg", "text": ""}\n'),
        ("metadata.jsonl", '{"file_name": "a.jpg", "caption": "a dog, red", "width": 3}\n'),
        ("metadata.csv", 'file_name,text\na.jpg,"a dog, red"\nb.jpg,\n'),
    ],
)
def test_tables_of_an_image_folder(tmp_path, caplog, name, content):
    for photo in ("a.jpg", "b.jpg"):
        picture(seed=ord(photo[0])).save(tmp_path / photo)
    (tmp_path / name).write_text(content)
    assert captions(tmp_path) == {"a.jpg": ("a dog, red",), "b.jpg": ()}
    assert not caplog.records


def test_a_table_may_hold_alternatives(tmp_path):
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": ["a dog", "my dog"]}\n')
    assert captions(tmp_path) == {"a.jpg": ("a dog", "my dog")}


def test_a_table_without_captions_is_named_with_its_columns(tmp_path, caplog):
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "label": 3}\n')
    assert captions(tmp_path) == {"a.jpg": ()}
    assert "its columns: file_name, label" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"not json\n", "Line 1 of"),
        (b"[1, 2]\n", "Line 1 of"),
        (b"[" * 100_000, "Line 1 of"),
        (b'{"file_name": "a.jpg", "text": {"a": 1}}', "where a caption belongs"),
        (b'{"file_name": "a.jpg", "text": "\\ud83d dog"}', "half a character"),
        (b"\xff\xfe\x00", "can't be read"),
    ],
)
def test_tables_that_are_none(tmp_path, content, said):
    picture().save(tmp_path / "a.jpg")
    (tmp_path / "metadata.jsonl").write_bytes(content)
    with pytest.raises(SVFitError, match=said):
        find_photos(tmp_path)


def test_folders_as_kohya_names_them(tmp_path, caplog):
    for folder, names in (("10_sks dog", "ab"), ("2_a mug", "c"), ("others", "d")):
        (tmp_path / folder).mkdir()
        for name in names:
            picture(seed=ord(name)).save(tmp_path / folder / f"{name}.jpg")
    (tmp_path / "10_sks dog" / "b.txt").write_text("a portrait of sks dog")
    found = [(photo.path.name, photo.captions, photo.repeats) for photo in find_photos(tmp_path)]
    assert found == [
        ("a.jpg", ("sks dog",), 10),
        ("b.jpg", ("a portrait of sks dog",), 10),
        ("c.jpg", ("a mug",), 2),
    ]
    assert "Sub-folders are not searched; these hold pictures: others." in caplog.text
    assert "repeats by folder: 1 counted 2 times, 2 counted 10 times" in photo_report(find_photos(tmp_path), 16)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("10_sks dog", (10, "sks dog")),
        ("1_x", (1, "x")),
        ("0_dog", None),
        ("dog", None),
        ("10_", None),
        ("10 dog", None),
    ],
)
def test_what_a_folders_name_says(tmp_path, name, said):
    assert folder_words(tmp_path / name) == said


def test_tags_are_shuffled_behind_those_that_stay():
    orders = shuffled("sks dog, red,  on grass, smiling, night", 1, seed=3)
    assert len(orders) == ORDERS == len(set(orders))
    assert all(order.split(", ")[0] == "sks dog" for order in orders)
    assert all(
        sorted(order.split(", ")) == sorted(["sks dog", "red", "on grass", "smiling", "night"]) for order in orders
    )
    assert orders == shuffled("sks dog, red,  on grass, smiling, night", 1, seed=3)
    assert orders != shuffled("sks dog, red,  on grass, smiling, night", 1, seed=4)
    assert {order.split(", ")[0] for order in shuffled("a, b, c, d, e", 0, seed=0)} != {"a"}


@pytest.mark.parametrize(
    ("caption", "keep", "orders"), [("a dog", 1, {"a dog"}), ("a, b", 2, {"a, b"}), ("a, b", 0, {"a, b", "b, a"})]
)
def test_few_tags_have_few_orders(caption, keep, orders):
    assert set(shuffled(caption, keep, seed=0)) == orders
