"""The commands that deal with adapter files: export, import, combine, annotate.  They parse and print."""

import argparse
import json
from pathlib import Path
from typing import Any

from svfit_dreambooth.commands.base import add_base, open_base
from svfit_dreambooth.commands.wording import printable
from svfit_dreambooth.errors import SVFitError


def add_file_commands(commands: Any) -> None:
    """Adds them to `commands`, what `add_subparsers` returned."""
    export = commands.add_parser("export", help="turn an adapter into a LoRA or a merged model")
    export.add_argument("adapter", metavar="PATH[:WEIGHT]")
    export.add_argument("--format", choices=["kohya", "diffusers", "merged"], required=True)
    export.add_argument(
        "--output", type=Path, required=True, help="LoRA file; merged model: a folder, or one .safetensors file"
    )
    export.add_argument("--rank", type=int, help="keep so many directions a layer, the strongest; default: all")
    export.add_argument("--error", type=float, help="keep as few as leave no layer off by more, such as 0.01")
    export.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    export.add_argument(
        "--without_words",
        action="store_true",
        help="leave out learned words: beside a LoRA they are files of their own",
    )
    export.add_argument("--allow_other_base", action="store_true", help="use the adapter on a relative of its base")
    export.add_argument("--overwrite", action="store_true", help="replace the output if it is there already")
    add_base(export)
    export.set_defaults(run=_export)

    importing = commands.add_parser("import", help="turn a LoRA, or an SVDiff file, into the nearest adapter")
    importing.add_argument("file", type=Path, help="the file, or the folder with it")
    importing.add_argument("--output", type=Path, required=True, help="adapter file to write")
    importing.add_argument("--partial", action="store_true", help="although tensors, or most of the change, get lost")
    importing.add_argument("--instance_prompt", help='to remember, such as "a photo of sks dog"')
    importing.add_argument("--overwrite", action="store_true", help="replace the output if it is there already")
    add_base(importing)
    importing.set_defaults(run=_import)

    combine = commands.add_parser("combine", help="add, average, scale or interpolate adapters of one base")
    combine.add_argument("adapters", nargs="+", metavar="PATH[:WEIGHT]", help="one adapter is scaled, several added")
    combine.add_argument("--output", type=Path, required=True, help="adapter file to write")
    how = combine.add_mutually_exclusive_group()
    how.add_argument("--average", action="store_true", help="divide by the sum of the weights")
    how.add_argument("--interpolate", type=float, metavar="T", help="between two: 0 is the first, 1 the second")
    combine.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    combine.add_argument("--overwrite", action="store_true", help="replace the output if it is there already")
    add_base(combine)
    combine.set_defaults(run=_combine)

    annotate = commands.add_parser("annotate", help="write author, licence, picture ... into an adapter file")
    annotate.add_argument("adapter", type=Path)
    for name in ("title", "author", "description", "license", "tags", "usage_hint"):
        annotate.add_argument(f"--{name}", help="an empty text removes it" if name == "author" else None)
    annotate.add_argument("--thumbnail", type=Path, metavar="PICTURE", help="a picture, stored as a small JPEG")
    annotate.set_defaults(run=_annotate)


