"""The linear layers of a model rounded by calibration data: factors on their inputs first, then codes, in stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from compress.awq import best_boost, boosted
from compress.emit import probe_inputs
from compress.folds import Fold, find_folds, fold
from compress.gptq import gptq, gram_error, ordered_root, round_all
from compress.quick import quick_products
from compress.roles import is_conv1d, width_out
from compress.rounding import Grid, dequantize, rtn, searched
from compress.sequential import Stage, stages
from compress.signround import signround
from compress.view import View

SET_APART = 4  # one batch in so many, where solvers compete
BOOSTED = ("awq", "auto", "signround")  # with factors on the inputs where the layer before can take them


@dataclass(frozen=True)
class Rounded:
    """What a layer is built from, and the relative error of its outputs then."""

    codes: Tensor
    grid: Grid
    solver: str
    error: float
    factor: Tensor | None = None  # that the inputs are multiplied with before they meet these codes

    def tensors(self) -> dict[str, Tensor]:
        """By name; what there is not is left out."""
        named = {"codes": self.codes, "scale": self.grid.scale, "zero_point": self.grid.zero_point()}
        return {name: tensor for name, tensor in (named | {"input_factor": self.factor}).items() if tensor is not None}

    def weight(self) -> Tensor:
        """The weight that the layer has in effect."""
        weight = dequantize(self.codes, self.grid)
        return weight if self.factor is None else weight * self.factor


def solve(
    view: View, edits: dict[str, dict], solver: str, batches: list[dict]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Round the layers of `edits` (path -> bits, group, symmetric) and put the values into their weights.

    Returns what the layers are built from, as `path.name`, and the relative error of each one's outputs. Every edit is
    told its solver, and whether a factor on the inputs stays with the layer.
    """
    held = len(batches) // SET_APART if solver == "auto" else 0
    places = find_folds(view, probe_inputs(view.model, batches[0], tokens=128)) if solver in BOOSTED else []
    sharing = defaultdict(list)
    for path in edits:
        sharing[id(view.module(path).weight)].append(path)
    twins = {paths[0]: paths for paths in sharing.values()}  # one of the layers that share a weight stands for all
    found, errors = {}, {}
    for stage in stages(view, twins, batches, held, targets=solver == "signround"):
        folded = [path for place in places for path in fold_boost(view, place, stage, edits, solver, set(errors))]
        results = {}
        for paths in alike(stage, edits):
            own = solver == "awq" and paths[0] not in folded
            results |= round_together(view, paths, stage, edits[paths[0]], solver, own)
        if solver == "signround" and stage.block:
            results = refined(view, stage, results)
        for path, result in results.items():
            put(view.module(path), result.weight())
            for twin in twins[path]:
                edits[twin] |= {"solver": result.solver} | ({} if result.factor is None else {"input_factor": True})
                errors[twin] = result.error
                found |= {f"{twin}.{name}": tensor for name, tensor in result.tensors().items()}
    return found, errors


def alike(stage: Stage, edits: dict[str, dict]) -> list[list[str]]:
    """The layers of a stage, those together that share their inputs and settings."""
    groups = defaultdict(list)
    for path, moment in stage.moments.items():
        edit = edits[path]
        groups[id(moment), edit["bits"], edit["group"], edit["symmetric"]].append(path)
    return list(groups.values())


def fold_boost(
    view: View, place: Fold, stage: Stage, edits: dict[str, dict], solver: str, done: set[str]
) -> list[str]:  # fmt: skip
    """Move the best factor on the inputs behind a fold into its producer; the layers that it was sought for."""
    paths = [path for path in place.consumers if path in stage.moments]
    if not paths or place.producer in done or len({id(stage.moments[path]) for path in paths}) > 1:
        return []

    def share(values: Tensor) -> Tensor:
        return place.spread(place.narrow(values), len(values))

    factor = boost(view, paths, stage, edits[paths[0]], solver, share)
    if factor is not None:
        fold(view, place, 1 / place.narrow(factor))
        for moments in (stage.moments, stage.held):
            if paths[0] in moments:
                moments |= dict.fromkeys(paths, boosted(moments[paths[0]], factor))
    return paths


