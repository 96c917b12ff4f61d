"""tokens.merge by criteria, by sizes and by importance: against the papers' maths in loops, and on whole models."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import models
from compress.errors import CompressError
from compress.merge_search import Trial
from compress.nn.token_match import Rule, bystanders, match
from compress.nn.token_merge import Tokens
from compress.outputs import relative_error, run
from compress.transform import Plan
from compress.transforms.tokens.merge import Merge
from compress.view import View
from compress_kernels.token_merge.reference import merge

KINDS = ["bipartite", "criteria", "sizes"]
cases = {
    "batch": st.integers(1, 3),
    "tokens": st.integers(2, 20),
    "share": st.floats(0.1, 0.5),
    "first": st.integers(0, 3),
    "last": st.booleans(),
    "weighed": st.booleans(),
    "seed": st.integers(0, 2**16),
}


def drawn(batch, tokens, seed):
    """Tokens, how many each stands for, and how important each is."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, 4, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 9, (batch, tokens), generator=generator).float()
    return x, size, torch.rand(batch, tokens, generator=generator, dtype=torch.float64) + 0.1


def pairs(matching):
    """Who goes where, in every row."""
    into = matching.kept.gather(1, matching.slot.gather(1, matching.gone))
    return [dict(zip(*row, strict=True)) for row in zip(matching.gone.tolist(), into.tolist(), strict=True)]


def proposals(goes, stays, like, number):
    """Each that may go proposes the one it is most like; the best of the proposals."""
    best = [(max((like(a, b), -b) for b in stays), a) for a in goes] if stays else []
    return [(a, -b) for (_, b), a in sorted(best, key=lambda one: (-one[0][0], one[1]))[:number]]


@settings(deadline=None, max_examples=80)
@given(**cases)
def test_criteria_against_the_paper_in_loops(batch, tokens, share, first, last, weighed, seed):
    """MCTF: likeness, 1/20 of the inverse attention and 1/40 of the inverse size; r/2 from A to B, r/2 back."""
    x, size, weight = drawn(batch, tokens, seed)
    rule = Rule(share, None, first, last, match="criteria")
    r, fixed = rule.removes(tokens), bystanders(rule, tokens, None, x.device)
    found = pairs(match(x, r, fixed, size=size, rule=rule, weight=weight if weighed else None))
    free = [i for i in range(tokens) if first <= i < tokens - int(last)]
    for row in range(batch):

        def like(a, b, row=row):
            s, u = size[row].double(), weight[row]
            near = (1 + torch.cosine_similarity(x[row, a], x[row, b], dim=0)) / 2
            attention = (1 / u[a] * 1 / u[b]) ** (1 / 20) if weighed else 1.0
            return (near * attention * (1 / s[a] * 1 / s[b]) ** (1 / 40)).item()

        even, odd = [i for i in free if i % 2 == 0], [i for i in free if i % 2]
        there = proposals(even, odd, like, r - r // 2)
        gone, hit = {a for a, _ in there}, {b for _, b in there}
        back = proposals([b for b in odd if b not in hit], [a for a in even if a not in gone], like, r // 2)
        assert found[row] == dict(there + back)


@settings(deadline=None, max_examples=80)
@given(**cases)
def test_sizes_against_the_paper_in_loops(batch, tokens, share, first, last, weighed, seed):
    """ATM: the small half of the tokens to the large one, by n m / (n + m) times 1 - cos, here to the power `ward`."""
    x, size, weight = drawn(batch, tokens, seed)
    rule = Rule(share, None, first, last, match="sizes", ward=1.0)
    r, fixed = rule.removes(tokens), bystanders(rule, tokens, None, x.device)
    found = pairs(match(x, r, fixed, size=size, rule=rule, weight=weight if weighed else None))
    free = [i for i in range(tokens) if first <= i < tokens - int(last)]
    for row in range(batch):
        order = sorted(free, key=lambda i: -size[row, i].item())
        large, small = order[: len(free) - len(free) // 2], order[len(free) - len(free) // 2 :]

        def like(a, b, row=row):
            s, u = size[row].double(), weight[row]
            error = s[a] * s[b] / (s[a] + s[b]) * (1 - torch.cosine_similarity(x[row, a], x[row, b], dim=0))
            return -(error * (u[a] * u[b]) ** 0.1 if weighed else error).item()

        # Equal costs do not occur: positions of real numbers differ.
        assert found[row] == dict(proposals(small, large, like, r))


@settings(deadline=None, max_examples=80)
@given(**cases, kind=st.sampled_from(KINDS))
def test_a_merge_is_a_partition_that_conserves(batch, tokens, share, first, last, weighed, seed, kind):
    x, size, weight = drawn(batch, tokens, seed)
    rule = Rule(share, None, first, last, match=kind)
    r, fixed = rule.removes(tokens), bystanders(rule, tokens, None, x.device)
    matching = match(x, r, fixed, size=size, rule=rule, weight=weight if weighed else None)
    merged, after = merge(x, matching, size)
    assert torch.cat([matching.kept, matching.gone], 1).sort(1).values.tolist() == [list(range(tokens))] * batch
    assert merged.shape == (batch, tokens - r, 4) and after.sum(1).equal(size.sum(1))
    torch.testing.assert_close((merged * after[..., None]).sum(1), (x * size[..., None]).sum(1))
    assert not fixed.expand(batch, -1).gather(1, matching.gone).any()
    for row in pairs(matching):
        assert not {*row} & {*row.values()} and not fixed[0, list(row.values())].any()


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 16), min_size=1, max_size=4),
    extra=st.integers(0, 5),
    amount=st.one_of(st.floats(0, 0.5), st.integers(0, 9)),
    first=st.integers(0, 2),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
)
def test_padding_changes_nothing(lengths, extra, amount, first, kind, seed):
    """Every row of a padded batch, over three merges, gives what it gives alone; padding may even be nan."""
    ratio, r = (amount, None) if isinstance(amount, float) else (0.0, amount)
    rule, longest = Rule(ratio, r, first, True, match=kind, importance="received"), max(lengths) + extra
    x, _, score = drawn(len(lengths), longest, seed)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]

    def merges(x, score, tokens):
        for _ in range(3):
            tokens.score = score[:, : x.shape[1]]  # any that go with the places
            x = tokens.merge(x, rule)
        return x

    together = Tokens()
    together.see(mask[:, None, None], len(lengths))
    out = merges(torch.where(mask[..., None], x, torch.nan), score, together)
    whole = together.unmerge(out)
    for row, length in enumerate(lengths):
        alone = Tokens()
        expected = merges(x[row : row + 1, :length], score[row : row + 1, :length], alone)
        assert whole[row, :length].equal(alone.unmerge(expected)[0])


