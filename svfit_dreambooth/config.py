"""Every option of a training run, from flags, a YAML file or Python.

The flags carry the names of diffusers' DreamBooth scripts.  Their values do not carry over: singular values want
far larger learning rates than LoRA matrices, and a rank of 4 would train four numbers a layer.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from svfit_dreambooth.errors import SVFitError

logger = logging.getLogger(__name__)

TOYBOX = "toybox"  # the word that names the embedded base model


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelOptions:
    _argument_group_name = "base model"

    pretrained_model_name_or_path: str = _option(
        TOYBOX, 'Folder, hub id or single .safetensors file of the base model; "toybox" is the embedded one.'
    )
    revision: str | None = _option(None, "Branch, tag or commit of a hub id; None: its main branch.")
    variant: str | None = _option(None, 'Variant of the weight files, such as "fp16"; None: the plain ones.')
    base_config: str | None = _option(
        None, "Folder with the configs of a single-file checkpoint, to open it without the hub; None: ask the hub."
    )
    basis_cache_dir: str | None = _option(
        None, "Where decomposed bases are kept; None: $SVFIT_CACHE or the user's cache folder."
    )


@dataclass
class PhotoOptions:
    _argument_group_name = "photos and words"

    instance_data_dir: str | None = _option(
        None, "Folder of the subject's photos; photo.txt beside photo.jpg is its caption.  None: a toybox subject."
    )
    instance_prompt: str | None = _option(
        None, 'What the photos show, with a rare word for the subject, such as "a photo of sks dog".'
    )
    resolution: int | None = _option(None, "Side of the training pictures in pixels; None: the base's own size.")
    aspect_ratio: Literal["keep", "square"] = _option(
        "keep", "keep: train on each photo nearly whole, in its own proportions; square: on square windows of it."
    )
    center_crop: bool = _option(False, "Crop the middle of every photo instead of random windows.")
    random_flip: bool = _option(False, "Train on mirror images too; not for subjects with writing on them.")
    crops_per_photo: int = _option(4, "Random windows of every photo that are encoded once and then reused.")
    unmasked_weight: float = _option(
        0.1, "Weight of the loss where a mask (photo.mask.png, or an alpha channel) is black; where it is white: 1."
    )


@dataclass
class PriorOptions:
    _argument_group_name = "prior preservation"

    with_prior_preservation: bool = _option(
        False, "Train on pictures of the subject's class too, so that not every dog becomes the subject."
    )
    class_prompt: str | None = _option(None, 'What the class pictures show, such as "a photo of a dog".')
    class_data_dir: str | None = _option(
        None, "Folder of class pictures, topped up with the base's own; None: class_pictures in the output folder."
    )
    num_class_images: int = _option(100, "Class pictures to train on.")
    prior_loss_weight: float = _option(1.0, "Weight of their loss beside that of the photos.")


@dataclass
class AdapterOptions:
    _argument_group_name = "what is trained"

    rank: str = _option("full", 'Singular values to train in each layer, the largest first: a number or "full".')
    energy: float | None = _option(
        None, "Choose the rank of each layer by this share of its squared singular values, such as 0.99; None: rank."
    )
    budget: int | None = _option(
        None, "Train only so many singular values in all, those that help most by the photos' gradients; None: rank."
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": 'Layers of the UNet to adapt: "attention", "feed-forward", "conv", "all", or endings of names such '
            "as attn2.to_k; None: attention."
        },
    )
    train_text_encoder: bool = _option(False, "Adapt the attention projections of the text encoder too.")
    init_adapter: str | None = _option(None, "Adapter file to continue from; None: start at the base.")
    adapter_name: str | None = _option(None, "Name of the adapter and its file; None: that of the photo folder.")

    def __post_init__(self) -> None:
        if self.rank != "full":
            try:
                number = int(self.rank)
            except ValueError:
                number = 0
            if number < 1:
                raise SVFitError(f'--rank is {self.rank!r}: give a whole number of 1 or more, or "full".')
        if self.budget is not None:
            if self.budget < 1:
                raise SVFitError(f"--budget is {self.budget}: it is a number of singular values, 1 or more.")
            others = {"--rank": self.rank != "full", "--energy": self.energy, "--init_adapter": self.init_adapter}
            for flag in (flag for flag, given in others.items() if given):
                raise SVFitError(f"--budget chooses the singular values itself: leave {flag} out.")

    @property
    def rank_value(self) -> int | Literal["full"]:
        """`rank` as the library takes it."""
        return "full" if self.rank == "full" else int(self.rank)


@dataclass
class OptimizationOptions:
    _argument_group_name = "optimization"

    # None stands for the preset's value, which prepare() fills in before anybody reads it.
    preset: str = _option("balanced", "Recipe for what is left open: fast, balanced, faithful or style.")
    max_train_steps: int = _option(None, "Optimizer steps; None: the preset's.")
    train_batch_size: int = _option(None, "Pictures a step on each device; None: the preset's.")
    gradient_accumulation_steps: int = _option(1, "Batches that are added up for one optimizer step.")
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass: less memory, slower.")
    mixed_precision: Literal["no", "fp16", "bf16"] = _option("no", "Type of the frozen weights and the activations.")
    learning_rate: float = _option(None, "AdamW's step for the singular values, in their unit; None: the preset's.")
    text_encoder_lr: float = _option(2e-3, "The same for the text encoder, which needs far less.")
    lr_scheduler: str = _option("cosine", "Schedule of the learning rate, by diffusers' names.")
    lr_warmup_steps: int = _option(0, "Steps over which the learning rate grows to its value.")
    adam_beta1: float = _option(0.9, "AdamW's decay of the mean gradient.")
    adam_beta2: float = _option(0.99, "AdamW's decay of the mean squared gradient.")
    adam_weight_decay: float = _option(0.0, "Pull of every shift toward 0, the base model.")
    adam_epsilon: float = _option(1e-8, "AdamW's guard against division by 0.")
    max_grad_norm: float = _option(1.0, "Longest gradient; longer ones are shortened to it.")
    snr_gamma: float | None = _option(
        None, "Weight timesteps by min-SNR with this ceiling, customarily 5; None: all weigh the same."
    )
    noise_offset: float = _option(
        0.0, "Share of noise that is one number a channel, for darker and lighter pictures, such as 0.05; 0: none."
    )
    seed: int = _option(0, "Fixes crops, noise, timesteps and pictures.")


@dataclass
class OutputOptions:
    _argument_group_name = "output"

    output_dir: str = _option("output", "Folder of the run.")
    save_dtype: Literal["float16", "float32"] = _option("float16", "Type of the values in the adapter file.")
    final_pictures: bool = _option(True, "Paint the validation prompts at the end, with and without the adapter.")
    checkpointing_steps: int = _option(50, "Steps between checkpoints, which hold all that the rest follows from.")
    checkpoints_total_limit: int | None = _option(3, "Checkpoints that are kept, the newest; None: all.")
    resume_from_checkpoint: str | None = _option(
        None, 'Go on from this checkpoint; "latest": from the newest in --output_dir, or from the start without one.'
    )
    report_to: str | None = _option(
        None, 'Tracker to log to as well, by accelerate\'s names such as "tensorboard"; None: progress.jsonl alone.'
    )
    fixed_loss_examples: int = _option(
        8, "Noises and timesteps, fixed by the seed, on which the loss before and after is compared; 0: skip it."
    )
    keep: Literal["best", "last"] = _option(
        "best", "Which step becomes the result: the best one measured at --validation_steps, or the last."
    )
    dry_run: bool = _option(False, "Only print the resolved options, a report on the photos and what would be trained.")


@dataclass
class WatchOptions:
    _argument_group_name = "seeing how it goes"

    validation_steps: int | None = _option(
        None,
        "Steps between looks: pictures of the validation prompts, and measures; 0: none.  None: a quarter of the run, "
        "but none on a processor for bases that paint slowly there.",
    )
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts to paint on the way and at the end; None: the subject in four places."}
    )
    num_inference_steps: int = _option(25, "Denoising steps of these pictures.")
    guidance_scale: float | None = _option(None, "Guidance of these pictures; None: the base's own.")
    dino_path: str | None = _option(
        None, "Folder or hub id of a DINO model, to measure likeness to the photos; None: CLIP, or toybox's judge."
    )
    clip_path: str | None = _option(
        None, "Folder or hub id of a CLIP model, to measure prompts and drift; None: toybox's judge, else nothing."
    )


OPTION_GROUPS = (
    ModelOptions,
    PhotoOptions,
    PriorOptions,
    AdapterOptions,
    OptimizationOptions,
    WatchOptions,
    OutputOptions,
)


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
        for name in ("learning_rate", "text_encoder_lr", "adam_epsilon", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SVFitError(f"--{name} is {value}: it must be above 0.")
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
            raise SVFitError(f"{message}: see {prog} --help.")

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
        unknown = [word for word in parser.parse_known_args(arguments)[1] if word.startswith("-")]
        raise SVFitError(
            f"unknown option {', '.join(unknown)}: see {prog} --help." if unknown else f"{error}: see {prog} --help."
        ) from error
    values: dict[str, Any] = {}
    for group in groups:
        values |= vars(group)
    return TrainConfig(**values)


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
