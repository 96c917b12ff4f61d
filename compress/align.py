"""Tensors at multiples of 64 bytes, in files and in memory.

Loaders map weight files instead of copying them, and matrix kernels round differently on unaligned memory. With
aligned tensors a reloaded model answers bit for bit like the one that was saved, and no slower.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from torch import nn

STEP = 64


def align_file(path: Path) -> None:
    """Rewrite a safetensors file so that its tensors start aligned; those of odd sizes come last."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        start = 8 + length
        metadata = header.pop("__metadata__", None)
        sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
        order = sorted(header, key=lambda name: (sizes[name] % STEP != 0, name))
        moved, offset = {}, 0
        for name in order:
            moved[name] = {**header[name], "data_offsets": [offset, offset + sizes[name]]}
            offset += sizes[name]
        text = json.dumps(({"__metadata__": metadata} if metadata else {}) | moved, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % STEP)
        part = path.with_suffix(".part")
        with open(part, "wb") as aligned:
            aligned.write(struct.pack("<Q", len(text)) + text)
            for name in order:
                file.seek(start + header[name]["data_offsets"][0])
                left = sizes[name]
                while left:
                    left -= aligned.write(file.read(min(left, 1 << 24)))
    os.replace(part, path)


def align_model(model: nn.Module) -> None:
    """Copy the parameters that lie unaligned in memory (mapped from somebody's file) to aligned places."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.device.type == "cpu" and tensor.data_ptr() % STEP:
                tensor.data = tensor.data.clone()
