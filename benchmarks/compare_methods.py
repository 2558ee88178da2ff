"""Does it learn the subject? SVFit beside LoRA, PiSSA, TinyLoRA, SVDiff and full fine-tuning, on toybox.

    python benchmarks/compare_methods.py [--methods svfit lora-8 ...] [--results benchmarks/comparison]

Every method first sweeps its learning rate on two subjects, then learns eight other ones with three seeds, all by the
same loop, from the same examples, at a constant rate; measured at 100 and at 200 steps of batch 4.  A finished run is
one JSON file with a strip of its pictures beside it; whatever is there already is not repeated, so the command may be
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
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from PIL import Image
from records import SEEDS, STEPS, TEST_SUBJECTS, TUNING_SEED, Job, Record, pack, read_records, sweep
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from methods import ABLATIONS, METHODS, Method

from svfit_dreambooth import TrainConfig
from svfit_dreambooth.attention import svfit_layers
from svfit_dreambooth.denoising import Denoiser
from svfit_dreambooth.encoding import encode_examples
from svfit_dreambooth.features import Features, open_features
from svfit_dreambooth.loop import Loop, Step
from svfit_dreambooth.preparation import TOYBOX_SUBJECTS, Run, prepare
from svfit_dreambooth.protocol import Answers, Questions, ask, score, toybox_questions
from svfit_dreambooth.sheets import save_sheet
from svfit_dreambooth.validation import join

CPU = torch.device("cpu")
INFERENCE_STEPS = 10
TEXT_ENCODER_LR = 2e-3


def config_of(job: Job, method: Method, folder: Path, results: Path) -> TrainConfig:
    """What all methods share."""
    kind = job.subject.partition("_")[0]
    return TrainConfig(
        instance_data_dir=str(TOYBOX_SUBJECTS / job.subject),
        instance_prompt=f"a photo of sks {kind}",
        class_prompt=f"a photo of a {kind}",
        class_data_dir=str(results / "class_pictures" / kind) if "with_prior_preservation" in method.options else None,
        num_class_images=32,
        output_dir=str(folder),
        learning_rate=job.rate,
        text_encoder_lr=TEXT_ENCODER_LR,
        lr_scheduler="constant",
        max_train_steps=STEPS[-1],
        checkpointing_steps=STEPS[-1] + 1,
        train_batch_size=4,
        seed=job.seed,
        **method.options,
    )


def paint(run: Run, prompts: Sequence[str], seed: int) -> list[Image.Image]:
    """One picture a prompt; picture i has the seed `seed + i`."""
    pipeline = run.base.pipeline
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(prompts), 8):
        batch = list(prompts[start : start + 8])
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(batch))]
        images += pipeline(
            batch,
            num_inference_steps=INFERENCE_STEPS,
            guidance_scale=run.base.guidance_scale,
            generator=generators,
        ).images
    return images


def painted(run: Run, questions: Questions, seed: int) -> Answers:
    """The answers of `run`'s base as it is now, its SVFit layers merged meanwhile."""
    networks = (run.base.pipeline.unet, run.base.pipeline.text_encoder)
    layers = [layer for network in networks for layer in svfit_layers(network).values()]
    for layer in layers:
        layer.merge()
    with torch.no_grad():
        answers = ask(lambda prompts, first: paint(run, prompts, first), questions, 1000 * seed)
    for layer in layers:
        layer.unmerge()
    return answers


def make(job: Job, method: Method, features: Features, untouched: dict[Any, Answers], results: Path) -> Record:
    """Trains once, and measures on the way; leaves the strip of pictures in `results`."""
    questions = toybox_questions(job.subject, pictures_per_prompt=2)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(job, method, Path(folder), results)
        run = prepare(config)
        key = (job.subject, job.seed)
        if key not in untouched:
            untouched[key] = painted(run, questions, job.seed)
        examples = encode_examples(run, CPU)
        values = method.put_in(run, examples)
        numbers = {name: value.detach().half().contiguous() for name, value in values.items()}
        record = Record(
            job.method, job.subject, job.seed, job.rate, sum(v.numel() for v in values.values()),
            len(save(numbers)) if numbers else 0, 0.0,
        )  # fmt: skip
        painting = 0.0

        def look(step: int, loss: float | None) -> None:
            nonlocal painting
            started = time.perf_counter()
            answers = painted(run, questions, job.seed)
            scores = dataclasses.asdict(score(answers, untouched[key], questions, features))
            record.readings[str(step)] = {
                name: round(value, 5) if value is not None and math.isfinite(value) else None
                for name, value in {**scores, "loss": loss}.items()
            }
            strip = join(answers.subject[:: questions.pictures_per_prompt])
            save_sheet(strip, results / "pictures" / f"{Path(job.file_name).stem}-{step}.png")
            painting += time.perf_counter() - started

        if not values:
            for step in STEPS:
                look(step, None)
            return record
        losses: list[float] = []

        def on_step(step: Step) -> None:
            losses.append(step.loss)
            if step.step == STEPS[-1] or (step.step in STEPS and job.seed != TUNING_SEED):
                look(step.step, sum(losses[-50:]) / len(losses[-50:]))

        rates = {name: TEXT_ENCODER_LR if name.startswith("text_encoder.") else job.rate for name in values}
        pipeline = run.base.pipeline
        model = Denoiser(run, examples, pipeline.unet, pipeline.text_encoder, CPU, torch.float32)
        accelerator = Accelerator(cpu=True)
        loop = Loop(config, accelerator, model, [pipeline.unet], values, rates, {}, watch=None)
        started = time.perf_counter()
        loop.run(on_step, lambda: False)
        record.step_seconds = round((time.perf_counter() - started - painting) / STEPS[-1], 4)
    return record


def missing(names: Sequence[str], records: Sequence[Record], seeds: Sequence[int]) -> Iterator[Job]:
    """The runs to be made next, most useful first: all sweeps, then the test subjects seed by seed."""
    everything = METHODS | ABLATIONS
    rates = {}
    for name in names:
        jobs, rates[name] = sweep(name, everything[name].rates, records)
        yield from jobs
    done = {record.job for record in records}
    for seed in seeds:
        for subject in TEST_SUBJECTS:
            for name in names:
                rate = rates[name]
                if rate is not None and Job(name, subject, seed, rate) not in done:
                    yield Job(name, subject, seed, rate)


def work(names: Sequence[str], seeds: Sequence[int], results: Path) -> None:
    """Makes runs until none is missing; those that another process is making are left to it."""
    features = open_features("toybox")
    untouched: dict[Any, Answers] = {}
    everything = METHODS | ABLATIONS
    (results / "locks").mkdir(parents=True, exist_ok=True)
    while True:
        busy = False
        for job in missing(names, read_records(results), seeds):
            path = results / job.file_name
            try:
                with FileLock(results / "locks" / f"{job.file_name}.lock", timeout=0):
                    if path.exists():
                        break
                    record = make(job, everything[job.method], features, untouched, results)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=[*METHODS, *ABLATIONS])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("comparison"))
    parser.add_argument("--pack", action="store_true", help="only gather the files into one, RESULTS.jsonl")
    options = parser.parse_args()
    if options.pack:
        print(pack(options.results))
        return
    work(options.methods, options.seeds, options.results)


if __name__ == "__main__":
    main()
