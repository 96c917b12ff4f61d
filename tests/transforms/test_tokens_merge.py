"""tokens.merge: the laws of the matching, and the same laws on whole models."""

import copy
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from compress.errors import CompressError
from compress.merge_search import Trial, within
from compress.nn.token_match import Rule, bystanders, match, unmerge
from compress.nn.token_merge import Tokens, carrying
from compress.outputs import relative_error, run
from compress.token_layout import guinea_pig, spares
from compress.token_pictures import patches
from compress.transform import Plan
from compress.transforms.tokens.merge import Merge
from compress.view import View
from compress_kernels.token_merge.reference import merge

shapes = {
    "batch": st.integers(1, 3),
    "tokens": st.integers(2, 24),
    "share": st.floats(0, 0.5),
    "first": st.integers(0, 5),
    "last": st.booleans(),
    "similarity": st.sampled_from(["cosine", "euclidean"]),
    "margin": st.sampled_from([None, 0.4]),
    "seed": st.integers(0, 2**16),
}


def draw(batch, tokens, width=4, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    if ties:
        return torch.randint(0, 2, (batch, tokens, width), generator=generator).double()
    return torch.randn(batch, tokens, width, generator=generator, dtype=torch.float64)


def one_hot(slot, tokens):
    return torch.nn.functional.one_hot(slot, tokens).double()


@settings(deadline=None, max_examples=60)
@given(**shapes, ties=st.booleans())
def test_a_merge_is_a_partition_that_conserves(batch, tokens, share, first, last, similarity, margin, seed, ties):
    x = draw(batch, tokens, seed=seed, ties=ties)
    rule = Rule(share, None, first, last, similarity, margin=margin)
    r = rule.removes(tokens)
    fixed = bystanders(rule, tokens, None, x.device)
    matching = match(x, r, fixed, rule=rule)
    size = torch.randint(1, 9, (batch, tokens), generator=torch.Generator().manual_seed(seed)).float()
    merged, merged_size = merge(x, matching, size)

    assert merged.shape == (batch, tokens - r, 4) and merged_size.dtype == torch.float32
    assert (matching.kept.diff(dim=1) > 0).all(), "the order of the tokens must stay"
    assert torch.cat([matching.kept, matching.gone], 1).sort(1).values.tolist() == [list(range(tokens))] * batch
    assert merged_size.sum(1).equal(size.sum(1))
    torch.testing.assert_close((merged * merged_size[..., None]).sum(1), (x * size[..., None]).sum(1))

    partition = one_hot(matching.slot, tokens - r)  # B, n, n-r
    assert (partition.sum(1) >= 1).all(), "no place may be empty"
    assert (partition.transpose(1, 2) @ size.double()[..., None])[..., 0].equal(merged_size.double())
    means = partition.transpose(1, 2) @ (x * size[..., None]) / merged_size[..., None]
    torch.testing.assert_close(unmerge(merged, matching.slot), partition @ means)

    lonely = partition.sum(1) == 1
    assert merged[lonely].equal(x.gather(1, matching.kept[..., None].expand_as(merged))[lonely])
    protected = [i for i in range(tokens) if i < first or (last and i == tokens - 1)]
    for place in protected:
        here = place if place < first else tokens - r - 1
        assert (matching.slot[:, place] == here).all() and lonely[:, here].all()


@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_rows_of_a_batch_do_not_know_each_other(batch, tokens, share, first, last, similarity, margin, seed):
    x, rule = draw(batch, tokens, seed=seed), Rule(share, None, first, last, similarity, margin=margin)
    fixed = bystanders(rule, tokens, None, x.device)
    matching = match(x, rule.removes(tokens), fixed, rule=rule)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    other = match(x[order], rule.removes(tokens), fixed, rule=rule)
    assert other.slot.equal(matching.slot[order]) and other.kept.equal(matching.kept[order])


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=4),
    extra=st.integers(0, 5),
    left=st.booleans(),
    amount=st.one_of(st.floats(0, 0.5), st.integers(0, 9)),
    first=st.integers(0, 2),
    last=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_padding_changes_nothing(lengths, extra, left, amount, first, last, seed):
    """Every row of a padded batch, over three merges, gives what it gives alone; padding may even be nan."""
    rule = Rule(amount, None, first, last) if isinstance(amount, float) else Rule(0.0, amount, first, last)
    longest = max(lengths) + extra
    rows = [draw(1, length, seed=seed + i) for i, length in enumerate(lengths)]
    # On the left, an odd number of pads would change who is even: pad by an even number.
    before = [(longest - length) // 2 * 2 if left else 0 for length in lengths]
    batch = torch.full((len(rows), longest, 4), torch.nan, dtype=torch.float64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (row, skip) in enumerate(zip(rows, before, strict=True)):
        batch[i, skip : skip + row.shape[1]], mask[i, skip : skip + row.shape[1]] = row[0], True

    tokens = Tokens()
    tokens.see(mask[:, None, None], len(rows))
    current = batch
    for _ in range(1 if left else 3):
        current = tokens.merge(current, rule)
    real = [current[i][tokens.alive[i]] if tokens.slot is not None else current[i][mask[i]] for i in range(len(rows))]
    sizes = [tokens.size[i][tokens.alive[i]] if tokens.slot is not None else None for i in range(len(rows))]
    whole = tokens.unmerge(current)
    for i, row in enumerate(rows):
        alone = Tokens()
        expected = row
        for _ in range(1 if left else 3):
            expected = alone.merge(expected, rule)
        assert real[i].equal(expected[0])
        if alone.size is not None:
            assert sizes[i].equal(alone.size[0])
        assert whole[i, before[i] : before[i] + row.shape[1]].equal(alone.unmerge(expected)[0])


@settings(deadline=None, max_examples=40)
@given(
    ratios=st.lists(st.floats(0.05, 0.5), min_size=1, max_size=5),
    tokens=st.integers(2, 40),
    first=st.integers(0, 2),
    seed=st.integers(0, 2**16),
)
def test_merges_after_each_other_are_one_partition(ratios, tokens, first, seed):
    x, state = draw(2, tokens, seed=seed), Tokens()
    current = x
    for ratio in ratios:
        current = state.merge(current, Rule(ratio, None, first))
    if state.slot is None:
        assert current is x
        return
    partition = one_hot(state.slot, current.shape[1])
    assert (partition.sum(1) == state.size).all()
    means = partition.transpose(1, 2) @ x / state.size[..., None]
    torch.testing.assert_close(current, means)
    assert state.slot.gather(1, state.origin).equal(torch.arange(current.shape[1]).expand(2, -1))
    assert state.unmerge(current).shape == x.shape and state.slot is None


def test_ties_are_broken_by_position():
    x = torch.ones(1, 10, 4)
    matching = match(x, 3)
    assert matching.gone.tolist() == [[0, 2, 4]] and (matching.slot[0, [0, 2, 4]] == matching.slot[0, 1]).all()


def test_equal_tokens_are_merged_first_and_come_back_whole():
    x = draw(2, 12)
    x[:, 7], x[:, 3] = x[:, 4], x[:, 2]
    for similarity in ("cosine", "euclidean"):
        matching = match(x, 2, rule=Rule(similarity=similarity))
        merged, _ = merge(x, matching, torch.ones(2, 12))
        assert matching.gone.sort(1).values.tolist() == [[2, 4]] * 2
        torch.testing.assert_close(unmerge(merged, matching.slot), x, rtol=1e-15, atol=1e-15)


def test_euclidean_sees_length_and_cosine_does_not():
    x = torch.tensor([[[1.0, 0.0], [9.0, 0.0], [1.0, 0.5], [1.0, 1.0]]])
    assert match(x, 1, rule=Rule(similarity="cosine")).slot.tolist() == [[0, 0, 1, 2]]
    assert match(x, 1, rule=Rule(similarity="euclidean")).slot.tolist() == [[0, 1, 2, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sizes_of_half_precision_tokens_count_beyond_2048(dtype):
    x = torch.ones(1, 4, 2, dtype=dtype)
    size = torch.tensor([[2049.0, 1.0, 4097.0, 1.0]])
    merged, after = merge(x, match(x, 2), size)
    assert merged.dtype == dtype and after.dtype == torch.float32
    assert after.tolist() == [[6147.0, 1.0]] and merged.equal(x[:, :2])


def test_removes_never_takes_protected_tokens():
    assert [Rule(0.5, None, 1, True).removes(n) for n in range(8)] == [0, 0, 0, 0, 1, 1, 2, 2]
    assert Rule(0.1).removes(10) == 1 and Rule(0.3).removes(10) == 3  # not 2 from a rounded product
    lengths = torch.arange(40)
    for rule in (Rule(0.37, None, 2), Rule(0.0, 5, 1, True)):
        assert rule.removes_rows(lengths).tolist() == [rule.removes(n) for n in range(40)]


def test_large_tokens_stay_apart_where_their_size_counts():
    """Two pairs, one of them closer but of large tokens: the harmonic size decides."""
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.25, 1.0]]])
    size = torch.tensor([[9.0, 9.0, 1.0, 1.0]])
    for ward, gone in ((0.0, 0), (0.5, 2), (1.0, 2)):
        assert match(x, 1, size=size, rule=Rule(ward=ward)).gone.tolist() == [[gone]]
    assert match(x, 1, size=torch.ones(1, 4), rule=Rule(ward=1.0)).gone.tolist() == [[0]]


