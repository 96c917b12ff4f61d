"""Compress pretrained transformers and diffusers models into checkpoints that are smaller, faster and proven.

Importing this package also lets plain `from_pretrained` load compressed checkpoints.
"""

from __future__ import annotations

from importlib import import_module

from compress.errors import CompressError, LimitMissed
from compress.register import register as _register

__version__ = "0.1.0"

_PUBLIC = {
    "Recipe": "compress.recipe",
    "Report": "compress.report",
    "Result": "compress.pipeline",
    "compress": "compress.pipeline",
    "inspect": "compress.inspection",
    "load": "compress.checkpoint",
    "plan": "compress.pipeline",
    "push": "compress.hub",
    "save": "compress.pipeline",
    "verify": "compress.verification",
}
__all__ = ["CompressError", "LimitMissed", "__version__", *_PUBLIC]

_register()


def __getattr__(name: str):
    """The public names, each imported when it is first asked for: torch takes seconds."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
