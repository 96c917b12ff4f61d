"""The GPU kernels in Triton's interpreter, against float64; bf16 products are silently wrong there."""

import importlib

import pytest
import torch

from compress_kernels.int8_linear.torch_path import plain
from compress_kernels.weight_only_linear.reference import pack, pack_zeros, reference

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def kernel():
    """Imports a kernel package's Triton module."""
    return lambda name: importlib.import_module(f"compress_kernels.{name}.triton")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(monkeypatch):
    """Every fresh output holds NaN until it is written."""
    fresh = torch.Tensor.new_empty

    def new_empty(self, *args, **kwargs):
        out = fresh(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(77)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


@pytest.mark.parametrize(
    ("rows", "depth", "width"), [(1, 64, 64), (17, 100, 33), (70, 130, 65), (3, 1, 1), (130, 33, 130)]
)
@pytest.mark.parametrize("kind", ["dynamic", "factor", "static", "static with zero point", "groups"])
def test_int8_linear_is_the_plain_path_to_the_bit(kernel, monkeypatch, rows, depth, width, kind):
    triton = kernel("int8_linear")
    x = random(rows, depth) * 3 + 1
    weight = (random(width, depth, seed=2) * 50).round().clamp(-127, 127).to(torch.int8)
    factor = random(depth, seed=1).abs() + 0.5 if kind == "factor" else None
    scale = torch.tensor(0.02) if kind.startswith("static") else None
    zero = torch.tensor(100) if kind.endswith("point") else None
    bias = random(width, seed=4) if rows != 70 else None
    arguments = x, weight, random(width, 1, seed=3).abs(), bias, factor, scale, zero
    arguments += (0, 64 if kind == "groups" else 0)
    expected = plain(*arguments)
    poisoned(monkeypatch)
    assert torch.equal(triton.linear(*arguments), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, which the interpreter calculates with
def test_rows_of_zeros_and_of_nan(kernel):
    triton = kernel("int8_linear")
    x = random(6, 40)
    x[0], x[1, 3], x[2], x[4, 0], x[5, 1] = 0, float("nan"), 5, float("inf"), -float("inf")
    arguments = x, torch.ones(8, 40, dtype=torch.int8), torch.ones(8, 1), None, None, None, None
    out = triton.linear(*arguments)
    torch.testing.assert_close(out, plain(*arguments), rtol=0, atol=0, equal_nan=True)
    assert (out[0] == 0).all() and out[[1, 4, 5]].isnan().all() and out[3].isfinite().all()
    torch.testing.assert_close(out[2], torch.full((8,), 200.0))


def test_all_codes_at_their_limits_do_not_saturate(kernel):
    triton = kernel("int8_linear")
    depth = 4096
    x = torch.ones(16, depth)
    x[:, 0] = 0
    weight = torch.full((16, depth), 127, dtype=torch.int8)
    out = triton.linear(x, weight, torch.ones(16, 1), None, None, None, None)
    torch.testing.assert_close(out, torch.full((16, 16), 127.0 * (depth - 1)))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize(
    ("rows", "depth", "width", "groups"), [(1, 128, 64, 2), (5, 96, 33, 3), (33, 50, 70, 1), (20, 24, 9, 3)]
)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_weight_only_linear(kernel, monkeypatch, bits, rows, depth, width, groups, asymmetric):
    triton = kernel("weight_only_linear")
    half = 1 << bits - 1
    draw = torch.Generator().manual_seed(0)
    words = pack(torch.randint(-half, half, (width, depth), generator=draw).to(torch.int8), bits)
    zeros = pack_zeros(torch.randint(-half, half, (width, groups), generator=draw).to(torch.int8), bits)
    scale, bias, factor = random(width, groups, seed=1), random(width, seed=2), random(depth, seed=3).abs()
    weight = words, scale, zeros if asymmetric else None, bias, factor if asymmetric else None, bits
    x = random(rows, depth, seed=4)
    expected = reference(x, *weight)
    poisoned(monkeypatch)
    out = triton.linear(x, *weight)
    assert ((out - expected).norm() / expected.norm()) < 1e-5


def test_weight_only_linear_in_half_precision(kernel):
    triton = kernel("weight_only_linear")
    words = pack(torch.randint(-8, 8, (40, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8), 4)
    weight = words, random(40, 2, seed=1).half(), None, None, None, 4
    x = random(3, 6, 64).half()
    out, expected = triton.linear(x, *weight), reference(x, *weight)
    assert out.dtype == torch.float16 and out.shape == expected.shape
    assert ((out - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.parametrize(("batch", "tokens", "width", "depth"), [(2, 33, 20, 20), (1, 2, 3, 5), (3, 70, 33, 64)])
@pytest.mark.parametrize("euclidean", [False, True])
@pytest.mark.parametrize("ward", [0.0, 0.5])
@pytest.mark.parametrize("priced", [False, True])
def test_token_merge_finds_the_same_pairs(kernel, monkeypatch, batch, tokens, width, depth, euclidean, ward, priced):
    triton, meaning = kernel("token_merge"), importlib.import_module("compress_kernels.token_merge.reference")
    size = torch.randint(1, 5, (batch, tokens), generator=torch.Generator().manual_seed(3)).float()
    alive = torch.arange(tokens)[None] < torch.arange(tokens, tokens - batch, -1)[:, None]
    x = random(batch, tokens, width, seed=1)
    x[~alive] = torch.nan
    fixed, r = ~alive | (torch.arange(tokens) == 0)[None], max(0, (tokens - 1) // 3)
    rows = torch.arange(r, r - batch, -1).clamp(min=0)
    metric = random(batch, tokens, depth, seed=2)
    for padding in ((None, None), (alive, rows)):
        arguments = (
            x.nan_to_num() if padding[0] is None else x,
            metric,
            size * alive,
            fixed,
            *padding,
            r,
            euclidean,
            ward,
            torch.rand(batch, tokens, generator=torch.Generator().manual_seed(5)) + 0.5 if priced else None,
        )
        expected = meaning.reference(*arguments)
        with monkeypatch.context() as patch:
            poisoned(patch)
            found = triton.merge(*arguments)
        for name in ("kept", "gone", "size"):
            assert getattr(found, name).equal(getattr(expected, name)), name
        assert found.slot[alive].equal(expected.slot[alive])
        living = expected.size > 0
        torch.testing.assert_close(found.x[living], expected.x[living], rtol=1e-5, atol=1e-5)
