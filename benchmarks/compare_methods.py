"""Does it learn the subject? SVFit beside LoRA, PiSSA, TinyLoRA, SVDiff and full fine-tuning.

    python benchmarks/compare_methods.py [--methods svfit lora-8 ...] [--results benchmarks/comparison]
    python benchmarks/compare_methods.py --pretrained_model_name_or_path BASE --subjects FOLDER \\
        --dino_path DINO --clip_path CLIP --train_batch_size 1 --steps 400 800 --results FOLDER

Every method first sweeps its learning rate on two subjects, then learns the other ones with three seeds, all by the
same loop, from the same examples, at a constant rate; measured at every one of --steps.  A finished run is one JSON
file with a strip of its pictures beside it; whatever is there already is not repeated, so the command may be
interrupted at any time, and several of it may share the work.  `benchmarks/evidence.py` makes the tables and plots.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from PIL import Image
from records import SEEDS, TUNING_SEED, Job, Record, pack, read_records, sweep
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from methods import ABLATIONS, METHODS, Method

from svfit_dreambooth import TrainConfig
from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.names import SUBJECTS_FOLDER, TOYBOX
from svfit_dreambooth.evaluation.features import Features, open_features
from svfit_dreambooth.evaluation.protocol import Answers, Questions, ask, bundled_questions, score, subject_questions
from svfit_dreambooth.files import save_png
from svfit_dreambooth.method.targets import svfit_layers
from svfit_dreambooth.photos.reading import find_photos, open_photo
from svfit_dreambooth.training.examples import encode_examples
from svfit_dreambooth.training.keep_base import KeptBase
from svfit_dreambooth.training.loop import Loop, Step
from svfit_dreambooth.training.objective import Objective
from svfit_dreambooth.training.optimizer import Steps, step_scales
from svfit_dreambooth.training.plan import Plan, prepare
from svfit_dreambooth.training.sensitivity import base_sensitivity
from svfit_dreambooth.training.watch import join

TEXT_ENCODER_LR = 2e-3
TOYBOX_TUNING = ("cat_tiger", "car_racer")
TOYBOX_TEST = (
    "dog_patch", "duck_dots", "fish_queen", "boat_breeze", "rocket_band", "teapot_lady", "mug_king", "lamp_stripes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share."""

    base: str
    subjects: str  # folder with a folder of photos for each
    tuning: tuple[str, ...]
    test: tuple[str, ...]
    steps: tuple[int, ...]  # when a run is measured; the last is its length
    batch_size: int
    inference_steps: int
    pictures_per_prompt: int
    dino: str | None
    clip: str | None

    def questions(self, subject: str) -> Questions:
        if self.base == TOYBOX:
            return bundled_questions(subject, pictures_per_prompt=self.pictures_per_prompt)
        photos = [open_photo(photo.path) for photo in find_photos(Path(self.subjects) / subject)]
        words = class_words(subject)
        return subject_questions(photos, f"sks {words}", words, pictures_per_prompt=self.pictures_per_prompt)

    def config(self, job: Job, method: Method, folder: Path, results: Path) -> TrainConfig:
        words = class_words(job.subject)
        preserves = "with_prior_preservation" in method.options
        return TrainConfig(
            pretrained_model_name_or_path=self.base,
            instance_data_dir=str(Path(self.subjects) / job.subject),
            instance_prompt=f"a photo of sks {words}",
            class_prompt=f"a photo of a {words}",
            class_data_dir=str(results / "class_pictures" / words) if preserves else None,
            num_class_images=32,
            output_dir=str(folder),
            learning_rate=job.rate or 1.0,  # 0: nothing is trained
            text_encoder_lr=TEXT_ENCODER_LR,
            lr_scheduler="constant",
            max_train_steps=self.steps[-1],
            checkpointing_steps=self.steps[-1] + 1,
            train_batch_size=self.batch_size,
            seed=job.seed,
            **{"target_modules": ["attention"], **method.options},
        )


def class_words(subject: str) -> str:
    """ "dog" of "dog6" and "dog_patch"."""
    return subject.partition("_")[0].rstrip("0123456789")


