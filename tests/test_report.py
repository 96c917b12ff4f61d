"""The report survives its file, tells no flattering speed-up, and card and page carry any text unharmed."""

import io
import re
from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from compress.card import card, fenced
from compress.errors import CompressError
from compress.measure import Measure, human
from compress.page import page
from compress.report import FILE, Report

NASTY = 'we|ird/`mo`*del*</title><script>alert(1)</script> 模型 & [x](y) --- "q"'


def report(**changes) -> Report:
    notes = {"scores": {"layers.0": 1.5, "layers.1": -0.5}, "refused": {"lm_head": "tied"}, "kept": 3}
    step = {"use": "heads.prune", "options": {"keep": 0.5}, "modules": ["layers.0"], "seconds": 2.5}
    ledger = step | {"parameters": 900, "bytes": 1800, "flops": 1e9, "error": 0.25, "notes": notes}
    values = {
        "model": "someone/tiny",
        "recipe": "small.yaml",
        "format": "native",
        "why_format": "heads are uniform",
        "steps": [ledger, ledger | {"use": "quantize.int8", "bytes": 2400, "error": float("inf"), "notes": {}}],
        "measures": [
            Measure("size", 4000, 2400, "<= 0.7x", "bytes", True),
            Measure("latency", 40.0, 20.0, None, "ms", None, "", [1.0, 0.5], {"name": "compiled bf16", "value": 25.0}),
            Measure("perplexity", 12.0, 13.5, "<= 13", "", False),
        ],
        "verified": {"passed": True, "how": "reloaded in a fresh process", "error": 0.0},
        "hardware": {"device": "2 cores"},
        "versions": {"torch": "2.13.0"},
        "seconds": 5.5,
        "created": "2026-01-01T00:00:00Z",
    }
    return Report(**values | changes)


def make_card(report: Report, recipe: str = "steps: []\n", **changes) -> str:
    return card(report, recipe, **{"library": "transformers", "loader": "AutoModelForCausalLM"} | changes)


def metadata(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (52_100_000, "bytes", "52.1 MB"),
        (134_515_008, "parameters", "134.5 M"),
        (999_999, "parameters", "1 M"),
        (12, "parameters", "12"),
        (2.9e11, "FLOPs", "290 GFLOPs"),
        (0.0312, "ms", "31.2 µs"),
        (1234.5, "ms", "1.234 s"),
        (3725.0, "s", "3,725 s"),
        (12.9712, "", "12.97"),
        (0.00001234, "", "1.234e-05"),
        (31.4, "dB", "31.4 dB"),
        (0.871, "share", "0.871"),
        (float("inf"), "bytes", "inf B"),
        (None, "bytes", "-"),
    ],
)
def test_numbers_are_for_humans(value, unit, text):
    assert human(value, unit) == text


