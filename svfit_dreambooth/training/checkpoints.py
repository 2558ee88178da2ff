"""Checkpoints: all that the rest of a run follows from, in one safetensors file each.

Noise, timesteps and crops follow from the seed and the number of the example, the learning rate from the number of
the step.  So the trained values, the optimizer's memory of them and the step are the whole state of a run, and a run
that goes on from a checkpoint makes the same adapter as one that was never interrupted, to the bit on a CPU.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.photos.reading import Photo
from svfit_dreambooth.training.class_pictures import usable_class_pictures
from svfit_dreambooth.training.optimizer import Steps
from svfit_dreambooth.training.plan import Plan

logger = logging.getLogger(__name__)

FORMAT = "svfit-checkpoint"
VERSION = "2"  # 1 had neither checksum nor positions
NAME = re.compile(r"step-(\d{6,})\.safetensors")
# What is compared by its content, as sentences name it.
CONTENTS = {
    "photos": "other photos",
    "class_pictures": "other class pictures",
    "base": "another base",
    "initial": "another init_adapter",
}
EARLIER_RULES = {"step_scaling": "none"}  # of runs whose checkpoints do not name it
# Options that may differ between a run and its resumption: nothing that is learnt depends on them.
INDIFFERENT_OPTIONS = (
    "pretrained_model_name_or_path",  # the base's fingerprint stands for it
    "revision",
    "variant",
    "base_config",
    "init_adapter",  # so does the hash of its values
    "output_dir",
    "instance_data_dir",
    "class_data_dir",
    "basis_cache_dir",
    "resume_from_checkpoint",
    "checkpoints_total_limit",
    "final_pictures",
    "gradient_checkpointing",
    "validation_steps",
    "patience",
    "report_to",
    "also",
    "push_to_hub",
    "hub_model_id",
    "keep",
    "adapter_name",
    "dry_run",
)


@dataclass
class Best:
    """The last step whose pictures were liked as much as any so far, see `Loop.compare`."""

    step: int
    score: float  # of those that were liked most
    values: dict[str, Tensor]  # trained values by name, on the CPU


@dataclass
class TrainState:
    """Where a run stands after `step` optimizer steps; tensors are copies on the CPU."""

    step: int
    values: dict[str, Tensor]  # trained values by name
    optimizer: dict[str, Tensor] = field(default_factory=dict)  # "<name>.<key>": what AdamW remembers of each
    rate_factor: float = 1.0  # halved by every rollback
    rollbacks: int = 0
    best: Best | None = None
    scaler: dict[str, float] = field(default_factory=dict)  # of fp16's loss scaling
    positions: dict[str, Tensor] | None = None  # which singular values a budget pays for; None: there is none
    worse: int = 0  # looks in a row that were clearly worse than the best
    steps: Steps | None = None  # how far values move; None: as the run's options say, in checkpoints that hold none


class NotWhole(SVFitError):
    """A checkpoint that is damaged."""


@dataclass(frozen=True)
class Checkpoints:
    """Where a run puts its checkpoints, and what they say of it."""

    folder: Path
    identity: Mapping[str, Any]  # what must be the same for a run to go on, as JSON values: see `run_identity`
    limit: int | None  # how many are kept, the newest; None: all

    def save(self, state: TrainState) -> Path:
        """Writes <folder>/step-NNNNNN.safetensors whole or not at all, then deletes those beyond the limit."""
        groups: dict[str, Mapping[str, Tensor]] = {
            "value": state.values,
            "optimizer": state.optimizer,
            "best": {} if state.best is None else state.best.values,
            "position": state.positions or {},
            "scale": {} if state.steps is None else state.steps.scales,
        }
        tensors = {f"{group}.{name}": tensor for group, own in groups.items() for name, tensor in own.items()}
        facts = {
            "step": state.step,
            "rate_factor": state.rate_factor,
            "rollbacks": state.rollbacks,
            "scaler": state.scaler,
            "best": None if state.best is None else [state.best.step, state.best.score],
            "chosen": state.positions is not None,
            "worse": state.worse,
            "rates": None if state.steps is None else state.steps.rates,
        }
        metadata = {"format": FORMAT, "format_version": VERSION}
        metadata |= {"state": json.dumps(facts), "identity": json.dumps(dict(self.identity))}
        metadata["sha256"] = _checksum(tensors, metadata)
        path = write_atomically(self.folder / f"step-{state.step:06d}.safetensors", save(tensors, metadata))
        if self.limit is not None:
            for old in list_checkpoints(self.folder)[: -self.limit]:
                old.unlink()
        return path


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Over names, types, shapes and numbers of all tensors, and what is said beside them."""
    digest = hashlib.sha256(save(dict(tensors)))
    for key in ("state", "identity"):
        digest.update(metadata[key].encode())
    return digest.hexdigest()


