"""Tiny pipelines of transformer bases: their real classes, random weights, no network."""

import string

import torch
from conftest import WORDS, tiny_text_encoder
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from toybox.tokenizer import build_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def byte_tokenizer():
    """A Qwen tokenizer whose vocabulary is the bytes, with the chat template of Qwen3's shape."""
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    for special in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocabulary[special] = len(vocabulary)
    tokenizer = Qwen2TokenizerFast(
        vocab=vocabulary, merges=[], pad_token="<|endoftext|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_qwen3(layers, vocabulary_size, kind=Qwen3ForCausalLM, width=16):
    return kind(
        Qwen3Config(
            vocab_size=vocabulary_size,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            tie_word_embeddings=True,
        )
    ).eval()


def tiny_klein(seed=0, **changes):
    """FLUX.2-klein of one double and two single blocks, 16 pixels; `changes` are of the pipeline."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    vae.bn.running_mean.normal_(0, 0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    pipeline = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=tiny_qwen3(28, len(tokenizer)),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ).eval(),
        **changes,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_autoencoder(levels=2, **changes):
    """As FLUX.1's: 4 channels, moved and scaled."""
    unit = {"scaling_factor": 0.4, "shift_factor": 0.1} | changes
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **unit,
    ).eval()


def tiny_z_image(seed=0):
    """Z-Image of one refiner each and two blocks, 16 pixels."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 2, 2],
        axes_lens=[1024, 32, 32],
    ).eval()
    for padding in (
        transformer.x_pad_token,
        transformer.cap_pad_token,
    ):  # zeros, with which the norm would divide 0 by 0
        torch.nn.init.normal_(padding)
    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_autoencoder(),
        text_encoder=tiny_qwen3(2, len(tokenizer), Qwen3Model),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_video_autoencoder():
    """As Qwen-Image's: every channel has a unit of its own."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.7, 1.0, 2.0],
    ).eval()


def tiny_qwen_image(seed=0):
    """Qwen-Image of two blocks, 256 pixels."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]},
    }
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    pipeline = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_video_autoencoder(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=sight)).eval(),
        tokenizer=tokenizer,
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
        ).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_t5(width=16):
    """A T5 that reads letters, and its tokenizer."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)
    config = T5Config(vocab_size=len(pieces), d_model=width, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return T5EncoderModel(config).eval(), tokenizer


def tiny_flux1(seed=0, guidance_embeds=True):
    """FLUX.1 of one double and two single blocks, 16 pixels."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(WORDS, max_length=77)
    text_encoder_2, tokenizer_2 = tiny_t5()
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_autoencoder(),
        text_encoder=tiny_text_encoder(len(tokenizer)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=24,
            axes_dims_rope=(4, 2, 2),
            guidance_embeds=guidance_embeds,
        ).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd3(seed=0, with_t5=True):
    """Stable Diffusion 3.5 of two blocks, 16 pixels."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(WORDS, max_length=77)
    text_encoder_3, tokenizer_3 = tiny_t5(width=64) if with_t5 else (None, None)
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_autoencoder(),
        text_encoder=tiny_text_encoder(len(tokenizer), CLIPTextModelWithProjection).eval(),
        tokenizer=tokenizer,
        text_encoder_2=tiny_text_encoder(len(tokenizer), CLIPTextModelWithProjection, width=32).eval(),
        tokenizer_2=tokenizer,
        text_encoder_3=text_encoder_3,
        tokenizer_3=tokenizer_3,
        transformer=SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=64,
            caption_projection_dim=16,
            pooled_projection_dim=24 + 32,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        ).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_chroma(seed=0):
    """Chroma of one double and two single blocks, 16 pixels."""
    torch.manual_seed(seed)
    text_encoder, tokenizer = tiny_t5()
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_autoencoder(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_krea2(seed=0, is_distilled=False):
    """Krea 2 of two blocks and one of each kind for the prompt."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }
    sight = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
    }
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        timestep_embed_dim=8,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    ).eval()
    for name, table in transformer.named_parameters():
        if name.endswith("scale_shift_table"):  # zeros, with which nothing would be learnt
            torch.nn.init.normal_(table)
    pipeline = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_video_autoencoder(),
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=sight)).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
        text_encoder_select_layers=(0, 1, 2),
        is_distilled=is_distilled,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_gemma2():
    """A Gemma 2 that reads letters, and its tokenizer."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.printable.strip()]
    tokenizer = GemmaTokenizer(vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))}, merges=[])
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return Gemma2Model(config).eval(), tokenizer


def tiny_lumina2(seed=0):
    """Lumina-Image 2.0 of one refiner each and two blocks, 32 pixels: its pipeline counts on 8 pixels a latent."""
    torch.manual_seed(seed)
    text_encoder, tokenizer = tiny_gemma2()
    pipeline = Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_autoencoder(levels=4),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=Lumina2Transformer2DModel(
            sample_size=4,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 32, 32),
            cap_feat_dim=16,
        ).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sana(seed=0):
    """Sana of two blocks, 32 pixels."""
    torch.manual_seed(seed)
    text_encoder, tokenizer = tiny_gemma2()
    pipeline = SanaPipeline(
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", final_sigmas_type="zero"
        ),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41407,
        ).eval(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=16,
        ).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_pixart(seed=0):
    """PixArt-Sigma of two blocks, 64 pixels."""
    torch.manual_seed(seed)
    text_encoder, tokenizer = tiny_t5()
    pipeline = PixArtSigmaPipeline(
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
        vae=tiny_autoencoder(scaling_factor=0.13, shift_factor=None),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=32,
            caption_channels=16,
        ).eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


BASES = {
    "klein": tiny_klein,
    "z-image": tiny_z_image,
    "qwen-image": tiny_qwen_image,
    "flux-1": tiny_flux1,
    "sd3": tiny_sd3,
    "chroma": tiny_chroma,
    "krea2": tiny_krea2,
    "lumina2": tiny_lumina2,
    "sana": tiny_sana,
    "pixart": tiny_pixart,
}
SIDES = {"lumina2": 32, "sana": 32}  # pixels of the smallest square that the base paints; 16 of others


def side_of(folder):
    """The same for a folder "tiny-<name>"."""
    return SIDES.get(folder.name.removeprefix("tiny-"), 16)
