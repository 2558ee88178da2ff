"""The options of a training run from flags and YAML files, read by one and the same rules."""

import argparse
import dataclasses
import difflib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from svfit_dreambooth.bases.names import DEFAULT_BASE, FORMER
from svfit_dreambooth.commands.wording import with_dashes
from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.config import TrainConfig
from svfit_dreambooth.training.limits import kind_words, plain_type, words_of
from svfit_dreambooth.training.options import OPTION_GROUPS

logger = logging.getLogger(__name__)

OPTION_NAMES = [option.name for option in dataclasses.fields(TrainConfig)]
ANNOTATIONS = {name: kind for name, kind in get_type_hints(TrainConfig).items() if name in OPTION_NAMES}
KINDS = {name: plain_type(kind)[0] for name, kind in ANNOTATIONS.items()}
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")

# Flags of diffusers' DreamBooth scripts and of kohya's that have no counterpart here, and what to do instead.
REPLACED_FLAGS = {
    "num_train_epochs": "say how long to train with max_train_steps",
    "use_8bit_adam": "leave it out, the optimizer state of a few thousand values needs no compression",
    "scale_lr": "leave it out, learning_rate is used as given",
    "pre_compute_text_embeddings": "leave it out, prompts are encoded once in any case",
    "validation_prompt": "use validation_prompts",
    "validation_epochs": "use validation_steps",
    "num_validation_images": "list several validation_prompts",
    "lora_dropout": "leave it out, there is no dropout",
    "lora_alpha": "leave it out, shifts are not scaled; learning_rate says how far they move",
    "enable_xformers_memory_efficient_attention": "leave it out, torch's own efficient attention is used",
    "allow_tf32": "leave it out, set it in torch",
    "dataloader_num_workers": "leave it out, photos are encoded once before the first step",
    "logging_dir": "leave it out, the run is described in output_dir",
    "hub_token": "log in by `hf auth login` instead, so that no file holds the token",
    "prior_generation_precision": "leave it out, class pictures are painted in mixed_precision",
    "sample_batch_size": "leave it out, class pictures are painted one by one",
    "tokenizer_name": "leave it out, the tokenizer is the base's own",
    "lr_num_cycles": "leave it out, lr_scheduler runs as diffusers sets it up",
    "lr_power": "leave it out, lr_scheduler runs as diffusers sets it up",
    "train_data_dir": "name the photos with instance_data_dir",
    "reg_data_dir": "name the class pictures with class_data_dir",
    "output_name": "use adapter_name",
    "network_module": "leave it out, singular values are what is trained",
    "network_dim": "use rank, or leave it out to train all singular values",
    "network_alpha": "leave it out, shifts are not scaled; learning_rate says how far they move",
    "network_weights": "use init_adapter",
    "unet_lr": "use learning_rate",
    "max_train_epochs": "say how long to train with max_train_steps",
    "save_every_n_steps": "use checkpointing_steps",
    "save_every_n_epochs": "use checkpointing_steps",
    "save_precision": "use save_dtype",
    "save_model_as": "leave it out, everything is written as safetensors",
    "sample_prompts": "use validation_prompts",
    "sample_every_n_steps": "use validation_steps",
    "sample_every_n_epochs": "use validation_steps",
    "min_snr_gamma": "use snr_gamma",
    "resume": "use resume_from_checkpoint",
    "optimizer_type": "leave it out, the optimizer is AdamW",
    "enable_bucket": "leave it out, aspect_ratio says how photos keep their proportions",
    "cache_latents": "leave it out, photos are encoded once in any case",
    "flip_aug": "use random_flip",
    "xformers": "leave it out, torch's own efficient attention is used",
    "sdpa": "leave it out, torch's own efficient attention is used",
    "logging_directory": "leave it out, the run is described in output_dir",
    "log_with": "use report_to",
}


def parse_config(arguments: Sequence[str], prog: str) -> TrainConfig:
    """The configuration that `arguments` (flags) ask for; `--config FILE` gives a YAML file that flags override.

    Exits through SystemExit(0) for --help; raises SVFitError with one sentence for anything that cannot be read.
    """
    config, folders, _ = parse_runs(arguments, prog)
    if folders:
        raise SVFitError("instance_data_dir was given several times: one run has one.", "instance_data_dir")
    return config


def parse_runs(
    arguments: Sequence[str], prog: str, more: Callable[[argparse.ArgumentParser], None] | None = None
) -> tuple[TrainConfig, list[str], dict[str, Any]]:
    """`parse_config` where instance_data_dir may be repeated, and `more` adds arguments of its own to the parser.

    Returns the configuration, the folders of photos where there are several, and what was given of the others.
    """
    arguments = [_underscores(word) for word in arguments]
    for word in arguments:
        if word.startswith("--"):
            _refuse_replaced(word[2:].partition("=")[0])
    parser = _parser(prog)
    if more is not None:
        more(parser)
    given, unread = parser.parse_known_args(arguments)
    if unread:
        raise SVFitError(f"{_unread(unread)}: see {prog} --help.")
    flags = vars(given)
    file = flags.pop("config", None)
    options: dict[str, Any] = {} if file is None else read_yaml(file)
    folders = flags.pop("instance_data_dir", [])
    if len(folders) == 1:
        options["instance_data_dir"] = folders[0]
    options |= {name: _value(name, flags.pop(name)) for name in list(flags) if name in OPTION_NAMES}
    return TrainConfig(**options), folders if len(folders) > 1 else [], flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise SVFitError(f"{message.rstrip('.')}: see {self.prog} --help.")


