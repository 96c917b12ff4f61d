"""Tasks of the lm-evaluation-harness as measures: by a harness that is made up, and by the real one where it is."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch

import compress
from compress import CompressError, LimitMissed, harness
from compress.recipe import Recipe, schema
from models import MODELS

INT8 = [{"use": "quantize.int8"}]
WORDS = ["[UNK]", "[EOS]", "red", "green", "blue", "round", "square", "is", "the", "ball", "box"]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="[EOS]", pad_token="[EOS]", unk_token="[UNK]")


def recipe(**validate):
    return {"steps": INT8, "validate": {"batch": 2, **validate}}


def refusal(text):
    with pytest.raises(CompressError) as error:
        Recipe.parse(f"steps:\n  - use: quantize.int8\nvalidate:\n  {text}\n", "r.yaml")
    return str(error.value)


@pytest.mark.parametrize("task", ["piqa", "arc_easy", "ceval-valid_law", "tasks/mine.yaml"])
def test_a_task_is_a_measure_with_a_limit(task):
    limits = Recipe.make(recipe(**{f"lm_eval.{task}": -0.01})).validate_.limits
    assert limits[f"lm_eval.{task}"].bound(0.5) == pytest.approx(0.49)


def test_a_malformed_task_is_found_at_its_place():
    assert refusal("lm_eval.: 0.5").startswith("r.yaml:4:3: validate: lm_eval. names no task, it must be like")
    assert refusal("lm_eval.a b: 0.5").startswith("r.yaml:4:3: validate: 'lm_eval.a b' names no task")
    assert "did you mean lm_eval.<task>?" in refusal("lm_eval: {piqa: 0.5}")
    assert "r.yaml:4:17: validate: lm_eval.piqa is 'good', it must be a number" in refusal("lm_eval.piqa: good")


def test_the_schema_knows_tasks():
    jsonschema = pytest.importorskip("jsonschema")
    rules = jsonschema.Draft202012Validator(schema())
    assert rules.is_valid(recipe(**{"lm_eval.piqa": -0.01}))
    assert not rules.is_valid(recipe(**{"lm_eval.": -0.01})) and not rules.is_valid(recipe(**{"lm_eval.x": "good"}))


@pytest.mark.parametrize(
    ("row", "higher", "value"),
    [
        ({"alias": "a", "acc,none": 0.1, "acc_stderr,none": 9, "acc_norm,none": 0.2, "sample_len": 7}, {}, 0.2),
        ({"exact_match,strict-match": 0.3, "exact_match,flexible-extract": 0.4}, {}, 0.3),
        ({"em,none": 0.5, "acc,none": 0.6}, {}, 0.6),
        ({"alias": "a", "bleu,none": 7, "chrf,none": 8}, {"bleu": True}, 7.0),
    ],
)
def test_the_primary_metric(row, higher, value):
    assert harness.primary("lm_eval.t", row, higher) == value


def test_a_task_without_a_score_or_with_a_loss_is_refused():
    with pytest.raises(CompressError, match="lm_eval.t has no score of its own"):
        harness.primary("lm_eval.t", {"alias": "t"}, {})
    with pytest.raises(CompressError, match="word_perplexity, which is better when lower; use perplexity"):
        harness.primary("lm_eval.t", {"word_perplexity,none": 8.0}, {"word_perplexity": False})


def test_scores_are_held_against_their_limits(monkeypatch, tokenizer):
    asked = []

    def evaluate(name, model, processor, samples, batch):
        asked.append((name, samples, batch))
        compressed = any("int8" in type(module).__name__.lower() for module in model.modules())
        return {"acc,none": 0.5 if compressed else 0.75}, {"acc": True}

    monkeypatch.setattr(harness, "evaluate", evaluate)
    monkeypatch.setattr("compress.pipeline.check_tasks", lambda *arguments: None)
    with pytest.raises(LimitMissed, match=r"lm_eval.piqa is 0.5, the limit is -0.2"):
        compress.compress(MODELS["llama"]()[0], recipe(**{"lm_eval.piqa": -0.2}), processor=tokenizer)
    result = compress.compress(
        MODELS["llama"]()[0], recipe(samples=5, **{"lm_eval.piqa": -0.25, "lm_eval.boolq": None}), processor=tokenizer
    )
    found = {item.name: (item.before, item.after, item.passed) for item in result.report.measures}
    assert found["lm_eval.piqa"] == (0.75, 0.5, True) and found["lm_eval.boolq"] == (0.75, 0.5, None)
    assert asked[-4:] == [("lm_eval.piqa", 5, 2), ("lm_eval.boolq", 5, 2)] * 2


def test_a_missing_package_is_said_before_any_work(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("compress.pipeline.carry_out", lambda *arguments: pytest.fail("the work began"))
    with pytest.raises(CompressError, match=r"lm_eval.piqa needs .*pip install transformer-compress\[eval\]"):
        compress.compress(MODELS["llama"]()[0], recipe(**{"lm_eval.piqa": None}), processor=tokenizer)


def test_what_answers_no_text_is_refused(tokenizer):
    with pytest.raises(CompressError, match="measures language models, ViTForImageClassification generates no text"):
        compress.compress(MODELS["vit"]()[0], recipe(**{"lm_eval.piqa": None}))
    with pytest.raises(CompressError, match="needs a tokenizer"):
        compress.compress(MODELS["llama"]()[0], recipe(**{"lm_eval.piqa": None}))


real = [
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed"),
    pytest.mark.filterwarnings("ignore"),  # of the harness and its many parts
]


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A multiple choice of our own in the working folder, and a cache of datasets there."""
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    colours = ["red", "green", "blue"]
    rows = [{"question": f"the {thing} is", "choices": colours, "gold": number % 3} for number, thing in
            enumerate(["ball", "box", "round ball", "square box", "round box", "square ball"])]  # fmt: skip
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: rows.json}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    return rows


