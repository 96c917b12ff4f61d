"""Recipes: what they read to, and that every mistake is found at its place and said in our words."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError, model_validator

import compress.recipe
from broken_recipes import BY_HAND, STEPS, VALID, generated
from compress.errors import CompressError
from compress.metrics import METRICS
from compress.recipe import Recipe, schema
from compress.sections import Limit
from compress.transform import Field, Transform, find, names


class Prune(Transform):
    keep: float = Field(1.0, gt=0, le=1, description="share that stays")


class Merge(Transform):
    ratio: float | None = Field(None, ge=0, lt=1)
    mode: Literal["mean", "first"] = "mean"
    window: tuple[int, int] = (1, 1)
    groups: int | Literal["all"] = "all"
    steps: list[Annotated[int, Field(gt=0)]] = []
    label: str = Field("", max_length=5)
    width: int = Field(8, multiple_of=8)
    exact: bool = False

    @model_validator(mode="after")
    def _agree(self):
        if self.exact and self.ratio:
            raise ValueError("exact is true,\nratio must be left out")
        return self


class Int8(Transform):
    pass


class Bits(Transform):
    bits: Literal[2, 4, 8]

    @model_validator(mode="after")
    def _refuse(self):
        if self.bits == 2 and not self.only:
            raise CompressError("bits is 2, only must be given")
        return self


METHODS = {"heads.prune": Prune, "tokens.merge": Merge, "quantize.bits": Bits, "quantize.int8": Int8}


@pytest.fixture(autouse=True, scope="module")
def methods():
    """Methods of our own, so that these tests do not depend on the options of the real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.recipe.names", lambda: tuple(METHODS))
        patch.setattr("compress.recipe.find", METHODS.__getitem__)
        patch.setattr("compress.recipe.card", lambda name: f"The card of {name}.\n\nMore.")
        yield


def refusal(text: str, name: str = "r.yaml") -> list[str]:
    with pytest.raises(CompressError) as error:
        Recipe.parse(text, name)
    return str(error.value).split("\n")


def test_every_part_is_read():
    recipe = Recipe.parse(VALID, "demo")
    assert (recipe.name, recipe.seed, recipe.source) == ("demo", 3, VALID)
    assert recipe.calibrate.model_dump() == {
        "data": "text.txt", "samples": 4, "length": 32, "batch": 2, "column": "text", "split": None
    }  # fmt: skip
    assert [step.use for step in recipe.steps] == ["heads.prune", "quantize.int8"]
    assert recipe.steps[0].method == Prune(keep=0.5, only=("*",), skip=("*.0.*",))
    assert recipe.steps[0].options == {"keep": 0.5, "only": ["*"], "except": ["*.0.*"]}
    assert [step.where for step in recipe.steps] == ["demo:10:5", "demo:14:5"]
    assert recipe.validate_.split == "test" and recipe.validate_.samples == 4
    limits = {name: limit and (limit.kind, limit.value, limit.text) for name, limit in recipe.validate_.limits.items()}
    assert list(limits.items()) == [
        ("perplexity", ("ratio", 1.05, "1.05x")),
        ("kl", ("absolute", 0.05, "0.05")),
        ("top1", ("change", -0.2, "-0.2")),
        ("accuracy", ("change", 0.5, "+0.5")),
        ("size", None),
        ("latency", None),
    ]
    assert (recipe.emit.format, recipe.emit.shard, recipe.emit.shard_bytes) == ("auto", "2GB", 2 * 10**9)


def test_what_is_left_out_has_a_default():
    recipe = Recipe.parse("steps: [{use: quantize.int8}]")
    assert (recipe.seed, recipe.calibrate, recipe.validate_) == (0, None, None)
    assert (recipe.emit.format, recipe.emit.shard_bytes, recipe.name) == ("auto", 5 * 10**9, "recipe")
    validation = Recipe.parse(STEPS + "validate: {size: 0.6x}").validate_
    assert (validation.data, validation.samples, validation.length, validation.batch) == (None, 64, 512, 8)


def test_a_recipe_is_frozen():
    with pytest.raises(ValidationError):
        Recipe.parse(VALID).seed = 4


@pytest.mark.parametrize(
    "written, kind, bound",
    [
        (3, "absolute", 3), (0.5, "absolute", 0.5), ("2", "absolute", 2), ("1.5x", "ratio", 15), (".5x", "ratio", 5),
        ("+0.5", "change", 10.5), ("-0.5", "change", 9.5), (-0.5, "change", 9.5), (0, "absolute", 0),
        ("+1", "change", 11),
    ],
)  # fmt: skip
def test_a_limit_bounds_a_measure_that_was_ten_before(written, kind, bound):
    limit = Limit.read(written)
    assert (limit.kind, limit.bound(10.0), limit.text) == (kind, bound, str(written))


