"""What the wheel takes along and asks for: every folder of the tree, and every package that the code imports."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = {"compress": ROOT / "compress", "compress_kernels": ROOT / "kernels" / "compress_kernels"}
OF_MODULE = {"yaml": "pyyaml", "PIL": "pillow", "lm_eval": "lm-eval"}
THROUGH_LIBRARIES = {"accelerate", "jinja2"}  # transformers and diffusers import them for us


def names(requirements):
    return {re.match(r"[\w-]+", line)[0].replace("_", "-") for line in requirements}


def imported():
    """The packages that the code imports, wherever in a file."""
    found = set()
    for folder in SOURCES.values():
        for node in (node for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    ours = found - sys.stdlib_module_names - SOURCES.keys()
    return {OF_MODULE.get(name, name).replace("_", "-") for name in ours}


def test_every_package_of_the_tree_is_in_the_wheel():
    tree = {
        ".".join((top, *path.parent.relative_to(folder).parts))
        for top, folder in SOURCES.items()
        for path in folder.rglob("*.py")
    }
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(tree)
    others = [path for folder in SOURCES.values() for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in others} <= {".py", ".pyc"}  # anything else would need package-data


def test_every_import_is_declared_and_every_declaration_used():
    needed, extras = names(PROJECT["project"]["dependencies"]), PROJECT["project"]["optional-dependencies"]
    optional = names(extras["data"] + extras["eval"] + extras["gpu"] + extras["vllm"])
    used = imported()
    assert used <= needed | optional
    assert needed - used <= THROUGH_LIBRARIES
