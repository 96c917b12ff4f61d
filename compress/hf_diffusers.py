"""Our quantizer for diffusers: replays the recorded steps on the empty model before its weights are loaded."""

from __future__ import annotations

from enum import StrEnum

from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from compress.replay import FORMAT, replay


class Method(StrEnum):
    """diffusers reads `.value` of a quantization method."""

    PLAN = "compress-plan"


class PlanConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint."""

    def __init__(self, steps=None, format=FORMAT, **kwargs):
        self.quant_method = Method.PLAN
        self.format = format
        self.steps = steps or []

    def to_dict(self):
        return {"quant_method": Method.PLAN.value, "format": self.format, "steps": self.steps}

    def to_diff_dict(self):
        return self.to_dict()


class PlanQuantizer(DiffusersQuantizer):
    """Rebuilds the compressed structure; the library's own loader then reads the tensors into it."""

    requires_calibration = True
    use_keep_in_fp32_modules = True

    def _process_model_before_weight_loading(self, model, **kwargs):
        replay(model, self.quantization_config.steps, self.quantization_config.format)
        model.config.quantization_config = self.quantization_config

    def _process_model_after_weight_loading(self, model, **kwargs):
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True