@pytest.mark.parametrize("written", [None, True])
def test_a_metric_without_a_limit(written):
    assert Limit.read(written) is None


@pytest.mark.parametrize(
    "option, expected",
    [
        ("ratio: 1e-3", {"ratio": 0.001}), ("ratio: .5", {"ratio": 0.5}), ("ratio: 0", {"ratio": 0.0}),
        ("ratio: 5e-1", {"ratio": 0.5}), ("ratio: null", {"ratio": None}), ("ratio:", {"ratio": None}),
        ("label: no", {"label": "no"}), ("label: on", {"label": "on"}), ("label: 012", {"label": "012"}),
        ("label: '1'", {"label": "1"}), ("label: !!str 1", {"label": "1"}), ("label: 1:30", {"label": "1:30"}),
        ("label: =", {"label": "="}), ("label: \U0001f600", {"label": "\U0001f600"}), ("exact: True", {"exact": True}),
        ("window: [3, 5]", {"window": (3, 5)}), ("groups: 4", {"groups": 4}), ("groups: all", {"groups": "all"}),
        ("steps: [1, 2]", {"steps": [1, 2]}),
    ],
)  # fmt: skip
def test_values_are_read_without_the_riddles_of_yaml(option, expected):
    assert Recipe.parse(f"steps:\n  - use: tokens.merge\n    {option}\n").steps[0].method == Merge(**expected)


@pytest.mark.parametrize(
    "option, message",
    [
        ("ratio: 1", "4:12: tokens.merge: ratio is 1, it must be at least 0 and below 1"),
        ("ratio: a", "4:12: tokens.merge: ratio is 'a', it must be a number at least 0 and below 1"),
        ("mode: frist", "4:11: tokens.merge: mode is 'frist', it must be mean or first; did you mean first?"),
        ("mode: 3", "4:11: tokens.merge: mode is 3, it must be mean or first"),
        ("window: [1]", "4:13: tokens.merge: window.1 is missing"),
        ("window: [1, 2, 3]", "4:13: tokens.merge: window is a list, it must be at most 2 items long"),
        ("window: [1, b]", "4:17: tokens.merge: window.1 is 'b', it must be a whole number"),
        ("window: 3", "4:13: tokens.merge: window is 3, it must be a list"),
        ("groups: al", "4:13: tokens.merge: groups is 'al', it must be a whole number or all; did you mean all?"),
        ("groups: 1.5", "4:13: tokens.merge: groups is 1.5, it must be a whole number or all"),
        ("steps: [1, 0]", "4:16: tokens.merge: steps.1 is 0, it must be above 0"),
        ("steps: {a: 1}", "4:12: tokens.merge: steps is a mapping, it must be a list"),
        ("label: abcdef", "4:12: tokens.merge: label is 'abcdef', it must be at most 5 characters long"),
        ("label: 3", "4:12: tokens.merge: label is 3, it must be text"),
        ("width: 9", "4:12: tokens.merge: width is 9, it must be a multiple of 8"),
        ("exact: yes", "4:12: tokens.merge: exact is 'yes', it must be true or false"),
        ("exact: 1", "4:12: tokens.merge: exact is 1, it must be true or false"),
        (
            "label: " + "x" * 99,
            "4:12: tokens.merge: label is '" + "x" * 56 + "..., it must be at most 5 characters long",
        ),
        ("{ratio: 0.5, exact: true}", "4:5: tokens.merge: exact is true, ratio must be left out"),
    ],
)
def test_options_are_refused_in_our_words(option, message):
    if option.startswith("{"):
        option = option.strip("{}").replace(", ", "\n    ")
        message = message.replace("4:5", "3:5")
    assert refusal(f"# one\nsteps:\n  - use: tokens.merge\n    {option}\n") == [f"r.yaml:{message}"]


def test_a_missing_option_and_a_method_that_refuses():
    assert refusal("steps:\n  - use: quantize.bits\n") == ["r.yaml:2:5: quantize.bits: bits is missing"]
    assert refusal("steps:\n  - {use: quantize.bits, bits: 3}\n") == [
        "r.yaml:2:32: quantize.bits: bits is 3, it must be 2, 4 or 8"
    ]
    assert refusal("steps:\n  - {use: quantize.bits, bits: 2}\n") == [
        "r.yaml:2:5: quantize.bits: bits is 2, only must be given"
    ]


