"""The norm of each head's value-output map: what it is, and what leaves it as it is."""

import pytest
import torch

from compress.outputs import relative_error, run
from compress.transforms.heads.magnitude import Magnitude, head_norms, head_weights
from compress.view import View
from models import MODELS


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bert", "vit", "swin", "t5", "dit", "sd3", "flux"])
def test_the_norm_is_that_of_the_product(name):
    view = View(MODELS[name]()[0])
    for at in view.attentions():
        values, outputs = head_weights(view, at)
        norms = head_norms(view, at)
        assert norms.shape == (at.heads,)
        for head in range(at.heads):
            exact = (outputs[head].double() @ values[head].double()).norm().item()
            assert norms[head].item() == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_scaling_values_up_and_the_output_down_changes_nothing(name):
    view = View(MODELS[name]()[0])
    at = view.attentions()[0]
    before = head_norms(view, at)
    if at.v is None:
        pytest.skip("values are part of a fused projection")
    view.module(at.v).weight.data *= 16
    view.module(at.o).weight.data /= 16
    torch.testing.assert_close(head_norms(view, at), before, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_a_dead_head_goes_first_without_a_trace(name):
    model, batch = MODELS[name]()
    view = View(model)
    at = view.attentions()[1]
    output = view.module(at.o)
    matrix = output.weight.data if isinstance(output, torch.nn.Linear) else output.weight.data.T
    matrix[:, at.value_dim : 2 * at.value_dim] = 0
    method = Magnitude(keep=7 / 8)
    plan = method.plan(view)
    assert plan.edits == {at.path: {"groups": [0, 2, 3], "queries": None}}
    before = run(model, batch)
    method.apply(view, plan)
    assert relative_error(run(model, batch), before) < 1e-6


def test_on_an_empty_model_it_plans_the_same_number_of_heads():
    model, _ = MODELS["vit"]()
    method = Magnitude(keep=0.5, layout="uniform")
    real = method.plan(View(model)).edits
    empty = method.plan(View(MODELS["vit"]()[0].to("meta"))).edits
    assert {path: len(edit["groups"]) for path, edit in real.items()} == {
        path: len(edit["groups"]) for path, edit in empty.items()
    }
