"""Closed-form repair: what it gives back exactly, what it never makes worse, how the ridge pulls."""

import pytest
import torch

from compress.outputs import relative_error, run
from compress.parts import heads_of
from compress.repair import Moments, error, refit, repair, without
from compress.view import View
from models import MODELS


def moments(x, y, held=None):
    found = Moments()
    held = torch.arange(len(x)) % 5 == 0 if held is None else held
    found.add(x, y, held)
    return found


def sample(rows=400, width=12, out=7):
    chance = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=chance)
    weights = torch.randn(width + 1, out, generator=chance).double()
    return x, weights, torch.cat((x, torch.ones(rows, 1)), 1).double() @ weights


def test_inputs_that_are_linear_in_the_others_are_not_missed():
    x, weights, _ = sample()
    x[:, 8:] = x[:, :4] - x[:, 4:8]
    y = torch.cat((x, torch.ones(len(x), 1)), 1).double() @ weights
    stay = torch.arange(12) < 8
    new, _, left = refit(moments(x, y), weights, stay, bias=True, ridges=(1e-12,))
    assert (new[8:12] == 0).all()
    assert left < 1e-9


def test_with_all_inputs_the_old_weights_come_back():
    x, weights, y = sample()
    for ridge in (1e-5, 1.0, 1e3):
        new, _, _ = refit(moments(x, y), weights, torch.ones(12, dtype=torch.bool), bias=True, ridges=(ridge,))
        torch.testing.assert_close(new, weights, rtol=1e-5, atol=1e-5)


def test_the_larger_the_ridge_the_nearer_the_old_weights():
    x, weights, y = sample()
    stay = torch.arange(12) < 9
    away = []
    for ridge in (1e-3, 1.0, 1e3, 1e9):
        found = moments(x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), y)
        new, taken, _ = refit(found, weights, stay, bias=False, ridges=(ridge,))
        away.append((new[:9] - weights[:9]).norm().item() if taken else 0.0)
        assert (new[12] == 0).all()
    assert away == sorted(away, reverse=True)
    assert away[-1] < 1e-6


def test_the_ridge_is_the_best_one_on_the_rows_set_apart_and_none_may_win():
    x, weights, y = sample(rows=20)
    noisy = y + 30 * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    held = torch.arange(20) % 2 == 0
    found = moments(x, noisy, held)
    stay = torch.ones(12, dtype=torch.bool)
    take = torch.arange(13)
    errors = {r: error(found, refit(found, weights, stay, True, (r,))[0], take) for r in (1e-3, 1e-1, 10.0, 1e3)}
    new, ridge, left = refit(found, weights, stay, True, tuple(errors))
    assert left == pytest.approx(min([*errors.values(), error(found, weights, take)]))
    assert ridge is None or errors[ridge] == pytest.approx(left)


def test_fewer_rows_than_inputs_stay_finite():
    x, weights, y = sample(rows=4)
    new, _, left = refit(moments(x, y, torch.tensor([True, False, False, False])), weights, torch.arange(12) < 6, True)
    assert new.isfinite().all() and left < float("inf")


def cut(model, kept):
    """The jobs that leave these units of every attention."""
    view = View(model)
    parts = [heads_of(attention, "group") for attention in view.attentions()]
    return view, {path: part.stays(view, path, kept) for part in parts for path in part.outputs}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "vit", "t5", "dit", "sd3", "flux", "unet2d"])
def test_repair_brings_the_answers_nearer_and_reads_nothing_of_what_goes(name):
    answers = {}
    for how in (without, repair):
        model, batch = MODELS[name]()
        original = run(model, batch)
        view, jobs = cut(model, [0])
        notes = how(view, jobs, [batch]) if how is repair else how(view, jobs)
        answers[how] = relative_error(run(model, batch), original)
        for path, stay in jobs.items():
            weight = view.module(path).weight
            weight = weight if isinstance(view.module(path), torch.nn.Linear) else weight.T
            assert (weight[:, ~stay] == 0).all()
            assert (weight[:, stay] != 0).any()
    assert answers[repair] < answers[without]
    assert set(notes) == set(jobs)


def test_twins_are_repaired_exactly():
    model, batch = MODELS["vit"]()
    view = View(model)
    at = view.attentions()[0]
    width = at.value_dim
    for path in (at.q, at.k, at.v):
        for tensor in (view.module(path).weight.data, view.module(path).bias.data):
            tensor[width : 2 * width] = tensor[:width]
    original = run(model, batch)
    stay = heads_of(at, "group").stays(view, at.o, [0, 2, 3])
    repair(view, {at.o: stay}, [batch])
    assert relative_error(run(model, batch), original) < 1e-3


def test_nothing_to_do_changes_nothing():
    model, batch = MODELS["llama"]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    view, jobs = cut(model, [0, 1])
    repair(view, jobs, [batch])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-4, atol=1e-5)
