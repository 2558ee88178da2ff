"""Names of files that hold on every system."""

import pytest

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import MAX_NAME_BYTES, check_portable, file_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("my dog", "my-dog"), ("../../etc/passwd", "etc-passwd"), (".hidden", "hidden"), ("Höhle", "Höhle"),
        ("Ho\u0308hle", "Höhle"), ('a<b>:"c"|d?*\\e', "a-b-c-d-e"), ("dog. ", "dog"), ("d\ud800g", "d-g"), ("console", "console"),
        ("com", "com"), ("com10", "com10"), ("d" * 100, "d" * 60),
    ],
)  # fmt: skip
def test_names_are_names_of_files_on_every_system(text, name):
    assert file_name(text) == name


@pytest.mark.parametrize("name", ["con", "CON", "nul.txt", "Aux", "com1", "LPT9", "com¹", "prn.safetensors"])
def test_names_of_devices_are_refused(name):
    with pytest.raises(SVFitError, match=f"the name '{name}' stands for a device on Windows: choose another"):
        file_name(name)


def test_names_have_letters_and_fit_on_disks():
    with pytest.raises(SVFitError, match=r"the name of the adapter '../..' has no letters or digits"):
        file_name("../..", "name of the adapter")
    long = file_name("犬" * 100)
    assert (
        len(f"{long}-diffusers.safetensors".encode()) <= 255 and len(file_name("🐶a" * 50).encode()) <= MAX_NAME_BYTES
    )
    with pytest.raises(SVFitError, match="201 bytes long"):
        check_portable("d" * 201)
