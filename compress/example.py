"""A minimal input for a model from its config and its forward's signature: for planning on meta and for probes."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn

from compress.errors import CompressError


def example(model: nn.Module, tokens: int = 16, batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Forward arguments that the model takes, on its device and in its dtype."""
    if not hasattr(model, "config"):
        raise CompressError(f"{type(model).__name__}: its inputs are not known; give calibration or validation data")
    parameter = next(model.parameters())
    arguments = _denoiser(model, batch) if hasattr(model, "config_name") else _transformer(model, tokens, batch)
    generator = torch.Generator().manual_seed(seed)
    return {name: _tensor(value, parameter, generator) for name, value in arguments.items()}


def _tensor(value, parameter: Tensor, generator: torch.Generator):
    """A shape becomes noise, (shape, high) becomes integers below high, anything else stays."""
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: _tensor(entry, parameter, generator) for name, entry in value.items()}
    if isinstance(value, Tensor):
        return value.to(parameter.device)
    shape, high = value
    if high is None:
        dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
        tensor = torch.randn(shape, generator=generator).to(dtype)
    else:
        tensor = torch.randint(0, high, shape, generator=generator)
    return tensor.to(parameter.device)


def _first(config, *names, default=None):
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    return default


def _transformer(model, tokens: int, batch: int) -> dict:
    """Arguments of a transformers model: text, image or audio by the names its forward takes."""
    config, names = model.config, set(inspect.signature(model.forward).parameters)
    text = config.get_text_config(decoder=True)
    vision = _first(config, "vision_config", default=config)
    arguments: dict = {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or ("pixel_values" in names and "input_ids" in names and hasattr(config, "text_config")):
        size = _first(vision, "image_size", default=224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        arguments["pixel_values"] = ((batch, _first(vision, "num_channels", default=3), height, width), None)
    if main == "input_features":
        mels, frames = _first(config, "num_mel_bins", default=80), _first(config, "max_source_positions", default=1500)
        arguments["input_features"] = ((batch, mels, 2 * frames), None)
    if main == "input_values":
        arguments["input_values"] = ((batch, 8000), None)
    vocabulary = _first(text, "vocab_size", default=100)
    limit = _first(text, "max_position_embeddings", "n_positions", default=tokens)
    if "input_ids" in names and (main == "input_ids" or hasattr(config, "text_config")):
        arguments["input_ids"] = ((batch, min(tokens, limit)), vocabulary)
    if getattr(config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = ((batch, min(tokens, limit)), vocabulary)
    if not arguments:
        raise CompressError(
            f"no example input is known for a model that takes {sorted(names)[:6]}; pass calibration data"
        )
    return arguments


def _denoiser(model, batch: int) -> dict:
    """Arguments of a diffusers denoiser, by the names its forward takes and what its config says of their widths."""
    config, names = model.config, set(inspect.signature(model.forward).parameters)
    size = _first(config, "sample_size", default=32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _first(config, "in_channels", default=4)
    latent = ((batch, channels, height, width), None)
    arguments: dict = {"sample": latent} if "sample" in names else {"hidden_states": latent}
    if "img_ids" in names:  # Flux packs the latent into a sequence and takes the positions of both streams
        arguments["hidden_states"] = ((batch, 16, channels), None)
        arguments["img_ids"], arguments["txt_ids"] = torch.zeros(16, 3), torch.zeros(8, 3)
    arguments["timestep"] = ((batch,), 1000)
    context = _first(config, "joint_attention_dim", "caption_channels", "cross_attention_dim")
    if "encoder_hidden_states" in names and context:
        arguments["encoder_hidden_states"] = ((batch, 8, context), None)
    if "pooled_projections" in names:
        arguments["pooled_projections"] = ((batch, _first(config, "pooled_projection_dim", default=64)), None)
    if getattr(config, "guidance_embeds", False):
        arguments["guidance"] = torch.ones(batch)
    classes = _first(config, "num_embeds_ada_norm", "num_class_embeds")
    embedded = getattr(config, "class_embed_type", None) == "identity"
    if "class_labels" in names and embedded:
        arguments["class_labels"] = ((batch, config.block_out_channels[0] * 4), None)
    elif "class_labels" in names and classes and getattr(config, "norm_type", "") == "ada_norm_zero":
        arguments["class_labels"] = ((batch,), classes)
    if "added_cond_kwargs" in names:
        arguments["added_cond_kwargs"] = _conditions(config, batch)
    return arguments


def _conditions(config, batch: int) -> dict:
    """The entries of `added_cond_kwargs`: pooled text and sizes of an SDXL UNet, sizes of a large PixArt."""
    if getattr(config, "addition_embed_type", None) == "text_time":
        times = 6
        width = config.projection_class_embeddings_input_dim - times * config.addition_time_embed_dim
        return {"text_embeds": ((batch, width), None), "time_ids": ((batch, times), None)}
    sizes = getattr(config, "use_additional_conditions", None)
    sizes = getattr(config, "sample_size", None) == 128 if sizes is None else sizes  # as PixArt decides
    shapes = {"resolution": ((batch, 2), None), "aspect_ratio": ((batch, 1), None)}
    return shapes if sizes else dict.fromkeys(shapes)
