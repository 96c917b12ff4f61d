"""A training that is killed goes on where it was, to the bit; one of another run or another training does not."""

import json

import pytest
import torch
from torch import nn

import compress
from compress import CompressError, resuming
from compress.distill import train
from compress.resuming import resumable
from models import MODELS

STEPS = 12


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """The state is written after every step."""
    monkeypatch.setattr(resuming, "SECONDS", 0.0)
    monkeypatch.setattr(resuming, "RARE", 0)


class Killed(BaseException):
    pass


class Task:
    """Two weights, of which only one is reached at first; counts the steps, and is killed at one."""

    def __init__(self, die=None):
        generator = torch.Generator().manual_seed(1)
        self.weights = [nn.Parameter(torch.randn(5, generator=generator)) for _ in range(2)]
        self.examples = torch.randn(4, 5, generator=generator)
        self.die, self.calls = die, 0

    def loss(self, example, done):
        self.calls += 1
        if self.calls == self.die:
            raise Killed
        reached = self.weights if done > 0.5 else self.weights[:1]
        return sum((weight - example).square().sum() for weight in reached)

    def learn(self):
        train(self.weights, self.examples, self.loss, STEPS, 0.1)
        return self.calls, torch.stack([weight.detach() for weight in self.weights])


@pytest.mark.parametrize("die", range(2, STEPS + 1))
def test_a_killed_training_goes_on_where_it_was(tmp_path, die):
    path = tmp_path / "training.safetensors"
    with pytest.raises(Killed), resumable(path, "a run"):
        Task(die).learn()
    with resumable(path, "a run"):
        calls, learned = Task().learn()
    assert calls == STEPS - (die - 1)
    assert torch.equal(learned, Task().learn()[1])


def test_of_several_trainings_of_a_step_the_killed_one_goes_on(tmp_path):
    path = tmp_path / "training.safetensors"
    with pytest.raises(Killed), resumable(path, "a run"):
        Task().learn()
        Task(die=5).learn()
    with resumable(path, "a run"):
        first, second = Task().learn(), Task().learn()
    assert (first[0], second[0]) == (STEPS, STEPS - 4)
    assert torch.equal(first[1], second[1])


def test_the_state_of_another_run_is_not_gone_on_from(tmp_path):
    path = tmp_path / "training.safetensors"
    with pytest.raises(Killed), resumable(path, "a run"):
        Task(die=5).learn()
    with resumable(path, "another"):
        assert Task().learn()[0] == STEPS


def test_a_damaged_state_is_one_clear_line(tmp_path):
    path = tmp_path / "training.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CompressError, match=f"{path}: is damaged; remove it"), resumable(path, "a run"):
        Task().learn()


def test_a_state_is_not_written_at_every_step(tmp_path, monkeypatch):
    monkeypatch.undo()
    path = tmp_path / "training.safetensors"
    with resumable(path, "a run"):
        Task().learn()
    assert not path.exists()


def test_a_recipe_killed_in_its_distillation_gives_the_same_bytes(quick, saved, tmp_path, monkeypatch):
    """And once its step is done nothing is left of the training."""
    batch = MODELS["llama"]()[1]
    recipe = {
        "steps": [{"use": "heads.prune", "score": "magnitude", "keep": 0.5, "distill": STEPS}],
        "emit": {"format": "compress-plan"},
    }

    def finished(out):
        compress.compress(saved("llama"), recipe, output=out, calibration=[batch] * 4)
        return json.loads((out / "compress.json").read_text())["files"]

    from compress import relearning

    taught, count = relearning.loss, 0

    def counted(*arguments):
        nonlocal count
        if torch.is_grad_enabled():
            count += 1
            if count == 8:
                raise Killed
        return taught(*arguments)

    monkeypatch.setattr(relearning, "loss", counted)
    with pytest.raises(Killed):
        finished(tmp_path / "killed")
    assert list((tmp_path / "killed.partial").glob("*training*"))
    found = finished(tmp_path / "killed")
    assert count == STEPS + 1, "the step in which it was killed ran twice, no other"
    assert not (tmp_path / "killed.partial").exists()
    monkeypatch.undo()
    assert found == finished(tmp_path / "whole")
