"""Several subjects in one run: one base, one forward and backward pass for all, and for each what a run of its own makes.

Every subject keeps its values, optimizer, examples, looks, best step and run folder.  Its examples follow from the seed
and their numbers, as ever, so its adapter is that of its own run, but for the rounding of sums in larger batches.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.bases.opening import check_base_model
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.method.word import word_embedding
from svfit_dreambooth.subjects.shared import Shared
from svfit_dreambooth.subjects.steps import OnStep, complete_together
from svfit_dreambooth.subjects.subject import (
    Known,
    Outcome,
    Subject,
    encode_subject,
    finish_subject,
    finished_before,
    make_loop,
    prepare_subject,
    save_subject,
    share_out_budget,
)
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.estimate import estimate_memory
from svfit_dreambooth.training.plan import Plan, open_run_base
from svfit_dreambooth.training.result import plain_memory_errors
from svfit_dreambooth.training.run import ask_early, measured, note_start, step_aside, train
from svfit_dreambooth.training.signals import stop_signals

logger = logging.getLogger(__name__)

# What each subject may have of its own; in everything else the subjects of one run are alike.
OWN_OPTIONS = (
    "instance_data_dir",
    "instance_prompt",
    "class_data_dir",
    "class_prompt",
    "learned_word",
    "validation_prompts",
    "init_adapter",
    "adapter_name",
    "output_dir",
    "seed",
    "max_train_steps",
    "resume_from_checkpoint",
    "hub_model_id",
)


def train_together(
    configs: Sequence[TrainConfig], on_step: OnStep | None = None, base: BaseModel | None = None
) -> list[Outcome]:
    """Trains an adapter for each of `configs`, which may differ in `OWN_OPTIONS`; each into a folder of its own.

    `on_step(name, step)` is called after every step of every subject; a true value stops that subject.  Ctrl-C stops
    all.  `base`: as in `prepare`; None: opened here, once.  What a subject fails by is in its outcome, and the others
    go on.  With resume_from_checkpoint "latest", what is finished is left as it is.  Raises SVFitError for options
    that must be alike and are not, for two subjects of one folder, and for a base that cannot be opened.
    """
    check_alike(configs)
    subjects = [Subject(config) for config in configs]
    with plain_memory_errors(), stop_signals(at_once=True), ExitStack() as all_held:
        for subject in subjects:
            all_held.push(lambda *error, each=subject: each.stack.__exit__(*error))
        check_base_model(configs[0].pretrained_model_name_or_path, configs[0].base_config)
        base = base or open_run_base(configs[0])
        _each(subjects, prepare_subject, base)
        _train(subjects, on_step)
        return [subject.outcome() for subject in subjects]


def train_all(
    configs: Sequence[TrainConfig], at_once: int, on_step: OnStep | None = None, base: BaseModel | None = None
) -> list[Outcome]:
    """`train_together`, `at_once` of them at a time, so that memory is bounded; after Ctrl-C no more are begun."""
    check_alike(configs)
    check_base_model(configs[0].pretrained_model_name_or_path, configs[0].base_config)
    base = base or open_run_base(configs[0])
    outcomes: list[Outcome] = []
    for first in range(0, len(configs), at_once):
        group = configs[first : first + at_once]
        if any(each.result is not None and each.result.ending.hurried for each in outcomes):
            outcomes += [replace(Subject(config).outcome(), state="stopped", message="not begun.") for config in group]
            continue
        try:
            outcomes += train_together(group, on_step, base)
        except SVFitError as error:  # such as a lack of memory: fewer may do
            outcomes += [replace(Subject(config).outcome(), message=str(error)) for config in group]
        base = as_stored(base, configs[0])
    return outcomes


def train_alone(config: TrainConfig, base: BaseModel) -> Outcome:
    """`train`, to the bit, on a base that is open; what it fails by, or that it was finished before, is its outcome."""
    folder, name = Path(config.output_dir), Subject(config).name
    try:
        before = finished_before(config, base)
        if before is not None:
            return Outcome(name, "finished before", folder, before)
        result = train(config, base=base)
    except SVFitError as error:
        return Outcome(name, "failed", folder, message=str(error))
    return Outcome(name, result.ending.status, folder, result.adapter_path, result=result)


def as_stored(base: BaseModel, config: TrainConfig) -> BaseModel:
    """The base of runs of `config` as it is stored: `base`, unless they rounded its networks, or left values in them."""
    components = [model for model in base.family.components.values() if model is not None]
    left = any(svfit_layers(model) or word_embedding(model) is not None for model in components)
    return open_run_base(config) if left or config.mixed_precision != "no" else base


def check_alike(configs: Sequence[TrainConfig]) -> None:
    """Raises SVFitError unless `configs` differ in `OWN_OPTIONS` alone, and in their folders."""
    if not configs:
        raise SVFitError("there is no subject to train: give a config for each.")
    first = vars(configs[0])
    for config in configs:
        for name, value in vars(config).items():
            if name not in OWN_OPTIONS and value != first[name]:
                raise SVFitError(
                    f"{name} is {first[name]!r} for one subject and {value!r} for another: train them apart.", name
                )
        if config.dry_run:
            raise SVFitError("dry_run asks for no training: use prepare(config).report(), as the command does.")
    folders = [Path(config.output_dir).resolve() for config in configs]
    for folder in folders:
        if folders.count(folder) > 1:
            raise SVFitError(f"output_dir {folder} is that of two subjects: give each its own.", "output_dir")


def _train(subjects: Sequence[Subject], on_step: OnStep | None) -> None:
    subjects = [subject for subject in subjects if subject.error is None]
    if not subjects:
        return
    first = subjects[0]
    features = ask_early(first.plan, first.accelerator)
    known = Known(first.plan)
    subjects = [each for each in _each(subjects, encode_subject, known) if each.before is None]
    if subjects:
        goes_on = first.resumed if all(subject.resumed is not None for subject in subjects) else None
        known.sensitivity = measured(first.plan, known.weights, known.hashes, goes_on, first.accelerator)
        step_aside(first.plan, first.accelerator)
        subjects = _each(subjects, share_out_budget, known)
    if not subjects:
        return
    _warn_of_memory([subject.plan for subject in subjects])
    plans, positions = [subject.plan for subject in subjects], [subject.positions for subject in subjects]
    shared = Shared(plans, known.weights, known.hashes, positions, subjects[0].accelerator)
    known.forget_weights()
    for subject, own in zip(subjects, shared.owns, strict=True):
        subject.own, subject.loop = own, make_loop(subject, own, shared, features, known)
        note_start(subject.plan, own, subject.accelerator)
    complete_together(subjects, shared, on_step)
    subjects = _each(subjects, save_subject)
    shared.remove()
    base = first.plan.base
    for subject in subjects:
        subject.attempt(partial(finish_subject, subject, base))
        if subject.result is not None:
            base = subject.result.base  # opened anew where its pictures wanted it


def _warn_of_memory(plans: Sequence[Plan]) -> None:
    """Each plan has told what its own run would take; a batch for all takes more."""
    if len(plans) > 1:
        config = plans[0].config
        batch = sum(plan.config.train_batch_size for plan in plans)
        estimate = estimate_memory(replace(plans[0], config=replace(config, train_batch_size=batch)))
        if not estimate.fits:
            logger.warning("%d subjects at once: %s; use a smaller subjects_at_once.", len(plans), estimate.lines()[0])


def _each(subjects: Sequence[Subject], act: Callable[..., None], *given: object) -> list[Subject]:
    """act(subject, *given) for every subject; those that did not fail."""
    for subject in subjects:
        subject.attempt(partial(act, subject, *given))
    return [subject for subject in subjects if subject.error is None]
