"""int8 layers fitted to calibration data: factors per channel, the rounding of weights, ranges of activations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.emit import probe_inputs
from compress.errors import CompressError, one_of
from compress.folds import Fold, find_folds, fold
from compress.layer_inputs import Inputs, gather, passes
from compress.linears import weight_owners
from compress.roles import is_conv1d, width_in
from compress.smoothing import ALPHAS, TINY, codes_of, fixed_range, rounded_rows, row_grid, search
from compress.view import View


@dataclass
class Fit:
    """The work on one model, and what it found: settings, tensors and, for the report, choices by layer.

    Folds change the weights of the model, not what it computes. Layers that read the same tensor are worked on as one:
    they share a factor. Layers that share a weight get neither factor nor codes, since theirs must stay the same.
    """

    view: View
    smooth: str | float
    solver: str
    static: bool
    group: int = 0
    alone: set[str] = field(default_factory=set)
    settings: dict[str, dict[str, bool]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))

    @torch.no_grad()
    def run(self, paths: list[str], batches: list[dict]) -> Fit:
        """Fit these layers, as many at a time as fit into memory; layers that never run are left out."""
        if not batches:
            raise CompressError("quantize.int8: the calibration data is empty, it must hold at least one batch")
        owners = weight_owners(self.view)
        alone = self.alone = {path for path in paths if len(owners[id(self.view.module(path).weight)]) == 1}
        places = []
        if self.smooth != "off":
            found = find_folds(self.view, probe_inputs(self.view.model, batches[0], tokens=128))
            places = [place for place in found if alone >= {*place.consumers, *linear_producer(place)}]
        for chunk in passes(self.view, groups(paths, places)):
            seen = gather(self.view, chunk, batches)
            here = [place for place in places if seen.keys() >= set(place.consumers)]
            if self.smooth != "off":
                self.fold(here, seen)
            if self.smooth not in ("off", "fold"):
                self.factors(alone - {path for place in here for path in place.consumers}, seen)
            self.round(alone, seen)
            if self.static:
                self.ranges(seen)
        if idle := [path for path in paths if path not in self.notes["error"] and path in alone]:
            self.notes["remarks"] = [f"never ran on the calibration data, so rounded to nearest: {one_of(idle, 3)}"]
        return self

    def fold(self, places: list[Fold], seen: dict[str, Inputs]) -> None:
        """Fold the best factors into other weights; `seen` follows."""
        for place in sorted(places, key=lambda place: place.kind != "norm"):  # what scales values comes after
            consumers, inputs = list(place.consumers), seen[place.consumers[0]]
            spread = partial(place.spread, width=width_in(self.view.module(consumers[0])))
            alpha, factor = self.search(consumers, inputs, place.narrow, spread)
            if alpha is not None:
                fold(self.view, place, factor)
                seen |= dict.fromkeys(consumers, inputs.times(spread(factor)))
                for path in consumers:
                    self.notes["folded into"][path] = place.producer

    def factors(self, paths: set[str], seen: dict[str, Inputs]) -> None:
        """The best factors that the layers themselves have to keep."""
        for same in readers(seen, paths):
            alpha, factor = self.search(same, seen[same[0]])
            if alpha is not None:
                factor = factor.to(self.view.module(same[0]).weight.dtype)
                seen |= dict.fromkeys(same, seen[same[0]].times(factor.float()))
                for path in same:
                    self.settings.setdefault(path, {})["factor"] = True
                    self.tensors[f"{path}.input_factor"] = factor.clone()

    def search(self, paths: list[str], inputs: Inputs, *channels) -> tuple[float | None, Tensor]:
        """The best alpha and factor for layers that read the same tensor, their outputs brought to the same size."""
        weights = [matrix(self.view.module(path)) for path in paths]
        leveled = [weight / (inputs.rows @ weight.t()).norm().clamp_min(TINY) for weight in weights]
        alphas = ALPHAS if isinstance(self.smooth, str) else (self.smooth,)
        alpha, factor = search(torch.cat(leveled), inputs, alphas, self.rounded, *channels)
        if alpha is not None:
            self.notes["alpha"] |= dict.fromkeys(paths, alpha)
        return alpha, factor

    def rounded(self, inputs: Inputs) -> Tensor:
        """The sample as these layers will see it."""
        return rounded_rows(inputs, self.static, self.group)

    def round(self, paths: set[str], seen: dict[str, Inputs]) -> None:
        """The codes of the weights."""
        for same in readers(seen, paths):
            inputs, weights = seen[same[0]], [matrix(self.view.module(path)) for path in same]
            sizes, weight, dtype = list(map(len, weights)), torch.cat(weights), self.view.module(same[0]).weight.dtype
            factor = self.tensors.get(f"{same[0]}.input_factor")
            if factor is not None:
                weight = weight / factor.float()
            grid = row_grid(weight, dtype)
            codes, solver, error = codes_of(weight, inputs, self.rounded(inputs), self.solver, grid)
            for path, own, scale in zip(same, codes.split(sizes), grid.scale.to(dtype).split(sizes), strict=True):
                self.tensors |= {f"{path}.weight": own.clone(), f"{path}.weight_scale": scale.clone()}
                self.notes["solver"][path], self.notes["error"][path] = solver, error

    def ranges(self, seen: dict[str, Inputs]) -> None:
        """One step and the code of 0 for all inputs of a layer."""
        for path, inputs in seen.items():
            scale, zero = fixed_range(inputs, self.view.module(path).weight.dtype)
            self.tensors |= {f"{path}.input_scale": scale, f"{path}.input_zero_point": zero}
            self.settings.setdefault(path, {})["static"] = True


def linear_producer(place: Fold) -> Sequence[str]:
    """The layer in front, if it is one that is quantized too."""
    return () if place.kind == "norm" else (place.producer,)


def groups(paths: list[str], places: list[Fold]) -> list[list[str]]:
    """The layers so that those which folds tie together stand together, for they are fitted at once."""
    group = {path: [path] for path in paths}
    for place in places:
        tied = (*linear_producer(place), *place.consumers)
        joined = list(dict.fromkeys(path for one in tied for path in group[one]))
        group |= dict.fromkeys(joined, joined)
    return list({id(one): one for one in group.values()}.values())


def readers(seen: dict[str, Inputs], paths: set[str]) -> list[list[str]]:
    """Those of the layers that read the same tensor, together."""
    found = defaultdict(list)
    for path, inputs in seen.items():
        if path in paths:
            found[id(inputs)].append(path)
    return list(found.values())


def matrix(module: nn.Module) -> Tensor:
    """The layer's weight as [out, in] in float32."""
    return (module.weight.t() if is_conv1d(module) else module.weight).float()
