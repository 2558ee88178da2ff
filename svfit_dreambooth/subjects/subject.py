"""One of the subjects of a run of several: what it is by and by, and the stages of its way."""

import logging
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from accelerate import Accelerator
from torch import Tensor

from svfit_dreambooth.bases.model import BaseModel
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.evaluation.features import Features
from svfit_dreambooth.method.basis import fingerprint, weight_hashes
from svfit_dreambooth.subjects.shared import Own, Shared
from svfit_dreambooth.subjects.steps import Member
from svfit_dreambooth.training.checkpoints import Checkpoints, TrainState, resume_state, run_identity
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.events import End
from svfit_dreambooth.training.examples import Examples
from svfit_dreambooth.training.journal import RunFolder
from svfit_dreambooth.training.loop import Loop
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.plan import Plan, prepare
from svfit_dreambooth.training.processes import accelerated
from svfit_dreambooth.training.result import TrainResult, end_of, finish, make_adapter, publish, save_result
from svfit_dreambooth.training.run import asked, begin, encoded, look_adapters, phase, shared_out, steps_of, told_in
from svfit_dreambooth.training.sensitivity import Sensitivity
from svfit_dreambooth.training.watch import Watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What became of one subject."""

    name: str  # of its adapter
    state: Literal["finished", "stopped", "failed", "finished before"]
    folder: Path
    adapter: Path | None = None  # None: it has none
    message: str | None = None  # why it failed, one sentence
    result: TrainResult | None = None  # None where there was nothing to train, or where it failed before that


@dataclass(eq=False)
class Subject(Member):
    """One of several, on its way through a run."""

    config: TrainConfig
    stack: ExitStack = field(default_factory=ExitStack)  # what it holds: its accelerator, its folder
    error: SVFitError | None = None  # what it failed by before its steps or after them
    before: Path | None = None  # its adapter, where an earlier run had finished it
    plan: Plan = field(init=False)
    accelerator: Accelerator = field(init=False)
    examples: Examples = field(init=False)
    positions: dict[str, Tensor] | None = None
    adapter: Path | None = None
    result: TrainResult | None = None

    def attempt(self, act: Callable[[], None]) -> None:
        """act(), whose SVFitError is this subject's alone: what it holds is let go, and the others go on."""
        try:
            act()
        except SVFitError as error:
            self.error = error
            logger.warning("%s: %s", self.name, error)
            with suppress(SVFitError), self.stack.pop_all():
                raise

    @property
    def name(self) -> str:
        """Of its adapter."""
        return self.config.adapter_name or Path(str(self.config.instance_data_dir)).resolve().name

    def outcome(self) -> Outcome:
        """What became of it."""
        folder = Path(self.config.output_dir)
        if self.before is not None:
            return Outcome(self.name, "finished before", folder, self.before)
        if self.error is not None or self.result is None:
            return Outcome(self.name, "failed", folder, self.adapter, str(self.error or "it was not reached."))
        ending = self.result.ending
        message = None if ending.failure is None else str(ending.failure)
        return Outcome(self.name, ending.status, folder, self.adapter, message, self.result)


class Known:
    """What is the same for all subjects: the weights that they adapt, as they are stored."""

    def __init__(self, plan: Plan) -> None:
        self.weights = plan.weights()
        self.hashes = weight_hashes(self.weights)
        self.fingerprint = fingerprint(self.weights, self.hashes)
        self.sensitivity: Sensitivity | None = None  # once it is measured, if any subject's steps follow from it

    def forget_weights(self) -> None:
        """They would stay in memory beside the cast networks."""
        self.weights = {}


def prepare_subject(subject: Subject, base: BaseModel) -> None:
    """All of a subject that comes before anything slow."""
    subject.accelerator = subject.stack.enter_context(accelerated(subject.config))
    if subject.accelerator.num_processes > 1:
        raise SVFitError("several subjects share one process: start one, or a fleet with a worker on each device.")
    subject.plan = prepare(subject.config, base=base)
    subject.stack.enter_context(told_in(subject.plan))


def encode_subject(subject: Subject, known: Known) -> None:
    """Where the subject goes on from, and its examples; or that it was finished before."""
    plan, accelerator = subject.plan, subject.accelerator
    subject.resumed = resume_state(plan, run_identity(plan, known.fingerprint))
    if is_finished(plan, subject.resumed):
        subject.before = plan.adapter_path
        subject.stack.close()
        return
    begin(plan, subject.resumed, accelerator)
    subject.examples = encoded(plan, accelerator)


def is_finished(plan: Plan, resumed: TrainState | None) -> bool:
    """Whether there is nothing left to do: all steps are made, and the end is written."""
    config = plan.config
    if resumed is None or config.resume_from_checkpoint != "latest":
        return False
    cut_short = config.patience and resumed.worse >= config.patience
    if resumed.step < config.max_train_steps and not cut_short:
        return False
    return _ended(plan.folder) and plan.adapter_path.exists()


def finished_before(config: TrainConfig, base: BaseModel) -> Path | None:
    """The adapter of the run of `config`, where an earlier one had finished it and it is to go on from there."""
    if not _ended(RunFolder(config.output_dir, config.adapter_name)):
        return None
    plan = prepare(config, base=base)
    known = Known(plan)
    return plan.adapter_path if is_finished(plan, resume_state(plan, run_identity(plan, known.fingerprint))) else None


def _ended(folder: RunFolder) -> bool:
    events = folder.events()
    return bool(events) and isinstance(events[-1], End) and events[-1].status == "finished"


def share_out_budget(subject: Subject, known: Known) -> None:
    subject.positions = shared_out(
        subject.plan,
        subject.examples,
        known.weights,
        known.hashes,
        subject.resumed,
        known.sensitivity,
        subject.accelerator,
    )


def make_loop(subject: Subject, own: Own, shared: Shared, features: Features, known: Known) -> Loop:
    plan, networks = subject.plan, shared.trainable.networks
    own.steps = steps_of(plan, own, known.sensitivity, subject.resumed)
    identity = run_identity(plan, known.fingerprint)  # class pictures are there now
    objective = Objective(plan, subject.examples, networks, subject.accelerator.device)
    return Loop(
        plan.config,
        subject.accelerator,
        objective,
        shared.trainable.modules,
        own.values,
        own.steps,
        plan.folder,
        Checkpoints(plan.folder.checkpoints, identity, plan.config.checkpoints_total_limit),
        Watch(plan, features, look_adapters(plan, own, subject.accelerator)) if plan.config.validation_steps else None,
        subject.positions,
        asked(plan, objective, subject.accelerator),
    )


def save_subject(subject: Subject) -> None:
    """Writes the subject's adapter."""
    ending = subject.ending
    if ending.failure is not None and ending.step == 0:
        raise ending.failure
    subject.adapter = save_result(make_adapter(subject.plan, subject.own, ending, 1), subject.plan)
    subject.accelerator.end_training()


def finish_subject(subject: Subject, base: BaseModel) -> None:
    """What is made from the adapter; and the end of the subject's diary."""
    plan, path = subject.plan, subject.adapter
    assert path is not None
    result = TrainResult(path, subject.ending, subject.own.count, path.stat().st_size, plan, base)
    phase(plan, "finishing", subject.accelerator)
    finish(result)
    plan.folder.note(end_of(result, time.time()))
    subject.result = result
    if subject.ending.failure is None:
        publish(result)
    subject.stack.close()
