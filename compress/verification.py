"""Proof by reloading: a fresh process loads the folder as a user would and compares its answers with the saved model's.

A small probe (inputs, and a sample of the outputs they gave) lies in the folder, so that `compress verify` can be
repeated anywhere and at any time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compress.align import align_model
from compress.checkpoint import check_files, load
from compress.errors import CompressError
from compress.outputs import answer, relative_error

PROBE = "verify.probe"  # a safetensors file, but none of the model's weights
SAMPLES = 65536  # of the output's numbers, evenly spread, are kept
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def write_probe(model: nn.Module, inputs: dict, folder: Path) -> None:
    """Keep the inputs and what the model in memory answers to them."""
    align_model(model)
    tensors, others = split(inputs)
    tensors = {f"input.{name}": value.cpu().contiguous() for name, value in tensors.items()}
    tensors["output"] = _sample(_ask(model, inputs))
    facts = json.dumps({"device": next(model.parameters()).device.type, "inputs": others})
    save_file(tensors, folder / PROBE, metadata={"facts": facts})  # one entry: the order of several is random


def split(inputs: dict) -> tuple[dict[str, Tensor], dict]:
    """The tensors among the inputs by name, those of a dict argument as `argument.entry`; and all else."""
    tensors, others = {}, {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, dict):
            found, others[name] = split(value)
            tensors |= {f"{name}.{inner}": tensor for inner, tensor in found.items()}
        else:
            others[name] = value
    return tensors, others


def verify(folder: str | Path) -> dict:
    """Reload in a fresh process; {passed, how, error}. A damaged folder or a failing load is a CompressError."""
    check_files(folder)
    command = [sys.executable, "-W", "ignore", "-m", "compress.verification", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise CompressError(f"{folder}: cannot be loaded in a fresh process: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder: Path) -> dict:
    """Load with plain `from_pretrained` and ask the probe; runs in the fresh process."""
    facts = check_files(folder)
    loader = f"{'DiffusionPipeline' if facts['component'] else facts['class']}.from_pretrained"
    model = load(folder)
    if facts["component"]:
        model = getattr(model, facts["component"])
    with safe_open(folder / PROBE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        facts = json.loads(file.metadata()["facts"])
    expected = tensors.pop("output")
    inputs = facts["inputs"]
    for name, value in tensors.items():
        argument, _, entry = name.removeprefix("input.").partition(".")
        inputs |= {argument: inputs.get(argument, {}) | {entry: value}} if entry else {argument: value}
    if facts["device"] == "cuda" and torch.cuda.is_available():  # other devices round differently
        model.to("cuda")
    got = _sample(_ask(model.eval(), inputs))
    if got.shape != expected.shape:
        raise CompressError(f"{folder}: the reloaded model answers in another shape")
    same = torch.equal(got, expected)
    error = 0.0 if same else relative_error(got, expected)
    dtype = next(model.parameters()).dtype
    passed = same or error <= TOLERANCE.get(dtype, 1e-5)
    how = f"{loader} in a fresh process, {'bit-equal' if same else 'not bit-equal'}"
    return {"passed": passed, "how": how, "error": error, "bit_equal": same}


@torch.no_grad()
def _ask(model: nn.Module, inputs: dict) -> Tensor:
    """The model's answer on one thread: how work is split among several, and so the rounding, is up to chance."""
    device = next(model.parameters()).device
    moved = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return answer(model(**moved)).cpu()
    finally:
        torch.set_num_threads(threads)


def _sample(output: Tensor) -> Tensor:
    flat = output.flatten()
    return flat[:: max(1, flat.numel() // SAMPLES)].contiguous()


if __name__ == "__main__":
    try:
        print(json.dumps(compare(Path(sys.argv[1]))))
    except CompressError as error:
        sys.exit(str(error))