def test_only_tokens_in_a_crowd_merge_by_energy():
    crowd, lonely = draw(1, 1, seed=1) + 0.01 * draw(1, 4, seed=2), draw(1, 4, seed=3)
    x = torch.stack([lonely[:, 0], crowd[:, 0], lonely[:, 1], crowd[:, 1], lonely[:, 2], crowd[:, 2]], 1)
    x = torch.cat([x, crowd[:, 3:], lonely[:, 3:]], 1)
    matching = match(x, 2, rule=Rule(margin=0.9))
    places = {1, 3, 5, 6}
    assert set(matching.gone[0].tolist()) < places
    assert {matching.kept[0, slot].item() for slot in matching.slot[0, matching.gone[0]]} < places


@pytest.mark.parametrize("metric", ["features", "keys", "both"])
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_what_is_compared_decides_what_merges(name, metric):
    model, batch = models.MODELS[name]()
    merged = compressed(model, ratio=0.3, metric=metric)
    assert answers(merged, batch).equal(answers(merged, batch))
    if metric == "keys":
        assert not answers(merged, batch).equal(answers(compressed(model, ratio=0.3, metric="features"), batch))


def test_keys_are_compared_as_the_mean_of_the_heads_and_both_whole():
    tokens, x = Tokens(keys=draw(2, 3, seed=1)[:, :, None].expand(2, 3, 5, 4)), draw(2, 5, seed=2)
    assert tokens.compared(x, "features") is x
    torch.testing.assert_close(tokens.compared(x, "keys"), tokens.keys.mean(1))
    both = tokens.compared(3 * x, "both")
    assert both.shape == (2, 5, 4 + 12)
    torch.testing.assert_close(both[..., :4], torch.nn.functional.normalize(x, dim=-1))


