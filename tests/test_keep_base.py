"""Keeping the base: at the base nothing pulls, away from it everything is pulled back, and runs go on to the bit."""

import dataclasses

import pytest
import torch
from accelerate import Accelerator
from flow_bases import tiny_klein

from svfit_dreambooth import TrainConfig, read_adapter, train
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.protocol import bundled_questions
from svfit_dreambooth.method.basis import weight_hashes
from svfit_dreambooth.subjects.together import train_together
from svfit_dreambooth.training import base_pictures, keep_base
from svfit_dreambooth.training.base_pictures import kept_prompts
from svfit_dreambooth.training.checkpoints import run_identity
from svfit_dreambooth.training.estimate import estimate_memory
from svfit_dreambooth.training.events import Stepped
from svfit_dreambooth.training.examples import encode_examples
from svfit_dreambooth.training.keep_base import KeptBase, kept_batch_size
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.trainable import Trainable

CPU = torch.device("cpu")
OPTIONS = {
    "keep_base": True,
    "class_prompt": "a photo of a dog",
    "max_train_steps": 4,
    "train_batch_size": 2,
    "learning_rate": 5e-2,
    "fixed_loss_examples": 0,
    "validation_steps": 0,
    "final_pictures": False,
    "save_dtype": "float32",
}


@pytest.fixture(autouse=True)
def few_examples(monkeypatch):
    """Of pictures of one denoising step; the cache of the session keeps them."""
    monkeypatch.setattr(base_pictures, "STEPS", 1)
    monkeypatch.setattr(base_pictures, "PLAIN_PROMPTS", ("a photo of a cat", "a mug in the snow"))
    monkeypatch.setattr(base_pictures, "CLASS_PICTURES", 1)
    monkeypatch.setattr(keep_base, "EXAMPLES", 8)


class Ready:
    """A run that is about to make its first step, beside the base as it was before."""

    def __init__(self, plan):
        accelerator = Accelerator(cpu=True)
        weights = plan.weights()
        self.plan, self.examples = plan, encode_examples(plan, CPU)
        objective = Objective(plan, self.examples, plan.base.family.networks, CPU, torch.float32)
        plan.base.family.denoiser.float()  # as it was, where its pictures were painted in half precision
        with torch.no_grad():
            self.base_answers = torch.cat([objective.predict([objective.draw(i, "base")])[0] for i in range(8)])
        self.trainable = Trainable(plan, weights, weight_hashes(weights), None, accelerator)
        self.values = self.trainable.values
        self.objective = Objective(plan, self.examples, self.trainable.networks, CPU)

    def move(self, distance=0.5):
        with torch.no_grad():
            for value in self.values.values():
                value.add_(distance)

    def gradient(self, loss):
        for value in self.values.values():
            value.grad = None
        loss.backward()
        return torch.cat([value.grad.flatten() for value in self.values.values() if value.grad is not None])


@pytest.fixture
def ready(tiny_run):
    return lambda **changes: Ready(tiny_run(**OPTIONS | changes))


@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True, "learned_word": "sks"}])
def test_at_the_base_it_is_nothing_and_pulls_nowhere(ready, changes):
    run = ready(**changes)
    kept = KeptBase(run.objective)
    here = [kept.loss(number, 0, 1) for number in range(8)]
    assert max(loss.item() for loss in here) < 1e-10
    still = run.gradient(here[0])
    run.move()
    away = kept.loss(0, 0, 1)
    pull = run.gradient(away)
    assert away > 1e-6 and still.abs().max() < 1e-4 * pull.abs().max()


def test_answers_are_the_bases_own_wherever_the_values_are(ready):
    run = ready()
    run.move()
    before = [value.detach().clone() for value in run.values.values()]
    kept = KeptBase(run.objective)
    torch.testing.assert_close(kept.answers, run.base_answers, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(*pair) for pair in zip(before, run.values.values(), strict=True))
    places = [kept._place(0)]
    answer, _ = run.objective.predict([run.objective.draw(places[0], "base")])
    expected = (answer - run.base_answers[places]).square().mean()
    torch.testing.assert_close(kept.loss(0, 0, 1), expected, rtol=1e-4, atol=1e-8)


def test_half_precision_keeps_half_the_bytes_and_is_nothing_at_the_base(ready):
    run = ready(mixed_precision="bf16")
    kept = KeptBase(run.objective)
    assert kept.answers.dtype == torch.bfloat16
    assert kept.loss(0, 0, 1).item() < 1e-4


def test_processes_share_what_one_would_do(ready):
    run = ready()
    run.move()
    kept = KeptBase(run.objective)
    kept.batch_size = 2
    shares = [kept.loss(3, process, 2) for process in range(2)]
    kept.batch_size = 4
    torch.testing.assert_close(sum(shares) / 2, kept.loss(3, 0, 1))


