"""A denoiser along its sampling: its calls recorded, and a whole sampling run again with another model."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compress.errors import CompressError
from compress.outputs import run

PROMPTS = (
    "a photo of a red fox in the snow",
    "an oil painting of a harbour at dawn",
    "a bowl of ramen on a wooden table, top view",
    "portrait of an old fisherman, studio light",
    "a city street at night in the rain, neon signs",
    "a watercolor of mountains and a lake",
    "a green parrot sitting on a branch",
    "a steam train crossing a stone bridge",
)
FAITHFUL = 1e-3  # how far a replayed step may be from the recorded one, relative to the sample


def record(source: Any, samples: int, length: int, batch: int, seed: int | None) -> list[dict]:
    """The denoiser's first `samples` calls while the pipeline samples from its own prompts or classes.

    `batch` images are sampled at once, in the pipeline's own number of steps but at most `length`. Calls stay as the
    pipeline made them (with guidance both halves in one batch) and in their order.
    """
    calls: list[dict] = []
    start = seed or 0
    while len(calls) < samples:
        with listening(source.model) as heard:
            _sample(source.pipeline, start, batch, length)
        if not heard:
            raise CompressError("data: the pipeline never called its denoiser; nothing was recorded")
        calls += heard
        start += 1
    return calls[:samples]


def pipeline_sampler(source: Any, *, seed: int, batch: int, length: int) -> Callable[[nn.Module], Tensor]:
    """A function that samples with another denoiser in the pipeline's place and returns the final latents."""

    def sample(model: nn.Module) -> Tensor:
        own = getattr(source.pipeline, source.component)
        setattr(source.pipeline, source.component, model)
        try:
            return _sample(source.pipeline, seed, batch, length)
        finally:
            setattr(source.pipeline, source.component, own)

    return sample


def replay_sampler(batches: list[dict], original: nn.Module) -> Callable[[nn.Module], Tensor]:
    """A function that runs the recorded samplings of a bare denoiser again, with another model, from the same noise.

    What the sampler did between two calls is not in the recording, but a deterministic one-step sampler (DDIM, Euler,
    EDM) makes the next sample as a weighted sum of this one and the model's answer to it. Both weights follow from the
    recorded samples and the original's answers; a recording that they do not explain (another sampler, noise added on
    the way) is refused. The result is the sample that goes into the last recorded call.
    """
    calls = _steps(batches)
    if len(calls) < 2:
        raise CompressError("validate: psnr needs a recorded sampling: the calls of at least two steps in their order")
    name = next(name for name in ("sample", "hidden_states") if name in calls[0])
    weights = [_weights(call, following[name], name, original) for call, following in pairwise(calls)]

    def sample(model: nn.Module) -> Tensor:
        x = calls[0][name]
        with torch.inference_mode():
            for call, (own, gained) in zip(calls, weights, strict=False):
                x = (own * x + gained * run(model, call | {name: x})).to(x.dtype)
        return x

    return sample


