"""The options of a training run, in the groups that --help shows.

The flags carry the names of diffusers' DreamBooth scripts.  Their values do not carry over: singular values want
far larger learning rates than LoRA matrices, and a rank of 4 would train four numbers a layer.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from svfit_dreambooth.errors import SVFitError

TOYBOX = "toybox"  # the word that names the embedded base model


def base_name(path: Path) -> str:
    """What adapter files and the page call a base model that is a folder or a file, without the folders above it."""
    return path.resolve().stem if path.is_file() else path.name or path.resolve().name


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
    learned_word: str | None = _option(
        None, 'Word of the instance prompt whose embedding is trained along, such as "sks"; None: no word.'
    )
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
        if self.energy is not None and self.rank != "full":
            raise SVFitError("--energy chooses the ranks itself: leave --rank out.")
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
    learned_word_lr: float = _option(1e-3, "The same for the numbers of the learned word's embedding.")
    lr_scheduler: str = _option(
        "cosine", "Schedule of the learning rate: cosine, linear, constant or another of diffusers'."
    )
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
    final_pictures: bool = _option(
        True, "Paint the validation prompts at the end, with and without the adapter; --no_final_pictures: don't."
    )
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
    also: str | None = _option(
        None, "Write a LoRA, at most a tenth off, beside the adapter: kohya or diffusers; None: none."
    )
    push_to_hub: bool = _option(False, "Upload the adapter with a model card at the end, to be seen by you alone.")
    hub_model_id: str | None = _option(None, "OWNER/NAME of the upload; None: the adapter's name, your account.")
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
        "but none on a CPU for bases that paint slowly there, unless --dino_path or --clip_path is given.",
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
