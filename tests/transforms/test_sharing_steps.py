"""sharing.steps: what is skipped is counted, what may not be is exact, and nothing of one image reaches another."""

import copy
import gc
import json
import weakref
from contextlib import nullcontext

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.nn.step_cache import reset
from compress.nn.step_clock import extrapolate, is_computed, is_last
from compress.outputs import relative_error
from compress.transforms.sharing.steps import Steps
from compress.view import View
from models import MODELS

DENOISERS = ["dit", "pixart", "sd3"]
LAYOUTS = ["one call", "uncond first", "cond first", "two calls"]


def build(name="dit", **options):
    """A tiny denoiser that reuses its steps, its plain twin, and its conditions: row 0 none, row 1 the wanted ones."""
    model, batch = MODELS[name]()
    reused = copy.deepcopy(model)
    install(reused, **options)
    return reused, model, {key: batch[key] for key in batch if key not in ("hidden_states", "timestep")}


def install(model, **options):
    view, step = View(model), Steps(**options)
    plan = step.plan(view)
    # every=1 plans nothing; the identity of the installed hooks is tested all the same.
    settings = step.model_dump(include={"reuse", "every", "order", "warmup"})
    plan.edits = plan.edits or dict.fromkeys(step.sites(view)[0], settings)
    step.apply(view, plan)


class Aborted(Exception):
    """What a user's callback raises in the middle of a generation."""