def test_the_more_attention_looks_at_tokens_the_more_does_their_merge_cost():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.2], [0.0, 1.0], [0.25, 1.0]]])
    for kind in ("bipartite", "criteria"):
        rule = Rule(match=kind, importance="class", ward=0.0)
        assert match(x, 1, rule=rule).gone.tolist() == [[0]]
        assert match(x, 1, rule=rule, weight=torch.tensor([[9.0, 9.0, 0.1, 0.1]])).gone.tolist() == [[2]]


def test_importance_is_by_original_token():
    tokens = Tokens(size=torch.tensor([[1.0, 2.0, 4.0]]), score=torch.tensor([[9.0, 2.0, 12.0]]))
    torch.testing.assert_close(tokens.weight(), torch.tensor([[9.0, 1.0, 3.0]]))
    assert tokens.score is None, "it is of one attention only"
    nothing = Tokens(size=torch.ones(1, 3), score=torch.zeros(1, 3))
    assert (nothing.weight() > 0).all(), "nobody looks at anything"


def compressed(model, **options):
    """A copy with merged tokens, through the plan's JSON as a checkpoint keeps it."""
    view = View(copy.deepcopy(model))
    plan = Merge(**options).plan(view)
    Merge.model_construct().apply(view, Plan(json.loads(json.dumps(plan.edits))))
    return view.model


def answers(model, batch):
    with torch.no_grad():
        return run(model, batch)


@pytest.mark.parametrize("name", ["vit", "bert", "dinov2", "clip", "whisper"])
@pytest.mark.parametrize("options", [{"match": "criteria"}, {"match": "sizes"}, {"importance": "received"}])
def test_every_model_it_takes(name, options):
    model, batch = models.MODELS[name]()
    stock, merged = answers(model, batch), compressed(model, ratio=0.25, **options)
    out = answers(merged, batch)
    assert out.shape == stock.shape and 0 < relative_error(out, stock) < 0.6
    assert out.equal(answers(merged, batch)) and [*merged.state_dict()] == [*model.state_dict()]
    assert answers(compressed(model, ratio=1e-6, **options), batch).equal(stock)


