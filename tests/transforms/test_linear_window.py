"""linear.window: what a token sees is the rule, however it is computed; a window over everything changes nothing."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress.attend import Softmax, attend_through, softmax
from compress.errors import CompressError
from compress.nn import window as engine
from compress.nn.window import Band, Disc, blockwise, flex, window_mask
from compress.outputs import run
from compress.transform import Plan
from compress.transforms.linear.window import Window
from compress.view import View
from models import MODELS, handed

SMALL = Window(window=3, special=1, radius=1)


def install(model, method=SMALL, **changed):
    """The model with the method applied; `changed` overrides what the plan says."""
    view = View(model)
    plan = method.plan(view)
    edits = {path: edit | {key: changed[key] for key in changed if key in edit} for path, edit in plan.edits.items()}
    method.apply(view, Plan(json.loads(json.dumps(edits))))
    return model


def built(name, method=SMALL, **changed):
    model, batch = MODELS[name]()
    return install(copy.deepcopy(model), method, **changed), model, batch


def plain(query, key, value, mask):
    return softmax(query, key, value, mask)


def drawn(tokens, heads=2, kv_heads=2):
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(2, count, tokens, 8, generator=generator) for count in (heads, kv_heads, kv_heads)]


bands = st.builds(Band, st.integers(0, 9), st.integers(0, 4), st.booleans())
discs = st.builds(Disc, st.integers(0, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3))


@given(bands, st.integers(1, 12))
def test_band_is_its_definition(rule, tokens):
    for i, row in enumerate(window_mask(rule, tokens, tokens).tolist()):
        for j, allowed in enumerate(row):
            near, first = abs(i - j) <= rule.window, j < rule.special or (i < rule.special and not rule.causal)
            assert allowed == ((near or first) and not (rule.causal and j > i))


@given(discs, st.integers(0, 3))
def test_disc_is_its_definition(rule, behind):
    tokens = rule.first + rule.height * rule.width + behind
    place = dict.fromkeys(range(tokens))
    place |= {rule.first + y * rule.width + x: (y, x) for y in range(rule.height) for x in range(rule.width)}
    mask = window_mask(rule, tokens, tokens)
    assert torch.equal(mask, mask.T)
    for i, row in enumerate(mask.tolist()):
        for j, allowed in enumerate(row):
            both = place[i] and place[j]
            near = both and (place[i][0] - place[j][0]) ** 2 + (place[i][1] - place[j][1]) ** 2 <= rule.radius**2
            assert allowed == (near or not both)


@settings(max_examples=40, deadline=None)
@given(st.one_of(bands, discs), st.integers(0, 3), st.integers(120, 300))
def test_blockwise_is_the_dense_mask(rule, behind, length):
    tokens = length if isinstance(rule, Band) else rule.first + rule.height * rule.width + behind
    query, key, value = (x.requires_grad_() for x in drawn(tokens, 4, 2))
    outs, grads = [], []
    for way in (
        lambda: blockwise(plain, query, key, value, rule),
        lambda: plain(query, key, value, dense(rule, tokens)),
    ):
        outs.append(way())
        grads.append(torch.autograd.grad(outs[-1].sin().sum(), (query, key, value)))
    assert torch.allclose(*outs, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*grads, strict=True))


def dense(rule, tokens):
    return window_mask(rule, tokens, tokens)


def test_blockwise_with_a_padding_mask():
    rule, tokens = Band(5, 0, False), 300
    query, key, value = drawn(tokens)
    given_mask = torch.ones(2, 1, 1, tokens, dtype=torch.bool)
    given_mask[0, ..., :40] = False
    ways = (
        blockwise(plain, query, key, value, rule, given_mask),
        plain(query, key, value, given_mask & dense(rule, tokens)),
    )
    assert torch.allclose(*ways, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize("rule", [Band(20, 3, True), Disc(3, 16, 16, 5)])
def test_flex_is_the_dense_mask(rule):
    tokens = 300 if isinstance(rule, Band) else 270
    query, key, value = drawn(tokens, 4, 2)
    with torch.no_grad():
        out = flex(query, key, value, rule, None)
    assert torch.allclose(out, plain(query, key, value, dense(rule, tokens)), atol=1e-5)


def test_block_mask_counts_blocks_and_shares_no_tensor():
    rule, tokens = Disc(3, 20, 20, 7), 411
    blocks = engine.block_mask(rule, tokens, torch.device("cpu"))
    allowed = nn.functional.pad(dense(rule, tokens), (0, 101, 0, 101))
    some = allowed.view(4, 128, 4, 128).any(3).any(1).sum(1)
    assert torch.equal((blocks.kv_num_blocks + blocks.full_kv_num_blocks)[0, 0], some.int())
    assert blocks.kv_indices.data_ptr() != blocks.full_kv_indices.data_ptr()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "swin"])
def test_a_window_over_everything_changes_no_bit(name):
    model, original, batch = built(name, window=99, radius=99)
    with torch.no_grad():
        before = run(original, batch)
        assert torch.equal(before, run(model, batch))
        assert not torch.equal(before, run(install(copy.deepcopy(original)), batch))
    assert list(model.state_dict()) == list(original.state_dict())


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "dit", "sd3"])
def test_what_surely_covers_everything_is_not_planned(name):
    plan = Window(window=63, radius=5).plan(View(MODELS[name]()[0]))
    assert plan.edits == {}
    assert all("covers all" in why for why in plan.notes["refused"].values())


class Reference(nn.Module):
    """Windows by an explicit list of who sees whom."""

    def __init__(self, allowed):
        super().__init__()
        self.allowed = torch.tensor(allowed)

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs):
        allowed = self.allowed.tril() if causal else self.allowed
        if mask is not None and mask.dtype != torch.bool:
            allowed = torch.where(allowed, mask, torch.finfo(mask.dtype).min)
        elif mask is not None:
            allowed = allowed & mask
        return softmax(query, key, value, allowed, scale)


def grid_table(height, width, before=0, behind=0, radius=1):
    """Who sees whom when `before` and `behind` tokens stand beside the image."""
    places = [None] * before + [(y, x) for y in range(height) for x in range(width)] + [None] * behind
    return [[not a or not b or (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2 <= radius**2 for b in places] for a in places]


IMAGES = [("vit", (4, 4, 1)), ("dinov2", (4, 4, 1)), ("dit", (4, 4)), ("pixart", (4, 4)), ("sd3", (4, 4, 0, 5))]


@pytest.mark.parametrize(("name", "grid"), [*IMAGES, ("flux", (4, 4, 5))])
def test_images_see_a_disc_and_all_that_stands_beside(name, grid):
    model, original, batch = built(name)
    view = View(original)
    for path in SMALL.plan(view).edits:
        attend_through(view, view.attention(path), Reference(grid_table(*grid)))
    with torch.no_grad():
        assert torch.allclose(run(model, batch), run(original, batch), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "t5", "whisper"])
def test_sequences_see_their_window(name):
    model, original, batch = built(name)
    view = View(original)
    for path in SMALL.plan(view).edits:
        attention = view.attention(path)
        length = (
            (16 if "encoder" in path else 7)
            if name == "whisper"
            else 12
            if "decoder" not in path or name == "opt"
            else 7
        )
        rule = Band(3, 1, attention.causal)
        attend_through(view, attention, Reference(window_mask(rule, length, length).tolist()))
    with torch.no_grad():
        real = batch.get("attention_mask", torch.ones(run(original, batch).shape[:2])).bool()
        assert torch.allclose(run(model, batch)[real], run(original, batch)[real], atol=1e-5)


def test_gradients_stay_inside_the_window():
    model, _, batch = built("llama", special=2)
    ids = batch["input_ids"][:1]
    layer = model.model.layers[0].self_attn
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    angles = model.model.rotary_emb(embedded, torch.arange(12)[None])
    out = layer(embedded, position_embeddings=angles, attention_mask=None)[0]
    for i in range(12):
        reach = torch.autograd.grad(out[0, i].sum(), embedded, retain_graph=True)[0][0].abs().sum(-1) > 0
        assert reach.tolist() == [j <= i and (i - j <= 3 or j < 2) for j in range(12)]


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_and_the_rest_of_the_batch_do_not_matter(name, side, implementation):
    model, _, batch = built(name)
    model.set_attn_implementation(implementation)
    ids = batch["input_ids"][:1, :9]
    width = (3, 0) if side == "left" else (0, 3)
    padded = torch.cat([nn.functional.pad(ids, width), batch["input_ids"][1:]])
    mask = torch.cat([nn.functional.pad(torch.ones_like(ids), width), torch.ones(1, 12, dtype=torch.long)])
    places = nn.functional.pad(torch.arange(9)[None], width).expand(2, -1)
    with torch.no_grad():
        alone = model(input_ids=ids).logits[0]
        together = model(input_ids=padded, attention_mask=mask, position_ids=places).logits[0]
    assert torch.allclose(alone, together[mask[0].bool()], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("pad", [0, 4])
def test_decoding_token_by_token_is_the_prefill(name, pad):
    model, _, batch = built(name, special=2)
    ids = batch["input_ids"].repeat(1, 2)
    mask = torch.ones_like(ids)
    mask[0, :pad] = 0
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        full = model(input_ids=ids, attention_mask=mask, position_ids=places).logits
        cache, parts = None, []
        for low, high in [(0, 7), (7, 9), *((i, i + 1) for i in range(9, 24))]:
            out = model(
                input_ids=ids[:, low:high], attention_mask=mask[:, :high], position_ids=places[:, low:high],
                **handed(model, cache), use_cache=True,
            )  # fmt: skip
            cache, parts = out.past_key_values, [*parts, out.logits]
    assert torch.allclose(full[mask.bool()], torch.cat(parts, 1)[mask.bool()], atol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pad", [0, 4])
def test_generation_with_a_cache_is_generation_without(cache, pad):
    model, original, batch = built("llama", special=2)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :pad] = 0
    options = {"input_ids": batch["input_ids"], "attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    plainly = model.generate(**options, use_cache=False)
    assert torch.equal(plainly, model.generate(**options, cache_implementation=cache))
    assert not torch.equal(plainly, original.generate(**options, use_cache=False))


class Spy(Softmax):
    """Remembers how many keys it was shown."""

    def forward(self, module, query, key, value, mask, scale, causal, **kwargs):
        self.keys = key.shape[2]
        return super().forward(module, query, key, value, mask, scale, causal, **kwargs)


@pytest.mark.parametrize("pad", [0, 4])
def test_a_decoded_token_reads_only_its_window(pad):
    model, _, batch = built("llama", special=2)
    spy = model.model.layers[0].self_attn.attend.inner = Spy()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :pad] = 0
    model.generate(input_ids=batch["input_ids"], attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert spy.keys == 3 + 1 + 2


def test_a_core_below_still_sees_all_keys():
    model, _ = MODELS["llama"]()
    view = View(model)

    class Below(Spy):
        pass

    below = [Below() for _ in range(2)]
    for attention, core in zip(view.attentions(), below, strict=True):
        attend_through(view, attention, core)
    install(model)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        assert [core.keys for core in below] == [16, 16]
        model(input_ids=ids[:, -1:], **handed(model, cache))
    assert [core.keys for core in below] == [17, 17]


@pytest.mark.parametrize("name", ["sd3", "unet2d", "vit"])
def test_the_grid_follows_the_image(name):
    """A, then a smaller and not square B, then A again: as if each model had only ever seen its own size."""
    model, original, batch = built(name)
    key = {"sd3": "hidden_states", "unet2d": "sample", "vit": "pixel_values"}[name]
    options = {"interpolate_pos_encoding": True} if name == "vit" else {}
    smaller = batch | {key: batch[key][..., : batch[key].shape[-2] // 2, :].contiguous()}
    with torch.no_grad():
        fresh = [run(install(copy.deepcopy(original)), one | options) for one in (batch, smaller)]
        reused = [run(model, one | options) for one in (batch, smaller, batch)]
    assert torch.equal(reused[0], fresh[0]) and torch.equal(reused[1], fresh[1]) and torch.equal(reused[2], fresh[0])


def test_an_image_of_unknown_size_is_an_error():
    model, _, batch = built("vit")
    with torch.no_grad():
        run(model, batch)
    with pytest.raises(CompressError, match="17 keys are not the 0 x 0 tokens"):
        install(MODELS["vit"]()[0]).vit.layers[0].attention(torch.randn(1, 17, 32))


def test_copies_read_their_own_images():
    model, _, batch = built("unet2d")
    twin = copy.deepcopy(model)
    smaller = batch | {"sample": batch["sample"][..., :4].contiguous()}
    with torch.no_grad():
        before = run(model, batch), run(twin, smaller)
        assert torch.equal(before[0], run(model, batch)) and torch.equal(before[1], run(twin, smaller))
    ours, theirs = (next(m.attend for m in side.modules() if hasattr(m, "attend")) for side in (model, twin))
    assert ours.size is not theirs.size and theirs.size.width < ours.size.width


@pytest.mark.parametrize("name", ["llama", "vit", "dit", "sd3"])
def test_compiles_in_one_graph(name):
    model, _, batch = built(name)
    with torch.no_grad():
        expected = run(model, batch)
        assert torch.allclose(expected, run(torch.compile(model, fullgraph=True, backend="eager"), batch), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "swin"])
def test_replay_on_meta(name):
    model, _ = MODELS[name]()
    plan = SMALL.plan(View(model))
    empty = copy.deepcopy(model).to("meta")
    assert SMALL.plan(View(empty)).edits == plan.edits
    SMALL.apply(View(empty), plan)
    assert sum(hasattr(module, "attend") for module in empty.modules()) == len(plan.edits) > 0
    assert list(empty.state_dict()) == list(model.state_dict())


def test_options_choose_modules_and_reasons_are_kept():
    clip = View(MODELS["clip"]()[0])
    assert all("vision" in path for path in Window(radius=1).plan(clip).edits)
    assert all("text" in path for path in Window(window=3).plan(clip).edits)
    t5 = Window(window=3).plan(View(MODELS["t5"]()[0]))
    assert all("EncDec" in path for path in t5.notes["refused"]) and len(t5.edits) == 4
    swin = Window(radius=1).plan(View(MODELS["swin"]()[0]))
    assert not swin.edits and "a window of its own" in next(iter(swin.notes["refused"].values()))
    with pytest.raises(CompressError, match="EncDecAttention: its keys are another sequence"):
        Window(window=3, only=("*EncDecAttention",)).plan(View(MODELS["t5"]()[0]))


@pytest.mark.parametrize("name", ["llama", "vit", "sd3", "bert"])
def test_distillation_brings_each_layer_nearer(name):
    model, batch = MODELS[name]()
    untouched, method = copy.deepcopy(model), Window(window=2, special=1, radius=1, distill=30)
    assert method.needs_data and not SMALL.needs_data
    plan = method.calibrate(View(model), method.plan(View(model)), [batch])
    losses = plan.notes["distill"]
    assert list(losses) == list(plan.edits) and not any(hasattr(module, "attend") for module in model.modules())
    assert all(loss["after"] < 0.9 * loss["before"] for loss in losses.values())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, untouched.state_dict()[key])}
    assert changed and all(key.startswith(tuple(plan.edits)) for key in changed)
    assert all(parameter.requires_grad for parameter in model.parameters())
    again = copy.deepcopy(untouched)
    last = Window(window=2, special=1, radius=1, distill=30, only=(list(plan.edits)[-1],))
    alone = last.calibrate(View(again), last.plan(View(again)), [batch]).notes["distill"]
    assert alone == {list(plan.edits)[-1]: losses[list(plan.edits)[-1]]}