def paint(run: Plan, steps: int, prompts: Sequence[str], seed: int) -> list[Image.Image]:
    """One picture a prompt; picture i has the seed `seed + i`."""
    pipeline = run.base.pipeline
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), 8):
        batch = list(prompts[start : start + 8])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        images += pipeline(
            batch,
            num_inference_steps=steps,
            guidance_scale=run.base.guidance_scale,
            generator=generators,
        ).images
    return images


def painted(run: Plan, steps: int, questions: Questions, seed: int) -> Answers:
    """The answers of `run`'s base as it is now, its SVFit layers merged meanwhile."""
    networks = (run.base.pipeline.unet, run.base.pipeline.text_encoder)
    layers = [layer for network in networks for layer in svfit_layers(network).values()]
    for layer in layers:
        layer.merge()
    with torch.no_grad():
        answers = ask(partial(paint, run, steps), questions, 1000 * seed)
    for layer in layers:
        layer.unmerge()
    return answers


def make(
    job: Job, method: Method, setting: Setting, features: Features, untouched: dict[Any, Answers], results: Path
) -> Record:
    """Trains once, and measures on the way; leaves the strip of pictures in `results`."""
    questions, steps = setting.questions(job.subject), setting.inference_steps
    with tempfile.TemporaryDirectory() as folder:
        config = setting.config(job, method, Path(folder), results)
        run = prepare(config)
        run.base.pipeline.to(device := default_device())
        key = (job.subject, job.seed)
        if key not in untouched:
            untouched[key] = painted(run, steps, questions, job.seed)
        with FileLock(results / "locks" / f"{class_words(job.subject)}.lock"):  # its class pictures are made once
            examples = encode_examples(run, device)
        sensitivity = None
        if config.step_scaling == "sensitivity":  # of all values of its layers, which the method must train
            sensitivity = base_sensitivity(run.base, run.targets, run.weights(), device=device).values
        values, positions = method.put_in(run, examples)
        numbers = {name: value.detach().half().contiguous() for name, value in values.items()}
        record = Record(
            job.method, job.subject, job.seed, job.rate, sum(v.numel() for v in values.values()),
            len(save(numbers)) if numbers else 0, 0.0,
        )  # fmt: skip
        painting = 0.0

        def look(step: int, loss: float | None) -> None:
            nonlocal painting
            started = time.perf_counter()
            answers = painted(run, steps, questions, job.seed)
            scores = dataclasses.asdict(score(answers, untouched[key], questions, features))
            record.readings[str(step)] = {
                name: round(value, 5) if value is not None and math.isfinite(value) else None
                for name, value in {**scores, "loss": loss}.items()
            }
            strip = join(answers.subject[:: questions.pictures_per_prompt])
            save_png(strip, results / "pictures" / f"{Path(job.file_name).stem}-{step}.png")
            painting += time.perf_counter() - started

        if not values:
            for step in setting.steps:
                look(step, None)
            return record
        losses: list[float] = []

        def on_step(step: Step) -> None:
            losses.append(step.loss)
            if step.step == setting.steps[-1] or (step.step in setting.steps and job.seed != TUNING_SEED):
                look(step.step, sum(losses[-50:]) / len(losses[-50:]))

        rates = {name: TEXT_ENCODER_LR if name.startswith("text_encoder.") else job.rate for name in values}
        pipeline = run.base.pipeline
        model = Objective(run, examples, run.base.family.components, device, torch.float32)
        accelerator = Accelerator(cpu=device.type == "cpu")
        kept_base = KeptBase(model) if config.keep_base else None  # every method begins at the base
        scales = {}
        if sensitivity is not None:
            scales = step_scales({name: sensitivity[f"unet.{name}"][own] for name, own in positions.items()})
        moves = Steps(rates, scales)
        loop = Loop(config, accelerator, model, [pipeline.unet], values, moves, run.folder, kept_base=kept_base)
        started = time.perf_counter()
        _, _, failure = loop.run(on_step)
        if failure is not None:
            raise failure
        record.step_seconds = round((time.perf_counter() - started - painting) / setting.steps[-1], 4)
    return record


