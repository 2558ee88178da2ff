"""Folders of data and caches: the system's own, an earlier one where there is one, or what a person says."""

import pytest

from svfit_dreambooth import folders


@pytest.mark.parametrize(
    ("find", "variable", "call", "earlier"),
    [
        (folders.data_dir, "SVFIT_HOME", "user_data_path", ".local/share/svfit-dreambooth"),
        (folders.cache_dir, "SVFIT_CACHE", "user_cache_path", ".cache/svfit_dreambooth"),
    ],
)
def test_the_systems_own_folder_unless_there_is_an_earlier_one(find, variable, call, earlier, tmp_path, monkeypatch):
    home, usual = tmp_path / "home", tmp_path / "Library" / "svfit"
    for name in (variable, "XDG_DATA_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    on_linux = find()
    assert on_linux == home / earlier or on_linux.is_relative_to(home)  # platformdirs' own answer
    monkeypatch.setattr(f"platformdirs.{call}", lambda name, appauthor: usual)  # as on macOS
    assert find() == usual
    (home / earlier).mkdir(parents=True)
    assert find() == home / earlier
    usual.mkdir(parents=True)
    assert find() == usual
    monkeypatch.setenv(variable, "~/mine")
    assert find() == home / "mine"