def test_every_example_has_its_turn(ready):
    kept = KeptBase(ready().objective)
    rounds = [[kept._place(8 * epoch + place) for place in range(8)] for epoch in range(2)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == list(range(8)) and rounds[0] != rounds[1]
    assert [kept_batch_size(size) for size in (1, 2, 4, 5)] == [1, 1, 2, 3]


def test_prompts_are_their_own_the_class_and_the_empty_one(ready):
    run = ready()
    source = run.examples.base
    draws = [run.objective.draw(number, "base") for number in range(300)]
    assert all(draw.source is source for draw in draws)
    assert {draw.index for draw in draws} == {0, 1, 2}  # two plain prompts, the class
    empty = [draw for draw in draws if draw.prompt == source.dropped]
    assert 0.2 < len(empty) / len(draws) < 0.4
    assert all(draw.prompt == source.prompts[draw.index][0] for draw in draws if draw.prompt != source.dropped)
    photos = [run.objective.draw(number) for number in range(20)]
    assert all(draw.source is run.examples for draw in photos)


@pytest.mark.parametrize("subject", ["dog_patch", "cat_tiger"])
def test_no_prompt_of_a_measure_is_asked(subject):
    questions = bundled_questions(subject)
    asked = {*questions.prompts, *questions.class_prompts, *questions.unrelated_prompts}
    assert not asked & set(kept_prompts("toybox", f"a photo of a {subject.partition('_')[0]}"))


def losses(plan):
    return [event.base_loss for event in plan.folder.events() if isinstance(event, Stepped)]


@pytest.mark.parametrize(
    "changes",
    [
        {"train_text_encoder": True, "gradient_accumulation_steps": 2},
        pytest.param(
            {
                "learned_word": "sks",
                "budget": 40,
                "with_prior_preservation": True,
                "num_class_images": 1,
                "num_inference_steps": 1,
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_begins_at_the_base_and_goes_on_to_the_bit(tiny_run, tmp_path, changes):
    plan = tiny_run(**OPTIONS | changes, output_dir=str(tmp_path / "whole"))
    whole = read_adapter(train(plan.config).adapter_path)
    distances = losses(plan)
    assert distances[0] < 1e-9 and all(later > 1e-9 for later in distances[1:])
    assert whole.training["keep_base_weight"] == 1.0
    parts = dataclasses.replace(plan.config, output_dir=str(tmp_path / "parts"), checkpointing_steps=2)
    train(parts, on_step=lambda step: step.step == 2)
    rest = read_adapter(train(dataclasses.replace(parts, resume_from_checkpoint="latest")).adapter_path)
    assert all(torch.equal(shift, rest.shifts[name]) for name, shift in whole.shifts.items())


def test_more_weight_more_stays(tiny_run, tmp_path):
    ends = []
    for weight in (1e-6, 100.0):
        plan = tiny_run(**OPTIONS, keep_base_weight=weight, output_dir=str(tmp_path / str(weight)))
        train(plan.config)
        ends.append(losses(plan)[-1])
    assert ends[1] < 0.7 * ends[0]


def test_flow_bases_are_kept_too(photo_folder, tmp_path):
    tiny_klein().save_pretrained(tmp_path / "klein")
    config = TrainConfig(
        pretrained_model_name_or_path=str(tmp_path / "klein"),
        instance_data_dir=str(photo_folder),
        instance_prompt="a photo of sks dog",
        output_dir=str(tmp_path / "out"),
        resolution=16,
        **OPTIONS,
    )
    result = train(config)
    distances = losses(result.plan)
    assert distances[0] < 1e-9 and distances[-1] > 1e-9


def test_a_plan_says_by_what_and_what_it_takes(tiny_run, tmp_path):
    cache = str(tmp_path / "cache")

    def said(**options):
        return next(
            line for line in tiny_run(**OPTIONS | options, basis_cache_dir=cache).report() if "keep_base" in line
        )

    assert said() == "keep_base: by 3 pictures of the base's own, 3 of them still to be painted"
    assert "2 pictures of the base's own, none of the subject's class" in said(class_prompt=None)
    plan = tiny_run(**OPTIONS, basis_cache_dir=cache)
    encode_examples(plan, CPU)
    assert said() == "keep_base: by 3 pictures of the base's own"
    assert estimate_memory(plan).answers == 256 * 4 * 8 * 8 * 4  # examples, channels, h, w, bytes
    with pytest.raises(SVFitError, match="keep_base_weight is 0.0: it must be above 0"):
        tiny_run(keep_base=True, keep_base_weight=0.0)


def test_of_several_subjects_at_once_each_is_held_as_in_its_own_run(tiny_run, tmp_path):
    plans = [
        tiny_run(**OPTIONS, keep_base_weight=30.0, adam_epsilon=1e-3, seed=seed, output_dir=str(tmp_path / str(seed)))
        for seed in (0, 1)
    ]
    together = [each.result for each in train_together([plan.config for plan in plans])]
    for plan, result in zip(plans, together, strict=True):
        alone = dataclasses.replace(plan.config, output_dir=plan.config.output_dir + "-alone")
        assert losses(result.plan) == pytest.approx(losses(train(alone).plan), rel=1e-3, abs=1e-10)
        assert losses(result.plan)[-1] > 1e-9


def test_only_runs_that_keep_the_base_say_so_in_their_checkpoints(tiny_run):
    """Checkpoints of versions that did not know it go on, with a run that does not ask for it."""
    plain, kept = run_identity(tiny_run(), {}), run_identity(tiny_run(**OPTIONS), {})
    assert not {"keep_base", "keep_base_weight"} & set(plain)
    assert kept["keep_base"] is True and kept["keep_base_weight"] == 1.0
