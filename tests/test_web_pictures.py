"""Pictures of a visitor and the settings in them."""

import pytest
from PIL import Image
from web_stand_ins import paint

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.picture import free_path, save_picture
from svfit_dreambooth.web.rooms import pictures
from svfit_dreambooth.web.rooms.bases import Bases
from svfit_dreambooth.web.rooms.orders import Order
from svfit_dreambooth.web.rooms.studio import Studio


def test_settings_are_read_back_and_others_refused(workspace, tiny_base, tmp_path):
    _, (picture,) = paint(
        Studio(Bases(workspace.models, (str(tiny_base),))),
        Order("a <b>dog</b>", tiny_base.name, num_inference_steps=2, width=16, height=16),
    )
    path = save_picture(picture, free_path(tmp_path, "dog"))
    assert pictures.read_settings(path) == picture.settings
    Image.open(path).save(tmp_path / "bare.png")
    with pytest.raises(SVFitError, match="bare.png holds no settings"):
        pictures.read_settings(tmp_path / "bare.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SVFitError, match="^text.png is not a readable PNG file: choose"):
        pictures.read_settings(tmp_path / "text.png")
    with pytest.raises(SVFitError, match="not there any more"):
        pictures.find(tmp_path, "../secret")
