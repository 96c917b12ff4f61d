"""From texts and images to the tensors that a model takes, through the tokenizer or image processor saved with it."""

from __future__ import annotations

import inspect
import io
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError, did_you_mean, one_of
from compress.reading import Sample

SPARE = 16  # windows to draw from for each that is taken


def texts(source, samples: list[Sample], number: int, length: int, batch: int, seed: int | None) -> list[dict]:
    """Token batches: windows of one stream for a model that writes text, one text a row for others."""
    model, tokenizer = source.model, getattr(source.processor, "tokenizer", source.processor)
    if not hasattr(tokenizer, "convert_tokens_to_ids"):
        raise CompressError(f"data: the samples are texts and {source.folder or 'the model'} has no tokenizer files")
    length = min(length, _most(model.config, tokenizer, length))
    generates = getattr(model, "can_generate", None)
    if generates and generates() and not model.config.is_encoder_decoder:
        return windows(tokenizer, [sample.text for sample in samples], number, length, batch, seed)
    filled = [sample for sample in samples if sample.text.strip()]
    numbers = classes(model.config, filled) if "labels" in _takes(model) else None
    found = []
    for part in _parts(draw(filled, number, seed), batch):
        tensors = rows(model, tokenizer, [sample.text for sample in part], length)
        found.append(tensors | (_labels(source, part, numbers) if numbers else {}))
    return found


def windows(tokenizer, texts: list[str], number: int, length: int, batch: int, seed: int | None) -> list[dict]:
    """The texts as one stream of tokens, cut into windows of `length`.

    Where the tokenizer begins a text with special tokens (a BOS), every window begins with them, as the model expects
    it. With a seed the windows are drawn from a part of the stream that is larger than needed; without, they are the
    first ones.
    """
    start = _start(tokenizer)
    step = length - len(start)
    if step < 1:
        raise CompressError(f"data: length is {length}; it must be above {len(start)}, the special tokens of a window")
    stream = _stream(tokenizer, texts, step * number * (1 if seed is None else SPARE))
    found = [stream[at : at + step] for at in range(0, len(stream) - step + 1, step)]
    if not found and len(stream) > 1:
        found = [stream]  # shorter than one window: better than nothing
    chosen = draw(found, number, seed)
    rows = torch.tensor([start + window for window in chosen])
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows.split(batch)] if chosen else []


def _start(tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text."""
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    return full[: full.index(plain[0])] if plain and plain[0] in full else []


def _stream(tokenizer, texts: list[str], tokens: int) -> list[int]:
    """The first tokens of the joined texts; lines that kept their end are joined as they stood in the file."""
    text = ("" if any(part.endswith("\n") for part in texts) else "\n\n").join(texts)
    cut = 8 * tokens
    while True:
        # Without `verbose` transformers would warn that the stream is longer than the model takes.
        ids = tokenizer(text[:cut], add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if cut >= len(text):
            return ids[:tokens]
        if len(ids) > tokens:  # the last token may have been cut in two
            return ids[:tokens]
        cut *= 2


def rows(model, tokenizer, texts: list[str], length: int) -> dict[str, Tensor]:
    """One text a row, cut at `length` and padded to the longest."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # behind the mask any token will do
    if tokenizer.pad_token is None:
        raise CompressError("data: the tokenizer has neither a padding token nor an end token to pad with")
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    tensors = {name: value for name, value in encoded.items() if name in _takes(model)}
    return tensors | (_decoder(model, encoded) if model.config.is_encoder_decoder else {})


def _decoder(model, encoded) -> dict[str, Tensor]:
    """The decoder reads the encoder's text again, one token later, so that what it predicts is known."""
    ids, first = encoded["input_ids"], model.config.decoder_start_token_id
    if first is None:
        raise CompressError("data: the config names no decoder_start_token_id, which a text needs for this model")
    start = torch.full_like(ids[:, :1], first)
    mask = encoded["attention_mask"]
    return {
        "decoder_input_ids": torch.cat([start, ids[:, :-1]], 1),
        "decoder_attention_mask": torch.cat([torch.ones_like(start), mask[:, :-1]], 1),
    }


def images(source, samples: list[Sample], number: int, batch: int, seed: int | None) -> list[dict]:
    """Image batches through the model's image processor, with class numbers where the samples have labels."""
    model = source.model
    processor = getattr(source.processor, "image_processor", source.processor)
    if processor is None or hasattr(processor, "convert_tokens_to_ids"):
        raise CompressError(
            f"data: the samples are images and {source.folder or 'the model'} has no preprocessor_config.json, "
            "which says how the model wants them"
        )
    takes, found = _takes(model), []
    numbers = classes(model.config, samples) if "labels" in takes else None
    for part in _parts(draw(samples, number, seed), batch):
        pixels = processor([_image(sample.image) for sample in part], return_tensors="pt")
        tensors = {name: value for name, value in pixels.items() if name in takes}
        found.append(tensors | (_labels(source, part, numbers) if numbers else {}))
    return found


def _image(value) -> Any:
    """An opened RGB image from a file, its bytes or a PIL image."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise CompressError("data: to read images run: pip install pillow") from error
    name = value if isinstance(value, Path) else "an image"
    if isinstance(value, dict):
        value = value["bytes"]
    try:
        image = (
            value if hasattr(value, "convert") else Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
        )
        return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise CompressError(f"data: {name} cannot be read as an image: {error}") from error


def classes(config, samples: list[Sample]) -> dict[str, int]:
    """The number of each class name: as the config knows it, the number that it is, or, of just as many, its place."""
    names = sorted({sample.label for sample in samples if isinstance(sample.label, str)})
    unknown = [name for name in names if name not in config.label2id]
    if not unknown:
        return config.label2id
    if all(name.isdecimal() and int(name) < config.num_labels for name in names):
        return {name: int(name) for name in names}
    if len(names) == config.num_labels:
        return {name: number for number, name in enumerate(names)}
    near = did_you_mean(unknown[0], config.label2id)
    raise CompressError(f"data: {unknown[0]} is no class of the model{near} (classes: {one_of(config.label2id)})")


def _labels(source, part: list[Sample], numbers: dict[str, int]) -> dict[str, Tensor]:
    """The class numbers of a batch, if every sample has a label."""
    labels = [numbers.get(sample.label, sample.label) for sample in part]
    if None in labels:
        return {}
    most = source.model.config.num_labels
    if wrong := [label for label in labels if not isinstance(label, int) or not 0 <= label < most]:
        raise CompressError(f"data: a label is {wrong[0]!r}; the model has the classes 0 to {most - 1}")
    return {"labels": torch.tensor(labels)}


def _takes(model) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def draw(items: list, number: int, seed: int | None) -> list:
    """So many of the items: the first ones without a seed, else drawn and kept in their order."""
    if seed is None or len(items) <= number:
        return items[:number]
    return [items[at] for at in sorted(random.Random(seed).sample(range(len(items)), number))]


def _parts(items: list, size: int) -> list[list]:
    return [items[at : at + size] for at in range(0, len(items), size)]


def _most(config, tokenizer, length: int) -> int:
    """The longest text that the model takes."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or length
    return min(positions, tokenizer.model_max_length)
