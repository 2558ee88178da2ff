"""The bundled photos are those that the world renders."""

import numpy as np
from PIL import Image

from toybox.bundle import SUBJECTS_FOLDER, bundle


def test_bundled_photos_are_the_worlds(tmp_path):
    rendered = bundle(tmp_path)
    assert len(rendered) == 5 * len(list(SUBJECTS_FOLDER.iterdir()))
    for path in rendered:
        shipped = np.asarray(Image.open(SUBJECTS_FOLDER / path.relative_to(tmp_path)).convert("RGB"), dtype=int)
        fresh = np.asarray(Image.open(path).convert("RGB"), dtype=int)
        assert np.abs(shipped - fresh).max() <= 4, path  # libraries round a pixel differently now and then
