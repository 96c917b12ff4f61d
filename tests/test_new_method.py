"""scripts/new-method writes three files that work at once, and nothing over what is there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress.transform import FAMILIES

ROOT = Path(__file__).parents[1]


def new_method(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "new-method", *arguments, "--root", root]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """As much of a checkout as a method needs."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "compress", tmp_path / "compress", ignore=ignore)
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "models.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_files_of_a_new_method_work_at_once(checkout):
    before = {path for path in checkout.rglob("*") if path.is_file()}
    for family in FAMILIES:
        assert new_method(checkout, family, "new_w4").returncode == 0
    written = {path for path in checkout.rglob("*") if path.is_file()} - before
    assert {path.relative_to(checkout).as_posix() for path in written} == {
        path
        for family in FAMILIES
        for path in (
            f"compress/transforms/{family}/new_w4.py",
            f"recipes/{family}-new_w4.yaml",
            f"tests/transforms/test_{family}_new_w4.py",
        )
    }
    places = os.pathsep.join(map(str, [checkout, ROOT / "kernels"]))
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests"],
        cwd=checkout, env={**os.environ, "PYTHONPATH": places}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0 and f"{2 * len(FAMILIES)} passed" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "family, name, message",
    [
        ("head", "good", "no family 'head', it must be one of heads, "),
        ("nn", "good", "no family 'nn'"),
        ("heads", "Bad", "'Bad' is no name of a method"),
        ("heads", "two__lines", "is no name"),
        ("heads", "_hidden", "is no name"),
        ("heads", "9", "is no name"),
        ("heads", "../up", "is no name"),
        ("heads", "class", "is no name"),
        ("heads", "true", "is no name"),
        ("heads", "plan", "is no name"),
        ("heads", "", "is no name"),
        ("heads", "old", "is there already"),
    ],
)
def test_bad_and_taken_names_write_nothing(tmp_path, family, name, message):
    for each in FAMILIES:
        (tmp_path / "compress" / "transforms" / each).mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "heads-old.yaml").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    ran = new_method(tmp_path, family, name)
    assert ran.returncode == 1 and message in ran.stderr and "Traceback" not in ran.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "recipes" / "heads-old.yaml").read_text() == "mine"
