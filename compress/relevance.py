"""Layer-wise relevance propagation through any model that is made of torch functions, without touching its code.

The answer's relevance flows back through the graph in the place of gradients. Linear maps hand it to their inputs by
the positive contributions (the alpha-beta rule with alpha 1), products of two inputs half to each, sums by the size
of the addends, elementwise functions, norms and softmax as it is. It stays positive, and its sum stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compress.errors import CompressError
from compress.outputs import answer, inputs
from compress.probing import frozen, is_logits

SLACK = 1.01  # what rounding may make of a sum that should stay
# Torch functions by their names, to which a method's underscores and sides are no matter.
SAME = re.compile(
    r"\w*(relu|elu|softmax|_norm)\d?|gelu|silu|tanh|sigmoid|hardtanh|hardswish|mish|softplus|erf|exp|log|pow|square|abs|neg"
    r"|normalize|i?(true)?div"
)
SCALES = re.compile(r"r?sqrt|reciprocal|r(true)?div|var|std|norm")  # what only scales others explains nothing
LINEAR = re.compile(r"linear|matmul|bmm|conv(_transpose)?[123]d")
SUM = re.compile(r"[ir]?(add|sub)")
PRODUCT = re.compile(r"[ir]?mul")
ANEW = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div}  # in place would spoil what is kept


def relevance(model: nn.Module, layers: dict[str, nn.Module], batches: list[dict]) -> dict[str, float]:
    """The relevance that passes through each layer's output, of 1 for all answers together."""
    found, total = dict.fromkeys(layers, 0.0), 0.0

    def at_output(path: str) -> Callable:
        def add(passed: Tensor) -> None:
            found[path] += passed.sum().item()

        def hook(module: nn.Module, arguments: tuple, output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            output.register_hook(add)
            return output

        return hook

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        for module in tables:
            stack.callback(module.register_forward_hook(lambda m, a, output: output.detach().requires_grad_()).remove)
        for path, module in layers.items():
            stack.callback(module.register_forward_hook(at_output(path)).remove)
        for batch in batches:
            call = {name: wanting(value) for name, value in inputs(batch).items()}
            with torch.enable_grad(), Propagation():
                output = model(**call)
            start = seed(output)
            answer(output).backward(start)
            total += start.sum().item()
    worst = max(found, key=found.get)
    if not found[worst] <= total * SLACK:
        raise CompressError(f"sensitivity lrp: relevance is not kept on the way back to {worst}; take another estimate")
    return {path: value / total for path, value in found.items()}


def wanting(value):
    """A tensor of numbers as a leaf that relevance can reach."""
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def seed(output) -> Tensor:
    """The relevance to start from: 1 at each prediction's first choice, or features by their size."""
    main = answer(output).detach()
    if is_logits(output):
        return torch.zeros_like(main).scatter_(-1, main.argmax(-1, keepdim=True), 1)
    return main.abs() / main.abs().sum().clamp_min(torch.finfo(main.dtype).tiny)


class Route(torch.autograd.Function):
    """Passes a value on; backward, `back` says what of the relevance goes to each operand."""

    @staticmethod
    def forward(ctx, value: Tensor, back: Callable, *operands: Tensor) -> Tensor:
        ctx.back = back
        return value.view_as(value)

    @staticmethod
    def backward(ctx, passed: Tensor):
        return None, None, *ctx.back(passed)


class Propagation(TorchFunctionMode):
    """While this mode is on, backward through what is computed hands relevance instead of gradients."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.strip("_")
        with self:
            if name == "scaled_dot_product_attention":
                return attention(*args, **kwargs)
            if name == "addmm":  # transformers' Conv1D
                return torch.matmul(args[1], args[2]) + args[0]
            if name == "baddbmm":
                return torch.bmm(args[1], args[2]) * kwargs.get("alpha", 1) + args[0] * kwargs.get("beta", 1)
        wants = [arg for arg in args[:2] if isinstance(arg, Tensor) and arg.requires_grad]
        if not wants or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if SCALES.fullmatch(name) or (name.endswith("div") and wants[0] is not args[0]):
            return func(*args, **kwargs).detach()
        if LINEAR.fullmatch(name):
            return by_contribution(func, args, kwargs)
        if name == "sum":
            return by_count(func, args, kwargs)
        func = ANEW.get(name.removeprefix("i").replace("true", ""), func)
        if SUM.fullmatch(name):
            return Route.apply(func(*args, **kwargs).detach(), lambda passed: by_size(passed, args[:2]), *wants)
        if PRODUCT.fullmatch(name) or SAME.fullmatch(name):
            heirs = wants if PRODUCT.fullmatch(name) else wants[:1]
            return Route.apply(func(*args, **kwargs).detach(), lambda passed: equally(passed, heirs), *heirs)
        return func(*args, **kwargs)


def by_count(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """A sum over dimensions: the same to all entries."""
    share = func(args[0].detach(), *args[1:], **kwargs).numel() / args[0].numel()
    return func(Route.apply(args[0].detach(), lambda passed: (passed * share,), args[0]), *args[1:], **kwargs)


def equally(passed: Tensor, heirs: list[Tensor]) -> tuple[Tensor, ...]:
    """The same to each."""
    return tuple((passed / len(heirs)).sum_to_size(heir.shape) for heir in heirs)


def by_size(passed: Tensor, addends: tuple) -> tuple[Tensor, ...]:
    """To the addends by their magnitudes, entry by entry; all to one that is alone in being explained."""
    wants = [addend for addend in addends if isinstance(addend, Tensor) and addend.requires_grad]
    if len(wants) == 1:
        return (passed.sum_to_size(wants[0].shape),)
    first, second = (addend.detach().abs() for addend in wants)
    both = first + second
    share = torch.where(both > 0, first / both, 0.5)
    return (passed * share).sum_to_size(first.shape), (passed * (1 - share)).sum_to_size(second.shape)


def by_contribution(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """A map that is linear in its first two arguments: relevance goes the ways of the positive products."""
    pair, rest = args[:2], args[3:]
    if len(pair) < 2:  # conv layers may name their weight
        return func(*args, **kwargs)
    options = {name: value for name, value in kwargs.items() if name != "bias"}
    has_bias = len(args) > 2 or "bias" in kwargs
    heirs = [index for index in (0, 1) if pair[index].requires_grad]

    def back(passed: Tensor) -> tuple[Tensor, ...]:
        (up, down), (more, less) = parts = [
            [part.requires_grad_() for part in (x.detach().clamp(min=0), x.detach().clamp(max=0))] for x in pair
        ]
        filler = (None,) if has_bias else ()

        def total(*ways) -> Tensor:
            return sum(func(*way, *filler, *rest, **options) for way in ways)

        with torch.enable_grad():
            sums = total((up, more), (down, less))
            small = torch.finfo(sums.dtype).tiny ** 0.5  # dividing by less would overflow
            if (sums <= small).any():  # nothing speaks for this output, so by what speaks against it
                sums = torch.where(sums <= small, total((up, less), (down, more)), sums)
        wanted = [part for index in heirs for part in parts[index]]
        slopes = torch.autograd.grad(sums, wanted, torch.where(sums.abs() <= small, 0, passed / sums))
        given = [part.detach() * slope for part, slope in zip(wanted, slopes)]
        return tuple((plus + minus) / len(heirs) for plus, minus in zip(given[::2], given[1::2]))

    return Route.apply(func(*args, **kwargs).detach(), back, *[pair[index] for index in heirs])


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Attention in single steps."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.matmul(query, key.transpose(-1, -2)) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return torch.matmul(torch.softmax(scores, -1), value)
