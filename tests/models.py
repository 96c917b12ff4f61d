"""Tiny random models of many families with a batch each: `MODELS` for every law, `MORE` for the breadth of the view."""

from __future__ import annotations

import inspect
import logging

import diffusers
import torch
import transformers
from torch import nn
from transformers import AutoConfig

logging.getLogger("diffusers").setLevel(logging.ERROR)

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
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


def handed(module, cache):
    """A cache under the name that a model or an attention has for it, which transformers 5.24 changed."""
    return {"cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values": cache}


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
    options = {"text_config": TEXT | size, "vision_config": IMAGE | size, "projection_dim": 16}
    return of("clip", "AutoModel", **options), {"input_ids": tokens(), "pixel_values": noise(2, 3, 32, 32)}


def t5(name: str = "t5", kind: str = "AutoModelForSeq2SeqLM", **options):
    size = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": 99,
        "decoder_start_token_id": 0,
    }
    return of(name, kind, **(size | options)), {"input_ids": tokens(), "decoder_input_ids": tokens(7)}


ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "pad_token_id": 0,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "vocab_size": 99,
}


def whisper():
    options = ENCODER_DECODER | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32}
    model = of("whisper", "AutoModelForSpeechSeq2Seq", **options, suppress_tokens=None, begin_suppress_tokens=None)
    return model, {"input_features": noise(2, 8, 32), "decoder_input_ids": tokens(7)}


LATENT = {"sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4}
STEP = torch.tensor([3, 5])


def sd3(**options):
    batch = {
        "hidden_states": noise(2, 4, 8, 8),
        "timestep": STEP,
        "encoder_hidden_states": noise(2, 5, 24),
        "pooled_projections": noise(2, 16),
    }
    size = {
        "patch_size": 2,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16,
        "out_channels": 4,
        "pos_embed_max_size": 8,
    }
    return denoiser("SD3Transformer2DModel", batch, **(LATENT | size | options))


def flux():
    batch = {
        "hidden_states": noise(2, 16, 4),
        "timestep": STEP / 10,
        "encoder_hidden_states": noise(2, 5, 24),
        "pooled_projections": noise(2, 16),
    }
    batch |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    batch["img_ids"][:, 1:] = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4], 1).float()
    size = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
    }
    size |= {
        "joint_attention_dim": 24,
        "pooled_projection_dim": 16,
        "guidance_embeds": False,
        "axes_dims_rope": (2, 2, 4),
    }
    return denoiser("FluxTransformer2DModel", batch, **size)


