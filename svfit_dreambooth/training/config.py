"""The configuration of a training run, from flags, a YAML file or Python; its options are in options.py."""

import dataclasses
import difflib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svfit_dreambooth.errors import SVFitError
from svfit_dreambooth.training.options import (
    OPTION_GROUPS,
    TOYBOX,  # noqa: F401 - who wants the configuration often wants this word too
    AdapterOptions,
    ModelOptions,
    OptimizationOptions,
    OutputOptions,
    PhotoOptions,
    PriorOptions,
    WatchOptions,
)

logger = logging.getLogger(__name__)


@dataclass
class TrainConfig(
    ModelOptions, PhotoOptions, PriorOptions, AdapterOptions, OptimizationOptions, WatchOptions, OutputOptions
):
    """All options of a run; each is explained where its group defines it.

    Raises SVFitError for values that no run could use.
    """

    def __post_init__(self) -> None:
        self.rank = str(self.rank)
        super().__post_init__()
        for name in (
            "crops_per_photo",
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "num_inference_steps",
            "num_class_images",
            "checkpointing_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SVFitError(f"--{name} is {value}: it must be 1 or more.")
        for name in ("learning_rate", "text_encoder_lr", "learned_word_lr", "adam_epsilon", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SVFitError(f"--{name} is {value}: it must be above 0.")
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise SVFitError(f"--{name} is {value}: it is a decay, from 0 to below 1.")
        if not self.adam_weight_decay >= 0:
            raise SVFitError(f"--adam_weight_decay is {self.adam_weight_decay}: it cannot be negative; 0 is none.")
        if self.resolution is not None and self.resolution < 1:
            raise SVFitError(f"--resolution is {self.resolution}: it is in pixels, such as 512.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise SVFitError(f"--energy is {self.energy}: it is a share, above 0 and at most 1.")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise SVFitError(f"--snr_gamma is {self.snr_gamma}: it must be above 0, such as 5; leave it out for none.")
        if not 0 <= self.unmasked_weight <= 1:
            raise SVFitError(f"--unmasked_weight is {self.unmasked_weight}: it is a share, from 0 to 1.")
        if not self.prior_loss_weight > 0:
            raise SVFitError(f"--prior_loss_weight is {self.prior_loss_weight}: it must be above 0; 1 is customary.")
        if self.noise_offset < 0:
            raise SVFitError(f"--noise_offset is {self.noise_offset}: it cannot be negative; 0 is none.")
        if self.also not in (None, "kohya", "diffusers"):
            raise SVFitError(f"--also is {self.also!r}: it is kohya or diffusers, or left out.")
        if self.validation_steps is not None and self.validation_steps < 0:
            raise SVFitError(f"--validation_steps is {self.validation_steps}: give a number of steps, or 0 for none.")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise SVFitError(f"--checkpoints_total_limit is {self.checkpoints_total_limit}: keep 1 or more.")
        if self.fixed_loss_examples < 0 or self.lr_warmup_steps < 0:
            raise SVFitError("--fixed_loss_examples and --lr_warmup_steps cannot be negative.")

    def warn_of_lora_values(self) -> None:
        """Logs a warning where rank or learning rate look like those of a LoRA command."""
        if self.rank != "full" and self.energy is None and int(self.rank) < 16:
            logger.warning(
                "--rank %s trains only %s numbers in each layer, far fewer than a LoRA of that rank: "
                "leave it out to train all singular values.",
                self.rank,
                self.rank,
            )
        if self.learning_rate is not None and self.learning_rate < 1e-3:
            logger.warning(
                "--learning_rate %g suits LoRA matrices; singular values barely move with it: 5e-2 is the default.",
                self.learning_rate,
            )


# Flags of diffusers' DreamBooth scripts that have no counterpart, and what to do instead.
REPLACED_FLAGS = {
    "--num_train_epochs": "say how long to train with --max_train_steps",
    "--use_8bit_adam": "leave it out, the optimizer state of a few thousand values needs no compression",
    "--scale_lr": "leave it out, --learning_rate is used as given",
    "--pre_compute_text_embeddings": "leave it out, prompts are encoded once in any case",
    "--validation_prompt": "use --validation_prompts",
    "--validation_epochs": "use --validation_steps",
    "--num_validation_images": "list several --validation_prompts",
    "--lora_dropout": "leave it out, there is no dropout",
    "--enable_xformers_memory_efficient_attention": "leave it out, torch's own efficient attention is used",
    "--allow_tf32": "leave it out, set it in torch",
    "--dataloader_num_workers": "leave it out, photos are encoded once before the first step",
    "--logging_dir": "leave it out, the run is described in --output_dir",
}


def parse_config(arguments: Sequence[str], prog: str) -> TrainConfig:
    """The configuration that `arguments` (flags) ask for; `--config FILE` gives a YAML file that flags override.

    Exits through SystemExit(0) for --help; raises SVFitError with one sentence for anything that cannot be read.
    """
    from transformers.hf_argparser import HfArgumentParser  # takes a second: not paid by importers of TrainConfig

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise SVFitError(f"{message.rstrip('.')}: see {prog} --help.")

    parser = Parser(
        OPTION_GROUPS,
        prog=prog,
        usage="%(prog)s [options]",
        description="Teach a Stable Diffusion model your subject by training the singular values of its attention.",
        add_help=True,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of options by the names below; flags override it.")
    for flag in arguments:
        name = flag.partition("=")[0].replace("-", "_").replace("__", "--", 1)
        if name in REPLACED_FLAGS:
            raise SVFitError(f"{name} has no place here: {REPLACED_FLAGS[name]}.")
    arguments = list(arguments)
    known, _ = parser.parse_known_args(arguments)
    if known.config is not None:
        arguments = _yaml_arguments(known.config) + arguments
    try:
        *groups, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    except SVFitError:
        raise
    except ValueError as error:
        unread = parser.parse_known_args(arguments)[1]
        raise SVFitError(f"{_unread(unread) if unread else error}: see {prog} --help.") from error
    values: dict[str, Any] = {}
    for group in groups:
        values |= vars(group)
    return TrainConfig(**values)


def _unread(words: Sequence[str]) -> str:
    """What is wrong with `words` of a command that no option took."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    if not flags:
        return f"{' '.join(words)!r} belongs to no option, put text with spaces in quotes"
    known = [option.name for option in dataclasses.fields(TrainConfig)]
    named = []
    for flag in flags:
        near = difflib.get_close_matches(re.sub(r"[- ]", "_", flag.lstrip("-")), known, 1)
        named.append(f"{flag} (did you mean --{near[0]}?)" if near else flag)
    return f"unknown option {', '.join(named)}"


def _yaml_arguments(path: str) -> list[str]:
    """The options of a YAML file as flags, so that one parser reads both."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SVFitError(f"the configuration {path} cannot be read ({error}): give a YAML file.") from error
    try:
        # BaseLoader leaves every value a string: YAML itself reads `no` as False and 1e-3 as text.
        options = yaml.load(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise SVFitError(f"the configuration {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if options is None:
        return []
    if not isinstance(options, dict):
        raise SVFitError(f"the configuration {path} must hold lines such as `max_train_steps: 400`.")
    arguments = []
    for name, value in options.items():
        if value in ("null", "~", ""):
            continue
        if isinstance(value, dict):
            raise SVFitError(f"the configuration {path} nests options under {name!r}: put each on a line of its own.")
        arguments += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    return arguments


def config_to_yaml(config: TrainConfig) -> str:
    """The options as YAML that `--config` reads back to the same configuration."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
