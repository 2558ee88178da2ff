"""Samplers by the names that they have in other programs."""

import numpy as np
import pytest
from conftest import tiny_pipeline
from diffusers import FlowMatchEulerDiscreteScheduler

from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.painting.generate import generate
from svfit_dreambooth.painting.samplers import SAMPLERS, sampled_with, samplers_of

SIZE = {"num_inference_steps": 3, "width": 16, "height": 16}


def test_every_sampler_of_the_list_paints_its_own_picture_and_the_base_keeps_its_own(tiny_base_v):
    model = open_base_model(str(tiny_base_v))
    own = model.pipeline.scheduler
    assert samplers_of(model.pipeline) == list(SAMPLERS)
    pictures = {}
    for name in (None, *SAMPLERS):
        (picture,) = generate(model, ["a dog"], scheduler=name, seed=3, **SIZE)
        assert picture.settings.get("scheduler") == name and model.pipeline.scheduler is own
        pictures[np.asarray(picture.image).tobytes()] = name
    assert len(pictures) >= len(SAMPLERS) - 1  # the base's own is one of them, and two of one rule may agree in 8 bits
    with sampled_with(model.pipeline, "dpm++_2m_karras"):
        config = model.pipeline.scheduler.config
        assert config.use_karras_sigmas and config.prediction_type == "v_prediction"  # the base's, not the sampler's


def test_what_does_not_fit_is_told_with_what_does():
    pipeline = tiny_pipeline()
    with pytest.raises(SVFitError, match="scheduler is 'fast': use one of ddim, euler, euler_a"):
        sampled_with(pipeline, "fast").__enter__()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    assert samplers_of(pipeline) == []
    with pytest.raises(SVFitError, match="scheduler is 'ddim': this base has its own alone"):
        sampled_with(pipeline, "ddim").__enter__()