def boost(
    view: View, paths: list[str], stage: Stage, edit: dict, solver: str, share: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The best factor on the inputs that these layers share, by the solver that will round them."""
    weight = torch.cat([rows_of(view.module(path)) for path in paths])
    dtype = view.module(paths[0]).weight.dtype

    def rounded(rows: Tensor, factor: Tensor) -> Tensor:
        rows = rows * factor
        made = fitted_grid(rows, moment.diagonal() / factor**2, edit, dtype)
        # the root of the boosted moment, without another Cholesky decomposition
        codes = rtn(rows, made) if solver == "awq" else round_all(rows, order, root / factor[order], made)
        return dequantize(codes, made) / factor

    moment = stage.moments[paths[0]]
    order, root = ordered_root(moment)
    return best_boost(weight, moment, stage.held.get(paths[0], moment), rounded, share)


def round_together(
    view: View, paths: list[str], stage: Stage, edit: dict, solver: str, own_factor: bool
) -> dict[str, Rounded]:
    """Round layers that share their inputs, with a factor of their own where it is asked for and helps."""
    modules = [view.module(path) for path in paths]
    weight, dtype = torch.cat([rows_of(module) for module in modules]), modules[0].weight.dtype
    moment, held = stage.moments[paths[0]], stage.held.get(paths[0])
    factor = boost(view, paths, stage, edit, solver, lambda values: values) if own_factor else None
    if factor is not None:
        factor = (1 / factor).to(dtype).float()
        weight, moment = weight / factor, boosted(moment, 1 / factor)
    kept = rounding(weight, moment, edit, dtype, solver)
    errors = {
        name: output_error(weight, dequantize(*each), moment if held is None else held) for name, each in kept.items()
    }
    best = min(errors, key=errors.get)
    codes, made = kept[best] if held is None else rounding(weight, moment + held, edit, dtype, solver)[best]
    sizes = [width_out(module) for module in modules]
    parts = zip(paths, codes.split(sizes), made.split(sizes), strict=True)
    return {path: Rounded(codes, made, best, errors[best], factor) for path, codes, made in parts}


def rounding(
    weight: Tensor, moment: Tensor, edit: dict, dtype: torch.dtype, solver: str
) -> dict[str, tuple[Tensor, Grid]]:
    """The codes and the grid that a solver finds, or those of all that compete, by name."""
    made = fitted_grid(weight, moment.diagonal(), edit, dtype)
    found = {}
    if solver != "awq":
        found["gptq" if solver == "auto" else solver] = gptq(weight, moment, made), made
    if solver in ("awq", "auto"):
        found["awq"] = rtn(weight, made), made
    return found


def fitted_grid(weight: Tensor, importance: Tensor, edit: dict, dtype: torch.dtype) -> Grid:
    """The grid with the ranges that are best for inputs of this size."""
    return searched(weight, edit["bits"], edit["group"], edit["symmetric"], dtype, importance, norm=2)


def refined(view: View, stage: Stage, results: dict[str, Rounded]) -> dict[str, Rounded]:
    """The results after learning them together for the answers of the whole block."""
    names = {path.removeprefix(stage.block + "."): path for path in results}
    layers = {
        name: (rows_of(view.module(path)), results[path].codes, results[path].grid) for name, path in names.items()
    }
    dtype = view.module(next(iter(results))).weight.dtype
    found = signround(view.module(stage.block), layers, stage.calls, stage.targets, dtype)
    return {
        path: replace(
            results[path], codes=codes, grid=made,
            error=output_error(layers[name][0], dequantize(codes, made), stage.moments[path]),
        )
        for name, path in names.items()
        for codes, made in [found[name]]
    }  # fmt: skip


def output_error(weight: Tensor, other: Tensor, moment: Tensor) -> float:
    """The relative error of the outputs of a layer with another weight."""
    with quick_products():  # not for the error itself, whose parts cancel
        whole = gram_error(weight, torch.zeros_like(weight), moment).sum()
    return (gram_error(weight, other, moment).sum() / whole.clamp_min(1e-30)).sqrt().item()


def rows_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in] in float32."""
    weight = module.weight.detach().float()
    return weight.t() if is_conv1d(module) else weight


@torch.no_grad()
def put(module: nn.Module, weight: Tensor) -> None:
    """Give a linear layer this weight [out, in]."""
    module.weight.copy_(weight.t() if is_conv1d(module) else weight)
