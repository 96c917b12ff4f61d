"""Our quantizer for transformers: replays the recorded steps on the empty model before its weights are loaded."""

from __future__ import annotations

from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.errors import CompressError
from compress.replay import FORMAT, replay

METHOD = "compress-plan"


class PlanConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed checkpoint."""

    def __init__(self, steps=None, format=FORMAT, weights=None, **kwargs):
        self.quant_method = METHOD
        self.format = format
        self.steps = steps or []
        self.weights = weights


def preferring_ours(stock: type) -> type:
    """The library's config class of compressed-tensors, which hands checkpoints with our record to our kernels."""

    class CompressedTensors(stock):
        @classmethod
        def from_dict(cls, config_dict, *args, **kwargs):
            record = config_dict.get("compress")
            return PlanConfig(**record) if record else stock.from_dict(config_dict, *args, **kwargs)

    return CompressedTensors


class PlanQuantizer(HfQuantizer):
    """Rebuilds the compressed structure; the library's own loader then reads the tensors into it."""

    requires_calibration = True

    def update_attn_implementation(self, config):
        """Point the loader at our weights file: under its own name a machine without us fails instead of guessing."""
        if self.quantization_config.weights:
            config.transformers_weights = self.quantization_config.weights
        return config

    update_tp_plan = update_attn_implementation  # the last hook that sees the config in releases without the other one

    def _process_model_before_weight_loading(self, model, **kwargs):
        replay(model, self.quantization_config.steps, self.quantization_config.format)
        return model

    def is_serializable(self, *args, **kwargs):
        raise CompressError(
            "save_pretrained would write a checkpoint that machines without compress load wrongly; "
            "save this model with compress.save(model, folder)"
        )

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
