"""int8_mlp: to the bit what two int8 layers compute, whatever the shapes, types and threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import compress_kernels.int8_mlp as kernel
from compress import flops
from compress.nn.int8_linear import Int8Linear
from compress.nn.int8_mlp import Int8Mlp
from compress_kernels.int8_linear import int8_linear
from compress_kernels.int8_linear.torch_path import FUNCTIONS
from compress_kernels.int8_mlp import SCHEMA, int8_mlp, plain
from compress_kernels.int8_mlp.source import SOURCES
from compress_kernels.native import build


def layer(depth, width, factor=False, bias=True):
    generator = torch.Generator().manual_seed(depth + width)
    weight = torch.randint(-127, 128, (width, depth), generator=generator).to(torch.int8)
    scale, offset = torch.rand(width, 1, generator=generator) * 0.01, torch.randn(width, generator=generator)
    return weight, scale, offset if bias else None, torch.rand(depth, generator=generator) + 0.5 if factor else None


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def one_after_the_other(x, up, down, activation, group=0):
    return int8_linear(int8_linear(x, *up, activation=activation, group=group), *down, group=group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 8, 9, 23, 24, 61, 130, 500])
def test_equals_two_layers_to_the_bit(count, dtype, threads):
    for depth, between, width in ((70, 130, 33), (64, 2100, 65), (1, 1, 1)):
        x = rows(count, depth).to(dtype)
        for group in (0, 64):
            up, down = layer(depth, between, factor=group == 64), layer(between, width, factor=True, bias=group == 0)
            for _ in range(2):  # the memory of the first answer may be given to the second
                got = int8_mlp(x, up, down, "gelu", group)
                assert got.dtype == dtype and torch.equal(got, one_after_the_other(x, up, down, "gelu", group))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 200), st.integers(1, 140), st.integers(1, 300), st.integers(1, 140), st.sampled_from(list(FUNCTIONS))
)
def test_equals_two_layers_at_any_size(count, depth, between, width, activation):
    x, up, down = rows(count, depth), layer(depth, between), layer(between, width)
    assert torch.equal(int8_mlp(x, up, down, activation), one_after_the_other(x, up, down, activation))


@pytest.mark.parametrize("number", range(len(SOURCES)), ids=["wide", "narrow"])
def test_each_c_kernel_equals_two_layers(number, threads):
    name = f"int8_mlp_{number}"
    if not hasattr(torch.ops.compress, name):
        library = build(SOURCES[number])
        if library is None:
            pytest.skip("no C compiler, or a processor without these instructions")
        torch.library.define(f"compress::{name}", SCHEMA)
        assert library.install(name.encode()) == 0
    for count in (1, 30, 500):
        for depth, between, width in ((70, 130, 33), (64, 2100, 65)):
            x, up, down = rows(count, depth), layer(depth, between), layer(between, width)
            got = getattr(torch.ops.compress, name)(x, *up, *down, list(FUNCTIONS).index("relu"), 64)
            assert torch.equal(got, one_after_the_other(x, up, down, "relu", 64))


def test_any_leading_dimensions_other_types_and_no_rows():
    up, down = layer(24, 40), layer(40, 10)
    for x in (rows(6, 7, 48)[..., ::2], rows(24), rows(2, 0, 24), rows(3, 24).double(), rows(30, 24).half()):
        got = int8_mlp(x, up, down, "silu")
        assert got.shape == (*x.shape[:-1], 10) and got.dtype == x.dtype
        assert torch.equal(got, one_after_the_other(x, up, down, "silu"))


def test_broken_rows_stay_among_themselves():
    up, down = layer(24, 40), layer(40, 10)
    clean = rows(100, 24)
    x = clean.clone()
    x[3, 5] = torch.nan
    got = int8_mlp(x, up, down, "gelu")
    expected = int8_mlp(clean, up, down, "gelu")
    assert got[3].isnan().all()
    assert torch.equal(got[:3], expected[:3]) and torch.equal(got[4:], expected[4:])


def test_works_without_a_c_kernel(monkeypatch):
    monkeypatch.setattr(kernel, "accelerated", lambda: False)
    arguments = rows(50, 24), *layer(24, 40), *layer(40, 10), 2, 0
    assert torch.equal(kernel._default(*arguments), plain(*arguments))


def test_is_registered_as_torch_wants_it_and_stays_one_operator():
    arguments = rows(30, 24), *layer(24, 40), *layer(40, 10), 2, 64
    assert set(torch.library.opcheck(torch.ops.compress.int8_mlp.default, arguments).values()) == {"SUCCESS"}
    module = Int8Mlp(*(Int8Linear.from_linear(linear) for linear in (nn.Linear(24, 40), nn.Linear(40, 10))))
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        assert torch.equal(torch.compile(module, backend=backend, fullgraph=True)(rows(30, 24)), module(rows(30, 24)))
    assert seen == ["compress.int8_mlp.default"]


def test_gradients_are_those_of_two_layers():
    up, down = layer(24, 40, factor=True), layer(40, 10)
    left, right = rows(3, 24).requires_grad_(), rows(3, 24).requires_grad_()
    int8_mlp(left, up, down, "gelu").sum().backward()
    one_after_the_other(right, up, down, "gelu").sum().backward()
    assert left.grad.abs().max() > 0 and torch.equal(left.grad, right.grad)


def test_counts_as_its_two_products_even_before_it_ever_ran(monkeypatch):
    monkeypatch.setattr(torch.ops.compress, "_dir", [])
    module = Int8Mlp(*(Int8Linear.from_linear(linear) for linear in (nn.Linear(24, 40), nn.Linear(40, 10))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = module

        def forward(self, x):
            return self.mlp(x)

    assert flops.count(Model(), {"x": rows(7, 24)}) == 2 * 7 * (24 * 40 + 40 * 10)