def by_hand(model, tokenizer, rows) -> float:
    """The share of rows whose right colour the model finds most likely."""
    hits = 0
    for row in rows:
        with torch.no_grad():
            last = model(**tokenizer(row["question"], return_tensors="pt", return_token_type_ids=False)).logits[0, -1]
        scores = [last[tokenizer.convert_tokens_to_ids(choice)].item() for choice in row["choices"]]
        hits += scores.index(max(scores)) == row["gold"]
    return hits / len(rows)


class TestRealHarness:
    pytestmark = real

    def test_a_local_task_gives_the_accuracy_by_hand(self, task, tokenizer, capfd):
        model = MODELS["llama"]()[0]
        wanted = {samples: by_hand(model, tokenizer, task[:samples]) for samples in (6, 4)}
        for samples, value in wanted.items():
            section = Recipe.make(recipe(samples=samples, **{"lm_eval.mine.yaml": None})).validate_
            assert harness.scores(section, model, tokenizer) == {"lm_eval.mine.yaml": pytest.approx(value)}
        assert "%|" not in capfd.readouterr().err

    def test_a_run_measures_before_and_after(self, task, tokenizer):
        model = MODELS["llama"]()[0]
        before = by_hand(model, tokenizer, task)
        result = compress.compress(model, recipe(**{"lm_eval.mine.yaml": -1.0}), processor=tokenizer)
        found = next(item for item in result.report.measures if item.name == "lm_eval.mine.yaml")
        assert (found.before, found.passed) == (pytest.approx(before), True)
        assert found.after == pytest.approx(by_hand(result.model, tokenizer, task))

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("lm_eval.piqqa", "has no such task; did you mean piqa"),
            ("lm_eval.none.yaml", "FileNotFoundError"),
            ("lm_eval.code.yaml", "could not determine a constructor for the tag '!function'"),
            ("lm_eval.list.yaml", "must be a mapping with the key task"),
            ("lm_eval.lost.yaml", "cannot be measured"),
        ],
    )
    def test_a_wrong_task_is_refused_before_any_work(self, task, tokenizer, tmp_path, monkeypatch, name, message):
        monkeypatch.setattr("compress.pipeline.carry_out", lambda *arguments: pytest.fail("the work began"))
        mine = (tmp_path / "mine.yaml").read_text()
        (tmp_path / "code.yaml").write_text(mine + "process_docs: !function code.run\n")
        (tmp_path / "list.yaml").write_text("[1]")
        (tmp_path / "lost.yaml").write_text(mine.replace("rows.json", "nowhere.json"))
        with pytest.raises(CompressError, match=message):
            compress.compress(MODELS["llama"]()[0], recipe(**{name: None}), processor=tokenizer)
