"""Tiny random models of many families with a batch each: `MODELS` for every law, `MORE` for the breadth of the view."""

from __future__ import annotations

import logging

import diffusers
import torch
import transformers
from transformers import AutoConfig

logging.getLogger("diffusers").setLevel(logging.ERROR)

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
TEXT = dict(SIZE, vocab_size=99, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
IMAGE = dict(SIZE, image_size=32, patch_size=8)


def seeded(build):
    """Build under a fixed seed without moving the global generator; norms and biases are random too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().float().eval()
        for parameter in model.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        return model


def tokens(length: int = 12, low: int = 3, high: int = 99, batch: int = 2):
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(1))


def noise(*shape: int):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def of(name: str, kind: str, **options):
    """A transformers model by its model type and auto class."""
    config = AutoConfig.for_model(name, **options)
    return seeded(lambda: getattr(transformers, kind).from_config(config))


def text(name: str, kind: str = "AutoModelForCausalLM", **options):
    model = of(name, kind, **(TEXT | options))
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return model, {"input_ids": tokens(), "attention_mask": mask}


def image(name: str, kind: str = "AutoModel", channels: int = 3, size: int = 32, **options):
    return of(name, kind, **options), {"pixel_values": noise(2, channels, size, size)}


def denoiser(kind: str, batch: dict, **options):
    return seeded(lambda: getattr(diffusers, kind)(**options)), batch


def clip():
    size = dict(SIZE, projection_dim=16)
    options = dict(text_config=TEXT | size, vision_config=IMAGE | size, projection_dim=16)
    return of("clip", "AutoModel", **options), {"input_ids": tokens(), "pixel_values": noise(2, 3, 32, 32)}


def t5(name: str = "t5", kind: str = "AutoModelForSeq2SeqLM", **options):
    size = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0)
    return of(name, kind, **(size | options)), {"input_ids": tokens(), "decoder_input_ids": tokens(7)}


ENCODER_DECODER = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0,
    encoder_ffn_dim=64, decoder_ffn_dim=64, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, vocab_size=99,
)  # fmt: skip


def whisper():
    options = ENCODER_DECODER | dict(num_mel_bins=8, max_source_positions=16, max_target_positions=32)
    model = of("whisper", "AutoModelForSpeechSeq2Seq", **options, suppress_tokens=None, begin_suppress_tokens=None)
    return model, {"input_features": noise(2, 8, 32), "decoder_input_ids": tokens(7)}


LATENT = dict(sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4)
STEP = torch.tensor([3, 5])


def sd3(**options):
    batch = dict(
        hidden_states=noise(2, 4, 8, 8),
        timestep=STEP,
        encoder_hidden_states=noise(2, 5, 24),
        pooled_projections=noise(2, 16),
    )
    size = dict(
        patch_size=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )
    return denoiser("SD3Transformer2DModel", batch, **(LATENT | size | options))


def flux():
    batch = dict(
        hidden_states=noise(2, 16, 4),
        timestep=STEP / 10,
        encoder_hidden_states=noise(2, 5, 24),
        pooled_projections=noise(2, 16),
    )
    batch |= dict(img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(5, 3))
    batch["img_ids"][:, 1:] = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4], 1).float()
    size = dict(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=4
    )
    size |= dict(joint_attention_dim=24, pooled_projection_dim=16, guidance_embeds=False, axes_dims_rope=(2, 2, 4))
    return denoiser("FluxTransformer2DModel", batch, **size)


def unet2d_condition():
    size = dict(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4
    )
    size |= dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")
    )
    size |= dict(cross_attention_dim=24, attention_head_dim=4)
    batch = dict(sample=noise(2, 4, 8, 8), timestep=STEP, encoder_hidden_states=noise(2, 5, 24))
    return denoiser("UNet2DConditionModel", batch, **size)


def unet2d():
    size = dict(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=4
    )
    size |= dict(
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "AttnUpBlock2D")
    )
    return denoiser("UNet2DModel", dict(sample=noise(2, 1, 8, 8), timestep=STEP), attention_head_dim=8, **size)


MODELS = {
    "llama": lambda: text("llama", num_key_value_heads=2),
    "qwen3": lambda: text("qwen3", num_key_value_heads=2, head_dim=8),
    "gpt2": lambda: text("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: text("opt", ffn_dim=64, word_embed_proj_dim=32),
    "bert": lambda: text("bert", "AutoModelForMaskedLM"),
    "vit": lambda: image("vit", "AutoModelForImageClassification", **IMAGE),
    "dinov2": lambda: image("dinov2", **IMAGE),
    "swin": lambda: image("swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4),
    "clip": clip,
    "t5": t5,
    "whisper": whisper,
    "dit": lambda: denoiser(
        "DiTTransformer2DModel", dict(hidden_states=noise(2, 4, 8, 8), timestep=STEP, class_labels=torch.tensor([1, 2])),
        **LATENT, patch_size=2, out_channels=8, norm_num_groups=1, num_embeds_ada_norm=10,
    ),
    "pixart": lambda: denoiser(
        "PixArtTransformer2DModel",
        dict(hidden_states=noise(2, 4, 8, 8), timestep=STEP, encoder_hidden_states=noise(2, 5, 24)),
        **LATENT, patch_size=2, out_channels=8, cross_attention_dim=32, caption_channels=24, use_additional_conditions=False,
    ),
    "sd3": sd3,
    "flux": flux,
    "unet2d_condition": unet2d_condition,
    "unet2d": unet2d,
}  # fmt: skip
