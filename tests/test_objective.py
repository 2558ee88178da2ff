"""The loss against its formulas, and what the number of an example decides."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from PIL import Image
from torch import nn

from svfit_dreambooth import TrainConfig, train
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.examples import Examples, encode_examples
from svfit_dreambooth.training.objective import Objective, min_snr_weights
from svfit_dreambooth.training.plan import Plan

CPU = torch.device("cpu")


class Constant(nn.Module):
    """Predicts the same number everywhere."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = value

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=False):
        return (torch.full_like(sample, self.value),)


def denoiser(unet=None, prediction_type="epsilon", sizes=((8, 8),) * 3, weight=None, **options):
    pipeline = tiny_pipeline(prediction_type=prediction_type)
    photos = len(sizes)
    generator = torch.Generator().manual_seed(0)
    mean = [torch.randn(2, 4, *size, generator=generator) for size in sizes]
    examples = Examples(
        mean=mean,
        spread=[torch.full_like(m, 0.1) for m in mean],
        weight=weight or [None] * photos,
        prompts=[[photo] for photo in range(photos)],
        time_ids=[torch.zeros(2, 6)] * photos,
        tokens={"text_encoder": torch.zeros(photos, 77, dtype=torch.long)},
        conditions={"prompt_embeds": torch.randn(photos, 77, 24, generator=generator)},
    )
    config = TrainConfig(**{"train_batch_size": 4, "fixed_loss_examples": 3, **options})
    run = Plan(config, [], BaseModel("tiny", pipeline), "test", {}, {})
    networks = run.base.family.components | {"unet": unet or Constant()}
    return Objective(run, examples, networks, CPU, torch.float32)


def test_epsilon_is_the_distance_from_the_noise():
    model = denoiser(Constant(0.5))
    noise = torch.stack([model.draw(number).noise for number in range(4, 8)])
    assert torch.allclose(model.loss(1, 0, 1).total, (0.5 - noise).square().mean())


def test_v_prediction_is_the_distance_from_the_velocity():
    """v = sqrt(alpha) noise - sqrt(1 - alpha) latents (Salimans and Ho, 2022)."""
    model = denoiser(Constant(0.5), "v_prediction")
    expected = []
    for draw in [model.draw(number) for number in range(4)]:
        alpha = model.noising.scheduler.alphas_cumprod[draw.timestep]
        velocity = alpha.sqrt() * draw.noise - (1 - alpha).sqrt() * draw.latents
        expected.append((0.5 - velocity).square().mean())
    assert torch.allclose(model.loss(0, 0, 1).total, torch.stack(expected).mean())


def test_min_snr_weights_follow_the_formula():
    alphas = torch.tensor([0.999, 0.9, 0.5, 0.1, 0.001], dtype=torch.float64)
    snr = alphas / (1 - alphas)
    least = torch.minimum(snr, torch.tensor(5.0))
    assert torch.allclose(min_snr_weights(alphas, 5.0, "epsilon"), least / snr)
    assert torch.allclose(min_snr_weights(alphas, 5.0, "v_prediction"), least / (snr + 1))
    ends = torch.tensor([0.0, 1.0])  # schedules of zero terminal SNR reach pure noise
    assert min_snr_weights(ends, 5.0, "epsilon").tolist() == [1.0, 0.0]
    assert min_snr_weights(ends, 5.0, "v_prediction").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_both_predictions_weigh_the_same_error_of_the_picture_alike(prediction_type):
    """min-SNR weighs the error of the predicted picture by min(SNR, gamma), whatever the network predicts."""
    alphas = torch.tensor([0.95, 0.6, 0.2], dtype=torch.float64)
    snr = alphas / (1 - alphas)
    # x0 = (x_t - sqrt(1-a) eps) / sqrt(a) = sqrt(a) x_t - sqrt(1-a) v: an error e of the network moves x0 by
    moved = (1 - alphas) / alphas if prediction_type == "epsilon" else 1 - alphas
    assert torch.allclose(min_snr_weights(alphas, 5.0, prediction_type), snr.clamp(max=5) * moved)