def test_shares_and_counts_may_differ_by_block():
    model, pixels = image("vit")
    for options in ({"ratio": (0.5, 0.25, 0.0, 0.0)}, {"r": (8, 2, 0, 0)}):
        merged = compressed(model, **options)
        left = []
        for layer in merged.layers[:3]:
            layer.register_forward_hook(lambda layer, *_, seen=left: seen.append(layer.merge.tokens.size.shape[1]))
        answers(merged, {"pixel_values": pixels})
        assert left == [9, 7, 7]
    with pytest.raises(CompressError, match="ratio has 2 entries, it must have 4"):
        Merge(ratio=(0.1, 0.2)).plan(View(model))
    with pytest.raises(CompressError, match="ratio and flops are both given"):
        Merge(ratio=0.1, flops=0.7).plan(View(model))


@pytest.mark.parametrize("name", ["vit", "bert", "dinov2"])
def test_the_search_keeps_to_its_budget_and_beats_an_even_schedule(name):
    model, batch = models.MODELS[name]()
    view, method = View(model), Merge(flops=0.85, repair=False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = method.calibrate(view, method.plan(view), [batch])
    assert model.state_dict().keys() == before.keys() and not any(hasattr(m, "merge") for m in model.modules())
    trial = Trial.of(view, plan.edits, [batch], method.apply)
    assert 0.6 < trial.share(plan.edits) <= 0.85
    even = within(trial, plan.edits, 0.85)
    assert trial.error(plan.edits) <= trial.error(even)
    tried = plan.notes["schedules"]
    assert len(tried) > 4 and trial.error(plan.edits) == pytest.approx(min(one["error"] for one in tried), rel=1e-5)
    assert set(plan.notes["metric"]) == {"features", "keys", "both"}
    method.apply(view, plan)
    assert answers(model, batch).isfinite().all()


def test_a_budget_of_time_is_one_of_operations_by_measured_times(monkeypatch):
    """Times are a fifth fixed and the rest by operations, here."""
    asked = []

    def paired(calls, **options):
        for call in calls.values():
            call()
        asked.extend(calls)
        return {share: 3 * (0.2 + 0.8 * share) for share in calls}

    monkeypatch.setattr("compress_kernels.timing.paired", paired)
    model, batch = models.MODELS["vit"]()
    view, method = View(model), Merge(latency=0.95, repair=False)
    assert method.needs_data
    plan = method.calibrate(view, method.plan(view), [batch])
    assert plan.notes["operations"] == pytest.approx(0.9375) and asked[:2] == [1.0, 0.9]
    assert Trial.of(view, plan.edits, [batch], method.apply).share(plan.edits) <= 0.9375
    with pytest.raises(CompressError, match=r"latency is 0.1, it must be at least 0.\d+ for this model here"):
        Merge(latency=0.1).calibrate(view, method.plan(view), [batch])
    with pytest.raises(CompressError, match="flops and latency are both given"):
        Merge(latency=0.1, flops=0.5).plan(view)


def test_a_budget_that_merging_cannot_reach_is_refused():
    model, batch = models.MODELS["vit"]()
    view, method = View(model), Merge(flops=0.05)
    with pytest.raises(CompressError, match=r"flops is 0\.05, it must be at least 0\.\d+ for this model"):
        method.calibrate(view, method.plan(view), [batch])


def compressed(model, **options):
    """A copy with merged tokens, through the plan's JSON as a checkpoint keeps it."""
    model = copy.deepcopy(model)
    view = View(model)
    plan = Merge(**options).plan(view)
    Merge.model_construct().apply(view, Plan(json.loads(json.dumps(plan.edits))))
    return model


def answers(model, batch):
    with torch.no_grad():
        return run(model, batch)


def image(name, kind="AutoModel", size=32, **options):
    return models.of(name, kind, **(models.IMAGE | {"num_hidden_layers": 4} | options)), models.noise(3, 3, size, size)


ENCODERS = ["bert", "vit", "dinov2", "clip", "whisper"]


@pytest.mark.parametrize("name", ENCODERS)
def test_every_model_it_takes(name):
    model, batch = models.MODELS[name]()
    stock, merged = answers(model, batch), compressed(model, ratio=0.25)
    out = answers(merged, batch)
    assert out.shape == stock.shape and out.isfinite().all() and not out.equal(stock)
    assert out.equal(answers(merged, batch)), "two runs must agree"
    assert relative_error(out, stock) < 0.6
    assert Merge(r=0).plan(View(model)).edits == {}
    assert answers(model, batch).equal(stock), "the original must not be touched through its copy"
    # Nothing to merge: the hooks and cores are there and change no bit.
    assert answers(compressed(model, ratio=1e-6), batch).equal(stock)
    assert [*merged.state_dict()] == [*model.state_dict()]


@pytest.mark.parametrize(
    ("name", "path", "reason"),
    [
        ("llama", "model.layers.0", "it is causal"),
        ("gpt2", "transformer.h.0", "it is causal"),
        ("swin", "encoder.layers.0.blocks.0", "within windows"),
        ("t5", "encoder.block.0", "positions are those of the full input"),
        ("umt5", "encoder.block.0", "positions are those of the full input (relative_attention_bias)"),
        ("dit", "transformer_blocks.0", "hand on the full image"),
        ("whisper", "model.encoder.layers.1", "last of its stack"),
    ],
)
def test_refused_by_name_with_the_reason(name, path, reason):
    view = View((models.MODELS | models.MORE)[name]()[0])
    plan = Merge().plan(view)
    assert path not in plan.edits and reason in plan.notes["refused"][path]
    with pytest.raises(CompressError, match=f"cannot change {re.escape(path)}: .*{re.escape(reason)}"):
        Merge(only=(path,)).plan(view)


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("vit", {"before": "layernorm_after", "mlp": "mlp"}),
        ("dinov2", {"before": "norm2", "mlp": "mlp"}),
        ("dinov3_vit", {"before": "norm2", "mlp": "mlp"}),
        ("clip", {"before": "layer_norm2", "mlp": "mlp"}),
        ("bert", {"after": "attention"}),
        ("distilbert", {"after": ""}),
    ],
)
def test_the_mlp_is_spared_where_a_block_shows_how(name, point):
    view = View((models.MODELS | models.MORE)[name]()[0])
    for edit in Merge().plan(view).edits.values():
        assert {key: edit.get(key) for key in point} == point


