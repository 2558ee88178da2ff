"""Another autoencoder for a base: from a folder, from a model's folder, from one file; recorded where it was used."""

import json

import pytest
import torch
from conftest import tiny_autoencoder, tiny_pipeline
from diffusers import AutoencoderKL
from flow_bases import tiny_flux1
from PIL import Image
from safetensors.torch import save_file

from svfit_dreambooth import read_adapter
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.opening import exchange_autoencoder, open_base_model
from svfit_dreambooth.commands.main import main, main_train
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.sharing.original_names import autoencoder_tensors


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """An autoencoder in a folder of its own, in a model's, and as one file with and without the prefix of models."""
    torch.manual_seed(7)
    vae, folder = tiny_autoencoder(), tmp_path_factory.mktemp("autoencoders")
    vae.save_pretrained(folder / "own")
    vae.save_pretrained(folder / "model" / "vae")
    tensors = {key: tensor.contiguous() for key, tensor in autoencoder_tensors(vae.state_dict(), 2).items()}
    save_file(tensors, folder / "one.safetensors")
    save_file({f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}, folder / "two.safetensors")
    return folder, vae


@pytest.mark.parametrize("place", ["own", "model", "one.safetensors", "two.safetensors"])
def test_it_takes_the_place_of_the_bases_own(tiny_base, other, place):
    folder, vae = other
    model = open_base_model(str(tiny_base), pretrained_vae_model_name_or_path=str(folder / place))
    weights = model.pipeline.vae.state_dict()
    assert all(torch.equal(weights[key], tensor) for key, tensor in vae.state_dict().items())
    assert model.vae_name == (folder / place).stem or model.vae_name == place
    assert open_base_model(str(tiny_base)).vae_name is None


def test_units_are_its_own(tiny_base_xl, other, tmp_path):
    vae = tiny_autoencoder()
    vae.register_to_config(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4, scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    model = open_base_model(str(tiny_base_xl), pretrained_vae_model_name_or_path=str(tmp_path / "vae"))
    offset, factor = model.family.latent_unit()
    assert offset.flatten().tolist() == [1.0, 2.0, 3.0, 4.0] and factor.flatten().tolist() == [0.25] * 4
    with pytest.raises(SVFitError, match="latents_mean, which pipelines of its family ignore"):
        exchange_autoencoder(BaseModel("tiny", tiny_pipeline()), str(tmp_path / "vae"))


def test_a_run_and_its_pictures_remember_it(tiny_base, other, photo_folder, tmp_path):
    folder, _ = other
    base = [
        "--pretrained_model_name_or_path",
        str(tiny_base),
        "--pretrained_vae_model_name_or_path",
        str(folder / "own"),
    ]
    options = [
        "--instance_data_dir", str(photo_folder), "--instance_prompt", "a photo of sks dog", "--output_dir",
        str(tmp_path / "run"), "--resolution", "16", "--max_train_steps", "1", "--validation_steps", "0",
        "--no_final_pictures",
    ]  # fmt: skip
    assert main_train([*base, *options]) == 0
    path = tmp_path / "run" / "my-dog.safetensors"
    assert read_adapter(path).training["vae"] == "own" and str(folder) not in path.read_bytes().decode("latin-1")
    painting = [
        "generate",
        "--adapter",
        str(path),
        "--prompt",
        "a dog",
        "--num_images",
        "1",
        "--num_inference_steps",
        "1",
    ]
    settings = {}
    for name, arguments in (("other", base), ("own", base[:2])):
        assert main([*painting, *arguments, "--output_dir", str(tmp_path / name)]) == 0
        with Image.open(next((tmp_path / name).glob("*.png"))) as picture:
            settings[name] = json.loads(picture.text["svfit"])
            assert ("VAE: own, " in picture.text["parameters"]) == (name == "other")
    assert settings["other"]["vae"] == "own" and "vae" not in settings["own"]


def test_what_cannot_be_one(tiny_base, other, tmp_path):
    folder, vae = other
    model = BaseModel("tiny", tiny_pipeline())
    before = model.pipeline.vae

    def refuses(name, sentence):
        with pytest.raises(SVFitError, match=sentence):
            exchange_autoencoder(model, str(name))
        assert model.pipeline.vae is before and model.vae_name is None

    refuses(tmp_path / "nowhere", "is no autoencoder: there is no such folder or file")
    refuses(tiny_base / "unet", "holds a UNet2DConditionModel")
    (tmp_path / "x.pt").write_bytes(b"x")
    refuses(tmp_path / "x.pt", "is no .safetensors file")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path / "shallow")
    refuses(tmp_path / "shallow", "one for 1 pixels, and the base wants 4, one for 2")
    tensors = dict(vae.state_dict())
    tensors.pop("decoder.conv_out.bias")
    vae.save_pretrained(tmp_path / "less")
    save_file(tensors, tmp_path / "less" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    refuses(tmp_path / "less", "lacks decoder.conv_out.bias")
    original = autoencoder_tensors(tensors, 2)
    save_file({key: tensor.contiguous() for key, tensor in original.items()}, tmp_path / "less.safetensors")
    refuses(tmp_path / "less.safetensors", "has no numbers for decoder.conv_out.bias|cannot be opened")
    with pytest.raises(SVFitError, match="is for Stable Diffusion 1.x, 2.x and XL"):
        exchange_autoencoder(BaseModel("flux", tiny_flux1()), str(folder / "own"))
