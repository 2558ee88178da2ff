"""`inspect`: what an adapter or LoRA file holds, in words, as JSON, or drawn."""

import argparse
import json
from pathlib import Path
from typing import Any

from svfit_dreambooth.bases.names import spoken
from svfit_dreambooth.commands.base import add_base, open_base
from svfit_dreambooth.commands.inspect_base import inspect_base
from svfit_dreambooth.commands.wording import printable, with_dashes
from svfit_dreambooth.errors import SVFitError

SHOWN = {  # header field -> how it is called
    "modelspec.author": "author",
    "modelspec.description": "description",
    "modelspec.trigger_phrase": "trigger words",
    "modelspec.usage_hint": "usage",
    "modelspec.license": "licence",
    "modelspec.tags": "tags",
    "modelspec.architecture": "architecture",
    "modelspec.resolution": "resolution",
    "modelspec.merged_from": "made of",
    "modelspec.date": "date",
    "modelspec.hash_sha256": "hash",
}


def add_inspect(commands: Any) -> None:
    """Adds it to `commands`, what `add_subparsers` returned."""
    inspect = commands.add_parser("inspect", help="tell what an adapter or LoRA file holds, or what carries a base")
    inspect.add_argument("adapter", type=Path, nargs="?", help="none: the base, which is measured once")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument(
        "--plot", type=Path, metavar="PNG", help="draw which blocks changed, and how strongly; or carry the base"
    )
    inspect.add_argument("--layer", help="whose singular values --plot shows; default: the most changed layer")
    inspect.add_argument("--picture", type=Path, help="what --plot takes apart; default: the adapter's thumbnail")
    inspect.add_argument(
        "--overwrite", action="store_true", help="replace the picture of --plot if it is there already"
    )
    inspect.add_argument("--target_modules", nargs="+", help="of a base: its layers, such as all; default: attention")
    inspect.add_argument("--train_text_encoder", action="store_true", help="of a base: its text encoders too")
    add_base(inspect)
    inspect.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    if options.adapter is None:
        inspect_base(options)
        return
    for name in ("target_modules", "train_text_encoder"):
        if getattr(options, name):
            raise SVFitError(f"{name} is for a base, and {options.adapter} is named: leave one of them out.")
    from svfit_dreambooth.files import check_output
    from svfit_dreambooth.sharing.lora_file import is_lora

    if options.plot is not None:
        read = [options.adapter, options.picture, options.pretrained_model_name_or_path]
        check_output(options.plot, ".png", read, options.overwrite)
    if is_lora(options.adapter):
        if options.plot is not None:
            raise SVFitError(f"{options.adapter} is a LoRA, --plot draws adapters: name the adapter that it came from.")
        _inspect_lora(options)
        return
    from svfit_dreambooth.adapter.describe import describe_adapter
    from svfit_dreambooth.adapter.file import read_adapter

    adapter = read_adapter(options.adapter)
    description = describe_adapter(adapter, options.adapter)
    description["metadata"] = _presentable(adapter.metadata)
    if options.plot is not None:
        path = _plot(options, adapter)
        if not options.json:
            print(printable(f"drawn: {path}"))
    if options.json:
        print(printable(json.dumps(description, indent=2, ensure_ascii=False), keep="\n"))
        return
    for key in ("title", "base_model", "instance_prompt", "class_prompt", "file_bytes"):
        if description.get(key):
            value = spoken(description[key]) if key == "base_model" else description[key]
            print(printable(f"{key.replace('_', ' ')}: {value}"))
    _print_metadata(adapter.metadata)
    if "modelspec.license" not in adapter.metadata:
        from svfit_dreambooth.adapter.describe import licence_note

        print(printable(f"licence: {licence_note(adapter)}"))
    for key, value in description["training"].items():
        print(printable(f"  {key.replace('_', ' ')}: {value}"))
    print(printable(f"{'':28}{'layers':>7}{'values':>9}{'ranks':>12}{'strength':>10}"))
    rows = {**description["components"], **description["blocks"], "total": description["total"]}
    for name, row in rows.items():
        ranks = f"{row['rank_min']}" + (f"-{row['rank_max']}" if row["rank_max"] != row["rank_min"] else "")
        print(printable(f"{name:28}{row['projections']:>7}{row['values']:>9,}{ranks:>12}{row['strength']:>10.4f}"))