class Block(torch.nn.Module):
    """A norm, an MLP and a residual, put together in one of several ways."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.norm, self.mlp = kind, torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)

    def forward(self, x):
        out = self.mlp(self.norm(x))
        if self.kind in ("gated", "mixing"):
            out = out * (x if self.kind == "gated" else out.mean(1, keepdim=True))
        if self.kind == "normed behind":
            return self.norm(x + out)
        return x + (0.5 * out if self.kind == "scaled" else out)


@pytest.mark.parametrize("kind", ["plain", "scaled", "gated", "normed behind", "mixing"])
def test_only_an_mlp_that_is_added_to_what_it_reads_is_spared(kind):
    x = draw(1, 4, 8).float()
    with torch.no_grad():
        found = spares(guinea_pig(Block(kind)), "mlp", lambda block: block(x))
    assert found == ("norm" if kind in ("plain", "scaled") else "")


@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"r": 3, "match": "energy"}])
def test_a_merge_inside_a_block_is_that_between_its_attention_and_its_mlp(options):
    """As the paper has it, written out by hand."""
    model, pixels = image("vit")
    model, pixels = model.double(), pixels.double()
    merged = compressed(model, proportional=False, **options)
    seen, tokens = [], Tokens()
    with torch.no_grad():
        x = model.embeddings(pixels)
        for layer, twin in zip(model.layers, merged.layers, strict=True):
            x = tokens.merge(x + layer.attention(layer.layernorm_before(x))[0], twin.merge.rule)
            x = x + layer.mlp(layer.layernorm_after(x))
            twin.mlp.fc1.register_forward_hook(lambda *args, n=x.shape[1]: seen.append((args[1][0].shape[1], n)))
        wanted = model.layernorm(unmerge(x, tokens.slot))
    found = answers(merged, {"pixel_values": pixels})
    assert len(seen) == 4 and all(read == left for read, left in seen) and seen[-1][1] < 12
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_merge_twice_is_refused():
    plan = Merge().plan(View(compressed(models.MODELS["vit"]()[0])))
    assert plan.edits == {} and "merges tokens already" in str(plan.notes)


@pytest.mark.parametrize(
    ("name", "kind", "options", "first"),
    [
        ("vit", "AutoModel", {}, 1),
        ("deit", "AutoModel", {}, 2),
        ("dinov2", "AutoModel", {}, 1),
        ("dinov2_with_registers", "AutoModel", {"num_register_tokens": 4}, 5),
        ("siglip_vision_model", "AutoModel", {}, 0),
        ("clip_vision_model", "AutoModel", {}, 1),
    ],
)
def test_special_tokens_keep_their_place(name, kind, options, first):
    model, pixels = image(name, kind, **options)
    plan = Merge(ratio=0.5).plan(View(model))
    rules = [Rule(**edit["rule"]) for edit in plan.edits.values()]
    assert [rule.first for rule in rules] == [first] * 4
    merged, kept, left = compressed(model, ratio=0.5), [], 16 + first
    for path, rule in zip(plan.edits, rules, strict=True):
        block, left = merged.get_submodule(path), left - rule.removes(left)
        tokens = block.merge.tokens
        block.mlp.register_forward_hook(lambda *_, tokens=tokens: kept.append((tokens.slot, tokens.size)))
    out = answers(merged, {"pixel_values": pixels})
    for slot, size in kept:
        assert slot[:, :first].equal(torch.arange(first).expand(3, -1)) and (size[:, :first] == 1).all()
    assert kept[-1][1].shape == (3, left) and out.shape == answers(model, {"pixel_values": pixels}).shape
    # At this ratio every second token goes, so that one more or less protected shows.
    assert first == 0 or not out.equal(answers(compressed(model, ratio=0.5, protect=0), {"pixel_values": pixels}))


def doubled_images(model):
    """Images of a model without positions whose 16 patches are 8 pairs of equal ones, side by side."""
    with torch.no_grad():
        model.get_parameter("embeddings.position_embeddings").zero_()
    patches = models.noise(2, 3, 8, 32)
    row = torch.cat([part.repeat(1, 1, 1, 2) for part in patches.split(8, 3)[:2]], 3)
    rows = [row + i * models.noise(2, 3, 1, 1) for i in range(4)]
    return torch.cat(rows, 2).double()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_merging_equal_tokens_is_exact_when_they_weigh_what_they_stand_for(attention):
    model, _ = image("vit", attn_implementation=attention)
    model = model.double()
    batch = {"pixel_values": doubled_images(model)}
    stock = answers(model, batch)
    for similarity in ("cosine", "euclidean"):
        exact = answers(compressed(model, r=4, similarity=similarity, **{"except": ("layers.2", "layers.3")}), batch)
        torch.testing.assert_close(exact, stock, rtol=1e-6, atol=1e-6)
    light = answers(compressed(model, r=4, proportional=False), batch)
    assert relative_error(light, stock) > 1e-3


def bert(attention="sdpa"):
    return models.text("bert", "AutoModel", num_hidden_layers=4, attn_implementation=attention)[0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"r": 3}, {"ratio": 0.3, "proportional": False}])
def test_a_padded_batch_gives_what_its_rows_give_alone(attention, options):
    merged, lengths = compressed(bert(attention), **options), [12, 7, 2, 9]
    ids, mask = models.tokens(12, batch=4), torch.zeros(4, 14, dtype=torch.long)
    padded = torch.full((4, 14), 0)
    for i, length in enumerate(lengths):
        mask[i, :length], padded[i, :length] = 1, ids[i, :length]
    together = answers(merged, {"input_ids": padded, "attention_mask": mask})
    for i, length in enumerate(lengths):
        alone = answers(merged, {"input_ids": ids[i : i + 1, :length]})
        torch.testing.assert_close(together[i : i + 1, :length], alone, rtol=1e-4, atol=1e-5)
    whole = mask[:, None, None, :].bool().expand(-1, 1, 14, -1)
    if attention == "sdpa":
        torch.testing.assert_close(answers(merged, {"input_ids": padded, "attention_mask": whole}), together)


@settings(deadline=None, max_examples=30)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    width=st.integers(1, 17),
    beyond=st.integers(-3, 9),
    scale=st.floats(0.05, 2),
    seed=st.integers(0, 2**16),
)
def test_log_sizes_in_more_channels_are_those_of_a_mask(tokens, heads, width, beyond, scale, seed):
    chance = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, heads, tokens, width, generator=chance, dtype=torch.float64) for _ in range(2))
    value = torch.randn(2, heads, tokens, max(1, width + beyond), generator=chance, dtype=torch.float64)
    log_size = torch.randint(1, 300, (2, 1, 1, tokens), generator=chance).double().log()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, log_size, scale=scale)
    wide = carrying(query, key, value, log_size, scale)
    assert len({x.shape[-1] for x in wide}) == 1 and wide[0].shape[-1] % 8 == 0
    found = torch.nn.functional.scaled_dot_product_attention(*wide, scale=scale)
    torch.testing.assert_close(found[..., : value.shape[-1]], expected)
    assert (found[..., value.shape[-1] :] == 0).all()
    # In bfloat16 the sizes, in two parts, are no rougher than in a mask of that type.
    half = [x.bfloat16() for x in (query, key, value)]
    exact = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in half), log_size, scale=scale)
    rough = torch.nn.functional.scaled_dot_product_attention(*half, log_size.bfloat16(), scale=scale)
    wide = carrying(*half, log_size.float(), scale)
    fine = torch.nn.functional.scaled_dot_product_attention(*wide, scale=scale)[..., : value.shape[-1]]
    assert (fine - exact).abs().max() <= (rough - exact).abs().max() + 0.02


def test_rows_of_a_batch_are_independent():
    model, pixels = image("vit")
    merged, order = compressed(model, ratio=0.3), torch.tensor([2, 0, 1])
    out = answers(merged, {"pixel_values": pixels})
    torch.testing.assert_close(answers(merged, {"pixel_values": pixels[order]}), out[order], rtol=1e-5, atol=1e-6)


def test_a_failed_or_different_forward_leaves_nothing_behind():
    model, pixels = image("vit")
    merged = compressed(model, ratio=0.3)
    first = answers(merged, {"pixel_values": pixels})

    def fail(*_):
        raise RuntimeError("half-way")

    handle = merged.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        answers(merged, {"pixel_values": pixels})
    assert merged.layers[0].merge.tokens.slot is not None
    handle.remove()
    single = answers(merged, {"pixel_values": pixels[:1]})
    torch.testing.assert_close(single, first[:1], rtol=1e-5, atol=1e-6)
    assert answers(merged, {"pixel_values": pixels}).equal(first)


def test_a_copy_shares_its_state_only_with_itself():
    model, pixels = image("vit")
    merged = compressed(model, ratio=0.3)
    twin = copy.deepcopy(merged)
    states = {id(layer.merge.tokens) for layer in twin.layers} | {
        id(layer.attention.attend.tokens) for layer in twin.layers
    }
    assert len(states) == 1 and id(merged.layers[0].merge.tokens) not in states
    inner = []
    merged.layers[2].register_forward_pre_hook(lambda *_: inner.append(answers(twin, {"pixel_values": pixels[:2]})))
    out = answers(merged, {"pixel_values": pixels})
    torch.testing.assert_close(inner[0], out[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_the_plan_on_meta_gives_the_same_tree(name):
    model, batch = models.MODELS[name]()
    empty = copy.deepcopy(model).to("meta")
    assert Merge().plan(View(empty)).edits == Merge().plan(View(model)).edits != {}
    merged, empty = compressed(model, ratio=0.3), compressed(empty, ratio=0.3)
    assert str(empty) == str(merged)
    batch.pop("attention_mask", None)  # transformers asks for its values, which meta has not
    assert answers(empty, {key: value.to("meta") for key, value in batch.items()}).shape == answers(merged, batch).shape


def test_compiles_without_a_graph_break_and_once():
    model, batch = models.MODELS["vit"]()
    merged = compressed(model, ratio=0.3)
    torch._dynamo.reset()
    compiled = torch.compile(merged, backend="eager", fullgraph=True)
    torch.testing.assert_close(answers(compiled, batch), answers(merged, batch))
    with torch._dynamo.config.patch(error_on_recompile=True):
        answers(compiled, batch)


def test_bfloat16_models_work():
    model, pixels = image("vit")
    merged = compressed(model.bfloat16(), ratio=0.3)
    assert answers(merged, {"pixel_values": pixels.bfloat16()}).dtype == torch.bfloat16


def test_gradient_checkpointing_is_refused():
    model, pixels = image("vit")
    merged = compressed(model, ratio=0.3).train()
    merged.layers[0].gradient_checkpointing = True
    with pytest.raises(CompressError, match="gradient checkpointing"):
        merged(pixel_values=pixels)


def test_backbones_are_refused():
    view = View(image("dinov2", "AutoBackbone")[0])
    assert set(Merge().plan(view).notes["refused"].values()) >= {
        "its model is a backbone that hands out the tokens between its blocks"
    }


@pytest.mark.parametrize(
    ("name", "after"), [("bert", "attention"), ("roberta", "attention"), ("mobilebert", ""), ("distilbert", "")]
)
def test_texts_merge_before_the_mlp_where_the_block_lets_them(name, after):
    model, batch = models.text(name, "AutoModel", num_hidden_layers=3)
    edits = Merge(ratio=0.3).plan(View(model)).edits
    assert {edit["after"] for edit in edits.values()} == {after}
    assert len(edits) == (3 if after else 2)
    assert answers(compressed(model, ratio=0.3), batch).shape == (2, 12, 32)


def test_the_mlp_sees_the_tokens_that_the_rule_leaves():
    merged, seen = compressed(bert(), ratio=0.3), []
    for layer in merged.encoder.layer:
        layer.intermediate.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    answers(merged, {"input_ids": models.tokens(20)})
    assert seen == [14, 10, 7, 5]


def test_masks_it_cannot_follow_are_refused():
    merged = compressed(bert(), ratio=0.3)
    with pytest.raises(CompressError, match="it must be for all 12 tokens"):
        merged.encoder(models.noise(2, 12, 32), attention_mask=torch.ones(2, 12))


def test_a_share_and_a_count_exclude_each_other():
    model, _ = models.MODELS["vit"]()
    with pytest.raises(CompressError, match="ratio and r are both given"):
        Merge(ratio=0.25, r=2).plan(View(model))


def test_pictures_show_the_tokens_that_are_left():
    model, pixels = image("vit")
    view, method = View(model), Merge(ratio=0.25)
    plan = method.calibrate(view, method.plan(view), [{"pixel_values": pixels}])
    shown = plan.notes["pictures"]
    assert len(shown) == 2 and all(one["width"] == 4 and len(one["colours"]) == 16 for one in shown)
    method.apply(view, plan)
    seen = {}
    for number, layer in enumerate(model.layers):
        tokens = layer.merge.tokens
        layer.mlp.register_forward_hook(lambda *_, n=number, tokens=tokens: seen.__setitem__(n, tokens.slot))
    answers(model, {"pixel_values": pixels[:2]})
    for at, one in enumerate(shown):
        assert [*one["groups"]] == [f"layers.{number}" for number in range(4)]
        for number, places in enumerate(one["groups"].values()):
            assert places == seen[number][at, 1:].tolist()
    grey = patches(torch.arange(64.0).view(1, 1, 8, 8), 4)
    assert grey.shape == (1, 2, 2, 3) and grey[0, 0, 0].tolist() == [0, 0, 0] and grey[0, 1, 1].tolist() == [255] * 3
    text, batch = models.MODELS["bert"]()
    view = View(text)
    assert "pictures" not in method.calibrate(view, method.plan(view), [batch]).notes


def test_the_mlp_of_a_wide_block_is_spared_where_heads_are_gone():
    """What is tried with random weights must not drown in rounding."""
    model = models.of("dinov2", "AutoModel", **models.IMAGE | {"hidden_size": 384, "num_attention_heads": 6})
    view = View(model)
    view.keep_heads(view.attentions()[0], [1, 2, 3, 4])
    assert next(iter(Merge().plan(view).edits.values()))["before"] == "norm2"
