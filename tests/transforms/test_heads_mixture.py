"""A mixture of heads: gates that add up, choices that can be foreseen, and the model itself where all heads are on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError
from compress.nn.head_mixture import HeadMixture
from compress.outputs import relative_error, run
from compress.routing import begin, energy, route
from compress.transforms.heads.mixture import SLOW, Mixture
from compress.view import View
from models import MODELS

HEADS, DIM, ROWS = 6, 4, 400


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def core(shared=2, active=2, random=True, **weights):
    made = HeadMixture(HEADS, DIM, DIM, shared, active, noise(1))
    made.inner = lambda module, query, key, value, *rest: value
    for number, parameter in enumerate(made.parameters()):
        parameter.data = noise(*parameter.shape, seed=number) if random else parameter.data
    for name, value in weights.items():
        getattr(made, name).data.copy_(torch.as_tensor(value))
    return made


def answer(model, batch):
    with torch.no_grad():
        return run(model, batch)


@given(st.integers(1, 5), st.data())
@settings(max_examples=30, deadline=None)
def test_gates_of_each_kind_add_up_and_so_many_heads_are_on(shared, data):
    active = data.draw(st.integers(1, HEADS - shared))
    mixture, x = core(shared, active, kind_weight=0), noise(2, 5, HEADS * DIM)
    gates, on = mixture.gates(x), mixture.chosen(x, active)
    first = mixture.order[:shared]
    assert torch.allclose(gates[..., first].sum(-1), gates.new_tensor(shared).expand(2, 5))
    assert torch.allclose(gates.sum(-1), gates.new_tensor(shared + active).expand(2, 5))
    assert (on.sum(-1) == shared + active).all()
    assert (on[..., first] == 1).all()
    assert ((gates == 0) == (on == 0)).all()


def test_kinds_are_weighed_against_each_other():
    mixture, x = core(), noise(2, 5, HEADS * DIM)
    gates, first = mixture.gates(x), mixture.order[:2]
    one, two = gates[..., first].sum(-1) / 2, (gates.sum(-1) - gates[..., first].sum(-1)) / 2
    assert torch.allclose(one + two, torch.full_like(one, 2))
    assert (one - two).abs().max() > 0.1


def test_a_new_mixture_with_all_heads_on_is_what_it_was():
    mixture, query, value = core(2, 4, random=False), noise(2, HEADS, 5, DIM), noise(2, HEADS, 5, DIM, seed=1)
    assert torch.allclose(mixture(None, query, value, value, None, None, False), value, atol=1e-15)


def test_a_head_that_is_off_writes_its_mean():
    mixture, query, value = core(2, 1, random=False), noise(2, HEADS, 5, DIM), noise(2, HEADS, 5, DIM, seed=1)
    mixture.mean.data = noise(HEADS, DIM, seed=2)
    mixture.routed_bias.data[2] = 1
    out = mixture(None, query, value, value, None, None, False)
    on = [0, 1, 4]
    assert torch.allclose(out[:, on], value[:, on], atol=1e-15)
    for head in (2, 3, 5):
        assert torch.equal(out[:, head], mixture.mean[head].expand(2, 5, DIM))


def test_the_order_of_heads_does_not_matter():
    mixture, query, value = core(2, 2), noise(2, HEADS, 5, DIM), noise(2, HEADS, 5, DIM, seed=1)
    out, turn = mixture(None, query, value, value, None, None, False), torch.tensor([3, 1, 5, 0, 2, 4])
    moved = core(2, 2, order=turn.argsort())
    moved.mean.data = mixture.mean[turn]
    for name in ("kind_weight", "shared_weight", "routed_weight"):
        weight = getattr(mixture, name)
        getattr(moved, name).data = weight.unflatten(1, (HEADS, DIM))[:, turn].flatten(1)
    again = moved(None, query[:, turn], value[:, turn], value[:, turn], None, None, False)
    assert torch.allclose(again, out[:, turn], atol=1e-14)


def test_imbalance_is_1_where_heads_are_chosen_alike_and_grows_with_a_favourite():
    even = core(2, 1, random=False)
    even.routed_weight.data[:, :4] = 1e3 * torch.eye(4)
    query = torch.zeros(1, HEADS, 4, DIM, dtype=torch.float64)
    query[0, 0] = torch.eye(4)
    assert torch.allclose(even.imbalance(query), even.sharpness.new_ones(()))
    one = core(2, 1, random=False, routed_bias=[100.0, 0, 0, 0])
    assert torch.allclose(one.imbalance(query), one.sharpness.new_tensor(4.0))


def test_energy_is_what_the_output_projection_makes_of_each_head():
    out, weight = noise(7, HEADS, DIM), noise(10, HEADS * DIM, seed=1)
    for head in range(HEADS):
        alone = torch.zeros_like(out)
        alone[:, head] = out[:, head]
        assert torch.allclose(energy(out, weight)[:, head], (alone.flatten(1) @ weight.T).square().sum(1))


def test_routers_foretell_a_planted_energy():
    mixture, x = core(2, 1, random=False), noise(ROWS, HEADS * DIM)
    planted = noise(HEADS * DIM, HEADS, seed=1) / 5
    logs = x @ planted + torch.tensor([0.0, 3, 0, 0, 4, 0])
    full = torch.cat([x, x.new_ones(ROWS, 1)], 1)
    route(mixture, full.T @ full, full.T @ torch.cat([logs, logs.exp()], 1))
    assert sorted(mixture.order[:2].tolist()) == [1, 4]
    best = logs[:, mixture.order[2:]].argmax(1)
    chosen = mixture.choice(x, 1)[1].argmax(1)
    assert (best == chosen).double().mean() > 0.95


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "t5", "sd3", "unet2d"])
def test_all_heads_active_is_the_model(name):
    model, batch = MODELS[name]()
    before, view, method = answer(model, batch), View(model), Mixture(active=0.99, steps=1)
    plan = method.calibrate(view, method.plan(view), [batch])
    method.apply(view, plan)
    assert sum(isinstance(module, HeadMixture) for module in model.modules()) >= 2
    assert relative_error(answer(model, batch), before) < 1e-5
    assert plan.notes["remarks"] == [SLOW]


def test_the_refit_brings_the_answers_nearer_and_training_is_kept_only_where_it_helps():
    model, batch = MODELS["vit"]()
    batches = [{"pixel_values": noise(16, 3, 32, 32, seed=seed).float()} for seed in range(6)]
    expected, errors = answer(model, batches[0]), []
    for mend in (False, True):
        student, _ = MODELS["vit"]()
        view, method = View(student), Mixture(active=0.5, shared=0.25)
        plan = method.plan(view)
        method.apply(view, plan)
        cores = {path: student.get_submodule(path).attend for path in plan.edits}
        outputs = {a.path: student.get_submodule(a.o) for a in view.attentions()}
        old = {path: output.weight.clone() for path, output in outputs.items()}
        begin(student, cores, outputs, batches[1:])
        for path, output in outputs.items():
            assert not torch.equal(output.weight, old[path])
            if not mend:
                output.weight.data.copy_(old[path])
        errors.append(relative_error(answer(student, batches[0]), expected))
    assert errors[1] < errors[0]
    view, method = View(model), Mixture(active=0.5, shared=0.25, steps=3)
    notes = method.calibrate(view, method.plan(view), batches).notes
    assert 0 < notes["error"] <= notes["error at the start"]


def test_more_shared_heads_than_active_ones_are_refused():
    with pytest.raises(CompressError, match="at least shared"):
        Mixture(active=0.25, shared=0.5).plan(View(MODELS["vit"]()[0]))