def test_min_snr_weights_need_no_float64_of_the_device():
    """Apple's has none; the scheduler moves its table there with the first noise."""

    class OnDevice(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

    plain, moved = denoiser(snr_gamma=5.0), denoiser(snr_gamma=5.0)
    moved.noising.scheduler.alphas_cumprod = moved.noising.scheduler.alphas_cumprod.as_subclass(OnDevice)
    assert torch.equal(moved.loss(0, 0, 1).total, plain.loss(0, 0, 1).total)


def test_min_snr_weighs_every_example_by_its_timestep():
    plain, weighted = denoiser(), denoiser(snr_gamma=5.0)
    draws = [plain.draw(number) for number in range(4)]
    alphas = plain.noising.scheduler.alphas_cumprod[[draw.timestep for draw in draws]]
    errors = torch.stack([draw.noise.square().mean() for draw in draws])
    expected = (min_snr_weights(alphas, 5.0, "epsilon") * errors).mean()
    assert torch.allclose(weighted.loss(0, 0, 1).total.double(), expected)
    assert not torch.allclose(plain.loss(0, 0, 1).total, weighted.loss(0, 0, 1).total)
    assert plain.fixed_loss() == weighted.fixed_loss()


def test_offset_noise_adds_one_number_a_channel_and_moves_nothing_else():
    plain, offset = denoiser(), denoiser(noise_offset=0.1)
    shifts = []
    for number in range(60):
        before, after = plain.draw(number), offset.draw(number)
        assert torch.equal(before.latents, after.latents) and before.timestep == after.timestep
        difference = after.noise - before.noise  # (4, 8, 8)
        assert torch.allclose(difference, difference[:, :1, :1].expand_as(difference), atol=1e-6)
        shifts.append(difference[:, 0, 0] / 0.1)
    shifts = torch.cat(shifts)  # (240,), standard normal
    assert abs(shifts.mean()) < 0.2 and 0.85 < shifts.std() < 1.15
    assert plain.fixed_loss() == offset.fixed_loss()


def test_processes_share_the_examples_of_one():
    """Two processes with batches of 2 see what one with a batch of 4 sees."""
    one, two = denoiser(Constant(0.3)), denoiser(Constant(0.3), train_batch_size=2)
    halves = [two.loss(3, process, 2).total for process in (0, 1)]
    assert torch.allclose(one.loss(3, 0, 1).total, torch.stack(halves).mean())


def test_masks_weigh_the_error_at_latent_resolution():
    weight = torch.full((2, 1, 8, 8), 0.1)
    weight[:, :, :4] = 1.0
    model = denoiser(weight=[weight, None, torch.zeros(2, 1, 8, 8)])
    for number in range(6):
        draw = model.draw(number)
        expected = {
            0: (draw.noise[:, :4].square().sum() + 0.1 * draw.noise[:, 4:].square().sum()) / (4 * 8 * 4 * 1.1),
            1: draw.noise.square().mean(),
            2: torch.zeros(()),
        }[draw.index]
        assert torch.allclose(model._errors([draw])[0], expected)
    together = model._errors([model.draw(number) for number in range(3)])
    assert torch.allclose(together, torch.cat([model._errors([model.draw(number)]) for number in range(3)]))


def test_shapes_may_differ_within_a_batch():
    calls = []

    class Counting(Constant):
        def forward(self, sample, *args, **kwargs):
            calls.append(tuple(sample.shape))
            return super().forward(sample, *args, **kwargs)

    model = denoiser(Counting(), sizes=((8, 8), (10, 6), (8, 8)), train_batch_size=6)
    errors = model._errors([model.draw(number) for number in range(6)])
    assert sorted(calls) == [(2, 4, 10, 6), (4, 4, 8, 8)]
    assert torch.allclose(errors, torch.stack([model.draw(number).noise.square().mean() for number in range(6)]))


@pytest.mark.parametrize(("option", "value"), [("snr_gamma", 0), ("noise_offset", -0.1), ("unmasked_weight", 2)])
def test_impossible_values_are_refused(option, value):
    with pytest.raises(SVFitError, match=f"{option} is {value}"):
        TrainConfig(**{option: value})


def test_a_run_with_both_repeats(tiny_base, photo_folder, tmp_path):
    losses = []
    for name in ("a", "b"):
        config = TrainConfig(
            pretrained_model_name_or_path=str(tiny_base),
            instance_data_dir=str(photo_folder),
            instance_prompt="a photo of sks dog",
            output_dir=str(tmp_path / name),
            max_train_steps=2,
            train_batch_size=2,
            resolution=16,
            fixed_loss_examples=1,
            final_pictures=False,
            snr_gamma=5.0,
            noise_offset=0.05,
        )
        losses.append([])
        train(config, on_step=lambda step, own=losses[-1]: own.append(step.loss))
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_run_on_masked_portraits_beside_a_square(tiny_base, tmp_path):
    folder = tmp_path / "dog"
    folder.mkdir()
    for number, size in enumerate([(32, 64), (32, 64), (40, 40)]):
        pixels = np.random.default_rng(number).integers(0, 255, (*size[::-1], 4), dtype=np.uint8)
        pixels[..., 3] = 255
        pixels[: 20 * (number == 1), :, 3] = 0
        Image.fromarray(pixels).save(folder / f"{number}.png")
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_base),
        instance_data_dir=str(folder),
        instance_prompt="a photo of sks dog",
        output_dir=str(tmp_path / "out"),
        max_train_steps=3,
        resolution=16,
        final_pictures=False,
    )
    result = train(config)
    assert "12x20 (2), 16x16 (1)" in "\n".join(result.plan.report())
    examples = encode_examples(result.plan, CPU)
    assert [tuple(mean.shape) for mean in examples.mean] == [(4, 4, 10, 6), (4, 4, 10, 6), (1, 4, 8, 8)]
    assert [weight is None for weight in examples.weight] == [True, False, True]
    assert examples.weight[1].shape == (4, 1, 10, 6)
    assert examples.weight[1][:, :, :2].eq(0.1).all() and examples.weight[1][:, :, -2:].eq(1).all()
    square = train(dataclasses.replace(config, aspect_ratio="square", output_dir=str(tmp_path / "square")))
    assert "16x16 (3)" in "\n".join(square.plan.report())


