"""What the presets reach: whole runs of the training command's own schedule on toybox subjects, judged in unseen settings.

    python benchmarks/presets.py [--recipes fast balanced "balanced target_modules=[all] learning_rate=0.04"]
                                 [--subjects dog_patch mug_king ...] [--seeds 0] [--results benchmarks/presets.jsonl]

A recipe is a preset and what is changed in it.  Prints a table over the subjects that all recipes have finished; runs that are
in the results already are not repeated.  Several of these commands may write into one file, for different subjects.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compare_methods import TOYBOX_TEST, class_words
from evidence import common, main_table
from records import Record

from svfit_dreambooth import TrainConfig, train
from svfit_dreambooth.adapter.file import read_adapter
from svfit_dreambooth.bases.devices import default_device
from svfit_dreambooth.bases.names import DEFAULT_BASE, SUBJECTS_FOLDER
from svfit_dreambooth.evaluation.features import open_features
from svfit_dreambooth.evaluation.measures import MEASURES, number
from svfit_dreambooth.evaluation.scoring import Candidate, evaluate_adapters
from svfit_dreambooth.painting.generate import open_for_adapters

END = 0  # stands for the end of the run, whose length is the recipe's own


def measure(recipe: str, subject: str, seed: int) -> Record:
    """Trains once, and asks the judge."""
    preset, *changes = recipe.split()
    options = {name: yaml.safe_load(value) for name, _, value in (change.partition("=") for change in changes)}
    photos = SUBJECTS_FOLDER / subject
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.get("with_prior_preservation"):
            options |= {"class_prompt": f"a photo of a {class_words(subject)}", "class_data_dir": str(folder / "class")}
        config = TrainConfig(
            instance_data_dir=str(photos),
            instance_prompt=f"a photo of sks {class_words(subject)}",
            output_dir=str(folder / "run"),
            preset=preset,
            seed=seed,
            final_pictures=False,
            **options,
        )
        result = train(config)
        _, row = evaluate_adapters(
            open_for_adapters([(result.adapter_path, 1.0)]),
            [Candidate(result.adapter_path, 1.0, photos)],
            open_features(DEFAULT_BASE, None, None, default_device()),
            folder / "scores",
            num_images=2,
            seed=1000 * seed,
            num_inference_steps=10,
        )
    reading = asdict(row.scores) | {"seconds": result.seconds, "steps": result.steps, "kept_step": result.kept_step}
    return Record(
        recipe, subject, seed, read_adapter(result.adapter_path).training["learning_rate"], result.values, result.file_bytes,
        result.seconds / result.steps, {str(END): reading},
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipes", nargs="+", default=["fast", "balanced", "faithful"])
    parser.add_argument("--subjects", nargs="+", default=list(TOYBOX_TEST))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("presets.jsonl"))
    options = parser.parse_args()

    def known() -> list[Record]:
        if not options.results.exists():
            return []
        return [Record(**json.loads(line)) for line in options.results.read_text().splitlines()]

    for seed in options.seeds:
        for subject in options.subjects:
            for recipe in options.recipes:
                if any((r.method, r.subject, r.seed) == (recipe, subject, seed) for r in known()):
                    continue
                record = measure(recipe, subject, seed)
                with options.results.open("a") as file:
                    file.write(json.dumps(asdict(record)) + "\n")
                scores = "  ".join(f"{name} {number(record.reading(END)[name])}" for name in MEASURES)
                print(f"{recipe}  {subject}  {seed}  {scores}", flush=True)
    records = known()
    table = common({recipe: [record for record in records if record.method == recipe] for recipe in options.recipes})
    print(f"{len(next(iter(table.values())))} runs each", *main_table(table, END), sep="\n")


if __name__ == "__main__":
    main()
