"""README and recipes say what is true: their blocks run, every method and public name is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import compress
from compress.recipe import Recipe
from compress.transform import names
from models import MODELS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


@pytest.fixture(scope="module")
def playground(tmp_path_factory) -> Path:
    """A working folder with the names that the README uses, and a tiny model behind them."""
    folder = tmp_path_factory.mktemp("readme")
    model = MODELS["bert"]()[0].bert
    model.save_pretrained(folder / "models/all-minilm-l6-v2")
    words = [f"word{i}" for i in range(80)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder / "models/all-minilm-l6-v2")
    (folder / "models/sts-b").mkdir()
    for split in ("train", "test"):
        lines = [" ".join(words[i : i + 5 + i % 7]) for i in range(60)]
        (folder / f"models/sts-b/{split}.txt").write_text("\n".join(lines))
    recipe = (ROOT / "recipes/minilm.yaml").read_text()
    (folder / "recipes").mkdir()
    # Limits and the share of heads fit the real model; of eight heads a twentieth is none.
    recipe = re.sub(r"(cosine|size|latency): .*", r"\1:", recipe).replace("keep: 0.95", "keep: 0.8")
    (folder / "recipes/minilm.yaml").write_text(recipe)
    return folder


def test_the_shell_blocks_run_in_their_order(playground):
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    for line in filter(None, lines):
        words = line.split()
        assert words[0] == "compress"
        done = subprocess.run([sys.executable, "-m", *words], cwd=playground, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    assert (playground / "small/report.html").exists()


def test_the_python_blocks_run_in_their_order(playground):
    for block in blocks("python"):
        text = block.replace('"size": "0.9x"', '"size": None')
        done = subprocess.run([sys.executable, "-c", text], cwd=playground, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_the_yaml_block_is_a_recipe():
    for block in blocks("yaml"):
        assert Recipe.parse(block, "README").steps


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_sets_limits(path):
    recipe = Recipe.read(path)
    assert recipe.validate_ is not None
    assert any(limit is not None for limit in recipe.validate_.limits.values())


def test_every_method_is_in_the_readme():
    for name in names():
        assert f"| `{name}` |" in README


def test_every_script_is_in_the_tree():
    for path in (ROOT / "scripts").iterdir():
        if path.is_file() and path.name != "budgets":
            assert path.name in README


def test_the_public_names_are_real():
    for name in compress.__all__:
        assert getattr(compress, name) is not None
    assert sorted(compress.__all__) == dir(compress)
    with pytest.raises(AttributeError):
        compress.nonsense  # noqa: B018
