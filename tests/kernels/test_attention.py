"""Our attention kernel against float64, in every shape of mask, and what it leaves to torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_kernels.attention import attention
from compress_kernels.attention.cpu import CODE, LONGEST, suits
from compress_kernels.attention.reference import plain, reference
from compress_kernels.native import build

SHAPES = [  # batch, heads, kv heads, queries, keys, depth, value depth
    (2, 4, 4, 17, 17, 32, 32),
    (1, 6, 2, 64, 64, 64, 64),
    (1, 3, 1, 25, 90, 40, 24),
    (3, 2, 2, 9, 1, 16, 16),
    (1, 1, 1, 130, 257, 72, 80),
    (1, 2, 2, 49, 63, 5, 3),
    (2, 9, 3, 1, 300, 64, 64),
    (1, 4, 2, 5, 70, 24, 40),
]


ours = pytest.mark.skipif(build(CODE) is None, reason="torch's own path, for want of a compiler or AVX-512")


def inputs(shape, dtype=torch.float32):
    batch, heads, kv_heads, queries, keys, depth, value_depth = shape
    draw = torch.Generator().manual_seed(0)
    sizes = ((queries, heads, depth), (keys, kv_heads, depth), (keys, kv_heads, value_depth))
    return [torch.randn(batch, *size, generator=draw).to(dtype).transpose(1, 2) for size in sizes]


def masks(shape):
    batch, heads, _, queries, keys, *_ = shape
    draw = torch.Generator().manual_seed(1)
    seen = torch.rand(batch, 1, queries, keys, generator=draw) < 0.7
    yield None
    yield seen
    yield (torch.rand(batch, 1, 1, keys, generator=draw) < 0.7).expand(batch, heads, queries, keys)
    yield torch.rand(batch, 1, queries, 1, generator=draw) < 0.9
    yield torch.randn(1, heads, queries, keys, generator=draw)
    yield torch.zeros(batch, 1, queries, keys).masked_fill(~seen, -torch.inf)
    yield torch.zeros(batch, 1, queries, keys).masked_fill(~seen, torch.finfo(torch.float32).min)


def close(result, expected, tolerance):
    """Within the tolerance, relative to the whole; NaN is not."""
    return bool((result - expected).norm() <= tolerance * expected.norm())


@pytest.fixture
def poison(monkeypatch):
    """Every fresh output holds NaN until it is written."""
    fresh = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: fresh(*args, **kwargs).fill_(torch.nan))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_against_float64(shape, causal, poison):
    if causal and shape[3] > shape[4]:
        pytest.skip("no query would see a key")
    query, key, value = inputs(shape)
    for mask in masks(shape):
        expected = reference(query, key, value, mask, None, causal)
        assert close(attention(query, key, value, mask, None, causal), expected, 2e-6)
    assert close(attention(query, key, value, None, 0.3, causal), reference(query, key, value, None, 0.3, causal), 2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_bf16_products(shape, causal, poison):
    if causal and shape[3] > shape[4]:
        pytest.skip("no query would see a key")
    full, rounded = inputs(shape), inputs(shape, torch.bfloat16)
    for mask in masks(shape):
        result = attention(*rounded, mask, None, causal)
        assert result.dtype == torch.bfloat16
        assert close(result.double(), reference(*rounded, mask, None, causal), 3e-3 if build(CODE) else 1e-2)
        result = attention(*full, mask, 0.3, causal, half=True)
        assert result.dtype == torch.float32
        expected = reference(*(tensor.bfloat16() for tensor in full), mask, 0.3, causal)
        assert close(result, expected, 2e-3 if build(CODE) else 1e-2)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 150), st.integers(1, 70), st.integers(1, 70), st.booleans())
def test_odd_sizes(queries, keys, depth, value_depth, causal):
    query, key, value = inputs((1, 2, 1, queries, keys, depth, value_depth))
    assert close(
        attention(query, key, value, None, None, causal), reference(query, key, value, None, None, causal), 5e-6
    )
    expected = reference(query.bfloat16(), key.bfloat16(), value.bfloat16(), None, None, causal)
    assert close(attention(query, key, value, None, None, causal, half=True), expected, 2e-2)


def test_a_query_that_sees_nothing_gets_zeros_and_nan_stays_in_its_row():
    query, key, value = inputs((1, 2, 2, 10, 20, 16, 16))
    mask = torch.ones(1, 1, 10, 20, dtype=torch.bool)
    mask[..., 3, :] = False
    assert (attention(query, key, value, mask)[:, :, 3] == 0).all()
    query[0, 0, 5, 0] = torch.nan
    result = attention(query, key, value)
    assert result[0, 0, 5].isnan().all()
    assert result[0, 0, :5].isfinite().all() and result[0, 1].isfinite().all()


@ours
def test_the_end_of_a_static_cache_is_not_read():
    query, key, value = inputs((2, 6, 2, 1, 200, 32, 32))
    seen = torch.zeros(2, 1, 1, 200, dtype=torch.bool)
    seen[0, ..., :90], seen[1, ..., :17] = True, True
    expected = reference(query, key, value, seen, None, False)
    key[:, :, 90:] = value[:, :, 90:] = torch.nan
    assert close(attention(query, key, value, seen), expected, 2e-6)
    assert close(attention(query, key, value, torch.where(seen, 0.0, -torch.inf)), expected, 2e-6)


def test_large_scores_do_not_overflow():
    query, key, value = inputs((1, 1, 1, 12, 40, 16, 16))
    assert close(
        attention(query * 300, key * 300, value), reference(query * 300, key * 300, value, None, None, False), 1e-4
    )


def test_threads_change_nothing():
    tensors = inputs((2, 8, 4, 200, 200, 64, 64))
    threads = torch.get_num_threads()
    try:
        results = [(torch.set_num_threads(count), attention(*tensors))[1] for count in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@ours
def test_strides_do_not_matter():
    query, key, value = inputs((2, 4, 4, 20, 20, 16, 16))
    expected = attention(query.contiguous(), key.contiguous(), value.contiguous())
    odd = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in (query, key, value)]
    assert torch.equal(attention(query, key, value), expected)
    assert torch.equal(attention(*odd), expected)


def test_what_is_left_to_torch():
    long = inputs((1, 1, 1, 8, LONGEST + 1, 4, 4))
    assert not suits(*long, None)
    double = [tensor.double() for tensor in inputs((1, 2, 2, 20, 20, 16, 16))]
    assert torch.equal(attention(*double), plain(*double, None, None, False))
    trained = [tensor.requires_grad_() for tensor in inputs((1, 2, 2, 20, 20, 16, 16))]
    attention(*trained).sum().backward()
    assert all(tensor.grad is not None for tensor in trained)


def test_the_operator_is_whole():
    query, key, value = inputs((1, 4, 2, 16, 16, 8, 8))
    with torch.no_grad():
        torch.library.opcheck(torch.ops.compress.attention.default, (query, key, value, None, None, True, False))
        compiled = torch.compile(attention, fullgraph=True, backend="eager")
        assert torch.equal(compiled(query, key, value), attention(query, key, value))
    assert attention(query.to("meta"), key.to("meta"), value.to("meta")).shape == query.shape