def missing(names: Sequence[str], records: Sequence[Record], seeds: Sequence[int], setting: Setting) -> Iterator[Job]:
    """The runs to be made next, most useful first: all sweeps, then the test subjects seed by seed."""
    everything = METHODS | ABLATIONS
    rates = {}
    for name in names:
        jobs, rates[name] = sweep(name, everything[name].rates, records, setting.tuning)
        yield from jobs
    done = {record.job for record in records}
    for seed in seeds:
        for subject in setting.test:
            for name in names:
                rate = rates[name]
                if rate is not None and Job(name, subject, seed, rate) not in done:
                    yield Job(name, subject, seed, rate)


def _check_same(setting: Setting, path: Path) -> None:
    """Runs of different settings must not end up in one table."""
    text = repr(dataclasses.replace(setting, subjects=Path(setting.subjects).name))
    if path.exists() and path.read_text() != text:
        raise SystemExit(f"{path.parent} holds runs of {path.read_text()}, not of {text}: name another --results.")
    path.write_text(text)


def work(names: Sequence[str], seeds: Sequence[int], setting: Setting, results: Path) -> None:
    """Makes runs until none is missing; those that another process is making are left to it."""
    features = open_features(setting.base, setting.dino, setting.clip, default_device())
    if features.any is None:
        raise SystemExit("nothing can be measured: name a DINO and a CLIP model with --dino_path and --clip_path.")
    untouched: dict[Any, Answers] = {}
    everything = METHODS | ABLATIONS
    (results / "locks").mkdir(parents=True, exist_ok=True)
    _check_same(setting, results / "setting.txt")
    while True:
        busy = False
        for job in missing(names, read_records(results), seeds, setting):
            path = results / job.file_name
            try:
                with FileLock(results / "locks" / f"{job.file_name}.lock", timeout=0):
                    if path.exists():
                        break
                    record = make(job, everything[job.method], setting, features, untouched, results)
                    temporary = path.with_suffix(".tmp")
                    temporary.write_text(json.dumps(dataclasses.asdict(record)) + "\n")
                    temporary.replace(path)
                    print(path.stem, json.dumps(record.readings), flush=True)
                    break  # what to do next may depend on it
            except Timeout:
                busy = True
        else:
            if not busy:
                return
            time.sleep(5)


def setting_of(options: argparse.Namespace) -> Setting:
    """Tuning and test subjects are those named in this file for toybox, else the first two folders and the rest."""
    base = options.pretrained_model_name_or_path
    if base == TOYBOX:
        subjects, tuning, test = SUBJECTS_FOLDER, TOYBOX_TUNING, TOYBOX_TEST
    else:
        subjects = options.subjects.resolve()
        names = sorted(path.name for path in subjects.iterdir() if path.is_dir())
        tuning, test = tuple(names[:2]), tuple(names[2:])
    return Setting(
        base, str(subjects), tuning, test, tuple(options.steps), options.train_batch_size,
        options.num_inference_steps, options.pictures_per_prompt, options.dino_path, options.clip_path,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS, *ABLATIONS])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("comparison"))
    parser.add_argument("--pretrained_model_name_or_path", default=TOYBOX)
    parser.add_argument("--subjects", type=Path, help="folder with a folder of photos for each; toybox has its own")
    parser.add_argument("--dino_path")
    parser.add_argument("--clip_path")
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 200], help="when to measure; the last is the end")
    parser.add_argument("--train_batch_size", type=int, default=4)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--pictures_per_prompt", type=int, default=2)
    parser.add_argument("--pack", action="store_true", help="only gather the files into one, RESULTS.jsonl")
    options = parser.parse_args()
    if options.pack:
        print(pack(options.results))
        return
    if options.pretrained_model_name_or_path != TOYBOX and options.subjects is None:
        parser.error("--subjects is missing: name the folder that holds a folder of photos for each subject.")
    work(options.methods, options.seeds, setting_of(options), options.results)


if __name__ == "__main__":
    main()
