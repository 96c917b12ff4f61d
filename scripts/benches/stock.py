"""The ways that there are without us to run an encoder on a CPU; each gives a function of the inputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from benches.paired import Missing
from torch import Tensor, nn

Call = Callable[[dict], Tensor]


def hidden(model: nn.Module) -> Call:
    """The last hidden state."""

    @torch.inference_mode()
    def run(inputs: dict) -> Tensor:
        return model(**inputs).last_hidden_state

    return run


def compiled(model: nn.Module) -> Call:
    """The same through inductor, which packs weights that it may freeze."""
    fast = torch.compile(model, dynamic=False)

    @torch.no_grad()
    def run(inputs: dict) -> Tensor:
        with torch._inductor.config.patch(freezing=True):
            return fast(**inputs).last_hidden_state

    return run


class Packed(nn.Module):
    """A linear layer on oneDNN with its weight packed for each number of rows that comes."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias, self.forms = linear.weight, linear.bias, {}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if rows not in self.forms:
            self.forms[rows] = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
        return torch.ops.mkldnn._linear_pointwise(x, self.forms[rows], self.bias, "none", [], "")


def packed(model: nn.Module) -> nn.Module:
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(path, Packed(module))
    return model


def half(model: nn.Module) -> Call:
    """In bfloat16, with float inputs cast."""
    return cast(hidden(model.bfloat16()))


def cast(run: Call) -> Call:
    def narrowed(inputs: dict) -> Tensor:
        return run({name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()})

    return narrowed


def torch_ao(model: nn.Module) -> Call:
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still what most people use
        return hidden(quantize_dynamic(model, {nn.Linear: per_channel_dynamic_qconfig}))


def torchao(model: nn.Module) -> Call:
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise Missing("pip install torchao") from error
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return compiled(model)


class Positional(nn.Module):
    """A model with positional arguments and one output, as a tracer wants it."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, values, strict=True))).last_hidden_state


def openvino(model: nn.Module, samples: list[dict]) -> Call:
    """NNCF's post-training quantization with its defaults for transformers, on OpenVINO with one thread."""
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise Missing("pip install openvino nncf") from error

    graph = openvino.convert_model(Positional(model, list(samples[0])), example_input=tuple(samples[0].values()))
    rows = [[value.numpy() for value in sample.values()] for sample in samples]
    graph = nncf.quantize(graph, nncf.Dataset(rows), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    ready = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1})

    def run(inputs: dict) -> Tensor:
        return torch.from_numpy(ready([value.numpy() for value in inputs.values()])[0])

    return run


def contenders(model: nn.Module, samples: list[dict]) -> dict[str, Callable[[], Call]]:
    """The contenders by name, float32 as it is first; made only when called, on a copy of the model."""

    def fresh() -> nn.Module:
        return copy.deepcopy(model)

    return {
        "fp32 eager": lambda: hidden(model),
        "fp32 packed": lambda: hidden(packed(fresh())),
        "bf16 eager": lambda: half(fresh()),
        "bf16 packed": lambda: half(packed(fresh())),
        "bf16 compiled": lambda: cast(compiled(fresh().bfloat16())),
        "torch.ao dynamic": lambda: torch_ao(fresh()),
        "torchao int8 compiled": lambda: torchao(fresh()),
        "OpenVINO int8 PTQ": lambda: openvino(fresh(), samples),
    }
