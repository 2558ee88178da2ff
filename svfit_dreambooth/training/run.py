"""Photos to adapter: a plain function that anyone can call.

Each training example follows from the seed and its number alone (see objective.py): the same run gives the same
adapter, and several processes share the work of one.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from svfit_dreambooth.adapter.file import Adapter
from svfit_dreambooth.bases.devices import MIXED_PRECISION
from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.features import Features, open_features
from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.method.basis import fingerprint, weight_hashes
from svfit_dreambooth.sharing.hub import check_login
from svfit_dreambooth.training.budget import choose_positions
from svfit_dreambooth.training.checkpoints import Checkpoints, TrainState, delete_later, resume_state, run_identity
from svfit_dreambooth.training.config import TrainConfig, config_to_yaml
from svfit_dreambooth.training.ending import Ending
from svfit_dreambooth.training.estimate import estimate_memory
from svfit_dreambooth.training.events import End, Phase, Start
from svfit_dreambooth.training.examples import Examples, encode_examples
from svfit_dreambooth.training.keep_base import KeptBase
from svfit_dreambooth.training.loop import Loop, OnStep
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.optimizer import Steps, needs_sensitivity, plan_steps
from svfit_dreambooth.training.plan import Plan, prepare
from svfit_dreambooth.training.processes import accelerated
from svfit_dreambooth.training.result import (
    TrainResult,
    end_of,
    finish,
    make_adapter,
    plain_memory_errors,
    publish,
    save_result,
)
from svfit_dreambooth.training.sensitivity import Sensitivity, base_sensitivity
from svfit_dreambooth.training.signals import stop_signals
from svfit_dreambooth.training.trainable import Trainable, Trained
from svfit_dreambooth.training.watch import Watch

logger = logging.getLogger(__name__)

# of an adapter file, at most: number and position; names, texts, a thumbnail
BYTES_A_VALUE, BYTES_BESIDE = 8, 200_000


def train(config: TrainConfig, on_step: OnStep | None = None, base: BaseModel | None = None) -> TrainResult:
    """Trains an adapter as `config` says and saves it as <output_dir>/<adapter_name>.safetensors.

    `on_step` is called after every optimizer step; a true value ends the run there: a checkpoint is written, and what
    was learnt is saved.  Ctrl-C, SIGTERM and SIGHUP do the same.  `base`: see `prepare`.  What an earlier run left in
    <output_dir> is moved to <output_dir>/earlier.  Raises SVFitError for input that cannot be used, before anything slow starts, and for
    `dry_run`, which asks for no training.
    """
    if config.dry_run:
        raise SVFitError("dry_run asks for no training: use prepare(config).report(), as the command does.")
    with plain_memory_errors(), accelerated(config) as accelerator:
        plan = prepare(config, base=base)
        features = ask_early(plan, accelerator)
        with alone_in(plan, accelerator):
            weights = plan.weights()  # as they are stored: examples and budget may leave the networks cast
            hashes = weight_hashes(weights)
            identity = run_identity(plan, fingerprint(weights, hashes), accelerator.num_processes)
            resumed = resume_state(plan, identity)
            begin(plan, resumed, accelerator)
            examples = encoded(plan, accelerator)
            identity |= run_identity(plan, identity["base"], accelerator.num_processes)  # class pictures are there now
            sensitivity = measured(plan, weights, hashes, resumed, accelerator)
            step_aside(plan, accelerator)
            positions = shared_out(plan, examples, weights, hashes, resumed, sensitivity, accelerator)
            trainable = Trainable(plan, weights, hashes, positions, accelerator)
            del weights  # they would stay in memory beside the cast networks
            objective = Objective(plan, examples, trainable.networks, accelerator.device)
            trainable.steps = steps_of(plan, trainable, sensitivity, resumed)
            loop = Loop(
                plan.config, accelerator, objective, trainable.modules, trainable.values, trainable.steps, plan.folder,
                Checkpoints(plan.folder.checkpoints, identity, plan.config.checkpoints_total_limit),
                Watch(plan, features, look_adapters(plan, trainable, accelerator)) if plan.config.validation_steps else None,
                positions,
                asked(plan, objective, accelerator),
            )  # fmt: skip
            note_start(plan, trainable, accelerator)
            ending = loop.complete(on_step, resumed)
            if ending.failure is not None and ending.step == 0:
                raise ending.failure
            adapter = make_adapter(plan, trainable, ending, accelerator.num_processes)
            path = save_result(adapter, plan) if accelerator.is_main_process else plan.adapter_path
            accelerator.wait_for_everyone()
            accelerator.end_training()
            trainable.remove()
            result = TrainResult(path, ending, trainable.count, path.stat().st_size, plan, plan.base)
            if accelerator.is_main_process:
                phase(plan, "finishing", accelerator)
                finish(result)
                plan.folder.note(end_of(result, time.time()))
            if ending.failure is not None:
                raise SVFitError(f"{ending.failure} What was learnt until step {ending.step} is saved in {path}.")
            if accelerator.is_main_process:
                publish(result)
            return result


def ask_early(plan: Plan, accelerator: Accelerator) -> Features:
    """The networks that measure the run.  What may be missing is found out now, not after the hours of training."""
    if not accelerator.is_main_process:
        return Features()
    config = plan.config
    if config.push_to_hub:
        check_login()
    if not config.validation_steps:
        return Features()
    return open_features(plan.base.name, config.dino_path, config.clip_path, accelerator.device)


@contextmanager
def alone_in(plan: Plan, accelerator: Accelerator) -> Iterator[None]:
    """Within it the run has its folder for itself, and signals interrupt it; however it ends, its diary says so."""
    with stop_signals(at_once=True):
        if accelerator.is_main_process:
            with told_in(plan):
                yield
        else:
            yield


@contextmanager
def told_in(plan: Plan) -> Iterator[None]:
    """Within it the run has its folder for itself; what it ends by is noted there, and raised."""
    with plan.folder.locked():
        began = len(plan.folder.events())
        try:
            with plain_memory_errors():
                yield
        except (KeyboardInterrupt, Exception) as error:
            events = plan.folder.events()
            if events and not isinstance(events[-1], End) and (len(events) != began or len(events) == 0):
                status = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                plan.folder.note(End(status, time.time(), events[-1].step, str(error) or None))
            raise


def begin(plan: Plan, resumed: TrainState | None, accelerator: Accelerator) -> None:
    """Makes the run's folder ready, and says what the run is about to do.

    Another run in it is moved aside; one that goes on loses what it will make again.
    """
    if accelerator.is_main_process:
        folder, asked = plan.folder, plan.config.resume_from_checkpoint
        own = asked is not None and Path(asked).resolve().parent == folder.checkpoints.resolve()
        goes_on = asked == "latest" or own
        if goes_on and resumed is not None:
            folder.rewind(resumed.step)
            delete_later(folder.checkpoints, resumed.step)
        elif goes_on and not folder.adapter.exists():
            folder.rewind(-1)
        elif (aside := folder.set_aside(plan.config.init_adapter)) is not None:
            logger.info("the earlier files in %s lie in %s now.", folder.path, aside)
        write_atomically(folder.config, config_to_yaml(plan.config))
        values = sum(min(shape) for shape in plan.shapes.values())
        write_atomically(folder.reserve, bytes(BYTES_A_VALUE * values + BYTES_BESIDE))  # room on a disk that fills
        for line in plan.report():
            logger.info("%s", line)
        estimate = estimate_memory(plan)
        for line in estimate.lines():
            level = logging.INFO if estimate.fits else logging.WARNING
            logger.log(level, "%s", line, extra={"parameters": estimate.parameters})
    accelerator.init_trackers("svfit", config={k: str(v) for k, v in dataclasses.asdict(plan.config).items()})


def encoded(plan: Plan, accelerator: Accelerator) -> Examples:
    """The run's photos and class pictures as the denoiser sees them; the main process paints what is missing."""
    painting = plan.config.with_prior_preservation or plan.config.keep_base
    phase(
        plan,
        "painting pictures of the base and encoding the photos" if painting else "encoding the photos",
        accelerator,
    )
    with accelerator.main_process_first():  # the others then find the class pictures
        return encode_examples(plan, accelerator.device)