@contextmanager
def listening(model: nn.Module) -> Iterator[list[dict]]:
    """Collect the tensors among the model's forward arguments, by their names."""
    names = list(inspect.signature(model.forward).parameters)
    calls: list[dict] = []

    def hear(module, args, kwargs) -> None:
        given = dict(zip(names, args, strict=False)) | kwargs
        kept = {name: _kept(value) for name, value in given.items()}
        calls.append({name: value for name, value in kept.items() if value is not None})

    handle = model.register_forward_pre_hook(hear, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _kept(value: Any) -> Tensor | dict | None:
    """Tensors and dicts of them; a number such as the timestep becomes a tensor, the rest are defaults."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(value)
    if isinstance(value, dict):
        return {name: item.detach().clone() for name, item in value.items() if isinstance(item, Tensor)} or None
    return None


def _sample(pipeline: Any, seed: int, batch: int, length: int) -> Tensor:
    """Run the pipeline on its own kind of condition, and return the final latents or images as a tensor."""
    if pipeline is None:
        raise CompressError(
            "data: 'trajectory' needs a whole pipeline; for a bare denoiser give its recorded calls (.safetensors)"
        )
    takes = inspect.signature(pipeline.__call__).parameters
    arguments: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}
    draw = random.Random(seed)
    if "prompt" in takes:
        arguments["prompt"] = [draw.choice(PROMPTS) for _ in range(batch)]
    elif "class_labels" in takes:
        most = pipeline.transformer.config.num_embeds_ada_norm
        arguments["class_labels"] = [draw.randrange(most) for _ in range(batch)]
    elif "batch_size" in takes:
        arguments["batch_size"] = batch
    if "num_inference_steps" in takes:
        arguments["num_inference_steps"] = min(length, takes["num_inference_steps"].default or length)
    if "output_type" in takes:  # text pipelines can hand out the latents, the others their images
        arguments["output_type"] = "latent" if "prompt" in takes else "np"
    with torch.inference_mode():
        result = pipeline(**arguments)
    return torch.as_tensor(result.images if hasattr(result, "images") else result.frames)


def calls_of(rows: dict[str, Tensor], samples: int, batch: int) -> list[dict[str, Tensor]]:
    """The recorded rows of samplings, one sampling after another, as calls: a step of `batch` samplings at once.

    So the batches follow each other as the calls of a real sampling do, which a model that shares work between steps
    depends on. Rows that are no samplings of the same number of steps come as they are, `batch` at once.
    """
    spans = runs(rows["timestep"].flatten().tolist()[:samples]) if "timestep" in rows else []
    steps = len(spans[0]) if spans else 0
    whole = [span for span in spans if len(span) == steps]
    if steps < 2 or any(len(span) > steps for span in spans) or len(whole) < len(spans) - 1:
        count = min(samples, len(next(iter(rows.values()))))
        picked = [list(range(at, min(at + batch, count))) for at in range(0, count, batch)]
    else:
        groups = [whole[at : at + batch] for at in range(0, len(whole), batch)]
        picked = [[span[step] for span in group] for group in groups for step in range(steps)]
    return [{name: value[chosen] for name, value in rows.items()} for chosen in picked]


def runs(times: list[float]) -> list[range]:
    """The samplings in a row of timesteps: they run one way inside a sampling and turn back where the next begins."""
    found, begin = [], 0
    for at in range(1, len(times) + 1):
        if at < len(times) and (at == begin + 1 or (times[at] - times[at - 1]) * (times[begin + 1] - times[begin]) > 0):
            continue
        found.append(range(begin, at))
        begin = at
    return found


def sampling(batches: list[dict]) -> list[dict]:
    """What one use of the model is: the calls of the first sampling of a denoiser, else the first batch."""
    if not batches or "timestep" not in batches[0]:
        return batches[:1]
    return [batches[at] for at in runs([batch["timestep"].flatten()[0].item() for batch in batches])[0]]


def _steps(batches: list[dict]) -> list[dict]:
    """The calls of recorded samplings, step by step and all samplings at once; a sampling cut short is left out."""
    if not batches or "timestep" not in batches[0]:
        return []
    spans = runs([batch["timestep"].flatten()[0].item() for batch in batches])
    whole = [span for span in spans if len(span) == max(map(len, spans))]
    return [
        tree_map(lambda *parts: torch.cat(parts), *(batches[at] for at in step)) for step in zip(*whole, strict=True)
    ]


def _weights(call: dict, following: Tensor, name: str, original: nn.Module) -> tuple[Tensor, Tensor]:
    """For each sampling the weights of the sample and of the answer that make the next sample, by least squares."""
    with torch.inference_mode():
        answered = run(original, call)
    terms = torch.stack([call[name].flatten(1), answered.flatten(1)], 2).double()
    target = following.flatten(1).double().unsqueeze(2)
    solved = torch.linalg.lstsq(terms, target).solution
    unexplained = (terms @ solved - target).norm() / target.norm()
    if not unexplained < FAITHFUL:
        raise CompressError(
            f"validate: the recorded sampling cannot be run again: {unexplained:.1%} of a step follow from neither the "
            "sample nor the model's answer; psnr needs a deterministic one-step sampler (DDIM, Euler)"
        )
    shape = (-1, *[1] * (following.ndim - 1))
    return solved[:, 0].reshape(shape), solved[:, 1].reshape(shape)