@pytest.mark.parametrize("importance", ["class", "received", "values"])
def test_scores_are_what_attention_gives(importance):
    """Against the whole attention matrix of the stock model, in the first block."""
    model = models.of(
        "vit", "AutoModel", attn_implementation="eager", **models.IMAGE | {"num_hidden_layers": 3}
    ).double()
    pixels, seen = {"pixel_values": models.noise(3, 3, 32, 32).double()}, {}
    merged = compressed(model, ratio=0.25, importance=importance)
    tokens = merged.layers[0].merge.tokens
    merged.layers[0].attention.register_forward_hook(lambda *_: seen.update(score=tokens.score))
    answers(merged, pixels)
    model.layers[0].attention.v_proj.register_forward_hook(lambda linear, args, out: seen.update(value=out))
    with torch.no_grad():
        weights = model(**pixels, output_attentions=True).attentions[0]
    lengths = seen["value"].unflatten(-1, (4, 8)).norm(dim=-1).transpose(1, 2)
    expected = {
        "class": weights[:, :, 0].mean(1),
        "received": weights[:, :, torch.arange(16) * 17 // 16].mean((1, 2)),
        "values": (weights[:, :, 0] * lengths).norm(dim=1),
    }
    torch.testing.assert_close(seen["score"], expected[importance], rtol=1e-6, atol=1e-9)


def test_late_blocks_alone_merge_by_sizes():
    model = models.of("vit", "AutoModel", **models.IMAGE | {"num_hidden_layers": 5})
    edits = Merge(match="sizes").plan(View(model)).edits.values()
    assert [edit["rule"].get("match") for edit in edits] == [None, None, None, "sizes", "sizes"]
    edits = Merge(match="criteria", importance="class").plan(View(model)).edits.values()
    assert {(edit["rule"]["match"], edit["score"]) for edit in edits} == {("criteria", "class_attention")}


def test_refused_by_name():
    siglip = View(models.of("siglip_vision_model", "AutoModel", **models.IMAGE))
    for importance in ("class", "values"):
        refused = Merge(importance=importance).plan(siglip).notes["refused"].values()
        assert any("no class token" in why for why in refused)
    assert Merge(importance="received").plan(siglip).edits
    with pytest.raises(CompressError, match="ward is given, it has no place in match: criteria"):
        Merge(match="criteria", ward=0.5).plan(siglip)
    with pytest.raises(CompressError, match="similarity is given, it has no place"):
        Merge(match="criteria", similarity="euclidean").plan(siglip)


def test_compiles_without_a_graph_break():
    model, batch = models.MODELS["vit"]()
    merged = compressed(model, ratio=0.3, match="criteria", importance="values")
    torch._dynamo.reset()
    compiled = torch.compile(merged, backend="eager", fullgraph=True)
    torch.testing.assert_close(answers(compiled, batch), answers(merged, batch))


def test_the_search_goes_with_importance():
    model, batch = models.MODELS["vit"]()
    view, method = View(model), Merge(flops=0.9, importance="received", match="criteria", repair=False)
    plan = method.calibrate(view, method.plan(view), [batch])
    rule = next(iter(plan.edits.values()))["rule"]
    assert rule["importance"] == "received" and rule["match"] == "criteria" and len(plan.notes["schedules"]) > 2
    method.apply(view, plan)
    assert answers(model, batch).isfinite().all()


@pytest.mark.parametrize(
    ("name", "kinds"), [("vit", {"none", "class", "received", "values"}), ("siglip", {"none", "received"})]
)
@pytest.mark.parametrize("worth", [True, False])
def test_the_importance_that_changes_answers_least_is_taken_where_it_is_worth_its_time(name, kinds, worth, monkeypatch):
    if name == "vit":
        model, batch = models.MODELS["vit"]()
    else:
        model = models.of("siglip_vision_model", "AutoModel", **models.IMAGE)
        batch = {"pixel_values": models.noise(2, 3, 32, 32)}
    view, method = View(model), Merge(ratio=0.4, importance="auto", repair=False)
    tried = method.calibrate(view, method.plan(view), [batch]).notes["importance"]
    assert {*tried} == kinds
    least = min(tried.values()) / tried["none"]
    monkeypatch.setattr("compress.merge_search.WORTH", least + 1e-6 if worth else least - 1e-6)
    plan = method.calibrate(view, method.plan(view), [batch])
    best = min(tried, key=tried.get) if worth else "none"
    for edit in plan.edits.values():
        assert edit["rule"].get("importance", "none") == best and ("score" in edit) == (best != "none")
    for kind in kinds:
        fixed = Merge(ratio=0.4, importance=kind, metric=next(iter(plan.edits.values()))["rule"]["metric"])
        edits = fixed.plan(view).edits
        error = Trial.of(view, edits, [batch], fixed.apply).error(edits)
        assert error == pytest.approx(tried[kind], rel=1e-5)
    assert Merge(importance="auto", repair=False).uses_data and not Merge(importance="auto").needs_data
