"""Where the slimming of tokens begins: clusters of places, the same in all images, and logits that find them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import CompressError
from compress.nn.token_slim import SlimAfter, mixed
from compress.outputs import inputs
from compress.teaching import distance, seen
from compress_kernels.token_merge.reference import wide

IMAGES = 256  # that are looked at
RIDGE = 1e-2  # of the mean second moment of what the logits are made of
SHARPNESS = [2.0**power for power in range(1, 9)]  # of the softmax


@torch.no_grad()
def begin(model: nn.Module, slims: list[SlimAfter], batches: list[dict]) -> list[dict]:
    """Set the weights of these modules, one after the other, since each sees what those before it leave."""
    batches = batches[: -(-IMAGES // len(next(iter(batches[0].values()))))]
    told = []
    for slim in slims:
        found = heard(model, slim, batches)
        if len({x.shape[1:] for x in found}) > 1:
            raise CompressError("tokens.slim: the calibration images differ in size, they must all have as many tokens")
        told.append(settle(slim, torch.cat(found)))
    return told


def image_tokens(model: nn.Module, edits: dict[str, dict], batch: dict) -> dict[str, int]:
    """How many image tokens reach each of these blocks in the original."""
    found = {}

    def keep(path: str):
        return lambda module, args: found.__setitem__(path, args[0].shape[1] - edits[path]["special"])

    hooks = [model.get_submodule(path).register_forward_pre_hook(keep(path)) for path in edits]
    try:
        model(**inputs({name: value[:1] for name, value in batch.items()}))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def recalibration(teacher: nn.Module, batches: list[dict]) -> Callable[[list[Tensor], dict], Tensor]:
    """The distance of the tokens that the last block hands out from the teacher's."""
    with torch.no_grad():
        targets = {id(batch): seen(teacher, batch)[1][-1] for batch in batches}
    return lambda layers, batch: distance(layers[-1], targets[id(batch)])


def heard(model: nn.Module, slim: SlimAfter, batches: list[dict]) -> list[Tensor]:
    """The image tokens that reach a module (B,n,D), in float32 at least."""
    found, before = [], slim.fewer

    def listen(x: Tensor) -> Tensor:
        found.append(x[:, slim.special :].to(wide(x.dtype)))
        return before(x)

    slim.fewer = listen
    try:
        for batch in batches:
            model(**inputs(batch))
    finally:
        del slim.fewer
    return found


def settle(slim: SlimAfter, x: Tensor) -> dict:
    """Weights by which tokens like these (B,n,D) are mixed as their clusters say."""
    count, rank = len(slim.outer), len(slim.inner) // 2
    belongs = F.one_hot(clusters(distances(x), count), count).to(x.dtype)
    normed = F.layer_norm(x, x.shape[-1:]).flatten(0, 1).double()
    mean, target = normed.mean(0), belongs.double().repeat(len(x), 1)
    centred = normed - mean
    gram = centred.T @ centred
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found = torch.linalg.solve(gram + ridge, centred.T @ (target - target.mean(0))).T  # K,D
    # The `rank` combinations of the logits that vary most; all of them where there are no more.
    axes = torch.linalg.eigh(found @ gram @ found.T)[1][:, -rank:]
    inner = axes.T @ found
    slim.inner.copy_(torch.cat([inner, -inner]))
    slim.bias.copy_(torch.cat([-inner @ mean, inner @ mean]))
    errors = {}
    for sharpness in SHARPNESS:  # gelu(z) - gelu(-z) = z
        slim.outer.copy_(sharpness * torch.cat([axes, -axes], 1))
        y, share = mixed(x, slim.logits(x.to(slim.outer.dtype)))
        errors[sharpness] = error(x, share @ y)
    best = min(errors, key=errors.get)
    slim.outer.copy_(best * torch.cat([axes, -axes], 1))
    means = (belongs / belongs.sum(0)).T @ x
    return {"sharpness": best, "left out": errors[best], "by clusters": error(x, belongs @ means)}


def error(x: Tensor, got: Tensor) -> float:
    """Squared error as a share of the variance within the images."""
    return ((x - got).square().sum() / (x - x.mean(1, keepdim=True)).square().sum()).item()


def distances(x: Tensor) -> Tensor:
    """The mean squared distance of each two places over the images (n,n)."""
    return torch.cdist(x, x).square().mean(0)


def clusters(distance: Tensor, count: int) -> Tensor:
    """The cluster of each place (n): by turns the two whose joining adds least to the squared error join (Ward)."""
    cost, size = distance / 2, torch.ones(len(distance), device=distance.device, dtype=distance.dtype)
    cost = cost.masked_fill(torch.eye(len(cost), device=cost.device, dtype=torch.bool), torch.inf)
    home = torch.arange(len(cost), device=cost.device)
    for _ in range(len(cost) - count):
        one, other = divmod(int(cost.argmin()), len(cost))
        total = size + size[one] + size[other]
        row = ((size + size[one]) * cost[one] + (size + size[other]) * cost[other] - size * cost[one, other]) / total
        row[one] = torch.inf
        cost[one], cost[:, one] = row, row
        cost[other] = cost[:, other] = torch.inf
        size[one] += size[other]
        home[home == other] = one
    return home.unique(return_inverse=True)[1]
