"""The options of a training run, in the groups that --help shows.

The flags carry the names of diffusers' DreamBooth scripts.  Their values do not carry over: singular values want
far larger learning rates than LoRA matrices, and a rank of 4 would train four numbers a layer.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Literal, get_type_hints

from svfit_dreambooth.bases.names import DEFAULT_BASE
from svfit_dreambooth.training.limits import checked, option

Schedule = Literal["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]


@dataclass(frozen=True)
class ModelOptions:
    title: ClassVar[str] = "base model"

    pretrained_model_name_or_path: str = option(
        DEFAULT_BASE,
        f"Folder, hub id or single .safetensors file of the base model; {DEFAULT_BASE} is the embedded one.",
        path=True,
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub id; None: its main branch.")
    variant: str | None = option(None, 'Variant of the weight files, such as "fp16"; None: the plain ones.')
    base_config: str | None = option(
        None,
        "Folder with the configs of a single-file checkpoint, to open it without the hub; None: ask the hub.",
        path=True,
    )
    pretrained_vae_model_name_or_path: str | None = option(
        None,
        "Another autoencoder for the base: folder, hub id or single .safetensors file; None: its own.",
        path=True,
    )
    clip_skip: int | None = option(
        None,
        "Last layers of CLIP to leave out when prompts are read, 1 for most anime bases; 1 less than others call Clip "
        "skip.  None: that of init_adapter, else 0.",
        least=0,
        most=100,
    )
    quantize: Literal["int8", "fp8", "nf4"] | None = option(
        None,
        "Hold the weights of the denoiser's blocks in 8 or 4 bits, by torchao or bitsandbytes; None: as "
        "mixed_precision says.",
    )
    basis_cache_dir: str | None = option(
        None, "Where decomposed bases are kept; None: $SVFIT_CACHE or the user's cache folder.", path=True
    )


@dataclass(frozen=True)
class PhotoOptions:
    title: ClassVar[str] = "photos and words"

    instance_data_dir: str | None = option(
        None,
        "Folder of the subject's photos; photo.txt beside photo.jpg is its caption, several lines are alternatives.  "
        "None: a bundled subject.",
        path=True,
    )
    instance_prompt: str | None = option(
        None, 'What the photos show, with a rare word for the subject, such as "a photo of sks dog".'
    )
    resolution: int | None = option(
        None, "Side of the training pictures in pixels; None: the base's own size.", least=1, most=16384
    )
    aspect_ratio: Literal["keep", "square"] = option(
        "keep", "keep: train on each photo nearly whole, in its own proportions; square: on square windows of it."
    )
    center_crop: bool = option(False, "Crop the middle of every photo instead of random windows.")
    random_flip: bool = option(False, "Train on mirror images too; not for subjects with writing on them.")
    crops_per_photo: int = option(
        4, "Random windows of every photo that are encoded once and then reused.", least=1, most=10_000
    )
    shuffle_caption: bool = option(False, "Train on the tags of a caption, its parts between commas, in 8 orders.")
    keep_tokens: int = option(
        1, "Tags at the start of a caption that stay where they are when it is shuffled.", least=0
    )
    caption_dropout_rate: float = option(
        0.0, "Share of the examples that are trained on with an empty prompt, such as 0.05.", least=0, most=1
    )
    unmasked_weight: float = option(
        0.1,
        "Weight of the loss where a mask (photo.mask.png, or an alpha channel) is black; where it is white: 1.",
        least=0,
        most=1,
    )


@dataclass(frozen=True)
class PriorOptions:
    title: ClassVar[str] = "keeping the rest"

    with_prior_preservation: bool = option(
        False, "Train on pictures of the subject's class too, so that not every dog becomes the subject."
    )
    class_prompt: str | None = option(None, 'What the class pictures show, such as "a photo of a dog".')
    class_data_dir: str | None = option(
        None,
        "Folder of class pictures, topped up with the base's own; None: class_pictures in the output folder.",
        path=True,
    )
    num_class_images: int = option(100, "Class pictures to train on.", least=1)
    prior_loss_weight: float = option(1.0, "Weight of their loss beside that of the photos.", above=0)
    keep_base: bool = option(
        False,
        "Ask at every step that pictures which the base painted itself are still seen as the base sees them, so that "
        "the rest stays as it is; with class_prompt, its class too.",
    )
    keep_base_weight: float = option(1.0, "Weight of that beside the loss of the photos.", above=0, most=1000)


@dataclass(frozen=True)
class AdapterOptions:
    title: ClassVar[str] = "what is trained"

    rank: str = option(
        None,
        'Singular values to train in each layer, the largest first: a number or "full"; None: "full", on transformer '
        "bases a budget of 400 for each layer.",
    )
    energy: float | None = option(
        None,
        "Choose the rank of each layer by this share of its squared singular values, such as 0.99; None: rank.",
        above=0,
        most=1,
    )
    budget: int | None = option(
        None,
        "Train only so many singular values in all, those that help most by the photos' gradients; None: as rank says.",
        least=1,
    )
    target_modules: list[str] | None = option(
        None,
        'Layers of the denoiser to adapt: "attention", "feed-forward", "conv", "all", or endings of names such as '
        "attn2.to_k; None: attention.",
    )
    train_text_encoder: bool = option(False, "Adapt the attention projections of the text encoder too.")
    learned_word: str | None = option(
        None, 'Word of the instance prompt whose embedding is trained along, such as "sks"; None: no word.'
    )
    init_adapter: str | None = option(None, "Adapter file to continue from; None: start at the base.", path=True)
    adapter_name: str | None = option(None, "Name of the adapter and its file; None: that of the photo folder.")

    @property
    def rank_value(self) -> int | Literal["full"]:
        """`rank` as the library takes it."""
        return "full" if self.rank in (None, "full") else int(self.rank)


@dataclass(frozen=True)
class OptimizationOptions:
    title: ClassVar[str] = "optimization"

    # None stands for the preset's value, which prepare() fills in before anybody reads it.
    preset: Literal["fast", "balanced", "faithful", "style"] = option("balanced", "Recipe for what is left open.")
    max_train_steps: int = option(None, "Optimizer steps; None: the preset's.", least=1)
    train_batch_size: int = option(None, "Pictures a step on each device; None: the preset's.", least=1)
    gradient_accumulation_steps: int = option(1, "Batches that are added up for one optimizer step.", least=1)
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, slower.")
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "Type of the frozen weights and the activations.")
    learning_rate: float | Literal["auto"] = option(
        None,
        "AdamW's step for the singular values, in their unit; auto: as far as changes the base's answers by a fixed "
        "share, from a measurement once for each base.  None: auto.",
        above=0,
        most=1000,
    )
    text_encoder_lr: float | Literal["auto"] = option(
        None, "The same for the text encoder; None: auto where learning_rate is, else 2e-3.", above=0, most=1000
    )
    step_scaling: Literal["sensitivity", "none"] = option(
        None,
        "sensitivity: values on which the base's answers depend more move less; none: all steps are equal.  None: "
        "sensitivity where learning_rate is auto, none where it is a number.",
    )
    learned_word_lr: float = option(
        1e-3, "The same for the numbers of the learned word's embedding.", above=0, most=1000
    )
    lr_scheduler: Schedule = option("cosine", "Schedule of the learning rate, as diffusers names them.")
    lr_warmup_steps: int = option(0, "Steps over which the learning rate grows to its value.", least=0)
    adam_beta1: float = option(0.9, "AdamW's decay of the mean gradient.", least=0, below=1)
    adam_beta2: float = option(0.99, "AdamW's decay of the mean squared gradient.", least=0, below=1)
    adam_weight_decay: float = option(0.0, "Pull of every shift toward 0, the base model.", least=0, most=1000)
    adam_epsilon: float = option(1e-8, "AdamW's guard against division by 0.", above=0)
    max_grad_norm: float = option(1.0, "Longest gradient; longer ones are shortened to it.", above=0)
    timestep_sampling: Literal["uniform", "logit_normal", "shifted", "shifted_logit_normal"] | None = option(
        None,
        "How timesteps are drawn on bases trained by flow matching: all alike, more in the middle, more at high noise "
        "as the sampler has it, or both; None: as the base's own LoRA scripts do.",
    )
    snr_gamma: float | None = option(
        None, "Weight timesteps by min-SNR with this ceiling, customarily 5; None: all weigh the same.", above=0
    )
    noise_offset: float = option(
        0.0,
        "Share of noise that is one number a channel, for darker and lighter pictures, such as 0.05; 0: none.",
        least=0,
        most=1000,
    )
    seed: int = option(0, "Fixes crops, noise, timesteps and pictures.", least=0, most=2**63 - 1)


@dataclass(frozen=True)
class OutputOptions:
    title: ClassVar[str] = "output"

    output_dir: str = option("output", "Folder of the run.", path=True)
    save_dtype: Literal["float16", "float32"] = option("float16", "Type of the values in the adapter file.")
    final_pictures: bool = option(
        True, "Paint the validation prompts at the end, with and without the adapter; False: don't."
    )
    checkpointing_steps: int = option(
        50, "Steps between checkpoints, which hold all that the rest follows from.", least=1
    )
    checkpoints_total_limit: int | None = option(3, "Checkpoints that are kept, the newest; None: all.", least=1)
    resume_from_checkpoint: str | None = option(
        None,
        'Go on from this checkpoint; "latest": from the newest in output_dir, or from the start without one.',
        path=True,
    )
    report_to: str | None = option(
        None, 'Tracker to log to as well, by accelerate\'s names such as "tensorboard"; None: progress.jsonl alone.'
    )
    fixed_loss_examples: int = option(
        8,
        "Noises and timesteps, fixed by the seed, on which the loss before and after is compared; 0: skip it.",
        least=0,
        most=10_000,
    )
    also: Literal["kohya", "diffusers"] | None = option(
        None, "Write a LoRA in this layout, at most a tenth off, beside the adapter; None: none."
    )
    push_to_hub: bool = option(False, "Upload the adapter with a model card at the end, to be seen by you alone.")
    hub_model_id: str | None = option(None, "OWNER/NAME of the upload; None: the adapter's name, your account.")
    keep: Literal["best", "last"] = option(
        "best", "Which step becomes the result: the last of the best at validation_steps, or the last of all."
    )
    dry_run: bool = option(False, "Only print the resolved options, a report on the photos and what would be trained.")


@dataclass(frozen=True)
class WatchOptions:
    title: ClassVar[str] = "seeing how it goes"

    validation_steps: int | Literal["auto"] | None = option(
        None,
        "Steps between looks: pictures of the validation prompts, and measures; 0: none; auto: after an eighth, a "
        "quarter, half, three quarters, and all of the run.  None: auto, but none on a CPU for bases that paint slowly "
        "there, unless dino_path or clip_path is given.",
        least=0,
    )
    patience: int = option(
        None,
        "Looks in a row clearly worse than the best one after which the run ends early; 0: it never does.  None: 2 where "
        "validation_steps is auto, else 0.",
        least=0,
    )
    validation_prompts: list[str] | None = option(
        None, "Prompts to paint on the way and at the end; None: the subject in four places."
    )
    num_inference_steps: int = option(
        None, "Denoising steps of these pictures; None: what suits the base, 25 for most.", least=1, most=1000
    )
    guidance_scale: float | None = option(None, "Guidance of these pictures; None: the base's own.", least=0, most=1000)
    dino_path: str | None = option(
        None,
        "Folder or hub id of a DINO model, to measure likeness to the photos; None: CLIP, or the embedded base's judge.",
        path=True,
    )
    clip_path: str | None = option(
        None,
        "Folder or hub id of a CLIP model, to measure prompts and drift; None: the embedded base's judge, else nothing.",
        path=True,
    )


def check_options(options: object) -> None:
    """Checks every option of a dataclass against what it declares; "~" in paths becomes the home folder.

    Raises SVFitError for the first value that does not fit.
    """
    kinds = get_type_hints(type(options))
    for each in fields(options):  # type: ignore[arg-type]
        value = getattr(options, each.name)
        object.__setattr__(options, each.name, checked(each.name, kinds[each.name], each.metadata, each.default, value))


OPTION_GROUPS = (
    ModelOptions,
    PhotoOptions,
    PriorOptions,
    AdapterOptions,
    OptimizationOptions,
    WatchOptions,
    OutputOptions,
)