# ---------------------------------------------------------------- captions


def test_photos_are_shown_as_often_as_they_count():
    model = denoiser()
    plain = [model.draw(number).index for number in range(30)]
    model.examples.repeats = [1, 1, 1]
    assert [model.draw(number).index for number in range(30)] == plain
    model.examples.repeats = [3, 1, 2]
    for first in range(0, 60, 6):  # in every round
        shown = [model.draw(number).index for number in range(first, first + 6)]
        assert [shown.count(photo) for photo in range(3)] == [3, 1, 2]


def test_captions_of_a_photo_take_turns_and_change_nothing_else():
    model, plain = denoiser(), denoiser()
    model.examples.prompts = [[0, 1], [1], [2, 0, 1]]
    draws = [(model.draw(number), plain.draw(number)) for number in range(300)]
    assert all(ours.timestep == other.timestep and torch.equal(ours.noise, other.noise) for ours, other in draws)
    for photo, rows in enumerate(model.examples.prompts):
        drawn = [ours.prompt for ours, _ in draws if ours.index == photo]
        assert set(drawn) == set(rows) and min(drawn.count(row) for row in rows) > 20


def test_captions_are_dropped_for_a_share_of_the_examples():
    model = denoiser(caption_dropout_rate=0.25)
    model.examples.dropped = 2
    model.examples.prompts = [[0], [0], [1]]
    dropped = sum(model.draw(number).prompt == 2 for number in range(800))
    assert 150 < dropped < 250
    assert not any(model.draw(number, "fixed").prompt == 2 for number in range(100))