@torch.no_grad()
def generate(
    model, conditions, layout="one call", steps=9, size=8, seeds=(0,), scheduler=None, abort=None, inside=False
):
    """Final latents of a plain sampling loop with guidance, as the pipelines of diffusers do it."""
    scheduler = scheduler or DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    start = [torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    latent = torch.cat(start)
    none, wanted = (
        {key: value[row].expand(len(seeds), *value.shape[1:]) for key, value in conditions.items()} for row in (0, 1)
    )

    def call(rows, timestep, *parts):
        joined = {key: torch.cat([part[key] for part in parts]) for key in conditions}
        return model(torch.cat([rows] * len(parts)), timestep=timestep.expand(len(rows) * len(parts)), **joined).sample[
            :, :4
        ]

    for index, timestep in enumerate(scheduler.timesteps):
        if index == abort and not inside:
            raise Aborted
        with failing(model) if index == abort else nullcontext():
            rows = scheduler.scale_model_input(latent, timestep) if hasattr(scheduler, "scale_model_input") else latent
            if layout == "one call":
                noise = call(rows, timestep, wanted)
            else:
                if layout == "two calls":
                    conditional, free = call(rows, timestep, wanted), call(rows, timestep, none)
                elif layout == "cond first":
                    conditional, free = call(rows, timestep, wanted, none).chunk(2)
                else:
                    free, conditional = call(rows, timestep, none, wanted).chunk(2)
                noise = free + 1.5 * (conditional - free)
        latent = scheduler.step(noise, timestep, latent).prev_sample
    return latent


class failing:
    """The last block raises: the exception leaves the denoiser in the middle of its forward."""

    def __init__(self, model):
        self.block = model.transformer_blocks[-1]

    def __enter__(self):
        def fail(*_):
            raise Aborted

        self.handle = self.block.ff.register_forward_pre_hook(fail)

    def __exit__(self, *_):
        self.handle.remove()


def count(model, path="transformer_blocks.1.ff"):
    """A list that grows by the timestep rows of every call of a module that only runs when it is computed."""
    calls = []
    model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    return calls


# The line and the list of computed steps


@given(
    times=st.lists(st.integers(0, 1000), min_size=3, max_size=3, unique=True),
    slope=st.floats(-3, 3),
    offset=st.floats(-3, 3),
)
def test_a_line_is_continued_exactly_over_uneven_gaps(times, slope, offset):
    older, newer, at = times
    value = lambda time: torch.tensor([slope * time + offset, -time], dtype=torch.float64)  # noqa: E731
    got = extrapolate([(older, value(older)), (newer, value(newer))], at)
    torch.testing.assert_close(got, value(at), rtol=1e-9, atol=1e-6)
    assert extrapolate([(newer, value(newer))], at).equal(value(newer)), "one computed step is repeated"


@pytest.mark.parametrize(
    ("every", "warmup", "computed"),
    [(1, 1, range(9)), (2, 1, [0, 2, 4, 6, 8]), (3, 1, [0, 3, 6, 8]), (3, 3, [0, 1, 2, 5, 8]), (5, 2, [0, 1, 6, 8])],
)
@pytest.mark.parametrize("reuse", ["body", "attention"])
def test_exactly_the_planned_steps_are_computed(every, warmup, computed, reuse):
    assert [step for step in range(9) if is_computed(step, every, warmup) or step == 8] == list(computed)
    model, plain, conditions = build(every=every, warmup=warmup, reuse=reuse)
    # An attention is replaced by its hook; its projections are called by the original forward alone.
    calls = count(model, "transformer_blocks.1.ff" if reuse == "body" else "transformer_blocks.1.attn1.to_q")
    result = generate(model, conditions)
    assert len(calls) == len(computed)
    assert result.equal(generate(plain, conditions)) == (every == 1)


def test_the_last_step_is_known_by_its_timestep():
    trailing = [round(1000 - index * 1000 / 30) - 1 for index in range(30)]
    leading = [index * 33 for index in range(29, -1, -1)]
    sigmas = [(30 - index) / 30 for index in range(30)]
    shifted = [3 * sigma / (1 + 2 * sigma) for sigma in sigmas]
    for times, expected in [(trailing, [29]), (leading, [28, 29]), (shifted, [29])]:
        got = [step for step in range(1, 30) if is_last(times[step], times[step - 1] - times[step])]
        assert got == expected


# Exact where nothing may be skipped


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("reuse", ["body", "attention"])
def test_computing_every_step_is_the_identity(name, layout, reuse):
    model, plain, conditions = build(name, every=1, reuse=reuse)
    assert Steps(every=1, reuse=reuse).plan(View(plain)).edits == {}
    assert generate(model, conditions, layout, steps=4).equal(generate(plain, conditions, layout, steps=4))


@pytest.mark.parametrize("name", DENOISERS)
@torch.no_grad()
def test_single_calls_are_exact(name):
    model, plain, conditions = build(name, every=5, warmup=1)
    rows = lambda at: torch.full((2,), at)  # noqa: E731
    for seed, at in enumerate([700, 700, 300, 200, 900, 100]):  # other images each, as when a model is evaluated
        image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        given_ = dict(conditions, hidden_states=image, timestep=rows(at))
        assert model(**given_).sample.equal(plain(**given_).sample), (seed, at)
    mixed = dict(conditions, hidden_states=image, timestep=torch.tensor([50, 40]))
    assert model(**mixed).sample.equal(plain(**mixed).sample), "rows at several timesteps are no sampling step"
    other = {key: value.flip(0) for key, value in conditions.items()}
    given_ = dict(other, hidden_states=image, timestep=rows(30))
    assert model(**given_).sample.equal(plain(**given_).sample), "other conditions are another image"


@torch.no_grad()
def test_the_call_after_an_error_is_exact():
    model, plain, conditions = build(every=5, warmup=1, reuse="attention")
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(Aborted), failing(model):
        model(image, timestep=torch.full((2,), 900), **conditions)
    assert torch.equal(*(each(image, timestep=torch.full((2,), 800), **conditions).sample for each in (model, plain)))


def test_gradients_are_those_of_the_plain_model():
    model, plain, conditions = build(every=5, warmup=1)
    generate(model, conditions, steps=4, abort=None)
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for at in (800, 700):
        for each in (model, plain):
            each.zero_grad()
            each(image, timestep=torch.full((2,), at), **conditions).sample.square().sum().backward()
        for left, right in zip(model.parameters(), plain.parameters(), strict=True):
            assert left.grad.equal(right.grad)


@pytest.mark.parametrize("skipped", [[0], [1]])
@torch.no_grad()
def test_what_comes_between_the_blocks_is_not_skipped(skipped):
    model, plain, conditions = build("sd3", every=5, warmup=1)
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for at in (900, 800, 700):
        given_ = dict(conditions, hidden_states=image, timestep=torch.full((2,), at))
        control = [torch.full((2, 16, 32), at / 1000)]  # a ControlNet's residuals are others in each step
        assert torch.equal(*(each(**given_, block_controlnet_hidden_states=control).sample for each in (model, plain)))
    reset(model)
    for at in (900, 800, 700):
        given_ = dict(conditions, hidden_states=image, timestep=torch.full((2,), at))
        assert torch.equal(*(each(**given_, skip_layers=skipped).sample for each in (model, plain)))


# Nothing of one image reaches another


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DENOISERS)
def test_a_generation_does_not_depend_on_what_was_before(name, layout):
    model, plain, conditions = build(name, every=3, warmup=2)
    first = generate(model, conditions, layout)
    assert not first.equal(generate(plain, conditions, layout)), "something must be skipped"
    assert generate(model, conditions, layout).equal(first)
    for inside in (False, True):
        for abort in (1, 4):  # computed steps: 0 1 4 7
            with pytest.raises(Aborted):
                generate(model, conditions, layout, abort=abort, inside=inside)
            assert generate(model, conditions, layout).equal(first), (abort, inside)
            with pytest.raises(Aborted):
                generate(model, conditions, layout, abort=abort, inside=inside, seeds=(5,))
            assert generate(model, conditions, layout).equal(first), (abort, inside)
    generate(model, conditions, layout, seeds=(1, 2))
    assert generate(model, conditions, layout).equal(first)
    generate(model, conditions, layout, steps=5)
    generate(model, conditions, layout, steps=1)
    assert generate(model, conditions, layout).equal(first)
    generate(model, conditions, "one call", steps=4, size=4)
    assert generate(model, conditions, layout).equal(first)