def _inspect_lora(options: argparse.Namespace) -> None:
    from svfit_dreambooth.sharing.lora_file import describe_lora

    description = describe_lora(options.adapter)
    metadata = description["metadata"]
    description["metadata"] = _presentable(metadata)
    if options.json:
        print(printable(json.dumps(description, indent=2, ensure_ascii=False), keep="\n"))
        return
    ranks = f"{description['rank_min']}"
    if description["rank_max"] != description["rank_min"]:
        ranks += f" to {description['rank_max']}"
    print(printable(f"a LoRA in {description['layout']} layout: {description['layers']} layers of rank {ranks}"))
    print(printable(f"alpha: {', '.join(f'{alpha:g}' for alpha in description['alphas']) or 'none, so the rank'}"))
    print(printable(f"file bytes: {description['file_bytes']}"))
    if metadata.get("modelspec.title"):
        print(printable(f"title: {metadata['modelspec.title']}"))
    _print_metadata(metadata)
    for key in sorted(metadata):
        if key.startswith("ss_") or key == "svfit_source":
            print(printable(f"  {key}: {metadata[key]}"))


def _print_metadata(metadata: dict[str, str]) -> None:
    from svfit_dreambooth.adapter.describe import read_thumbnail

    for key, name in SHOWN.items():
        if metadata.get(key):
            print(printable(f"{name}: {metadata[key]}"))
    thumbnail = read_thumbnail(metadata)
    if thumbnail is not None:
        print(printable(f"thumbnail: {thumbnail.width}x{thumbnail.height} pixels"))


def _presentable(metadata: dict[str, str]) -> dict[str, str]:
    """Without what the description says already, and with the picture's size in place of its bytes."""
    skipped = {"targets", "training", "base_fingerprint", "base_model", "instance_prompt", "class_prompt"}
    return {
        key: f"{len(value)} bytes" if key == "modelspec.thumbnail" else value
        for key, value in metadata.items()
        if key not in skipped
    }


def _plot(options: argparse.Namespace, adapter: Any) -> Any:
    from svfit_dreambooth.adapter.describe import read_thumbnail
    from svfit_dreambooth.adapter.plot import plot_adapter, strongest_layer
    from svfit_dreambooth.bases.names import SUBJECTS_FOLDER
    from svfit_dreambooth.photos.reading import open_photo

    layer = options.layer or strongest_layer(adapter)
    if layer not in adapter.shifts:
        raise SVFitError(
            f"--layer {layer} is not among the layers of {options.adapter}, such as {min(adapter.shifts)}."
        )
    try:
        spectrum = (layer, _singular_values(options, adapter, layer))
    except SVFitError as error:
        print(printable(f"singular values are not drawn: {with_dashes(str(error), vars(options), error.parameters)}"))
        spectrum = None
    picture = read_thumbnail(adapter.metadata)
    bundled = sorted(SUBJECTS_FOLDER.glob("*/*.png"))
    if options.picture is not None:
        picture = open_photo(options.picture)
    elif picture is None and bundled:
        picture = open_photo(bundled[0])
    return plot_adapter(adapter, options.plot, spectrum=spectrum, picture=picture)


def _singular_values(options: argparse.Namespace, adapter: Any, layer: str) -> Any:
    """S of `layer` of the adapter's base; raises SVFitError where that is not at hand."""
    from svfit_dreambooth.method.basis import canonical_weight, same_base
    from svfit_dreambooth.method.decomposition import decompose
    from svfit_dreambooth.painting.matching import adapted_weights

    base = open_base(options, adapter.base_model, options.adapter)
    weights = adapted_weights(base.pipeline, adapter, adapter.title)
    if same_base(adapter.base_fingerprint, weights) == "different":
        raise SVFitError(f"the adapter was trained on {adapter.base_model}, and {base.name} is another base.")
    return decompose(canonical_weight(weights[layer]))[1]
