"""`evaluate`: how well adapters learnt their subjects, by the DreamBooth protocol."""

import argparse
from pathlib import Path
from typing import Any

from svfit_dreambooth.commands.base import add_base, add_denoising, base_options
from svfit_dreambooth.errors import SVFitError


def add_evaluate(commands: Any) -> None:
    """Adds it to `commands`, what `add_subparsers` returned."""
    evaluate = commands.add_parser("evaluate", help="measure adapters: likeness, fit to prompts, drift ...")
    evaluate.add_argument("--adapter", action="append", required=True, metavar="PATH[:WEIGHT]", help="may be repeated")
    evaluate.add_argument(
        "--instance_data_dir", action="append", type=Path, required=True, metavar="PHOTOS",
        help="photos of the subject, best others than those of the training; once for all adapters, or once for each",
    )  # fmt: skip
    evaluate.add_argument("--output_dir", type=Path, required=True, help="for scores.json, sheet.png and the pictures")
    evaluate.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="one prompt a line, {} for the subject's words; default: 12 of ours, for bundled subjects their own",
    )  # fmt: skip
    evaluate.add_argument("--subject_words", help='such as "sks dog"; default: from the adapter')
    evaluate.add_argument("--class_words", help='such as "dog"; default: from the adapter')
    evaluate.add_argument("--dino_path", help="folder or hub id of a DINO model: likeness; default: CLIP, or the judge")
    evaluate.add_argument("--clip_path", help="folder or hub id of a CLIP model: prompts, drift; default: the judge")
    evaluate.add_argument("--num_images", type=int, default=4, help="pictures of each prompt (default: 4)")
    evaluate.add_argument("--seed", type=int, default=0, help="of the first picture, counting up (default: 0)")
    add_denoising(evaluate)
    evaluate.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    add_base(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    from svfit_dreambooth.adapter.source import split_strength
    from svfit_dreambooth.bases.devices import DTYPES
    from svfit_dreambooth.evaluation.features import open_features
    from svfit_dreambooth.evaluation.protocol import read_templates
    from svfit_dreambooth.evaluation.scoring import Candidate, adapter_files, evaluate_adapters, table
    from svfit_dreambooth.painting.generate import open_for_adapters

    if options.num_images < 1:
        raise SVFitError(f"--num_images is {options.num_images}, but must be 1 or more.")
    adapters = [split_strength(text) for text in options.adapter]
    folders = options.instance_data_dir * (len(adapters) if len(options.instance_data_dir) == 1 else 1)
    if len(folders) != len(adapters):
        raise SVFitError(
            f"{len(adapters)} adapters and {len(folders)} folders of photos were given: give --instance_data_dir once "
            "for all adapters, or once for each."
        )
    templates = None if options.prompts is None else read_templates(options.prompts)
    files = adapter_files(path for path, _ in adapters)
    model = open_for_adapters(
        [(path, 1.0) for path in files],  # strengths are set one by one
        options.pretrained_model_name_or_path,
        basis_cache_dir=options.basis_cache_dir,
        dtype=DTYPES[options.dtype],
        **base_options(options),
    )
    features = open_features(model.name, options.dino_path, options.clip_path, model.pipeline.device)
    rows = evaluate_adapters(
        model,
        [Candidate(Path(path), strength, folder, options.subject_words, options.class_words)
         for (path, strength), folder in zip(adapters, folders, strict=True)],
        features,
        options.output_dir,
        templates=templates,
        num_images=options.num_images,
        seed=options.seed,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        guidance_rescale=options.guidance_rescale,
    )  # fmt: skip
    print("\n".join(table(rows)))
    print(f"{options.output_dir / 'scores.json'}, {options.output_dir / 'sheet.png'}")
