"""llm-compressor's GPTQ on given token windows; run by the Python of an environment that has it, prints its cost."""

import json
import resource
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(folder: str, windows: str, bits: str, group: str, out: str) -> None:
    """Quantize the linear layers but the head, symmetric, with the tool's own defaults, and save them."""
    ids = load_file(windows)["input_ids"]
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    weights = {
        "num_bits": int(bits),
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": int(group),
    }
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    started = time.process_time()
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    seconds = time.process_time() - started
    model.save_pretrained(out, save_compressed=True)
    # On Linux the peak is in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "cpu_seconds": time.process_time(), "peak_bytes": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
