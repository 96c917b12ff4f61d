"""The code that a checkpoint carries so that `trust_remote_code=True` loads it where compress is not installed.

`modeling_compress.py` and one file for each of our modules that loading needs, with their imports made relative. The
class in it registers the quantizer and hands over to the library's own class: nothing about the model is custom.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

from compress.transform import find

_IMPORT = re.compile(r"^(\s*)from (compress(?:_kernels)?(?:\.\w+)*) import (\(?.*)$")
_LIBRARY_IMPORT = re.compile(r"^(\s+)from ((?:diffusers|transformers|triton)[\w.]*) import (\w+)$")

HEAD = '''"""Loads this checkpoint where compress is not installed: from_pretrained(..., trust_remote_code=True)."""

'''

TRANSFORMERS = '''
import transformers
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("compress-plan", PlanConfig)
AUTO_QUANTIZER_MAPPING.setdefault("compress-plan", PlanQuantizer)


class _Native:
    """Stands in for an auto class and hands over to the library's own."""

    @classmethod
    def register_for_auto_class(cls, auto_class=None):
        pass

    @classmethod
    def from_pretrained(cls, path, *args, **options):
        options["trust_remote_code"] = False
        return getattr(transformers, cls.__name__).from_pretrained(path, *args, **options)

    @classmethod
    def _from_config(cls, config, **options):
        return getattr(transformers, cls.__name__).from_config(config, trust_remote_code=False, **options)
'''

DIFFUSERS = '''
import diffusers
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("compress-plan", PlanConfig)
AUTO_QUANTIZER_MAPPING.setdefault("compress-plan", PlanQuantizer)


class {name}:
    """Stands in for the denoiser's class and hands over to the library's own."""

    @classmethod
    def from_pretrained(cls, path, *args, **options):
        options.pop("trust_remote_code", None)
        return diffusers.{name}.from_pretrained(path, *args, **options)
'''

METHODS = '''"""The methods of this checkpoint's record; a stand-in for compress.transform without its option models."""

from dataclasses import dataclass, field
from importlib import import_module


@dataclass
class Plan:
    edits: dict
    tensors: dict = field(default_factory=dict)
    notes: dict = field(default_factory=dict)


def Field(*args, **options):
    return None


class Transform:
    @classmethod
    def model_construct(cls):
        return cls()


def find(name):
    module, cls = {table!r}[name]
    return getattr(import_module("." + module, __package__), cls)
'''


def bundle(library: str, classes: list[str], uses: list[str]) -> dict[str, str]:
    """File name -> text of everything that loading a checkpoint with these methods needs."""
    table = {use: (_flat(f"compress.transforms.{use}"), find(use).__name__) for use in uses}
    files = {"compress_transform.py": METHODS.replace("{table!r}", repr(table))}
    todo = [f"compress.hf_{library}", "compress.replay", *(f"compress.transforms.{use}" for use in uses)]
    while todo:
        name = todo.pop()
        if _flat(name) + ".py" not in files:
            text, needs = _relative(_source(name).read_text(), library)
            files[_flat(name) + ".py"] = text
            todo += needs
    tail = TRANSFORMERS if library == "transformers" else DIFFUSERS.replace("{name}", classes[0])
    if library == "transformers":
        tail += "".join(f"\n\nclass {name}(_Native):\n    pass\n" for name in classes)
    modules = sorted(file.removesuffix(".py") for file in files)
    # Every file is imported here by name: the hub's loader fetches only what this file imports.
    heads = [f"from .{module} import __doc__ as _{module}  # noqa: F401\n" for module in modules]
    heads.append(f"from .compress_hf_{library} import PlanConfig, PlanQuantizer\n")
    return {"modeling_compress.py": HEAD + "".join(heads) + tail, **files}


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _source(name: str) -> Path:
    """The file of one of our modules."""
    return Path(find_spec(name).origin)


def _relative(text: str, library: str) -> tuple[str, list[str]]:
    """Make a module's imports of ours relative; those inside functions are calibration's, which needs the package."""
    lines, needs = [], []
    for line in text.splitlines():
        if match := _IMPORT.match(line):
            indent, name, what = match.groups()
            if indent and not what.startswith("("):
                line = f'{indent}raise ImportError("this needs the package transformer-compress")'
            else:
                needs.append(name)
                line = f"{indent}from .{_flat(name)} import {what}"
        elif match := _LIBRARY_IMPORT.match(line):  # the other library need not be installed where this is loaded
            indent, name, what = match.groups()
            if name.split(".")[0] != library:
                line = f'{indent}{what} = __import__("importlib").import_module("{name}").{what}'
        lines.append(line)
    return "\n".join(lines) + "\n", needs