@pytest.mark.parametrize("reuse", ["body", "attention"])
@pytest.mark.parametrize("name", DENOISERS)
def test_contexts_do_not_mix(name, reuse):
    model, _, conditions = build(name, every=3, warmup=2, reuse=reuse)
    layouts = [generate(model, conditions, layout) for layout in LAYOUTS[1:]]
    for other in layouts[1:]:
        torch.testing.assert_close(other, layouts[0], rtol=1e-4, atol=1e-4)
    changed = conditions | {key: value.flip(0) for key, value in conditions.items()}
    assert not generate(model, changed, "two calls").allclose(layouts[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("named", [True, False])
@torch.no_grad()
def test_contexts_that_the_pipeline_names_may_come_in_any_order(named):
    model, batch = MODELS["flux"]()
    plain = copy.deepcopy(model)
    install(model, every=3, warmup=1, reuse="attention")
    calls = count(model, "transformer_blocks.0.attn.to_q")

    def step(model, names, at):
        outputs = {}
        for name in names:
            text = batch["encoder_hidden_states"] * (1 if name == "cond" else -1)
            inputs = batch | {"encoder_hidden_states": text, "timestep": torch.full((2,), at)}
            with model.cache_context(name) if named else nullcontext():
                outputs[name] = model(**inputs).sample
        return outputs

    for names, at in [(("cond", "uncond"), 0.9), (("uncond", "cond"), 0.8)]:
        got, exact = step(model, names, at), step(plain, names, at)
        for name in names:
            assert got[name].equal(exact[name]) == (not named or at == 0.9)
    assert len(calls) == (2 if named else 4)
    one_context = copy.deepcopy(plain)
    install(one_context, every=3, warmup=1, reuse="attention")
    step(one_context, ["cond"], 0.9)
    assert not named or step(one_context, ["cond"], 0.8)["cond"].equal(got["cond"])


@pytest.mark.parametrize("name", DENOISERS)
def test_a_batch_of_two_is_two_batches_of_one(name):
    model, _, conditions = build(name, every=2, warmup=1)
    both = generate(model, conditions, "uncond first", seeds=(3, 4))
    single = torch.cat([generate(model, conditions, "uncond first", seeds=(seed,)) for seed in (3, 4)])
    torch.testing.assert_close(both, single, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_order_sampler_has_a_context_for_each_evaluation(layout):
    conditions = build()[2]
    run = lambda model: generate(model, conditions, layout, steps=6, scheduler=HeunDiscreteScheduler())  # noqa: E731
    model, plain, _ = build(every=1)
    assert run(model).equal(run(plain))
    model, _, _ = build(every=2, warmup=2)
    calls = count(model)
    first = run(model)
    # Six timesteps, the first with one evaluation and the others with two; computed are 0 1 3, and 4 5 at the end.
    assert len(calls) == (2 if layout == "two calls" else 1) * 9
    assert run(model).equal(first)
    assert not first.equal(run(plain))


@pytest.mark.parametrize("order", [0, 1])
def test_a_flow_sampler(order):
    model, plain, conditions = build("sd3", every=2, order=order)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)  # uneven timesteps
    calls = count(model)
    got, exact = (generate(each, conditions, "uncond first", 10, scheduler=scheduler) for each in (model, plain))
    assert len(calls) == 7 and not got.equal(exact)  # 0 1 3 5 7, and 8 9 that both lie next to the image
    torch.testing.assert_close(got, exact, rtol=0.2, atol=0.2)


def test_a_body_that_is_linear_in_time_is_continued_exactly():
    plain, batch = MODELS["dit"]()
    now, direction = {}, torch.randn(32, generator=torch.Generator().manual_seed(0))

    def forward(hidden_states, **_):
        return hidden_states + now["timestep"] / 300 * direction

    plain.register_forward_pre_hook(
        lambda _, args, kwargs: now.update(timestep=kwargs["timestep"][0]), with_kwargs=True
    )
    for block in plain.transformer_blocks:
        block.forward = forward
    exact = generate(plain, {"class_labels": batch["class_labels"]})
    errors = []
    for order in (0, 1):
        model = copy.deepcopy(plain)
        install(model, every=3, order=order)
        errors.append(relative_error(generate(model, {"class_labels": batch["class_labels"]}), exact))
    assert errors[0] > 1e-3 and errors[1] < 1e-6


# The model around it


def test_memory_returns():
    model, _, conditions = build(every=2)
    generate(model, conditions)
    clock = model._diffusers_hook.get_hook("compress_steps")
    points = [point for history in clock.histories.values() for point in history["body"]]
    kept = [weakref.ref(value) for _, values in points for value in values] + [weakref.ref(clock.latent)]
    assert len(kept) == 3 and all(reference() is not None for reference in kept)
    del points
    reset(model)
    gc.collect()
    assert not any(reference() is not None for reference in kept)


def test_a_copy_has_its_own_weights_and_caches():
    model, _, conditions = build(every=3)
    first = generate(model, conditions)
    twin = copy.deepcopy(model)
    assert generate(twin, conditions).equal(first)
    with torch.no_grad():
        twin.transformer_blocks[0].attn1.to_q.weight.zero_()
    calls = count(model)
    assert not generate(twin, conditions).equal(first)
    assert not calls, "the copy must not run the original"
    assert generate(model, conditions).equal(first)


@pytest.mark.parametrize("reuse", ["body", "attention"])
@pytest.mark.parametrize("name", DENOISERS)
def test_the_plan_is_replayed_on_an_empty_model(name, reuse):
    model, _, conditions = build(name, every=3, reuse=reuse)
    plain, _ = MODELS[name]()
    view, step = View(plain), Steps(every=3, reuse=reuse)
    edits = step.plan(view).edits
    assert all(any(True for _ in view.module(path).parameters()) for path in edits)
    plan = step.plan(view)
    plan.edits = json.loads(json.dumps(edits, sort_keys=True))
    with torch.device("meta"):
        empty = type(plain).from_config(plain.config).eval()
    Steps.model_construct().apply(View(empty), plan)
    assert empty.state_dict().keys() == plain.state_dict().keys()
    empty.load_state_dict(plain.state_dict(), assign=True)
    for key, value in plain.named_buffers():
        empty.get_submodule(key.rpartition(".")[0]).register_buffer(key.rpartition(".")[2], value, persistent=False)
    assert generate(empty, conditions).equal(generate(model, conditions))


def test_first_blocks_that_are_left_out_always_run():
    model, _, conditions = build(every=3, warmup=1, **{"except": ("transformer_blocks.0",)})
    always, sometimes = count(model, "transformer_blocks.0.ff"), count(model, "transformer_blocks.1.ff")
    generate(model, conditions)
    assert (len(always), len(sometimes)) == (9, 4)


@pytest.mark.parametrize(
    ("name", "reuse", "reason"),
    [
        ("llama", "body", "no diffusers denoiser"),
        ("vit", "attention", "no diffusers denoiser"),
        ("unet2d_condition", "body", "no single stack"),
        ("unet2d", "body", "no stack of transformer blocks|no single stack"),
        ("unet2d", "attention", "adds its input"),
        ("flux", "body", "no single stack"),
    ],
)
def test_what_it_cannot_change_is_refused_by_name(name, reuse, reason):
    model, _ = MODELS[name]()
    plan = Steps(reuse=reuse).plan(View(model))
    assert plan.edits == {}
    refused = next(iter(plan.notes["refused"]))
    assert refused == type(model).__name__ or View(model).attention(refused)
    with pytest.raises(CompressError, match=f"cannot change {refused}: .*({reason})"):
        Steps(reuse=reuse, only=("*",)).plan(View(model))


def test_a_span_with_a_hole_is_refused():
    model, _ = MODELS["dit"]()
    model.transformer_blocks.append(copy.deepcopy(model.transformer_blocks[0]))
    with pytest.raises(CompressError, match="not consecutive"):
        Steps(only=("transformer_blocks.0", "transformer_blocks.2")).plan(View(model))


def test_it_is_applied_once():
    model, _ = MODELS["dit"]()
    install(model)
    with pytest.raises(CompressError, match="applied once"):
        install(model)