def test_all_mistakes_come_at_once_in_the_order_of_the_text():
    text = "sed: 1\nsteps:\n  - use: tokens.merge\n    mode: x\n    ratio: 2\n  - use: heads.prunes\nemit: {shard: 1}\n"
    places = [line.split(": ")[0] for line in refusal(text)]
    assert places == ["r.yaml:1:1", "r.yaml:4:11", "r.yaml:5:12", "r.yaml:6:10", "r.yaml:7:15"]


def test_a_value_that_cannot_be_read_is_reported_once():
    assert len(refusal("seed: !!binary aGk=\n" + STEPS)) == 1


@pytest.mark.parametrize("text, place, message", BY_HAND, ids=[str(number) for number in range(len(BY_HAND))])
def test_broken_by_hand(text, place, message):
    first = refusal(text)[0]
    assert first.startswith(f"r.yaml:{place}:" if place else "r.yaml:")
    assert message in first


@pytest.mark.parametrize("text, line", [pytest.param(text, line, id=what) for what, text, line in generated()])
def test_broken_by_mutation(text, line):
    lines = refusal(text)
    assert all(re.match(r"r\.yaml:\d+:\d+: \S", message) for message in lines)
    assert line is None or any(message.startswith(f"r.yaml:{line}:") for message in lines)


def test_there_are_enough_broken_recipes():
    assert len({text for text, *_ in BY_HAND} | {text for _, text, _ in generated()}) >= 200


def test_anchors_repeat_what_they_name():
    recipe = Recipe.parse("calibrate: &text {data: a.txt, samples: 2}\nsteps:\n  - {use: heads.prune, only: &g [a]}\n"
                          "  - {use: quantize.int8, only: *g}\n")  # fmt: skip
    assert recipe.steps[1].method.only == ("a",)


# files


def test_a_file_is_read_to_the_letter(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())
    recipe = Recipe.read(path)
    assert recipe.source.encode() == path.read_bytes()
    assert recipe.name == "small" and recipe.steps[1].where == f"{path}:14:5"
    assert recipe.steps[0].method == Recipe.parse(VALID).steps[0].method


