"""Merging of tokens by the C kernel against its meaning in torch: who goes where to the index, means to rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress_kernels.token_merge import accelerated, on_cpu, token_merge
from compress_kernels.token_merge.reference import Merged, arranged, costs, merge, reference

pytestmark = pytest.mark.skipif(not accelerated(), reason="no C compiler or no AVX-512 here")


def drawn(batch, tokens, width, depth, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x, metric = (torch.randn(batch, tokens, size, generator=generator).to(dtype) for size in (width, depth))
    size = torch.randint(1, 5, (batch, tokens), generator=generator).float()
    return x, metric, size


def prices(batch, tokens):
    """What makes some tokens three times as costly to merge as others."""
    return torch.rand(batch, tokens, generator=torch.Generator().manual_seed(5)) + 0.5


def same(found: Merged, expected: Merged, tolerance=1e-5):
    for name in ("kept", "gone", "slot", "size"):
        assert getattr(found, name).equal(getattr(expected, name)), name
    assert found.x.dtype == expected.x.dtype
    torch.testing.assert_close(found.x, expected.x, rtol=tolerance, atol=tolerance)


@pytest.fixture
def poison(monkeypatch):
    """Every fresh output holds nonsense until it is written."""
    fresh, empty = torch.Tensor.new_empty, torch.empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kw: fresh(*args, **kw).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty", lambda *args, **kw: empty(*args, **kw).fill_(-7))


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 3), st.integers(2, 150), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1),
    st.booleans(), st.sampled_from([0.0, 0.5, 0.8]), st.booleans(), st.integers(0, 3), st.integers(0, 999),
)  # fmt: skip
def test_odd_sizes(batch, tokens, width, depth, share, euclidean, ward, priced, first, seed):
    x, metric, size = drawn(batch, tokens, width, depth + 1, seed)
    fixed = torch.arange(tokens)[None] < first
    r = int(share * max(0, (tokens - first) // 2))
    price = prices(batch, tokens) if priced else torch.ones(batch, tokens)
    found = on_cpu(x, metric, size, fixed, None, None, r, euclidean, ward, price if priced else None)
    cost = costs(
        metric[:, ::2].double(), metric[:, 1::2].double(), size[:, ::2], size[:, 1::2],
        "euclidean" if euclidean else "cosine", ward,
    ) * price[:, ::2, None] * price[:, None, 1::2]  # fmt: skip
    cost = cost.masked_fill(fixed[:, None, 1::2], torch.inf)
    best = cost.min(-1).values.masked_fill(fixed[:, ::2], torch.inf)
    target = found.kept.gather(1, found.slot.gather(1, found.gone))
    assert not (found.gone % 2).any() and (target % 2).all() and (~fixed.expand(batch, -1)).gather(1, found.gone).all()
    paid = cost.flatten(1).gather(1, found.gone // 2 * cost.shape[2] + target // 2)
    chosen, near = best.sort(dim=1).values[:, :r], 1e-5 * max(1.0, cost[cost.isfinite()].abs().max().item() if r else 0)
    assert ((paid - chosen).abs() <= near).all(), "the cheapest partner of the cheapest, but for rounding"
    meant = arranged(found.gone, target, tokens)
    same(found, Merged(*merge(x, meant, size), meant.kept, found.gone, meant.slot))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("euclidean", [False, True])
@pytest.mark.parametrize("priced", [False, True])
def test_padding_goes_where_a_row_merges_less(dtype, euclidean, priced, poison):
    x, metric, size = drawn(3, 40, 24, 24, 1, dtype)
    alive = torch.arange(40)[None] < torch.tensor([40, 25, 6])[:, None]
    x[~alive] = torch.nan
    metric[~alive], size = 0, size * alive
    fixed, rows = ~alive | (torch.arange(40) == 0)[None], torch.tensor([15, 8, 0])
    arguments = x, metric, size, fixed, alive, rows, 15, euclidean, 0.5, prices(3, 40) if priced else None
    found, expected = on_cpu(*arguments), reference(*arguments)
    assert found.kept.equal(expected.kept) and found.gone.equal(expected.gone)
    assert found.slot[alive].equal(expected.slot[alive])
    living = found.size > 0
    torch.testing.assert_close(found.x[living], expected.x[living], rtol=1e-2, atol=1e-2)
    assert found.x[living].isfinite().all() and found.size.equal(expected.size)


def test_equal_tokens_go_in_their_order_and_others_stay_to_the_bit():
    x = torch.randn(1, 12, 20, generator=torch.Generator().manual_seed(0))
    x[:, 4], x[:, 8] = x[:, 7], x[:, 7]
    found = token_merge(x, x, torch.ones(1, 12), torch.zeros(1, 12, dtype=torch.bool), None, None, 2, True, 0.5)
    assert found.gone.tolist() == [[4, 8]] and found.size.sum() == 12
    at = found.slot[0, 4]
    assert found.slot[0, 8] == found.slot[0, 7] == at and found.size[0, at] == 3
    stayed = [index for index in range(10) if index != at]
    assert found.x[0, stayed].equal(x[0, found.kept[0, stayed]])


def test_threads_change_nothing():
    x, metric, size = drawn(8, 65, 32, 32, 3)
    arguments = x, metric, size, torch.zeros(1, 65, dtype=torch.bool), None, None, 20, False, 0.5
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(on_cpu(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(one.equal(two) for one, two in zip(*found, strict=True))


def test_the_operator_is_whole():
    x, metric, size = drawn(2, 17, 8, 8, 4)
    arguments = x, metric, size, torch.zeros(1, 17, dtype=torch.bool), None, None, 5, False, 0.5, prices(2, 17)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.compress.token_merge.default, arguments)
        torch.library.opcheck(torch.ops.compress.token_merge.default, arguments[:-1])
        compiled = torch.compile(token_merge, fullgraph=True, backend="eager")
        same(compiled(*arguments), token_merge(*arguments), 0)
    trained = x.clone().requires_grad_()
    token_merge(trained, *arguments[1:]).x.sum().backward()
    assert trained.grad.isfinite().all()
    double = token_merge(x.double(), metric.double(), *arguments[2:])
    assert double.x.dtype == torch.float64