def _parser(prog: str) -> argparse.ArgumentParser:
    """Takes every option as text, for `_value` to read."""
    parser = _Parser(
        prog=prog,
        usage="%(prog)s [options]",
        description="Teach a Stable Diffusion model your subject by training the singular values of its attention.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of options by the names below; flags override it.")
    for group in OPTION_GROUPS:
        section = parser.add_argument_group(group.title)
        for option in dataclasses.fields(group):
            kind, text = KINDS[option.name], with_dashes(option.metadata["help"], OPTION_NAMES).replace("%", "%%")
            if option.default is not None and option.default is not False:
                text += f" (default: {option.default})"
            if kind is bool:
                section.add_argument(f"--{option.name}", nargs="?", const="true", metavar="true|false", help=text)
                if option.default:
                    section.add_argument(
                        f"--no_{option.name}", dest=option.name, action="store_const", const="false",
                        help=f"The same as --{option.name} false.",
                    )  # fmt: skip
            elif option.name == "instance_data_dir":
                text += "  May be repeated: several subjects in one run, each in a folder of its own in --output_dir."
                section.add_argument(f"--{option.name}", action="append", metavar="TEXT", help=text)
            elif get_origin(kind) is list:
                section.add_argument(f"--{option.name}", nargs="+", metavar="TEXT", help=text)
            else:
                section.add_argument(f"--{option.name}", metavar=_placeholder(option.name), help=text)
    return parser


def _placeholder(name: str) -> str:
    kind = KINDS[name]
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return "|".join([{int: "N", float: "X"}.get(kind, "TEXT"), *words_of(ANNOTATIONS[name])])


def _value(name: str, text: str | list[str]) -> Any:
    """What `text` is to the option `name`."""
    kind = KINDS[name]
    if get_origin(kind) is list:
        return text if isinstance(text, list) else [text]
    if isinstance(text, list):
        raise SVFitError(f"{name} is a list, but takes one value: give one.", name)
    if kind is bool:
        if text.lower() not in (*TRUE, *FALSE):
            raise SVFitError(f"{name} is {text!r}, but must be true or false.", name)
        return text.lower() in TRUE
    if kind in (int, float) and text not in words_of(ANNOTATIONS[name]):
        try:
            return kind(text)
        except ValueError:
            shown = text if len(text) < 40 else f"{text[:20]}... ({len(text)} characters)"
            raise SVFitError(f"{name} is {shown!r}, but must be {kind_words(ANNOTATIONS[name])}.", name) from None
    return text


def _underscores(word: str) -> str:
    """`--max-train-steps=5` as `--max_train_steps=5`."""
    if not word.startswith("--"):
        return word
    name, *value = word[2:].split("=", 1)
    return "=".join(["--" + name.replace("-", "_"), *value])


def _refuse_replaced(name: str) -> None:
    if name in REPLACED_FLAGS:
        raise SVFitError(f"--{name} has no place here: {with_dashes(REPLACED_FLAGS[name], OPTION_NAMES, ['rank'])}.")


def _unread(words: Sequence[str]) -> str:
    """What is wrong with `words` of a command that no option took."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        return f"{' '.join(words)!r} belongs to no option, put text with spaces in quotes"
    return f"unknown option {', '.join(flag + _near(flag) for flag in flags)}"


def _near(name: str) -> str:
    near = difflib.get_close_matches(re.sub(r"[- ]", "_", name.lstrip("-")), OPTION_NAMES, 1)
    return f" (did you mean --{near[0]}?)" if near else ""


def read_yaml(path: str) -> dict[str, Any]:
    """The options of a YAML file, which are read as flags are: `no` is a word, 1e-3 a number, null (unquoted) is None.

    Raises SVFitError for a file that is none, for nested values, unknown options, and options that stand twice.
    """
    options: dict[str, Any] = {}
    for name, value in _yaml_lines(path):
        _refuse_replaced(name)
        if name not in OPTION_NAMES:
            raise SVFitError(f"the configuration {path} has an unknown option {name!r}{_near(name)}.")
        if name in options:
            raise SVFitError(f"the configuration {path} gives {name} twice: leave one out.", name)
        options[name] = None if value is None else _value(name, value)
    base = options.get("pretrained_model_name_or_path")
    if base in FORMER:  # a person may have written it, as the word for the one at hand
        logger.warning(
            "the configuration %s asks for %s, which is %s by now: if an earlier version wrote it, for %s, this run "
            "will be another one.",
            path,
            base,
            DEFAULT_BASE,
            FORMER[base],
        )
    return options


def _yaml_lines(path: str) -> list[tuple[str, str | list[str] | None]]:
    """Names and values of a YAML file, as the words that stand there."""
    import yaml

    try:
        node = yaml.compose(Path(path).expanduser().read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise SVFitError(f"the configuration {path} cannot be read ({error}): give a YAML file.") from error
    except yaml.YAMLError as error:
        raise SVFitError(f"the configuration {path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise SVFitError(f"the configuration {path} is nested too deeply: put each option on a line.") from None
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise SVFitError(f"the configuration {path} must hold lines such as `max_train_steps: 400`.")

    def word(each: Any, name: str) -> str | None:
        if not isinstance(each, yaml.ScalarNode):
            raise SVFitError(f"the configuration {path} nests values under {name!r}: put each option on a line.")
        plain = each.style is None  # quoted, the same is a word
        return None if plain and each.tag == "tag:yaml.org,2002:null" else str(each.value)

    lines: list[tuple[str, str | list[str] | None]] = []
    for key, each in node.value:
        name = word(key, "a name") or "null"
        if isinstance(each, yaml.SequenceNode):
            lines.append((name, [word(item, name) or "" for item in each.value]))
        else:
            lines.append((name, word(each, name)))
    return lines