def _export(options: argparse.Namespace) -> None:
    import torch

    from svfit_dreambooth.adapter.file import read_adapter
    from svfit_dreambooth.adapter.source import split_strength
    from svfit_dreambooth.files import check_output, size_text
    from svfit_dreambooth.sharing.export import export_lora, lora_path
    from svfit_dreambooth.sharing.merged_model import check_merged_output, export_merged, merged_bytes

    path, scale = split_strength(options.adapter)
    if options.format == "merged" and (options.rank is not None or options.error is not None):
        raise SVFitError("--rank and --error shorten a LoRA, a merged model needs neither: leave them out.")
    if options.format != "merged":
        output = lora_path(options.output, path, options.format)
        check_output(output, ".safetensors", _inputs(options, path), options.overwrite)
    else:
        check_merged_output(options.output, _inputs(options, path), options.overwrite)
    base = open_base(options, read_adapter(path).base_model, Path(path))
    dtype = getattr(torch, options.dtype)
    common = {
        "scale": scale,
        "dtype": dtype,
        "without_words": options.without_words,
        "allow_other_base": options.allow_other_base,
        "basis_cache_dir": options.basis_cache_dir,
        "overwrite": options.overwrite,
    }
    if options.format == "merged":
        print(f"{size_text(merged_bytes(base, dtype))} as a model in {options.dtype}", flush=True)
        print(export_merged(path, base, options.output, **common).summary())
        return
    exported = export_lora(
        path,
        base,
        options.output,
        options.format,
        rank=options.rank,
        error=options.error,
        on_plan=lambda plan: print("\n".join(plan.lines()), flush=True),
        **common,
    )
    print(printable("\n".join(exported.lines()), keep="\n"))


def _import(options: argparse.Namespace) -> None:
    from svfit_dreambooth.adapter.file import save_adapter
    from svfit_dreambooth.files import check_output
    from svfit_dreambooth.sharing.lora_import import import_lora, kin_of_lora
    from svfit_dreambooth.sharing.svdiff import import_svdiff

    if options.pretrained_model_name_or_path is None:
        raise SVFitError("such files do not say what they were trained on: add --pretrained_model_name_or_path.")
    check_output(options.output, ".safetensors", _inputs(options, options.file), options.overwrite)
    base = open_base(options, "", options.file)
    read = import_lora if options.file.is_file() and kin_of_lora(options.file) else import_svdiff
    result = read(options.file, base, partial=options.partial, basis_cache_dir=options.basis_cache_dir)
    if options.instance_prompt is not None:
        result.adapter.instance_prompt = options.instance_prompt
    path = save_adapter(result.adapter, options.output)
    print("\n".join(result.lines()))
    print(f"{path}: {path.stat().st_size:,} bytes")


def _combine(options: argparse.Namespace) -> None:
    import torch

    from svfit_dreambooth.adapter.file import read_adapter, save_adapter
    from svfit_dreambooth.adapter.source import split_strength
    from svfit_dreambooth.files import check_output
    from svfit_dreambooth.sharing.combine import combine_adapters

    named = [split_strength(text) for text in options.adapters]
    check_output(options.output, ".safetensors", _inputs(options, *(path for path, _ in named)), options.overwrite)
    adapters = [(read_adapter(path), strength) for path, strength in named]
    for (adapter, _), (path, _) in zip(adapters, named, strict=True):
        adapter.title = adapter.title or Path(path).stem

    method = "average" if options.average else "interpolate" if options.interpolate is not None else "add"
    result = combine_adapters(
        adapters,
        method,  # type: ignore[arg-type]
        options.interpolate,
        open_base=lambda: open_base(options, adapters[0][0].base_model, Path(named[0][0])),
    )
    saved = save_adapter(result, options.output, getattr(torch, options.dtype))
    for part in json.loads(result.metadata["combined_from"]):
        print(printable(f"{part['factor']:+.3g} x {part['title']}"))
    print(f"{saved}: {saved.stat().st_size:,} bytes")


def _inputs(options: argparse.Namespace, *paths: str | Path) -> list[str | Path | None]:
    """What a command reads, none of which its output may replace."""
    return [*paths, options.pretrained_model_name_or_path]


def _annotate(options: argparse.Namespace) -> None:
    from svfit_dreambooth.adapter.describe import TEXT_FIELDS, annotate_adapter
    from svfit_dreambooth.photos.reading import open_photo

    picture = None if options.thumbnail is None else open_photo(options.thumbnail)
    path = annotate_adapter(
        options.adapter, thumbnail=picture, **{name: getattr(options, name) for name in TEXT_FIELDS}
    )
    print(f"{path}: {path.stat().st_size:,} bytes")