@pytest.mark.parametrize("layers", [{}, {"layers.0": (10.0, 5.0)}])
def test_report_survives_its_file(tmp_path, layers):
    written = report(layers=layers)
    written.measures[2].after = float("inf")
    path = written.write(tmp_path)
    assert Report.read(tmp_path) == written
    assert [item.name for item in tmp_path.iterdir()] == [FILE]
    keys = "model recipe format why_format steps measures verified hardware versions seconds created"
    assert set(yaml.safe_load(path.read_text())) == {*keys.split(), *(["layers"] if layers else [])}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text[: len(text) // 2], "JSON"),
        (lambda text: "[]", "object"),
        (lambda text: text.replace('"verified"', '"checked"'), "verified: Field required"),
        (lambda text: text.replace('"model"', '"extra": 1,\n"model"'), "extra"),
        (lambda text: text.replace('"before"', '"earlier"'), "measures.0.before"),
        (lambda text: text.replace('"error": 0.25', '"error": "much"'), "steps.0.error"),
    ],
)
def test_damaged_report_is_one_clear_line(tmp_path, damage, told):
    path = report().write(tmp_path)
    path.write_text(damage(path.read_text()))
    with pytest.raises(CompressError, match=re.escape(told)) as caught:
        Report.read(tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_report_is_told(tmp_path):
    with pytest.raises(CompressError, match="there is no such file"):
        Report.read(tmp_path)


def test_failed_write_leaves_the_old_report(tmp_path):
    path = report().write(tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        report(hardware={"device": object()}).write(tmp_path)
    assert path.read_bytes() == before


def test_speed_up_is_told_against_the_fastest_stock_path():
    latency = report().measures[1]
    stock, eager = latency.change().split(";")
    assert stock.startswith("1.25x against the fastest stock path, compiled bf16 (25 ms)")
    assert "2.00x" in eager
    latency.baseline = None
    assert "not measured" in latency.change() and "x against" not in latency.change()
    latency.baseline = {"name": "the original", "value": 40.0}
    assert latency.change() == "2.00x against the fastest stock path, the original"


@pytest.mark.parametrize(
    ("measure", "change"),
    [
        (Measure("size", 4000, 1000, unit="bytes"), "-75.0 %"),
        (Measure("perplexity", 12.0, 13.5), "+1.5"),
        (Measure("top1", 1.0, 0.9, unit="share"), "-0.1"),
        (Measure("psnr", float("inf"), 30.0, unit="dB"), ""),
        (Measure("kl", None, 0.1, unit="nats"), ""),
        (Measure("size", 0, 1, unit="bytes"), ""),
    ],
)
def test_change_is_in_the_words_of_its_unit(measure, change):
    assert measure.change() == change


def test_every_view_tells_the_same_truth(tmp_path):
    console = Console(file=io.StringIO(), width=400)
    report().table(console, tmp_path)
    for text in (console.file.getvalue(), make_card(report()), page(report())):
        for told in (
            "1.25x against",
            "compiled bf16",
            "MISSED",
            "4 kB",
            "-40.0 %",
            "heads are uniform",
            "0.25",
            "tied",
        ):
            assert told in text
    assert str(tmp_path / FILE) in console.file.getvalue()


def test_terminal_prints_markup_to_the_letter(tmp_path):
    console = Console(file=io.StringIO(), width=400)
    odd = report(model="[bold]x[/nothing]", measures=[Measure("[red]a", 1, 2)])
    odd.table(console)
    assert "[bold]x[/nothing]" in console.file.getvalue() and "[red]a" in console.file.getvalue()


def test_card_metadata():
    data = metadata(make_card(report(), license="mit", dataset="someone/texts"))
    assert data["base_model"] == "someone/tiny" and data["base_model_relation"] == "quantized"
    assert data["license"] == "mit" and data["pipeline_tag"] == "text-generation"
    assert data["tags"] == ["compress", "heads.prune", "quantize.int8"]
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["type"] == "someone/texts"
    assert result["metrics"] == [{"type": "perplexity", "value": 13.5}]


def test_card_claims_nothing_that_the_hub_does_not_know(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").touch()
    assert "model-index" not in metadata(make_card(report(), dataset="texts.jsonl"))
    data = metadata(make_card(report(model=str(tmp_path)), dataset="/home/me/texts.jsonl"))
    assert not {"base_model", "base_model_relation", "model-index", "license"} & set(data)
    pruned = report(steps=report().steps[:1])
    assert metadata(make_card(pruned))["base_model_relation"] == "finetune"


@pytest.mark.parametrize(
    ("format", "imports", "trust"), [("native", 0, 0), ("compressed-tensors", 0, 0), ("compress-plan", 1, 1)]
)
def test_card_snippets_are_python_and_fit_the_format(format, imports, trust):
    text = make_card(report(format=format), loader="DiffusionPipeline", library="diffusers")
    snippets = re.findall(r"```python\n(.*?)```", text, re.S)
    for snippet in snippets:
        compile(snippet, "snippet", "exec")
    assert len(snippets) == 1 + trust
    assert text.count("import compress ") == imports and text.count("trust_remote_code=True") == trust
    assert "from diffusers import DiffusionPipeline" in text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_recipe_stays_to_the_letter_in_its_fence(text):
    first, _, rest = fenced(text, "yaml").partition("\n")
    fence = first.removesuffix("yaml")
    body = rest.removesuffix(fence)
    assert body in (text, text + "\n") and fence not in body


def test_card_survives_strange_names():
    data = report(model=NASTY, measures=[Measure(NASTY, 1, 2, NASTY, "", False, NASTY)])
    text = make_card(data, "a: ```` | 模型\n")
    assert metadata(text)["tags"][0] == "compress" and "base_model" not in metadata(text)
    rows = [line for line in text.splitlines() if line.startswith("| we")]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 7  # six columns
    assert "`````yaml\na: ```` | 模型\n`````" in text
    assert not re.search(r"(?<!\\)<script", text)


class Tags(HTMLParser):
    """All tags, and those that were opened and not closed."""

    def __init__(self, text):
        super().__init__()
        self.seen, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_escaped():
    odd = report(model=NASTY, why_format=NASTY, measures=[Measure(NASTY, 1, 2)], layers={NASTY: (10.0, 5.0)})
    tags = Tags(page(odd))
    assert tags.open == []
    assert not {tag for tag, _ in tags.seen} & {"script", "link", "img", "iframe", "object"}
    assert not any({"src", "href"} & set(attributes) for _, attributes in tags.seen)
    assert "url(" not in page(odd) and "@import" not in page(odd)


def test_page_draws_what_was_measured():
    text = page(report(layers={"layers.0": (4000.0, 2000.0)}))
    assert re.findall("<figcaption>(.*?)</figcaption>", text) == [
        "Size after each step",
        "Error against the original after each step",
        "Size by layer, before and after",
        "heads.prune: scores",
    ]
    waterfall = text.split("<figcaption>")[1]
    widths = {
        kind: float(width)
        for kind, width in re.findall(r'class="(\w+)" x="[\d.]+" y="\d+" width="([\d.]+)"', waterfall)
    }
    assert widths["grew"] / 420 == pytest.approx(600 / 4000, abs=1e-3)
    assert "nan" not in text.lower().replace("name", "")


def test_page_draws_an_allocation_of_bits_and_its_curve():
    choices = {f"layers.{n}.mlp.{name}": ("w4g32", "w8a8")[n % 2] for n in range(12) for name in ("up<", "down")}
    told = {
        "by": "fisher",
        "unit": "bytes",
        "budget": 500.0,
        "choices": choices | {"head": "keep"},
        "bits": {path: 4.5 if name == "w4g32" else 8.0 for path, name in choices.items()} | {"head": 32.0},
        "average": 6.25,
        "curve": [(400.0, 0.5), (450.0, 0.0625), (800.0, 0.0)],
        "points": {
            "mixed": {"weight": 500.0, "predicted": 0.05, "measured": 0.03},
            "uniform w4": {"weight": 450.0, "predicted": 0.2, "measured": float("inf")},
        },
        "data": "held-out data",
        "taken": "mixed",
    }
    step = report().steps[0] | {"use": "quantize.mixed", "notes": {"allocation": told}}
    text = page(report(steps=[step]))
    assert Tags(text).open == []
    titles = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert "quantize.mixed: bits of every layer, 6.25 a weight on average" in titles
    grid, curve = (text.split("<figcaption>quantize.mixed: ")[n].partition("</figure>")[0] for n in (1, 2))
    assert re.findall(r'class="label"[^>]*>([^<]*)<', grid) == ["layers.*.mlp.up&lt;", "layers.*.mlp.down", "head"]
    assert grid.count("<rect") == 25 and re.findall(r'class="cell"[^>]*>([^<]*)<', grid).count("8a8") == 12
    columns = {int(x) for x in re.findall(r'<rect class="stayed" x="(\d+)"', grid)}
    assert len(columns) == 12  # a column for each number of the stack
    line = re.search(r'points="([^"]*)"', curve)[1].split()
    places = [tuple(map(float, point.split(","))) for point in line]
    assert places == sorted(places) and [y for _, y in places] == sorted(y for _, y in places)
    assert curve.count("<circle") == 2 and "mixed: 500 B, 0.03" in curve and "nan" not in curve


def test_page_of_an_empty_report_has_no_plots():
    text = page(report(steps=[], measures=[], verified={}))
    assert "<svg" not in text and "not verified" in text


def test_page_draws_what_pruning_cost_round_by_round():
    curves = {"fisher": [[0.9, 0.01], [0.8, 0.05]], "energy": [[0.9, 0.02], [0.8, 0.04]]}
    step = report().steps[0] | {"notes": {"curves": curves, "taken": "energy"}}
    text = page(report(steps=[step]))
    assert "line: the rounds by energy" in text
    assert "fisher: 0.8" in text and "energy: 0.8" in text
    (line,) = re.findall(r'<polyline class="line" points="([^"]+)"', text)
    heights = [float(point.split(",")[1]) for point in line.split()]
    assert len(heights) == 2 and heights[0] != heights[1]


def test_page_draws_which_patches_were_merged():
    sample = {"width": 2, "colours": ["ff0000", "00ff00", "0000ff", "ffffff"], "groups": {"layers.3": [0, 0, 1, 2]}}
    step = report().steps[0] | {"use": "tokens.merge", "notes": {"pictures": [sample]}}
    text = page(report(steps=[step]))
    assert "tokens.merge: image 1" in text
    assert "layers.3: 4 patches in 3 tokens" in text
    assert text.count('fill="#808000"') == 1, "neighbours in one token are one rectangle in the mean colour"
    assert text.count('fill="#0000ff"') == 2 and text.count('fill="#ffffff"') == 2
    assert text.count('fill="#ff0000"') == 1