def look_adapters(plan: Plan, trainable: Trained, accelerator: Accelerator) -> Callable[[int], Adapter]:
    """What was learnt until a step, as a look finds it, as an adapter."""
    return lambda step: make_adapter(plan, trainable, Ending(step, step, 0.0, None, None), accelerator.num_processes)


def measured(
    plan: Plan,
    weights: Mapping[str, Tensor],
    hashes: Mapping[str, str],
    resumed: TrainState | None,
    accelerator: Accelerator,
) -> Sensitivity | None:
    """How much the base's answers depend on each value; None where the steps do not follow from it, or are known.

    Found on this disk, or measured by one process.
    """
    config, found = plan.config, None
    if not needs_sensitivity(config) or resumed is not None:
        return None

    def tell(cost: str) -> None:
        phase(plan, cost, accelerator)
        logger.info("%s", cost)

    if accelerator.is_main_process:
        found = base_sensitivity(
            plan.base, plan.targets, weights, hashes,
            device=accelerator.device, dtype=MIXED_PRECISION[config.mixed_precision],
            checkpointing=config.gradient_checkpointing, resolution=config.resolution,
            rank="full" if config.budget is not None else config.rank_value, energy=config.energy,
            cache_dir=config.basis_cache_dir, on_measuring=tell,
        )  # fmt: skip
    (found,) = broadcast_object_list([found])
    return found


