"""A training that is killed goes on where it was, to the bit; one of another run or another training does not."""

import json

import pytest
import torch
from torch import nn

import compress
from compress import resuming
from compress.distill import train
from compress.resuming import Trainings
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
    """Two weights, one of them transposed, of which only one is reached at first; counts the steps, and is killed."""

    def __init__(self, die=None, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.weights = [nn.Parameter(torch.randn(5, 2, generator=generator).t()) for _ in range(2)]
        self.examples = torch.randn(4, 2, 5, generator=generator)
        self.die, self.calls = die, 0

    def loss(self, example, done):
        self.calls += 1
        if self.calls == self.die:
            raise Killed
        reached = self.weights if done > 0.5 else self.weights[:1]
        return sum((weight - example).square().sum() for weight in reached)

    def learn(self, trainings=None):
        train(self.weights, self.examples, self.loss, STEPS, 0.1, trainings)
        return self.calls, torch.stack([weight.detach() for weight in self.weights])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "training.safetensors"


@pytest.mark.parametrize("die", range(2, STEPS + 1))
def test_a_killed_training_goes_on_where_it_was(path, die):
    with pytest.raises(Killed):
        Task(die).learn(Trainings(path, "a run"))
    calls, learned = Task().learn(Trainings(path, "a run"))
    assert calls == STEPS - (die - 1)
    assert torch.equal(learned, Task().learn()[1])


def test_of_several_trainings_of_a_step_the_killed_one_goes_on(path):
    trainings = Trainings(path, "a run")
    Task().learn(trainings)
    with pytest.raises(Killed):
        Task(die=5).learn(trainings)
    again = Trainings(path, "a run")
    first, second = Task().learn(again), Task().learn(again)
    assert (first[0], second[0]) == (STEPS, STEPS - 4)
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize(("run", "seed"), [("another", 1), ("a run", 2)])
def test_the_state_of_another_run_or_of_other_weights_is_not_gone_on_from(path, run, seed):
    with pytest.raises(Killed):
        Task(die=5).learn(Trainings(path, "a run"))
    calls, learned = Task(seed=seed).learn(Trainings(path, run))
    assert calls == STEPS and torch.equal(learned, Task(seed=seed).learn()[1])


def test_without_its_state_or_room_for_it_a_training_runs_as_ever(path, monkeypatch):
    path.write_bytes(b"nothing of the kind")
    assert Task().learn(Trainings(path, "a run"))[0] == STEPS

    def full(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(resuming, "save_file", full)
    calls, learned = Task().learn(Trainings(path.with_name("other"), "a run"))
    assert calls == STEPS and torch.equal(learned, Task().learn()[1])
    assert not path.with_name("other").exists()


def test_a_state_is_not_written_at_every_step(path, monkeypatch):
    monkeypatch.undo()
    Task().learn(Trainings(path, "a run"))
    assert not path.exists()


def test_a_recipe_killed_in_its_distillation_gives_the_same_bytes(quick, saved, tmp_path, monkeypatch):
    """And once its step is done nothing is left of the training."""
    batch = MODELS["llama"]()[1]
    recipe = {
        "steps": [{"use": "heads.prune", "score": "energy", "keep": 0.5, "distill": STEPS}],
        "emit": {"format": "compress-plan"},
    }

    def finished(out):
        compress.compress(saved("llama"), recipe, output=out, calibration=[batch] * 4)
        return json.loads((out / "compress.json").read_text())["files"]

    from compress import relearning

    taught, count = relearning.loss, 0

    def counted(student, *arguments):
        nonlocal count
        if torch.is_grad_enabled():
            assert any((weight == 0).any() for weight in student.parameters()), "what is cut must stay cut"
            count += 1
            if count == 8:
                raise Killed
        return taught(student, *arguments)

    monkeypatch.setattr(relearning, "loss", counted)
    with pytest.raises(Killed):
        finished(tmp_path / "killed")
    assert list((tmp_path / "killed.partial").glob("*training*"))
    found = finished(tmp_path / "killed")
    assert count == STEPS + 1, "the step in which it was killed ran twice, no other"
    assert not (tmp_path / "killed.partial").exists()
    monkeypatch.undo()
    assert found == finished(tmp_path / "whole")