def unet2d_condition():
    size = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 4,
    }
    size |= {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    size |= {"cross_attention_dim": 24, "attention_head_dim": 4}
    batch = {"sample": noise(2, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": noise(2, 5, 24)}
    return denoiser("UNet2DConditionModel", batch, **size)


def unet2d():
    size = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "norm_num_groups": 4,
    }
    size |= {
        "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
    }
    return denoiser("UNet2DModel", {"sample": noise(2, 1, 8, 8), "timestep": STEP}, attention_head_dim=8, **size)


SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
MODELS = {
    "llama": lambda: text("llama", num_key_value_heads=2),
    "qwen3": lambda: text("qwen3", num_key_value_heads=2, head_dim=8),
    "gpt2": lambda: text("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": lambda: text("opt", ffn_dim=64, word_embed_proj_dim=32),
    "bert": lambda: text("bert", "AutoModelForMaskedLM"),
    "vit": lambda: image("vit", "AutoModelForImageClassification", **IMAGE),
    "dinov2": lambda: image("dinov2", **IMAGE),
    "swin": lambda: image("swin", **SWIN),
    "clip": clip,
    "t5": t5,
    "whisper": whisper,
    "dit": lambda: denoiser(
        "DiTTransformer2DModel",
        {"hidden_states": noise(2, 4, 8, 8), "timestep": STEP, "class_labels": torch.tensor([1, 2])},
        **LATENT, patch_size=2, out_channels=8, norm_num_groups=1, num_embeds_ada_norm=10,
    ),
    "pixart": lambda: denoiser(
        "PixArtTransformer2DModel",
        {"hidden_states": noise(2, 4, 8, 8), "timestep": STEP, "encoder_hidden_states": noise(2, 5, 24)},
        **LATENT, patch_size=2, out_channels=8, cross_attention_dim=32, caption_channels=24,
        use_additional_conditions=False,
    ),
    "sd3": sd3,
    "flux": flux,
    "unet2d_condition": unet2d_condition,
    "unet2d": unet2d,
}  # fmt: skip


def audio(name: str, **options):
    size = {"conv_dim": (8, 8), "conv_stride": (4, 2), "conv_kernel": (4, 2), "num_conv_pos_embeddings": 4}
    size |= {"num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2, "vocab_size": 32}
    return of(name, "AutoModel", **(SIZE | size | options)), {"input_values": noise(2, 400)}


def seq2seq(name: str, **options):
    model = of(name, "AutoModelForSeq2SeqLM", **(ENCODER_DECODER | {"max_position_embeddings": 64} | options))
    return model, {"input_ids": tokens(), "decoder_input_ids": tokens(7)}


def vit_mae():
    model, batch = image("vit_mae", **IMAGE, mask_ratio=0.5)
    return model, batch | {"noise": torch.arange(32).reshape(2, 16) * 7 % 16 / 16}


def siglip():
    options = {"text_config": TEXT | {"projection_size": 32}, "vision_config": IMAGE}
    return of("siglip", "AutoModel", **options), {"input_ids": tokens(), "pixel_values": noise(2, 3, 32, 32)}


def segformer():
    size = {
        "num_encoder_blocks": 2,
        "depths": [1, 1],
        "sr_ratios": [2, 1],
        "hidden_sizes": [16, 32],
        "patch_sizes": [7, 3],
    }
    return image("segformer", **size, strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2])


def sam():
    vision = SIZE | {
        "image_size": 32,
        "patch_size": 8,
        "output_channels": 16,
        "window_size": 2,
        "global_attn_indexes": [1],
    }
    options = {"vision_config": vision | {"num_pos_feats": 8, "mlp_dim": 64}}
    options |= {
        "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4}
    }
    options |= {
        "mask_decoder_config": {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 32, "iou_head_hidden_dim": 16}
    }
    return of("sam_vision_model", "AutoModel", **vision, num_pos_feats=8), {"pixel_values": noise(2, 3, 32, 32)}


def qwen_image():
    batch = {"hidden_states": noise(2, 16, 4), "encoder_hidden_states": noise(2, 5, 24), "timestep": STEP / 10}
    batch |= {"encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool), "img_shapes": [[(1, 4, 4)]] * 2}
    size = {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
    }
    return denoiser("QwenImageTransformer2DModel", batch, **size, joint_attention_dim=24, axes_dims_rope=(4, 6, 6))


def auraflow():
    batch = {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 24), "timestep": STEP / 10}
    size = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "out_channels": 4,
    }
    size |= {"attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 24, "caption_projection_dim": 32}
    return denoiser("AuraFlowTransformer2DModel", batch, **size, pos_embed_max_size=16)


def sana():
    batch = {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 24), "timestep": STEP}
    size = {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
    }
    size |= {
        "num_cross_attention_heads": 4,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 32,
        "caption_channels": 24,
    }
    return denoiser("SanaTransformer2DModel", batch, **size, sample_size=8)


def cogvideox():
    batch = {"hidden_states": noise(2, 2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 24), "timestep": STEP}
    size = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "num_layers": 2,
    }
    size |= {
        "text_embed_dim": 24,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "patch_size": 2,
        "max_text_seq_length": 5,
    }
    return denoiser("CogVideoXTransformer3DModel", batch, **size, temporal_compression_ratio=4)


def hunyuan_video():
    batch = {"hidden_states": noise(1, 4, 2, 4, 4), "encoder_hidden_states": noise(1, 5, 24), "timestep": STEP[:1]}
    batch |= {
        "encoder_attention_mask": torch.ones(1, 5),
        "pooled_projections": noise(1, 16),
        "guidance": torch.tensor([6000.0]),
    }
    size = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
    }
    size |= {
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "text_embed_dim": 24,
        "pooled_projection_dim": 16,
    }
    return denoiser("HunyuanVideoTransformer3DModel", batch, **size, rope_axes_dim=(4, 6, 6))


def cogview3():
    batch = {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(2, 5, 24), "timestep": STEP}
    batch |= {
        "original_size": torch.full((2, 2), 8.0),
        "target_size": torch.full((2, 2), 8.0),
        "crop_coords": torch.zeros(2, 2),
    }
    size = {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "out_channels": 4,
    }
    size |= {"text_embed_dim": 24, "time_embed_dim": 16, "condition_dim": 8, "pos_embed_max_size": 8, "sample_size": 8}
    return denoiser("CogView3PlusTransformer2DModel", batch, **size)


