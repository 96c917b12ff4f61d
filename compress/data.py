"""Batches of forward arguments from a file, a folder, a dataset, an iterable or a pipeline's own sampling.

What is read (`spec`):
* `.txt`, `.jsonl`, `.parquet`, `.csv`, `.tsv`, a folder of texts, a dataset of the hub (`owner/name[:config]`): texts.
  A model that writes text gets windows of `length` tokens of the joined text, others one text a row;
* a folder of images, in class folders if they have labels; tables with an image column;
* `.safetensors`: recorded forward arguments, one tensor per argument, one row per example (of a sampling: per call);
* `trajectory`: the denoiser's calls while its pipeline samples;
* any iterable of dicts of tensors (taken as they are), texts, PIL images, or (text or image, label).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compress.cache import cached
from compress.encoding import images, texts
from compress.errors import CompressError, did_you_mean, one_of
from compress.reading import samples_in, taken
from compress.trajectory import calls_of, record

TRAJECTORY = "trajectory"


class Batches(list[dict[str, Tensor]]):
    """Batches of forward arguments, `labels` among them where they are known, and what the report says about them."""

    def __init__(self, found: Iterable[dict] = (), note: str = ""):
        super().__init__(found)
        self.note = note


def batches(
    spec: str | Path | Iterable[Any],
    source: Any,
    *,
    samples: int,
    length: int,
    batch: int,
    seed: int | None = 0,
    column: str | None = None,
    split: str | None = None,
    cache: Path | None = None,
) -> Batches:
    """Read so many samples for the model of `source` (`.model .processor .folder .library .pipeline`).

    Which samples are taken follows from `seed` alone (without one: the first). Tokens, pixels and recordings are kept
    in the folder `cache`, by default ~/.cache/compress, and made anew when file, tokenizer or options change.
    """
    if isinstance(spec, Path):
        spec = str(spec)
    if not isinstance(spec, str):
        found = _from_items(taken(spec, samples), source, samples, length, batch)
    elif Path(spec).suffix.lower() == ".safetensors":
        found = recorded(Path(spec).expanduser(), samples, batch)
    else:

        def make() -> list[dict]:
            if spec == TRAJECTORY:
                return record(source, samples, length, batch, seed)
            return _encoded(samples_in(spec, column=column, split=split), source, samples, length, batch, seed)

        options = {"samples": samples, "length": length, "batch": batch, "seed": seed, "column": column, "split": split}
        found = cached(make, spec, source, options, cache)
    if not found:
        raise CompressError(f"data: {spec} holds no sample; it must hold at least one")
    _check(found, source)
    number = sum(rows(item) for item in found)
    note = f"{number} samples, all there are of {samples} asked for" if number < samples else ""
    return Batches([placed(source.model, item) for item in found], note)


def rows(batch: dict[str, Tensor]) -> int:
    """How many examples a batch holds."""
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)


def recorded(path: Path, samples: int, batch: int) -> list[dict[str, Tensor]]:
    """Recorded forward arguments in their order, samplings as calls; `a.b` is the entry b of a dict argument a."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*")])
        raise CompressError(f"data: {path} does not exist{near}")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CompressError(f"data: {path} is no safetensors file: {error}") from error
    lengths = {name: len(value) if value.ndim else None for name, value in tensors.items()}
    if None in lengths.values() or len(set(lengths.values())) > 1:
        raise CompressError(
            f"data: {path}: the first dimensions differ ({lengths}); each tensor must have one row per call"
        )
    return [_nested(call) for call in calls_of(tensors, samples, batch)] if tensors else []


def _nested(flat: dict[str, Tensor]) -> dict:
    nested: dict = {}
    for name, value in flat.items():
        outer, _, inner = name.partition(".")
        if inner:
            nested.setdefault(outer, {})[inner] = value
        else:
            nested[outer] = value
    return nested


def _from_items(items: list, source, samples: int, length: int, batch: int) -> list[dict]:
    """The user's own items: ready batches as they are, until there are enough samples, or raw samples."""
    if not any(isinstance(item, dict) for item in items):
        return _encoded(items, source, samples, length, batch, None)
    found: list[dict] = []
    for item in items:
        if not isinstance(item, dict) or not any(isinstance(value, Tensor) and value.ndim for value in item.values()):
            raise CompressError("data: an item holds no tensor with a row per example; it must be a dict of tensors")
        if sum(rows(item) for item in found) < samples:
            found.append(item)
    return found


def _encoded(items: list, source, samples: int, length: int, batch: int, seed: int | None) -> list[dict]:
    if source.library != "transformers":
        raise CompressError(
            f"data: a {source.library} model takes no texts or images as they are; give its recorded calls "
            "(.safetensors), a list of dicts of tensors or, with a whole pipeline, 'trajectory'"
        )
    kinds = {"texts" if item.text is not None else "images" for item in items}
    if len(kinds) > 1:
        raise CompressError("data: some samples are texts and some are images; they must be of one kind")
    if kinds == {"texts"}:
        return texts(source, items, samples, length, batch, seed)
    return images(source, items, samples, batch, seed) if items else []


def _check(found: list[dict], source) -> None:
    """Refuse batches that the model's forward would not take."""
    parameters = inspect.signature(source.model.forward).parameters
    takes = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    for name in found[0]:
        if name not in (*takes, "labels") and len(takes) == len(parameters):
            near = did_you_mean(name, takes)
            raise CompressError(f"data: the model's forward takes no {name}{near} (it takes: {one_of(takes)})")
    main = getattr(source.model, "main_input_name", None)
    if source.library == "transformers" and main not in found[0] and not {"input_ids", "inputs_embeds"} & set(found[0]):
        raise CompressError(f"data: the model reads {main}, the samples give {one_of(found[0])}")


def placed(model: nn.Module, batch: dict) -> dict:
    """A batch on the model's device and in its dtype; times and other numbers per example keep their precision."""
    weight = next(tensor for tensor in model.parameters() if tensor.is_floating_point())

    def place(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(weight.device, weight.dtype if leaf.is_floating_point() and leaf.ndim > 1 else leaf.dtype)

    return tree_map(place, batch)
