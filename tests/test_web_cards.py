"""What the page draws: words of strangers."""

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

from svfit_dreambooth.web.tabs.cards import readable


def test_words_of_strangers_neither_turn_round_nor_go_on_for_ever():
    assert readable("a \u202egod\u202c dog\x1b[31m\u200b\ud800") == "a god dog[31m"
    assert readable("Höhle 犬 🐶") == "Höhle 犬 🐶"
    assert readable("d" * 100_000) == "d" * 300 + " …"