def delete_later(folder: Path, step: int) -> None:
    """Deletes the checkpoints in `folder` of steps after `step`, from where the run makes them again."""
    for path in list_checkpoints(folder):
        if _step(path) > step:
            path.unlink(missing_ok=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*.safetensors") if NAME.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.partition("-")[2])


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> TrainState:
    """Reads what `Checkpoints.save` wrote.

    Raises NotWhole for a damaged file, SVFitError for one that is none, of an earlier format, or of another run, naming
    the first difference.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise SVFitError(f"{path} is not a checkpoint of a training run.")
            if metadata.get("format_version") != VERSION:
                raise SVFitError(
                    f"{path} was written by another version of this program, whose runs cannot go on: start anew."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
        whole = _checksum(tensors, metadata) == metadata["sha256"]
        facts, saved = json.loads(metadata["state"]), json.loads(metadata["identity"])
    except SVFitError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise NotWhole(f"the checkpoint {path} cannot be read ({error}): name an earlier one.") from error
    if not whole:
        raise NotWhole(f"the checkpoint {path} is damaged, its checksum differs: name an earlier one.")
    _check_same_run(path, identity, saved)
    groups: dict[str, dict[str, Tensor]] = {"value": {}, "optimizer": {}, "best": {}, "position": {}, "scale": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    best = None if facts["best"] is None else Best(facts["best"][0], facts["best"][1], groups["best"])
    positions = groups["position"] if facts["chosen"] else None
    steps = None if facts.get("rates") is None else Steps(facts["rates"], groups["scale"])
    return TrainState(
        facts["step"],
        groups["value"],
        groups["optimizer"],
        facts["rate_factor"],
        facts["rollbacks"],
        best,
        facts["scaler"],
        positions,
        facts.get("worse", 0),
        steps,
    )


def _check_same_run(path: Path, identity: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises SVFitError where a run of `identity` cannot go on from what a run of `saved` left; it may be longer."""
    saved = {**EARLIER_RULES, **saved}
    for name in dict.fromkeys([*identity, *saved]):
        here, there = json.loads(json.dumps(identity.get(name))), saved.get(name)
        if here == there:
            continue
        if name == "max_train_steps" and here > there:
            logger.info("the run is to make %d steps instead of %d: its rate follows the longer schedule.", here, there)
            continue
        if name in CONTENTS:
            raise SVFitError(f"the checkpoint {path} belongs to {CONTENTS[name]}: start anew in another output_dir.")
        raise SVFitError(
            f"the checkpoint {path} was made with {name} {there}, not {here}: use the same options (config.yaml beside the "
            "checkpoints has them), or start anew; init_adapter goes on from a finished adapter with other options.",
            name,
        )


def run_identity(plan: Plan, base: Mapping[str, Any], num_processes: int = 1) -> dict[str, Any]:
    """What must be the same for a run to go on: all options that its result depends on, the pictures, the base.

    `base`: fingerprint of the weights that the run adapts, which says more than the name or place of the base.
    The class pictures are those that are there now: before they are painted, not yet what the run will train on.
    """
    options = dataclasses.asdict(plan.config)
    for name in INDIFFERENT_OPTIONS:
        options.pop(name, None)
    if not plan.config.keep_base:  # as in checkpoints of versions that did not know it, which go on
        del options["keep_base"], options["keep_base_weight"]
    contents = {"photos": _digest(plan.photos)}
    if plan.config.with_prior_preservation:
        present = usable_class_pictures(Path(str(plan.config.class_data_dir)))
        contents["class_pictures"] = _digest(present[: plan.config.num_class_images])
    if plan.initial is not None:
        contents["initial"] = plan.initial.metadata["payload_sha256"]
    return {**contents, "base": dict(base), "num_processes": num_processes, **options}


def _digest(photos: Iterable[Photo]) -> str:
    """SHA-256 over all that is trained on of `photos`, and their names, from which their crops follow."""
    digest = hashlib.sha256()
    for photo in photos:
        mask = b"" if photo.mask is None else photo.mask.read_bytes()
        words = "\n".join(photo.captions).encode() + (b"" if photo.repeats == 1 else b"\n%d" % photo.repeats)
        for part in (os.fsencode(photo.path.name), photo.path.read_bytes(), words, mask):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def resume_state(plan: Plan, identity: Mapping[str, Any]) -> TrainState | None:
    """The state that the run was asked to go on from; None where it starts anew.

    "latest" is the newest checkpoint that is whole.  Raises SVFitError for a path that is no checkpoint, and where
    none of several is whole.
    """
    asked = plan.config.resume_from_checkpoint
    if asked is None:
        return None
    if asked == "latest":
        return _latest(plan.folder.checkpoints, identity)
    if not Path(asked).is_file():
        raise SVFitError(
            f'resume_from_checkpoint {asked} is no file: give a file of <output_dir>/checkpoints, or "latest".'
        )
    return _told(load_checkpoint(Path(asked), identity), Path(asked))


def _latest(folder: Path, identity: Mapping[str, Any]) -> TrainState | None:
    found = list_checkpoints(folder)
    for path in reversed(found):
        try:
            return _told(load_checkpoint(path, identity), path)
        except NotWhole as error:
            logger.warning("%s", str(error).replace("name an earlier one", "it is passed over"))
    if found:
        raise SVFitError(f"none of the checkpoints in {folder} is whole: delete them to start anew.")
    logger.info("there is no checkpoint in %s yet: starting anew.", folder)
    return None


def _told(state: TrainState, path: Path) -> TrainState:
    logger.info("going on from step %d, %s.", state.step, path)
    return state
