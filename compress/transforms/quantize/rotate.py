"""Rotations that spread outliers over all channels, so that what is quantized next rounds them less; exact by itself.

The residual stream is written in another orthonormal basis (`stream`, R1 of SpinQuant), and so are the values of
every attention between their projection and the output projection (`values`, R2). All of it goes into the weights:
gains of norms and layer scales move into the linear layers that follow them, every layer that writes into the stream
is multiplied by the rotation and every layer that reads it by its inverse. Nothing is left to do at run time and the
format stays that of the model. A Hadamard matrix where its order is a power of two times one of Paley's (12, 20, 28, 36
and so on), else a random one; the notes say which. Products are in float64, and on a batch of the calibration data the
model must answer as before (1e-9 of the answer in float64, 1e-4 in float32), or that rotation is taken back.

A layer norm subtracts the mean, so its stream takes a rotation that maps the mean to itself; the norms stay layer norms
and no mean needs to be folded away. A stream is refused, with the reason, where a norm writes into it (post-norm
encoders, sandwich norms), where something multiplies it by the input (modulated norms of a DiT) and where something
else than linear layers reads its norms (bare encoders, which hand it to the user). The values can be rotated there.

When it hurts: a tied output head must be untied, which costs the size of the embedding table (the notes tell the
bytes; quantize it in a later step). By itself the step makes nothing smaller or faster. It helps where activations have
few bits, not where weights have: if gains of norms hold down channels that carry most of the stream, as in
SmolLM2-135M, where three channels hold half of it, every rotated weight has to be exact enough for those. Perplexity
there, rounded to nearest, 37.1 in float32: W6A6 with a scale a row from 49.1 to 43.9 (45.4 with `values`), W4A4 in
groups of 64 from 1971 to 555, W8A8 from 37.35 to 37.27 (37.66 with `values`), but W4A8 in groups from 55.6 to 102.
Compare with and without.

Papers: Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman, "QuaRot: Outlier-Free 4-Bit
Inference in Rotated LLMs", NeurIPS 2024; Liu, Zhao, Fedorov, Soran, Choudhary, Krishnamoorthi, Chandra, Tian,
Blankevoort, "SpinQuant: LLM Quantization with Learned Rotations", ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import nn

from compress.errors import CompressError
from compress.transform import Field, Plan, Transform
from compress.view import View


class Rotate(Transform):
    """Offline rotations of the residual stream and of the value heads."""

    needs_data: ClassVar[bool] = True
    prepares: ClassVar[bool] = True

    stream: bool = Field(True, description="rotate the residual stream")
    values: bool = Field(True, description="rotate the values of every attention")
    kind: Literal["hadamard", "random"] = Field("hadamard", description="the rotation, where its order exists")
    seed: int = Field(0, ge=0, description="of the random signs or matrices")

    def plan(self, view: View) -> Plan:
        if not self.stream and not self.values:
            raise CompressError("quantize.rotate: stream and values are false, at least one must be true")
        edits, refused = {}, {}
        if self.stream:
            try:
                edits, refused = self.streams(view)
            except CompressError as error:
                refused["residual stream"] = str(error)
        if self.values:
            for attention in view.attentions():
                if not self.takes(attention.path):
                    continue
                if why := attention.refusal or ("" if attention.o else "its output projection is not known"):
                    refused[attention.path] = why
                else:
                    edits[attention.path] = {"values": attention.value_dim}
        return Plan(edits, notes={"refused": refused})

    def streams(self, view: View) -> tuple[dict[str, dict], dict[str, str]]:
        """The edits of the streams, by their norms and untied heads, and why others stay."""
        from compress.stream import find_streams

        edits, refused = {}, {}
        for stream in find_streams(view.model):
            taken = [self.takes(norm) for norm in stream.norms]
            if not any(taken):
                continue
            if not all(taken):
                refused[stream.norms[0]] = "a residual stream can only be rotated as a whole, with all its norms"
            elif stream.refusal:
                refused[stream.norms[0]] = f"its residual stream cannot be rotated: {stream.refusal}"
            elif (heads := tied(view, stream)) and embeddings(view, heads[0]) > 1:
                refused[stream.norms[0]] = "to untie its output head would also part embeddings that share one table"
            else:
                edits |= {path: {"stream": stream.width} for path in marks(view, stream)}
                edits |= {path: {"untie": True} for path in heads}
        return edits, refused

    def calibrate(self, view: View, plan: Plan, batches: list[dict]) -> Plan:
        from compress.emit import probe_inputs
        from compress.stream import find_streams

        edits, refused = {}, dict(plan.notes["refused"])
        streams, values, untied = {}, {}, {}
        proof = Proof(view, probe_inputs(view.model, batches[0]))
        wanted = any("stream" in edit for edit in plan.edits.values())
        for number, stream in enumerate(find_streams(view.model) if wanted else ()):
            paths = [path for path in marks(view, stream) if path in plan.edits]
            if not paths:
                continue
            heads = [path for path in tied(view, stream) if path in plan.edits]
            name, why = self.turn_stream(view, stream, heads, proof, self.seed + number)
            if why:
                refused[paths[0]] = why
                continue
            edits |= {path: plan.edits[path] for path in (*paths, *heads)}
            streams[paths[0]] = f"{name} {stream.width}"
            untied |= {path: view.module(path).weight.nbytes for path in heads}
        for path, settings in plan.edits.items():
            if "values" in settings:
                name, why = self.turn_values(view, path, proof)
                if why:
                    refused[path] = why
                else:
                    edits[path], values[path] = settings, f"{name} {settings['values']}"
        notes = {"refused": refused, "streams": streams, "values": values, "bytes of untied heads": untied}
        return Plan(edits, notes=notes)

    def turn_stream(self, view: View, stream, heads: list[str], proof: Proof, seed: int) -> tuple[str, str]:
        """Rotate a stream; the name of the matrix, and why it was taken back if it was."""
        from compress.basis import rotate_stream
        from compress.rotations import rotation
        from compress.stream import normalizes

        norms = [normalizes(view.module(norm)) for norm in stream.norms]
        matrix, name = rotation(stream.width, self.kind, seed, any(norm.subtracts for norm in norms))

        def turn() -> None:
            untie(view, heads)
            rotate_stream(view.model, stream, matrix)

        return name, proof.refuses(turn, view.model)

    def turn_values(self, view: View, path: str, proof: Proof) -> tuple[str, str]:
        """The same for the values of one attention."""
        from compress.basis import rotate_values
        from compress.rotations import rotation

        attention = view.attention(path)
        matrix, name = rotation(attention.value_dim, self.kind, self.seed)
        touched = nn.ModuleList([view.module(path) for path in attention.projections().values()])
        return name, proof.refuses(lambda: rotate_values(view.model, attention, matrix), touched)

    def apply(self, view: View, plan: Plan) -> None:
        untie(view, [path for path, settings in plan.edits.items() if settings.get("untie")])


class Proof:
    """What the model answered before, and the undoing of a change after which it does not."""

    def __init__(self, view: View, batch: dict) -> None:
        from compress.steps import EXACT
        from compress.stream import normalizes

        self.view, self.batch = view, batch
        self.before = self.answer()
        norms = [norm for module in view.model.modules() if (norm := normalizes(module))]
        self.limit = EXACT[torch.float32 if any(norm.single for norm in norms) else torch.float64]
        self.limit = max(self.limit, EXACT[self.before.dtype])

    @torch.no_grad()
    def answer(self) -> torch.Tensor:
        from compress.outputs import run

        return run(self.view.model, self.batch)

    def refuses(self, change: Callable[[], None], touched: nn.Module) -> str:
        """Make the change; why it was taken back, empty where it stays."""
        from compress.outputs import relative_error

        kept = [
            (module, name, parameter, parameter.detach().clone())
            for module in touched.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        tied = [config for config in configs(self.view.model) if config.tie_word_embeddings]
        try:
            change()
            error = relative_error(self.answer(), self.before)
            if error <= self.limit:
                return ""
            why = f"rotated, the model answers otherwise by {error:.2g}"
        except CompressError as refusal:
            why = str(refusal)
        for module, name, parameter, value in kept:
            parameter.data.copy_(value)
            setattr(module, name, parameter)
        tell(self.view.model, tied, True)
        return why


def marks(view: View, stream) -> list[str]:
    """The modules by which a stream is recorded: its norms, or its readers where norms have no parameters."""
    owners = [path for path in stream.norms if next(view.module(path).parameters(), None) is not None]
    return owners or list(stream.readers)


def tied(view: View, stream) -> list[str]:
    """The readers whose weight is that of a writer."""
    written = {id(view.module(path).weight) for path in stream.writers}
    return [path for path in stream.readers if id(view.module(path).weight) in written]


def embeddings(view: View, head: str) -> int:
    """How many embeddings hold the weight of this head."""
    weight = view.module(head).weight
    return sum(isinstance(m, nn.Embedding) and m.weight is weight for m in view.model.modules())


def untie(view: View, heads: list[str]) -> None:
    """Give these layers weights of their own, and let the config say so; nothing happens where they have."""
    owners = [id(parameter) for module in view.model.modules() for parameter in module._parameters.values()]
    for path in heads:
        head = view.module(path)
        if owners.count(id(head.weight)) > 1:
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
    if heads:
        tell(view.model, configs(view.model), False)


def tell(model: nn.Module, owners: list, is_tied: bool) -> None:
    """Say in these configs whether embeddings are tied, which decides what transformers saves and ties on loading."""
    for config in owners:
        config.tie_word_embeddings = is_tied
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def configs(model: nn.Module) -> list:
    """The configs of the model and its parts that say whether embeddings are tied."""
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    return [config for config in found.values() if hasattr(config, "tie_word_embeddings")]