def steps_of(plan: Plan, trained: Trained, sensitivity: Sensitivity | None, resumed: TrainState | None) -> Steps:
    """How far values move: as in the checkpoint that the run goes on from, else as its options say."""
    if resumed is not None and resumed.steps is not None:
        return resumed.steps
    steps = plan_steps(trained.roles, plan.config, sensitivity, trained.positions)
    if sensitivity is not None:
        logger.info(
            "steps: learning_rate %.3g, step_scaling %s; a relative standard error of %.0f %% in each value's sensitivity.",
            steps.learning_rate, plan.config.step_scaling, 100 * sensitivity.error,
        )  # fmt: skip
    return steps


def step_aside(plan: Plan, accelerator: Accelerator) -> None:
    """Opens what the steps need, and brings the rest out of their way: only looks at the run need it on its device."""
    base, looks = plan.base, bool(plan.config.validation_steps)
    base.open(*plan.trained, dtype=MIXED_PRECISION[plan.config.mixed_precision])
    base.open(*["vae"] * looks)
    for name in {"vae": None, **base.family.networks}:
        if name not in plan.trained and base.is_open(name):
            getattr(base.pipeline, name).to(accelerator.device if looks else "cpu")


def shared_out(
    plan: Plan,
    examples: Examples,
    weights: Mapping[str, Tensor],
    hashes: Mapping[str, str],
    resumed: TrainState | None,
    sensitivity: Sensitivity | None,
    accelerator: Accelerator,
) -> dict[str, Tensor] | None:
    """Which singular values the run's budget pays for; None without a budget.

    Chosen once in a run, by one process: elsewhere rounding might choose others.
    """
    if plan.config.budget is None:
        return None
    if resumed is not None:
        return resumed.positions
    chosen = None
    if accelerator.is_main_process:
        phase(plan, "sharing out the budget", accelerator)
        chosen = choose_positions(plan, examples, accelerator.device, weights, hashes, sensitivity)
    (positions,) = broadcast_object_list([chosen])
    return positions


def asked(plan: Plan, objective: Objective, accelerator: Accelerator) -> KeptBase | None:
    """The base's answers that the run keeps to; None without keep_base.  Every process asks, and gets the same."""
    if not plan.config.keep_base:
        return None
    phase(plan, "asking the base what it sees", accelerator)
    return KeptBase(objective)


def note_start(plan: Plan, trainable: Trained, accelerator: Accelerator) -> None:
    """Notes that the run starts, unless it goes on."""
    if accelerator.is_main_process and not any(isinstance(event, Start) for event in plan.folder.events()):
        plan.folder.note(
            Start(time.time(), 0, plan.config.max_train_steps, plan.adapter_name, plan.base.name, trainable.count)
        )


def phase(plan: Plan, doing: str, accelerator: Accelerator) -> None:
    """Notes what the run turns to."""
    if accelerator.is_main_process:
        plan.folder.note(Phase(doing, time.time()))
