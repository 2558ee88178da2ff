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

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.files import write_atomically
from svfit_dreambooth.method.basis import fingerprint
from svfit_dreambooth.photos.reading import Photo
from svfit_dreambooth.training.class_pictures import usable_class_pictures
from svfit_dreambooth.training.plan import Run

logger = logging.getLogger(__name__)

FORMAT = "svfit-checkpoint"
NAME = re.compile(r"step-(\d{6,})\.safetensors")
# Options that may differ between a run and its resumption: nothing that is learnt depends on them.
INDIFFERENT_OPTIONS = (
    "output_dir",
    "instance_data_dir",
    "class_data_dir",
    "basis_cache_dir",
    "resume_from_checkpoint",
    "checkpoints_total_limit",
    "final_pictures",
    "gradient_checkpointing",
    "validation_steps",
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
    """The step whose pictures were liked most so far."""

    step: int
    score: float
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


def capture(values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], ...]:
    """Copies of the trained values and of what the optimizer remembers of them."""
    copies = {name: value.detach().to("cpu", copy=True) for name, value in values.items()}
    memory = {
        f"{name}.{key}": tensor.detach().to("cpu", copy=True)
        for name, value in values.items()
        for key, tensor in optimizer.state.get(value, {}).items()
    }
    return copies, memory


@torch.no_grad()
def restore(state: TrainState, values: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Puts a captured state back into the trained values and the optimizer."""
    optimizer.state.clear()
    for name, value in values.items():
        value.copy_(state.values[name])
        keys = [key for key in state.optimizer if key.rpartition(".")[0] == name]
        if keys:  # AdamW keeps its step count on the CPU, the rest beside the value
            optimizer.state[value] = {
                key.rpartition(".")[2]: state.optimizer[key].clone()
                if state.optimizer[key].ndim == 0
                else state.optimizer[key].to(value.device, copy=True)
                for key in keys
            }


def save_checkpoint(state: TrainState, folder: Path, identity: Mapping[str, Any], limit: int | None) -> Path:
    """Writes <folder>/step-NNNNNN.safetensors whole or not at all, then deletes all but the newest `limit`.

    `identity`: what must be the same for a run to go on from here (options, photos, base), as JSON values.
    """
    tensors = {f"value.{name}": tensor for name, tensor in state.values.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in state.optimizer.items()}
    if state.best is not None:
        tensors |= {f"best.{name}": tensor for name, tensor in state.best.values.items()}
    facts = {
        "step": state.step,
        "rate_factor": state.rate_factor,
        "rollbacks": state.rollbacks,
        "scaler": state.scaler,
        "best": None if state.best is None else [state.best.step, state.best.score],
    }
    metadata = {"format": FORMAT, "state": json.dumps(facts), "identity": json.dumps(dict(identity))}
    path = write_atomically(folder / f"step-{state.step:06d}.safetensors", save(tensors, metadata))
    if limit is not None:
        for old in list_checkpoints(folder)[:-limit]:
            old.unlink()
    return path


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


def find_checkpoint(asked: str, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means: "latest" of `output_dir` (None if it has none), or a file.

    Raises SVFitError for a path that is no checkpoint.
    """
    if asked == "latest":
        found = list_checkpoints(output_dir / "checkpoints")
        return found[-1] if found else None
    path = Path(asked)
    if not path.is_file():
        raise SVFitError(
            f'resume_from_checkpoint {asked} is no file: give a file of <output_dir>/checkpoints, or "latest".'
        )
    return path


def load_checkpoint(path: Path, identity: Mapping[str, Any]) -> TrainState:
    """Reads what `save_checkpoint` wrote.

    Raises SVFitError for a file that is none, and for one of another run, naming the first difference.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise SVFitError(f"{path} is not a checkpoint of a training run.")
            facts, saved = json.loads(metadata["state"]), json.loads(metadata["identity"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dictionary
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise SVFitError(f"the checkpoint {path} cannot be read ({error}): name an earlier one.") from error
    for name in dict.fromkeys([*identity, *saved]):
        here, there = json.loads(json.dumps(identity.get(name))), saved.get(name)
        if here != there:
            if name in ("photos", "class_pictures", "base"):
                raise SVFitError(
                    f"the checkpoint {path} belongs to other {name.replace('_', ' ')}: start anew in another "
                    "output_dir."
                )
            raise SVFitError(
                f"the checkpoint {path} was made with {name} {there}, not {here}: use the same options, or start "
                "anew; init_adapter goes on from a finished adapter with other options.",
                name,
            )
    groups: dict[str, dict[str, Tensor]] = {"value": {}, "optimizer": {}, "best": {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        groups[group][rest] = tensor
    best = None
    if facts["best"] is not None:
        step, score = facts["best"]
        best = Best(step, score, groups["best"])
    return TrainState(
        facts["step"],
        groups["value"],
        groups["optimizer"],
        facts["rate_factor"],
        facts["rollbacks"],
        best,
        facts["scaler"],
    )


def run_identity(run: Run, num_processes: int = 1) -> dict[str, Any]:
    """What must be the same for a run to go on: all options that its result depends on, the pictures, the base.

    The class pictures are those that are there now: before they are painted, not yet what the run will train on.
    """
    options = dataclasses.asdict(run.config)
    for name in INDIFFERENT_OPTIONS:
        options.pop(name, None)
    pictures = {"photos": _digest(run.photos)}
    if run.config.with_prior_preservation:
        present = usable_class_pictures(Path(str(run.config.class_data_dir)))
        pictures["class_pictures"] = _digest(present[: run.config.num_class_images])
    return {**pictures, "base": fingerprint(run.weights, run.hashes), "num_processes": num_processes, **options}


def _digest(photos: Iterable[Photo]) -> str:
    """SHA-256 over all that is trained on of `photos`, and their names, from which their crops follow."""
    digest = hashlib.sha256()
    for photo in photos:
        mask = b"" if photo.mask is None else photo.mask.read_bytes()
        words = "\n".join(photo.captions).encode() + (b"" if photo.repeats == 1 else b"\n%d" % photo.repeats)
        for part in (os.fsencode(photo.path.name), photo.path.read_bytes(), words, mask):
            digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def resume_state(run: Run, identity: Mapping[str, Any]) -> TrainState | None:
    """The state that the run was asked to go on from; None where it starts anew."""
    asked = run.config.resume_from_checkpoint
    if asked is None:
        return None
    path = find_checkpoint(asked, Path(run.config.output_dir))
    if path is None:
        logger.info("there is no checkpoint in %s yet: starting anew.", run.config.output_dir)
        return None
    state = load_checkpoint(path, identity)
    logger.info("going on from step %d, %s.", state.step, path)
    return state