GQA = {"num_key_value_heads": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
MORE = {
    "mistral": lambda: text("mistral", **GQA),
    "qwen2": lambda: text("qwen2", **GQA),
    "qwen3_moe": lambda: text("qwen3_moe", **GQA, **MOE, head_dim=8),
    "mixtral": lambda: text("mixtral", **GQA, num_local_experts=4),
    "gemma": lambda: text("gemma", num_key_value_heads=1, head_dim=8),
    "gemma2": lambda: text("gemma2", **GQA, head_dim=8),
    "gemma3_text": lambda: text("gemma3_text", **GQA, head_dim=8),
    "phi": lambda: text("phi"),
    "phi3": lambda: text("phi3", **GQA),
    "olmo": lambda: text("olmo", **GQA),
    "olmo2": lambda: text("olmo2", **GQA),
    "granite": lambda: text("granite", **GQA),
    "stablelm": lambda: text("stablelm", **GQA),
    "starcoder2": lambda: text("starcoder2", **GQA),
    "cohere": lambda: text("cohere", **GQA),
    "smollm3": lambda: text("smollm3", **GQA),
    "gptj": lambda: text("gptj", n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "gpt_neo": lambda: text("gpt_neo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": lambda: text("gpt_neox"),
    "gpt_bigcode": lambda: text("gpt_bigcode", n_embd=32, n_layer=2, n_head=4, n_positions=64, multi_query=False),
    "bloom": lambda: text("bloom", n_layer=2, n_head=4),
    "falcon": lambda: text("falcon", num_kv_heads=2, new_decoder_architecture=True, alibi=False),
    "falcon_mha": lambda: text("falcon", multi_query=False, new_decoder_architecture=False, alibi=False),
    "mpt": lambda: text("mpt", d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "persimmon": lambda: text("persimmon"),
    "codegen": lambda: text("codegen", n_embd=64, n_layer=2, num_attention_heads=8, n_positions=64, rotary_dim=4),
    "biogpt": lambda: text("biogpt"),
    "xglm": lambda: text("xglm", d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
    "roberta": lambda: text("roberta", "AutoModel"),
    "electra": lambda: text("electra", "AutoModel", embedding_size=16),
    "albert": lambda: text("albert", "AutoModel", embedding_size=16),
    "distilbert": lambda: text("distilbert", "AutoModel", dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "mpnet": lambda: text("mpnet", "AutoModel"),
    "deberta-v2": lambda: text("deberta-v2", "AutoModel", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    "modernbert": lambda: text("modernbert", "AutoModel", cls_token_id=1, sep_token_id=2, local_attention=4),
    "xlm-roberta": lambda: text("xlm-roberta", "AutoModel"),
    "bart": lambda: seq2seq("bart"),
    "mbart": lambda: seq2seq("mbart"),
    "pegasus": lambda: seq2seq("pegasus"),
    "marian": lambda: seq2seq("marian"),
    "mt5": lambda: t5("mt5"),
    "umt5": lambda: t5("umt5"),
    "longt5": lambda: t5("longt5", local_radius=4),
    "deit": lambda: image("deit", **IMAGE),
    "beit": lambda: image("beit", **IMAGE, use_relative_position_bias=True),
    "dinov3_vit": lambda: image("dinov3_vit", **IMAGE),
    "vit_mae": vit_mae,
    "swinv2": lambda: image("swinv2", **SWIN),
    "segformer": segformer,
    "sam_vision": sam,
    "yolos": lambda: image("yolos", **(IMAGE | {"image_size": [32, 32], "num_detection_tokens": 4})),
    "siglip": siglip,
    "wav2vec2": lambda: audio("wav2vec2"),
    "hubert": lambda: audio("hubert"),
    "wavlm": lambda: audio("wavlm", num_buckets=16, max_bucket_distance=32),
    "sd3.5": lambda: sd3(qk_norm="rms_norm", dual_attention_layers=(0,)),
    "qwen_image": qwen_image,
    "auraflow": auraflow,
    "sana": sana,
    "cogvideox": cogvideox,
    "hunyuan_video": hunyuan_video,
    "cogview3": cogview3,
}  # fmt: skip


class HalfUsed(nn.Module):
    """Two layers, of which no data ever reaches the other."""

    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.used(x)
