"""Where a mixture of heads begins: what every head writes, which vary most, and routers that foresee how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.basis import weight_of
from compress.layer_inputs import real
from compress.nn.head_mixture import HeadMixture
from compress.outputs import inputs
from compress.repair import HELD, Moments, refit, stacked, write
from compress.roles import width_in

RIDGE = 1e-2  # of the mean second moment of what routers read
LEAST = 1e-6  # of a head's mean energy: logarithms end here


@torch.no_grad()
def begin(model: nn.Module, cores: dict[str, HeadMixture], outputs: dict[str, nn.Module], batches: list[dict]) -> None:
    """Set means, the order of the heads, routers and output projections by the data; the gates stay one."""
    wanted = {path: core.active for path, core in cores.items()}
    for core in cores.values():  # while looking, all heads are on
        core.active = len(core.routed_weight)
    means = {path: [torch.zeros_like(core.mean, dtype=torch.float64), 0] for path, core in cores.items()}
    for path, _, out in rows(model, cores, batches):
        means[path][0] += out.double().sum(0)
        means[path][1] += len(out)
    for path, (total, count) in means.items():
        cores[path].mean.copy_(total / max(count, 1))
    gram, against = {}, {}
    for path, x, out in rows(model, cores, batches):
        energies = energy(out - cores[path].mean, weight_of(outputs[path])).double()
        x = torch.cat([x.double(), x.new_ones(len(x), 1).double()], 1)
        target = torch.cat([energies.clamp_min(LEAST * energies.mean()).log(), energies], 1)
        gram[path] = gram.get(path, 0) + x.T @ x
        against[path] = against.get(path, 0) + x.T @ target
    for path in gram:
        route(cores[path], gram[path], against[path])
    mend(model, cores, outputs, batches, wanted)
    for path, core in cores.items():
        core.active = wanted[path]


def mend(
    model: nn.Module, cores: dict[str, HeadMixture], outputs: dict[str, nn.Module], batches: list[dict],
    active: dict[str, int],
) -> None:  # fmt: skip
    """Refit the output projections to what is left of their inputs when only so many heads are on."""
    moments, chance = {path: Moments() for path in cores}, torch.Generator().manual_seed(0)
    for path, query, out in rows(model, cores, batches):
        core, module = cores[path], outputs[path]
        lossless, wider = active[path] == core.active, width_in(module) != core.mean.numel()
        if lossless or wider:  # which also reads something else
            continue
        on = core.chosen(query, active[path])[..., None]
        left = out * on + core.mean * (1 - on)
        held = (torch.rand(len(out), generator=chance) < 1 / HELD).to(out.device)
        moments[path].add(left.flatten(1).float(), module(out.flatten(1)).float(), held)
    for path, found in moments.items():
        if found.xx:
            module = outputs[path]
            stay = torch.ones(width_in(module), dtype=torch.bool)
            write(module, refit(found, stacked(module), stay, module.bias is not None)[0])


def energy(out_RHV: Tensor, weight: Tensor) -> Tensor:
    """The squared length of what each head writes through its columns of the output projection, [rows, heads]."""
    _, heads, width = out_RHV.shape
    weight = weight[:, : heads * width].unflatten(1, (heads, width)).to(out_RHV.dtype)
    return torch.einsum("rhv,ohv->rho", out_RHV, weight).square().sum(-1)


def route(core: HeadMixture, gram: Tensor, against: Tensor) -> None:
    """The heads that write most come first and are shared; the logits of the others foretell their log energy."""
    heads, shared = len(core.mean), len(core.shared_weight)
    total = against[-1, heads:]  # the constant input against the energies: their sums
    core.order.copy_(total.argsort(descending=True))
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    eye[-1, -1] = 0
    found = torch.linalg.solve(gram + RIDGE * gram.diagonal()[:-1].mean() * eye, against[:, :heads])
    routed = found[:, core.order[shared:]]
    core.routed_weight.copy_(routed[:-1].T)
    core.routed_bias.copy_(routed[-1])


def rows(model: nn.Module, cores: dict[str, HeadMixture], batches: list[dict]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Queries [rows, heads * size] and what the heads would write [rows, heads, size], without padding."""
    heard: list[tuple[str, Tensor, Tensor]] = []

    def listen(path: str) -> Callable:
        return lambda inner, args, out: heard.append((path, args[1], out))

    hooks = [core.inner.register_forward_hook(listen(path)) for path, core in cores.items()]
    try:
        for batch in batches:
            model(**inputs(batch))
            mask = batch.get("attention_mask")
            for path, *found in heard:
                query, out = (real(tensor.transpose(1, 2).flatten(2), mask) for tensor in found)
                yield path, query, out.unflatten(1, cores[path].mean.shape)
            heard.clear()
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def unevenness(cores: dict[str, HeadMixture]) -> Iterator[Callable[[], Tensor]]:
    """A function for the mean imbalance of all cores in the last forward."""
    heard: list[Tensor] = []

    def mean() -> Tensor:
        found = torch.stack(heard).mean()
        heard.clear()
        return found

    def listen(core: HeadMixture, args: tuple) -> None:
        heard.append(core.imbalance(args[1]))

    hooks = [core.register_forward_pre_hook(listen) for core in cores.values()]
    try:
        yield mean
    finally:
        for hook in hooks:
            hook.remove()
