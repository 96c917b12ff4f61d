"""PIQA: does a decoder expect the right one of two ways to a goal more, by character?"""

from __future__ import annotations

import json

import torch
from benches.paired import Missing
from benches.tables import ROOT
from torch import nn

TOGETHER = 32  # texts in a batch


@torch.no_grad()
def piqa(model: nn.Module, tokenizer, goals: int) -> float:
    """The share of the first goals where it does (`acc_norm` of the lm-evaluation-harness)."""
    path = ROOT / "models" / "piqa" / "validation.jsonl"
    if not path.exists():
        raise Missing("scripts/fetch piqa")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:goals]]
    texts = [(f"Question: {row['goal']}\nAnswer:", f" {way}") for row in rows for way in row["ways"]]
    found = dict.fromkeys(range(len(texts)), 0.0)
    lengths = {at: len(tokenizer(goal + way)["input_ids"]) for at, (goal, way) in enumerate(texts)}
    order = sorted(lengths, key=lengths.get)
    for start in range(0, len(order), TOGETHER):
        at = order[start : start + TOGETHER]
        found |= dict(zip(at, expected(model, tokenizer, [texts[index] for index in at]), strict=True))
    scores = [found[at] / len(way) for at, (_, way) in enumerate(texts)]
    pairs = zip(scores[::2], scores[1::2], strict=True)
    return sum((second > first) == row["label"] for (first, second), row in zip(pairs, rows, strict=True)) / len(rows)


def expected(model: nn.Module, tokenizer, texts: list[tuple[str, str]]) -> list[float]:
    """The log probability of each second part after its first."""
    whole = [tokenizer(first + second)["input_ids"] for first, second in texts]
    starts = [len(tokenizer(first)["input_ids"]) for first, _ in texts]
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in whole], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([[len(row)] for row in whole])
    logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1].float()
    known = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return [known[at, start - 1 : len(row) - 1].sum().item() for at, (row, start) in enumerate(zip(whole, starts))]
