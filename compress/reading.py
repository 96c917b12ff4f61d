"""Samples as they lie in files, folders, datasets and iterables: texts, images and rows, not yet tensors."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

from compress.errors import CompressError, did_you_mean, one_of

TABLES = (".jsonl", ".parquet", ".csv", ".tsv")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
KNOWN = (".txt", *TABLES, ".safetensors", *IMAGES)
SPARE = 64  # texts to read from an iterable for each window that is taken
LARGEST = 100_000  # rows that are read of a table; it may hold billions


@dataclass(frozen=True)
class Sample:
    """One text or one image (a file or a PIL image), and its label where it has one: a class name or number."""

    text: str | None = None
    image: Any = None
    label: str | int | None = None


def samples_in(spec: str, *, column: str | None = None, split: str | None = None) -> list[Sample]:
    """The samples of a file, a folder or a dataset of the hub, in their order there."""
    path = Path(spec).expanduser()
    if split is not None and path.is_file():
        raise CompressError(f"data: {spec} is one file and has no splits; leave split out")
    if column is not None and (path.is_dir() or path.is_file() and path.suffix.lower() not in TABLES):
        raise CompressError(f"data: {spec} is no table and has no columns; leave column out")
    if path.is_dir():
        samples = _folder(path, split)
    elif path.is_file():
        samples = _file(path, column)
    elif path.suffix.lower() in KNOWN or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        near = did_you_mean(path.name, [other.name for other in path.parent.glob("*")])
        raise CompressError(f"data: {spec} does not exist{near}")
    else:
        samples = _table(spec, list(islice(_dataset(spec, split), LARGEST)), column)
    if not samples:
        raise CompressError(f"data: {spec} is empty; it must hold at least one sample")
    return samples


def taken(items: Iterable, number: int) -> list:
    """The first items of an iterable of the user, as samples or, for dicts of tensors, as they are.

    Of texts more than asked for, since it may take several to fill a window of a decoder.
    """
    found = []
    for item in items:
        found.append(_item(item))
        is_text = isinstance(found[-1], Sample) and found[-1].text is not None
        if len(found) >= number * (SPARE if is_text else 1):
            break
    return found


def _item(item) -> Any:
    if isinstance(item, dict):
        return item
    if isinstance(item, str):
        return Sample(text=item)
    value, label = item if isinstance(item, (tuple, list)) and len(item) == 2 else (item, None)
    if hasattr(value, "convert") and hasattr(value, "size"):
        return Sample(image=value, label=label)
    if isinstance(value, str) and label is not None:
        return Sample(text=value, label=label)
    raise CompressError(
        f"data: an item is a {type(item).__name__}; it must be a dict of tensors, a text, a PIL image, "
        "or a text or an image with its label"
    )


def _folder(path: Path, split: str | None) -> list[Sample]:
    """Images in class folders, images, or texts."""
    if split is not None:
        if not (path / split).is_dir():
            raise CompressError(f"data: {path} has no split {split}{did_you_mean(split, _children(path))}")
        path = path / split
    classes = {child: _images(path / child) for child in _children(path)}
    if any(classes.values()):
        labelled = [[Sample(image=image, label=name) for image in images] for name, images in classes.items()]
        # In turn from each class, so that the first samples hold all of them alike.
        return [sample for row in zip_longest(*labelled) for sample in row if sample is not None]
    if images := _images(path):
        return [Sample(image=image) for image in images]
    texts = sorted(path.rglob("*.txt"))
    if not texts:
        raise CompressError(
            f"data: {path} holds neither images in class folders nor texts (.txt); its folders: "
            f"{one_of(_children(path)) or 'none'}"
        )
    return [Sample(text=_text(file)) for file in texts]


def _children(path: Path) -> list[str]:
    return sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _images(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)


def _file(path: Path, column: str | None) -> list[Sample]:
    suffix = path.suffix.lower()
    if suffix in TABLES:
        return _table(str(path), list(islice(_rows(path, suffix), LARGEST)), column)
    if suffix in IMAGES:
        return [Sample(image=path)]
    if suffix != ".txt":
        raise CompressError(f"data: {path} is a {suffix or 'nameless'} file; it must be one of {', '.join(KNOWN)}")
    return [Sample(text=line) for line in _text(path).splitlines(keepends=True)]


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise CompressError(f"data: {path} is no UTF-8 text (byte {error.start})") from error


def _rows(path: Path, suffix: str) -> Iterator[dict]:
    if suffix == ".jsonl":
        for number, line in enumerate(_text(path).splitlines(), 1):
            if line.strip():
                yield _json(path, number, line)
    elif suffix == ".parquet":
        yield from _parquet(path)
    else:
        with path.open(encoding="utf-8", newline="") as file:
            yield from csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")


def _json(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CompressError(f"data: {path}:{number}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise CompressError(f"data: {path}:{number}: is a JSON {type(row).__name__}, it must be an object")
    return row


def _parquet(path: Path) -> Iterator[dict]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise CompressError(f"data: {path} is a parquet file; to read it run: pip install pyarrow") from error
    try:
        for batch in ParquetFile(path).iter_batches(1000):
            yield from batch.to_pylist()
    except ArrowInvalid as error:
        raise CompressError(f"data: {path} is no parquet file: {error}") from error


def _dataset(spec: str, split: str | None) -> Iterator[dict]:
    """The rows of a dataset of the hub, `owner/name` or `owner/name:config`, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise CompressError(
            f"data: {spec} is no file or folder here; to read it from the hub run: pip install datasets"
        ) from error
    name, _, config = spec.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CompressError(
            f"data: {spec} is neither a file, a folder nor a dataset that can be had: {reason}"
        ) from error
    wanted = split or next((name for name in ("validation", "test", "train") if name in found), next(iter(found)))
    if wanted not in found:
        raise CompressError(f"data: {spec} has no split {wanted}{did_you_mean(wanted, found)}; splits: {one_of(found)}")
    return iter(found[wanted])


def _table(spec: str, rows: list[dict], column: str | None) -> list[Sample]:
    """The samples of a table: its column of texts or images, and its column `label` if it has one."""
    if not rows:
        return []
    columns = list(dict.fromkeys(chain.from_iterable(rows[:100])))
    if column is None:
        column = _column(spec, rows, columns)
    elif column not in columns:
        raise CompressError(
            f"data: {spec} has no column {column}{did_you_mean(column, columns)}; columns: {one_of(columns)}"
        )
    labels = next((name for name in ("label", "labels") if name in columns), None)
    samples = []
    for number, row in enumerate(rows, 1):
        value, label = row.get(column), row.get(labels)
        if isinstance(value, str):
            samples.append(Sample(text=value, label=label))
        elif _is_image(value):
            samples.append(Sample(image=value, label=label))
        elif value is not None:
            kind = type(value).__name__
            raise CompressError(f"data: {spec}: {column} of row {number} is a {kind}, it must be a text or an image")
    return samples


def _column(spec: str, rows: list[dict], columns: list[str]) -> str:
    """`text`, `image`, or the only column that can hold samples."""
    for name in ("text", "image"):
        if name in columns:
            return name
    fitting = [name for name in columns if isinstance(rows[0].get(name), str) or _is_image(rows[0].get(name))]
    if len(fitting) != 1:
        raise CompressError(
            f"data: {spec} has no column text or image; name one with column (columns: {one_of(columns)})"
        )
    return fitting[0]


def _is_image(value) -> bool:
    return isinstance(value, bytes) or hasattr(value, "convert") or (isinstance(value, dict) and "bytes" in value)
