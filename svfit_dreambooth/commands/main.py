"""The command lines: they parse and print, and decide nothing.

Heavy imports happen inside the commands, so that --help answers at once.
"""

import argparse
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from svfit_dreambooth.commands.base import add_base, add_denoising, base_options
from svfit_dreambooth.commands.evaluate import add_evaluate
from svfit_dreambooth.commands.files import add_file_commands
from svfit_dreambooth.commands.fleet import fleet
from svfit_dreambooth.commands.inspect import add_inspect
from svfit_dreambooth.commands.jobs import add_jobs, generate_jobs
from svfit_dreambooth.commands.push import add_push
from svfit_dreambooth.commands.wording import printable, with_dashes
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.threads import wait_asleep


def main_train(arguments: Sequence[str] | None = None) -> int:
    """`train_dreambooth_svfit.py`: returns the exit code."""
    return _plainly(_train, sys.argv[1:] if arguments is None else arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m svfit_dreambooth`: returns the exit code."""
    return _plainly(_dispatch, sys.argv[1:] if arguments is None else arguments)


def _plainly(command: Callable[[Sequence[str], set[str]], None], arguments: Sequence[str]) -> int:
    """Runs `command`, which adds the names of its options to a set; returns the exit code.

    What a person did wrong is one sentence on standard error and exit code 2.
    """
    wait_asleep()
    names: set[str] = set()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that knows ASCII alone gets escapes, not a traceback
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(names))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("svfit_dreambooth").setLevel(logging.INFO)
    try:
        command(arguments, names)
        sys.stdout.flush()
    except SVFitError as error:
        print(f"error: {printable(with_dashes(str(error), names, error.parameters))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        from svfit_dreambooth.bases.devices import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory: try {with_dashes('dtype float16', names, ['dtype'])}, smaller pictures, or fewer at "
            "once.",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:  # who read has read enough, as in `... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        print(
            f"error: '{printable(error.filename)}' cannot be used ({error.strerror}): choose another place.",
            file=sys.stderr,
        )
        return 2
    return 0


class _Formatter(logging.Formatter):
    """Plain lines; only warnings and worse say what they are.  Options are named as flags.

    Those of a single word if the record names them as `parameters`, given to the logger as `extra` (see SVFitError).
    """

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = super().format(record)
        if record.name.startswith("svfit_dreambooth") and not record.exc_info:  # ours are single lines
            text = printable(text)
        return prefix + with_dashes(text, self.names, getattr(record, "parameters", ()))


def _train(arguments: Sequence[str], names: set[str]) -> None:
    from svfit_dreambooth.commands.arguments import OPTION_NAMES, parse_runs
    from svfit_dreambooth.commands.subjects import add_subjects, print_plan, train_subjects

    names.update(OPTION_NAMES)
    names.update(("subjects", "subjects_at_once"))
    config, folders, given = parse_runs(arguments, "train_dreambooth_svfit.py", add_subjects)
    if folders or "subjects" in given:
        train_subjects(config, folders, given, names)
        return
    if "subjects_at_once" in given:
        raise SVFitError("subjects_at_once goes with several subjects alone: leave it out.", "subjects_at_once")
    if config.dry_run:
        from svfit_dreambooth.training.plan import prepare

        print_plan(prepare(config), names)
        return
    from accelerate import PartialState

    from svfit_dreambooth.training.run import train

    result = train(config)
    if PartialState().is_main_process:  # of several that share the run, one speaks
        print(with_dashes(result.summary(), names, ["keep"]))


def _dispatch(arguments: Sequence[str], names: set[str]) -> None:
    if arguments and arguments[0] == "fleet":  # whose options are those of training
        fleet(arguments[1:], names)
        return
    options = _parser().parse_args(arguments)
    names.update(vars(options))
    options.run(options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise SVFitError(f"{message}: see {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m svfit_dreambooth", description="Generate with adapters, look into them, and share them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)

    generate = commands.add_parser("generate", help="paint pictures with adapters")
    generate.add_argument("--adapter", action="append", default=[], metavar="PATH[:WEIGHT]", help="may be repeated")
    generate.add_argument("--prompt", action="append", help="may be repeated")
    generate.add_argument("--negative_prompt")
    generate.add_argument(
        "--prompt_weights", action="store_true", help='let words weigh: "a ball++", "a (red ball)1.3 on grass--"'
    )
    generate.add_argument(
        "--clip_skip", type=int, metavar="N",
        help="last layers of CLIP to leave out, 1 less than others call Clip skip; default: as the adapter was trained",
    )  # fmt: skip
    generate.add_argument("--output_dir", type=Path, required=True, help="folder for the PNG files")
    add_base(generate)
    generate.add_argument("--num_images", type=int, help="pictures of each prompt (default: 4)")
    generate.add_argument("--seed", type=int, help="seed of the first picture, counting up (default: 0)")
    add_denoising(generate)
    generate.add_argument("--height", type=int, help="pixels; default: the base's")
    generate.add_argument("--width", type=int, help="pixels; default: the base's")
    generate.add_argument("--scheduler", help="sampler, such as euler_a or dpm++_2m_karras (default: the base's own)")
    generate.add_argument("--image", type=Path, metavar="FILE", help="begin with this picture instead of noise")
    generate.add_argument("--strength", type=float, help="with image: how much is painted anew, 0 to 1 (default: 0.6)")
    generate.add_argument("--mask_image", type=Path, metavar="FILE", help="with image: paint where this one is white")
    generate.add_argument(
        "--quantize", choices=["int8", "fp8", "nf4"], help="hold the denoiser's blocks in 8 or 4 bits"
    )
    generate.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    generate.add_argument("--allow_other_base", action="store_true", help="use adapters on a relative of their base")
    generate.add_argument(
        "--trained_on",
        metavar="BASE",
        help="base that the adapters were trained on, to use them exactly on one that was distilled from it",
    )
    add_jobs(generate)
    generate.set_defaults(run=_generate)

    commands.add_parser("fleet", help="train many subjects on many workers, here or on a cluster", add_help=False)
    cache = commands.add_parser("cache", help="what is kept on this disk of bases, and for which; or clear it")
    cache.add_argument("--clear", action="store_true", help="delete them; they are computed again when needed")
    cache.add_argument("--basis_cache_dir", type=Path, help="default: $SVFIT_CACHE or the user's cache folder")
    cache.set_defaults(run=_cache)
    add_evaluate(commands)
    add_inspect(commands)
    add_file_commands(commands)
    add_push(commands)
    return parser


def _generate(options: argparse.Namespace) -> None:
    if options.jobs is not None:
        generate_jobs(options)
        return
    for name in ("batch_size", "adapter_memory"):
        if getattr(options, name) is not None:
            raise SVFitError(f"{name} goes with jobs alone: leave it out.", "jobs")
    if not options.prompt:
        raise SVFitError("there is nothing to paint: give a prompt, or a file of jobs.", "prompt", "jobs")
    from svfit_dreambooth.adapter.source import split_strength
    from svfit_dreambooth.bases.devices import DTYPES
    from svfit_dreambooth.painting.generate import generate, open_for_adapters
    from svfit_dreambooth.painting.picture import free_path, save_picture

    adapters = [split_strength(text) for text in options.adapter]
    begin = _begin(options)
    model = open_for_adapters(
        adapters,
        options.pretrained_model_name_or_path,
        allow_other_base=options.allow_other_base,
        trained_on=options.trained_on,
        basis_cache_dir=options.basis_cache_dir,
        dtype=DTYPES[options.dtype],
        **base_options(options),
    )
    stem = "-".join(Path(path).stem for path, _ in adapters) or model.name.replace("/", "-")

    def save(picture) -> None:  # type: ignore[no-untyped-def]
        path = save_picture(picture, free_path(options.output_dir, stem))
        print(f"{path}" + (" (blacked out by the base's content filter)" if picture.filtered else ""))

    generate(
        model,
        options.prompt,
        num_images=4 if options.num_images is None else options.num_images,
        seed=options.seed or 0,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        guidance_rescale=options.guidance_rescale,
        negative_prompt=options.negative_prompt,
        prompt_weights=options.prompt_weights,
        clip_skip=options.clip_skip,
        height=options.height,
        width=options.width,
        scheduler=options.scheduler,
        begin=begin,
        on_picture=save,
    )


def _begin(options: argparse.Namespace) -> Any:
    """The picture that painting begins with; None: there is none."""
    from svfit_dreambooth.painting.from_picture import Begin
    from svfit_dreambooth.photos.reading import open_photo

    for name in ("strength", "mask_image"):
        if options.image is None and getattr(options, name) is not None:
            raise SVFitError(f"{name} goes with image alone: leave it out.", name, "image")
    if options.image is None:
        return None
    mask = None if options.mask_image is None else open_photo(options.mask_image)
    return Begin(open_photo(options.image), 0.6 if options.strength is None else options.strength, mask)


def _cache(options: argparse.Namespace) -> None:
    from svfit_dreambooth.files import size_text
    from svfit_dreambooth.folders import cache_dir
    from svfit_dreambooth.training.cache import cached, clear_cache, summed

    folder = options.basis_cache_dir or cache_dir()
    found = clear_cache(folder) if options.clear else cached(folder)
    for entry in summed(found):
        print(printable(f"{entry.kind:26}{entry.count:>7,} files{size_text(entry.size):>10}   {entry.base}"))
    total = size_text(sum(entry.size for entry in found))
    done = f"deleted from {folder}: {total} freed" if options.clear else f"in {folder}: {total}"
    print(printable(f"{len(found):,} files {done}"))
