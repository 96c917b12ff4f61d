"""Distillation of a whole model: it comes nearer to the original, what was cut stays cut, and no harm is kept."""

import copy

import pytest
import torch

from compress.probing import Answers
from compress.relearning import lessons, relearn, surprise
from compress.transforms.heads.factorize import Factorize
from compress.transforms.heads.prune import Prune
from compress.view import View
from models import IMAGE, image, text


def decoder():
    model, _ = text("llama", num_key_value_heads=2, num_hidden_layers=3)
    ids = torch.randint(3, 99, (8, 4, 16), generator=torch.Generator().manual_seed(3))
    return model, [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in ids]


def encoder():
    model, _ = image("vit", "AutoModel", **IMAGE | {"num_hidden_layers": 3})
    pixels = torch.randn(8, 4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    return model, [{"pixel_values": rows} for rows in pixels]


def sharp(model):
    """Random models answer evenly whatever is cut; larger weights let them care."""
    for weight in model.parameters():
        weight.data.mul_(3 if weight.dim() > 1 else 1)
    return model


@pytest.mark.parametrize("make", [decoder, encoder])
@pytest.mark.parametrize(
    "method", [Prune(keep=0.5, score="energy", distill=40), Factorize(keep=0.5, step=2, distill=40)], ids=str
)
def test_distillation_brings_answers_nearer_and_what_is_cut_stays_cut(make, method):
    model, batches = make()
    original, view = copy.deepcopy(sharp(model)), View(model)
    plan = method.calibrate(view, method.plan(view), batches)
    without = copy.deepcopy(original)
    plain = method.model_copy(update={"distill": 0})
    plain.calibrate(View(without), plain.plan(View(without)), batches)
    answers = Answers.of(original, batches[3::4])
    assert answers.distance(model) < answers.distance(without)
    assert plan.notes["remarks"][-1].startswith("40 steps of distillation")
    pairs = [[each.get_submodule(at.o).weight == 0 for each in (model, without)] for at in view.attentions()]
    assert any(gone.any() for gone, _ in pairs)
    assert all(torch.equal(*pair) for pair in pairs)


def test_distillation_that_brings_nothing_is_undone():
    model, batches = decoder()
    before = copy.deepcopy(model.state_dict())
    assert "undone" in relearn(View(model), copy.deepcopy(model), batches, 2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_surprise_is_the_loss_of_the_library_and_padding_does_not_count():
    model, batches = decoder()
    batch = {name: value.clone() for name, value in batches[0].items()}
    batch["attention_mask"][0, 10:] = 0
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model(**batch, labels=labels)
    torch.testing.assert_close(surprise(output.logits, batch), output.loss)


def test_lessons_hold_every_example_once():
    batches = [{"input_ids": torch.arange(6 * 400).view(6, 400)}, {"input_ids": torch.arange(8).view(4, 2)}]
    parts = lessons(batches)
    assert [len(part["input_ids"]) for part in parts] == [2, 2, 2, 4]
    joined = torch.cat([part["input_ids"].flatten() for part in parts])
    assert torch.equal(joined, torch.cat([batch["input_ids"].flatten() for batch in batches]))


def test_factors_by_weights_learn_from_no_data():
    from compress.errors import CompressError

    with pytest.raises(CompressError, match="leave one out"):
        Factorize(by="weights", distill=3).plan(View(decoder()[0]))


def test_models_in_bfloat16_learn_in_float32_and_stay_what_they_are():
    model, batches = encoder()
    model = sharp(model).bfloat16()
    batches = [{"pixel_values": batch["pixel_values"].bfloat16()} for batch in batches]
    method = Prune(keep=0.5, score="energy", distill=3)
    plan = method.calibrate(View(model), method.plan(View(model)), batches)
    assert plan.notes["remarks"][-1].startswith("3 steps")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
