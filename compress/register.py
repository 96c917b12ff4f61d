"""Makes plain `from_pretrained` of transformers and diffusers load compressed checkpoints once `compress` is imported.

Both libraries have a registry of quantizers. Importing them costs seconds, so if they are not imported yet the
registration waits in an import hook until they are.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys


def register() -> None:
    """Register our quantizers in the libraries that are imported, and on import in those that are not yet."""
    for name, enter in _LIBRARIES.items():
        if name in sys.modules:
            enter(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _transformers(registry) -> None:
    from compress.hf_transformers import METHOD, PlanConfig, PlanQuantizer, preferring_ours

    configs = registry.AUTO_QUANTIZATION_CONFIG_MAPPING
    if METHOD not in configs:
        configs[METHOD] = PlanConfig
        registry.AUTO_QUANTIZER_MAPPING[METHOD] = PlanQuantizer
        configs["compressed-tensors"] = preferring_ours(configs["compressed-tensors"])


def _diffusers(registry) -> None:
    from compress.hf_diffusers import Method, PlanConfig, PlanQuantizer

    registry.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(Method.PLAN.value, PlanConfig)
    registry.AUTO_QUANTIZER_MAPPING.setdefault(Method.PLAN.value, PlanQuantizer)


_LIBRARIES = {"transformers.quantizers.auto": _transformers, "diffusers.quantizers.auto": _diffusers}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the two registry modules as usual and registers in them right after they ran."""

    def find_spec(self, name, path=None, target=None):
        if name not in _LIBRARIES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _Loader(spec.loader, _LIBRARIES[name])
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, enter):
        self.loader, self.enter = loader, enter

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        self.enter(module)
