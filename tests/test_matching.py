"""Adapters on a base that was distilled from the one they were trained on."""

import logging

import pytest
import torch
from flow_bases import tiny_klein, tiny_sd3, tiny_z_image

from svfit_dreambooth import load_adapter, save_adapter, unload_adapter
from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.families import family_of
from svfit_dreambooth.bases.opening import open_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.method.targets import svfit_layers

SIBLING = "FLUX.2-klein-base-9B"  # what a distilled klein of another width than 3072 names


@pytest.fixture(scope="module")
def sibling(tmp_path_factory):
    """Folder of the undistilled base."""
    path = tmp_path_factory.mktemp("bases") / SIBLING
    tiny_klein().save_pretrained(path)
    return path


def distilled(apart, seed=0):
    """A klein that calls itself distilled, with weights so far from those of `sibling`, relative."""
    pipeline = tiny_klein(seed, is_distilled=True)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in pipeline.transformer.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight += apart * weight.norm() / noise.norm() * noise
    return pipeline


def write_adapter(pipeline, path, base_model=SIBLING):
    layers = family_of(pipeline).find_projections("transformer")
    weights = {f"transformer.{name}": layer.weight.detach() for name, (_, _, layer) in layers.items()}
    torch.manual_seed(1)
    shifts = {name: torch.randn(min(weight.shape)) for name, weight in weights.items()}
    return save_adapter(Adapter(shifts, base_model, fingerprint(weights)), path, torch.float32)


def deltas(pipeline):
    return {name: layer.exact_delta() for name, layer in svfit_layers(pipeline.transformer).items()}


def test_with_the_base_that_it_was_trained_on_an_adapter_does_exactly_what_it_does_there(sibling, tmp_path, caplog):
    trained = open_base_model(str(sibling))
    path = write_adapter(trained.pipeline, tmp_path / "dog.safetensors")
    load_adapter(trained.pipeline, path)
    expected = deltas(trained.pipeline)
    off = {}
    for apart in (0.01, 0.1, 0.3):
        other = distilled(apart)
        load_adapter(other, path, trained_on=open_base_model(str(sibling), one_at_a_time=True))
        found = deltas(other)
        assert max((found[name] - expected[name]).norm() / expected[name].norm() for name in expected) < 1e-5
        unload_adapter(other)

        if apart > 0.03:
            with pytest.raises(
                SVFitError, match="too far for this base's own directions: give that base with trained_on"
            ):
                load_adapter(other, path)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            load_adapter(other, path, allow_other_base=apart > 0.03)
        assert apart > 0.03 or f"{SIBLING}, from which this base was distilled; their weights are" in caplog.text
        squares = [
            ((d - expected[name]).square().sum(), expected[name].square().sum()) for name, d in deltas(other).items()
        ]
        off[apart] = (sum(error for error, _ in squares) / sum(norm for _, norm in squares)).sqrt().item()
    # own directions are an approximation, the worse the further away
    assert 0 < off[0.01] < 0.15 and off[0.01] < off[0.1] < 0.8 and off[0.3] > 1


def test_directions_of_two_bases_do_not_mix(sibling, tmp_path):
    other = distilled(0.01)
    first = write_adapter(tiny_klein(), tmp_path / "first.safetensors")
    load_adapter(other, first)
    with pytest.raises(
        SVFitError, match="'first' and 'second' lie along the directions of different bases, this one and"
    ):
        load_adapter(other, first, name="second", trained_on=open_base_model(str(sibling)))
    assert list(other.transformer.svfit_adapters) == ["first"]


def test_what_is_no_sibling_is_refused(sibling, tmp_path):
    path = write_adapter(tiny_klein(), tmp_path / "dog.safetensors")
    with pytest.raises(SVFitError, match="holds other weights"):
        load_adapter(distilled(0.0, seed=4), path)  # distilled, by its word, and of other weights altogether
    elsewhere = write_adapter(tiny_klein(), tmp_path / "cat.safetensors", "owner/another-klein")
    with pytest.raises(SVFitError, match="holds other weights"):
        load_adapter(distilled(0.1), elsewhere)
    with pytest.raises(
        SVFitError, match=f"was trained on owner/another-klein, and trained_on {SIBLING} is another base"
    ):
        load_adapter(
            distilled(0.1), write_adapter(tiny_klein(5), tmp_path / "mug.safetensors", "owner/another-klein"),
            trained_on=open_base_model(str(sibling), one_at_a_time=True),
        )  # fmt: skip


@pytest.mark.parametrize(
    "pipeline, name, undistilled, guidance",
    [
        (tiny_z_image, "Z-Image-Turbo", "Tongyi-MAI/Z-Image", 0.0),
        (tiny_sd3, "stable-diffusion-3.5-large-turbo", "stabilityai/stable-diffusion-3.5-large", 1.0),
    ],
)
def test_bases_whose_configs_say_nothing_are_known_by_their_names(pipeline, name, undistilled, guidance):
    pipeline = pipeline()
    assert family_of(pipeline).undistilled is None and family_of(pipeline).guidance_scale > 1
    pipeline.register_to_config(_name_or_path=f"owner/{name}")
    assert family_of(pipeline).undistilled == undistilled and family_of(pipeline).guidance_scale == guidance
