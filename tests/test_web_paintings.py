"""Paintings under way: kept, watched, stopped, ended when nobody looks."""

import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

from web_stand_ins import until

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.web.rooms.bases import Bases
from svfit_dreambooth.web.rooms.orders import Order
from svfit_dreambooth.web.rooms.paintings import Paintings
from svfit_dreambooth.web.rooms.studio import Studio

SIZE = {"num_inference_steps": 2, "width": 16, "height": 16}


@pytest.fixture
def paintings(workspace, tiny_base):
    return Paintings(Studio(Bases(workspace.models, (str(tiny_base),))))


def test_a_painting_is_watched_to_its_end(paintings, visitor, tiny_base):
    painting = paintings.begin(visitor, Order("a dog", tiny_base.name, num_images=2, **SIZE))
    with pytest.raises(SVFitError, match="your last pictures are still being painted"):
        paintings.begin(visitor, Order("a dog", tiny_base.name, **SIZE))
    assert paintings.of(visitor) == [painting]
    seen = 0
    while not painting.over:
        assert painting.look(seen) >= seen
    assert [one.path.parent for one in painting.made] == [visitor.pictures] * 2 and painting.failure is None
    assert all(one.path.is_file() for one in painting.made) and paintings.of(visitor) == []
    again = paintings.begin(visitor, Order("a dog", "nothing such", **SIZE))
    until(lambda: again.over)
    assert "no base model that is offered here" in str(again.failure)
    with pytest.raises(SVFitError, match="number of pictures is 65"):
        paintings.begin(visitor, Order("a dog", tiny_base.name, num_images=65, **SIZE))


def test_a_painting_ends_when_it_is_told_to_or_nobody_looks(paintings, visitor, tiny_base):
    long = Order("a dog", tiny_base.name, num_images=64, num_inference_steps=200, width=16, height=16)
    asked = paintings.begin(visitor, long)
    unread = paintings.begin(visitor, long, alone=False, grace=0.5)
    until(lambda: asked.made)
    until(lambda: asked.look(0) and unread.is_set())
    asked.set()
    until(lambda: asked.over and unread.over)
    assert 0 < len(asked.made) < 64 and unread.made == [] and asked.failure is unread.failure is None
    assert paintings.of(visitor) == [] and paintings.studio.line.is_free
