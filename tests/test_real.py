"""Every recipe on its real pretrained model: limits kept, reloaded bit-equal. Run with `scripts/test -n 0 -m real`.

Wants the models and data of `scripts/fetch` (and `scripts/train-dit`) in models/; what is not there is skipped.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from compress.recipe import Recipe

ROOT = Path(__file__).parents[1]
REAL = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if path.read_text().startswith("# model: ")]

pytestmark = pytest.mark.real


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_a_recipe_keeps_its_limits_on_real_weights(path, tmp_path):
    model, *options = path.read_text().splitlines()[0].removeprefix("# model: ").split()
    if not (ROOT / model).exists():
        pytest.skip(f"{model} is not here; scripts/fetch {Path(model).name}")
    command = [sys.executable, "-m", "compress", model, str(path), "-o", str(tmp_path / "out"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verified"]["passed"] and report["verified"]["bit_equal"]
    limited = [measure for measure in report["measures"] if measure["limit"] is not None]
    assert limited and all(measure["passed"] for measure in limited)
    assert len(report["steps"]) == len(Recipe.read(path).steps)