@pytest.mark.parametrize(
    "raw, place, message",
    [
        (b"seed: 1\n# \xff", ":2:3", "byte 0xff is not UTF-8, it must be text"),
        (VALID.encode("utf-16"), ":1:1", "byte 0xff is not UTF-8"),
        (b"#" * 10**6 + b"\n", ":1:1", "more than 1000000 bytes"),
        (b"steps: 3", ":1:8", "steps is 3"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path, raw, place, message):
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    with pytest.raises(CompressError, match=re.escape(message)) as error:
        Recipe.read(path)
    assert str(error.value).startswith(f"{path}{place}: ")


@pytest.mark.parametrize("name, message", [("none.yaml", "no such file or directory"), (".", "is a directory")])
def test_no_file(tmp_path, name, message):
    with pytest.raises(CompressError, match=f"{message}, it must be a recipe file"):
        Recipe.read(tmp_path / name)


# made in Python


def test_a_recipe_made_in_python():
    made = Recipe.make(
        {
            "calibrate": {"data": Path("a") / "b.txt"},
            "steps": (
                {"use": "tokens.merge", "ratio": 1e-3, "label": "1e-3"},
                {"use": "quantize.int8", "only": ("a",)},
            ),
            "validate": {"kl": "+0.5", "top1": -0.5, "size": None},
        }
    )
    assert made.calibrate.data == str(Path("a") / "b.txt")
    assert [step.method for step in made.steps] == [Merge(ratio=0.001, label="1e-3"), Int8(only=("a",))]
    assert [step.where for step in made.steps] == ["recipe:steps.0", "recipe:steps.1"]
    again = Recipe.parse(made.source)
    assert (again.calibrate, again.validate_, again.emit) == (made.calibrate, made.validate_, made.emit)
    assert [step.method for step in again.steps] == [step.method for step in made.steps]


def test_mistakes_made_in_python_have_key_paths():
    with pytest.raises(CompressError) as error:
        Recipe.make({"steps": [{"use": "heads.prune", "keep": 2, "only": {"a"}}], "seed": object(), 3: 4}, "mine")
    assert sorted(str(error.value).split("\n")) == [
        "mine: YAML: the key '3' is no text, it must be a word",
        "mine:seed: YAML: !object '...' cannot be read, it must be plain text, a number, a list or a mapping",
        "mine:steps.0.keep: heads.prune: keep is 2, it must be above 0 and at most 1",
        "mine:steps.0.only: YAML: !!set cannot be read, it must be plain text, a number, a list or a mapping",
    ]
    with pytest.raises(CompressError, match="mine: recipe: it is 'text', it must be a mapping"):
        Recipe.make("text", "mine")


# properties

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
MERGES = st.fixed_dictionaries(
    {},
    optional={
        "ratio": st.none() | st.floats(0, 1, exclude_max=True),
        "mode": st.sampled_from(["mean", "first"]),
        "window": st.tuples(st.integers(-(10**17), 10**17), st.integers(-9, 9)),
        "groups": st.integers(0, 99) | st.just("all"),
        "label": st.text(st.characters(codec="utf-8"), max_size=5)
        | st.sampled_from(
            ["1e3", "no", "012", "+1", "~", "true", "1_0", "", " ", "a: b", "#", "- 1", "\n", "0x1", "=", "<<"]
        ),
        "steps": st.lists(st.integers(1, 9), max_size=3),
        "only": st.lists(TEXT, max_size=3),
        "except": st.lists(TEXT, max_size=3),
    },
)


@example({"except": ["a\x85b\u2028\u2029"]}, 0)
@given(MERGES, st.integers(0, 2**32 - 1))
def test_options_come_back_through_the_text(options, seed):
    made = Recipe.make({"seed": seed, "steps": [{"use": "tokens.merge", **options}]})
    again = Recipe.parse(made.source)
    expected = {"skip" if key == "except" else key: value for key, value in options.items()}
    assert again.steps[0].method == made.steps[0].method == Merge(**expected)
    assert again.seed == made.seed == seed
    assert json.loads(json.dumps(again.steps[0].options)) == again.steps[0].options


def reads_or_refuses(text: str) -> None:
    try:
        recipe = Recipe.parse(text)
    except CompressError as error:
        assert all(re.match(r"recipe:\d+:\d+: \S", line) for line in str(error).split("\n"))
    else:
        assert recipe.source == text and recipe.steps


@given(st.text())
def test_any_text_is_read_or_refused(text):
    reads_or_refuses(text)


PIECES = (
    [
        "steps:",
        "- ",
        "use: ",
        "heads.prune",
        "keep: ",
        "0.5",
        "[",
        "]",
        "{",
        "}",
        ", ",
        "&a ",
        "*a",
        "<<: *a",
        "~",
        "@",
    ]
    + [
        "!!int ",
        "!!map ",
        "!!seq ",
        "!x ",
        "!<",
        "|\n",
        ">-\n",
        '"',
        "'",
        "\\UFFFFFFFF",
        "\\x4",
        "%YAML 1.1\n",
        "%TAG ! a\n",
    ]
    + [
        "---\n",
        "...\n",
        "? ",
        ": ",
        "#",
        "\t",
        "\r\n",
        "\ufeff",
        "\u2028",
        "\x85",
        "\ud800",
        "9" * 5000,
        "-.inf",
        "1e999",
    ]
    + ["validate:", "calibrate:", "emit:", "kl: ", "1x", "\n", "\n  ", "\n    "]
)


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_pieces_of_yaml_are_read_or_refused(pieces):
    reads_or_refuses("".join(pieces))


@given(st.integers(0, len(VALID)), st.integers(0, 12), st.sampled_from([*PIECES, ""]))
def test_any_damage_to_a_recipe_is_read_or_refused(start, length, piece):
    reads_or_refuses(VALID[:start] + piece + VALID[start + length :])


# the schema


def fits(value, rule: dict, root: dict) -> bool:
    """The part of JSON schema that ours uses."""
    if "$ref" in rule:
        return fits(value, root["$defs"][rule["$ref"].split("/")[-1]], root)
    types = {"null": type(None), "integer": int, "number": (int, float), "string": str, "boolean": bool}
    types |= {"array": list, "object": dict}
    kinds = rule.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    real = [
        kind for kind in kinds if isinstance(value, types[kind]) and (kind == "boolean" or not isinstance(value, bool))
    ]
    tests = [not kinds or bool(real)]
    tests += [value == rule["const"]] if "const" in rule else []
    tests += [value in rule["enum"]] if "enum" in rule else []
    tests += [any(fits(value, each, root) for each in rule["anyOf"])] if "anyOf" in rule else []
    tests += [sum(fits(value, each, root) for each in rule["oneOf"]) == 1] if "oneOf" in rule else []
    if isinstance(value, int | float):
        tests += [value >= rule.get("minimum", value), value <= rule.get("maximum", value)]
        tests += [value > rule.get("exclusiveMinimum", value - 1), value < rule.get("exclusiveMaximum", value + 1)]
    if isinstance(value, str) and "pattern" in rule:
        tests += [re.search(rule["pattern"], value) is not None]
    if isinstance(value, list):
        tests += [len(value) >= rule.get("minItems", 0), len(value) <= rule.get("maxItems", len(value))]
        tests += [fits(item, rule["items"], root) for item in value if "items" in rule]
    if isinstance(value, dict) and "properties" in rule:
        tests += [set(rule.get("required", [])) <= set(value)]
        tests += [rule["additionalProperties"] is not False or set(value) <= set(rule["properties"])]
        tests += [fits(item, rule["properties"][key], root) for key, item in value.items() if key in rule["properties"]]
    return all(tests)


GOOD = {
    "seed": 3,
    "calibrate": {"data": "a", "samples": 3},
    "steps": [{"use": "heads.prune", "keep": 0.5, "except": ["a"]}, {"use": "quantize.bits", "bits": 4}],
    "validate": {"data": "b", "perplexity": "1.05x", "kl": 0.1, "top1": "+0.5", "size": None, "flops": True},
    "emit": {"format": "native", "shard": "10MB"},
}
BAD = [
    {}, {"steps": []}, {"steps": [{}]}, {"steps": [{"use": "a.b"}]}, {"steps": [{"use": "heads.prune", "keep": 2}]},
    {"steps": [{"use": "heads.prune", "kep": 1}]}, {"steps": [{"use": "quantize.bits"}]}, GOOD | {"sed": 1},
    GOOD | {"seed": -1}, GOOD | {"calibrate": {"samples": 0}}, GOOD | {"validate": {"perplexty": 1}},
    GOOD | {"validate": {"kl": "1.05y"}}, GOOD | {"validate": {"kl": False}}, GOOD | {"validate": {"limits": {}}},
    GOOD | {"emit": {"shard": 3}}, GOOD | {"emit": {"format": "x"}}, GOOD | {"emit": None}, GOOD | {"steps": [[]]},
]  # fmt: skip


def test_the_schema_takes_what_we_take_and_refuses_what_we_refuse():
    rules = schema()
    assert json.loads(json.dumps(rules)) == rules
    assert fits(GOOD, rules, rules) and Recipe.make(GOOD)
    for bad in BAD:
        assert not fits(bad, rules, rules), bad
        with pytest.raises(CompressError):
            Recipe.make(bad)


def test_the_schema_is_one():
    jsonschema = pytest.importorskip("jsonschema")
    rules = schema()
    jsonschema.Draft202012Validator.check_schema(rules)
    validator = jsonschema.Draft202012Validator(rules)
    assert validator.is_valid(GOOD) and not any(validator.is_valid(bad) for bad in BAD)


def test_the_schema_helps_an_editor():
    rules = schema()
    keep = rules["properties"]["steps"]["items"]["oneOf"][0]["properties"]["keep"]
    assert (keep["description"], keep["default"], keep["exclusiveMinimum"], keep["maximum"]) == (
        "share that stays",
        1.0,
        0,
        1,
    )
    assert (
        rules["properties"]["steps"]["items"]["oneOf"][0]["properties"]["use"]["description"]
        == "The card of heads.prune."
    )
    assert set(METRICS) < set(rules["properties"]["validate"]["properties"])


# the real methods


@pytest.mark.parametrize("name", names())
def test_the_example_of_each_method_comes_back(name, monkeypatch):
    monkeypatch.setattr(compress.recipe, "names", names)
    monkeypatch.setattr(compress.recipe, "find", find)
    made = Recipe.make({"steps": [{"use": name, **find(name).example}]})
    (step,) = made.steps
    assert step.method == find(name)(**find(name).example)
    assert Recipe.parse(made.source).steps[0].method == step.method
    assert Recipe.make({"steps": [{"use": name, **step.options}]}).steps[0].method == step.method


def test_reading_a_recipe_needs_no_torch():
    code = "import sys, compress.recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_every_metric_says_what_it_is():
    assert set(METRICS) == {
        "perplexity", "kl", "top1", "accuracy", "cosine", "relative_error", "psnr",
        "latency", "size", "memory", "flops", "parameters",
    }  # fmt: skip
    assert all(
        name == metric.name and metric.what and metric.better in ("lower", "higher") for name, metric in METRICS.items()
    )
