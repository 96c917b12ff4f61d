"""What every method must do on every model; methods and models are enumerated, none is listed here."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest
import torch
from torch import nn

from compress.checkpoint import check_files, load
from compress.emit import write
from compress.errors import CompressError
from compress.outputs import run
from compress.recipe import Emit, Recipe
from compress.replay import record, replay
from compress.source import Source
from compress.transform import Plan, card, find, names
from compress.view import View
from models import MODELS

ROOT = Path(__file__).parents[2]
PAIRS = [(method, model) for method in names() for model in MODELS]


class Done(NamedTuple):
    """A method carried out on a tiny model, or its refusal."""

    model: nn.Module
    batch: dict
    plan: Plan
    steps: list[dict]
    refusal: str


@cache
def tiny(name: str) -> tuple[nn.Module, dict]:
    """A tiny model as users have it, read from a folder: then it knows the names that its tensors have on disk."""
    model, batch = MODELS[name]()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder).eval(), batch


@cache
def done(method: str, name: str) -> Done:
    """Carry the method out with its example options, once for all laws."""
    original, batch = tiny(name)
    model = copy.deepcopy(original)
    cls = find(method)
    transform = cls(**cls.example)
    try:
        plan = transform.plan(View(model))
    except CompressError as error:
        return Done(model, batch, Plan({}), [], str(error))
    if not plan.edits:
        return Done(model, batch, plan, [], json.dumps(plan.notes.get("refused", {})))
    torch.manual_seed(0)
    if transform.needs_data or transform.uses_data:
        plan = transform.calibrate(View(model), plan, [batch])
    steps = [record(model, method, plan)]
    transform.apply(View(model), plan)
    return Done(model, batch, plan, steps, "")


def carried_out(method: str, name: str) -> Done:
    result = done(method, name)
    if result.refusal:
        pytest.skip(f"refused: {result.refusal[:120]}")
    return result


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_it_changes_the_model_or_says_what_it_refuses_and_why(method, name):
    result = done(method, name)
    if result.plan.edits:
        original, batch = tiny(name)
        before, after = original.state_dict(), result.model.state_dict()
        same = before.keys() == after.keys() and all(
            tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]) for key, tensor in before.items()
        )
        modules = [type(module) for module in original.modules()], [type(module) for module in result.model.modules()]
        hooked = any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in result.model.modules())
        assert not same or modules[0] != modules[1] or hooked
    else:
        reasons = json.loads(result.refusal) if result.refusal.startswith("{") else {"": result.refusal}
        assert reasons, "nothing taken and nothing refused"
        assert all(why.strip() for why in reasons.values())


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_neutral_options_change_nothing(method, name):
    cls = find(method)
    if cls.neutral is None:
        pytest.skip("the method has no neutral options")
    original, _ = tiny(name)
    try:
        plan = cls(**cls.neutral).plan(View(copy.deepcopy(original)))
    except CompressError as error:
        assert str(error)
        return
    assert plan.edits == {}


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_the_plan_is_json(method, name):
    result = carried_out(method, name)
    assert json.loads(json.dumps(result.plan.edits)) == result.plan.edits
    assert json.loads(json.dumps(result.plan.notes)) == result.plan.notes, "a report is read again"
    assert json.loads(json.dumps(result.steps)) == result.steps


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_replay_on_meta_gives_the_shapes_of_apply_on_weights(method, name):
    result = carried_out(method, name)
    empty = copy.deepcopy(tiny(name)[0]).to("meta")
    replay(empty, json.loads(json.dumps(result.steps)))
    shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in result.model.state_dict().items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in empty.state_dict().items()} == shapes
    assert all(tensor.is_meta for tensor in empty.parameters())


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_saved_and_loaded_it_answers_bit_for_bit_and_saves_the_same_bytes(method, name, tmp_path):
    result = carried_out(method, name)
    if View(result.model).library == "torch":
        pytest.skip("only models of the two libraries are saved")
    model = copy.deepcopy(result.model)
    source = Source(name, model, View(model).library)
    write(source, tmp_path / "one", result.steps, result.batch, Emit(), {})
    with torch.no_grad():
        expected = run(model, result.batch)
    loaded = load(tmp_path / "one").eval()
    with torch.no_grad():
        assert torch.equal(run(loaded, result.batch), expected)
    source = Source(name, loaded, View(loaded).library)
    write(source, tmp_path / "two", result.steps, result.batch, Emit(), {})
    assert check_files(tmp_path / "two")["files"] == check_files(tmp_path / "one")["files"]


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_what_only_names_is_taken_or_refused_by_name(method, name):
    cls = find(method)
    original, _ = tiny(name)
    for path in ["no.such.module", *(attention.path for attention in View(original).attentions()[:1])]:
        try:
            plan = cls(**cls.example, only=(path,)).plan(View(copy.deepcopy(original)))
        except CompressError as error:
            assert len(str(error).splitlines()) == 1
            continue
        assert all(key == path or key.startswith(path + ".") or path.startswith(key + ".") for key in plan.edits)
        if path == "no.such.module":
            assert not plan.edits


@pytest.mark.parametrize("method", names())
def test_it_has_a_card_a_recipe_and_a_test(method):
    family, name = method.split(".")
    words = card(method)
    assert "When it hurts" in words or "when it hurts" in words
    assert "Paper" in words
    recipes = [Recipe.read(path) for path in (ROOT / "recipes").glob("*.yaml")]
    assert any(step.use == method for recipe in recipes for step in recipe.steps)
    assert (ROOT / "tests" / "transforms" / f"test_{family}_{name}.py").exists()
    for field in find(method).model_fields.values():
        assert field.description
