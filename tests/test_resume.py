"""A run killed at any moment: nothing that looks finished and is not, and the same bytes when it goes on."""

import json
import os
import random
import shutil
import signal
import time

import pytest

import compress
from compress import CompressError
from compress.checkpoint import check_files
from compress.report import Report
from models import MODELS

KILLS = 20
RECIPE = {
    "steps": [
        {"use": "heads.prune", "score": "magnitude", "keep": 0.5, "unit": "query"},
        {"use": "heads.prune", "keep": 0.5},
        {"use": "quantize.int8"},
    ],
    "validate": {"kl": None},
    "emit": {"format": "compress-plan"},
}
RUN = """
import json, os, signal, sys
import compress
from models import MODELS

folder, recipe, out, last = sys.argv[1:]
left = int(last)

def count(event, arguments):
    global left
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if writes and str(arguments[0]).startswith(os.path.dirname(out)) or event in ("os.rename", "os.remove", "os.rmdir"):
        left -= 1
        if not left:
            os.killpg(0, signal.SIGKILL)

sys.addaudithook(count)
batch = MODELS["llama"]()[1]
compress.compress(folder, json.loads(recipe), output=out, calibration=[batch], validation=[batch])
print("changes", int(last) - left)
"""


@pytest.fixture(scope="module")
def whole(warm, saved, tmp_path_factory):
    """An uninterrupted run: its folder, its seconds, and how often it changes something on the disk."""
    folder = tmp_path_factory.mktemp("whole")
    command = saved("llama"), json.dumps(RECIPE)
    warm.run(RUN, *command, folder / "first", 0)  # imports what is imported late
    started = time.monotonic()
    said = warm.run(RUN, *command, folder / "out", 0)
    seconds = time.monotonic() - started
    assert check_files(folder / "out")["files"] == check_files(folder / "first")["files"]
    return folder / "out", seconds, int(said.split()[-1])


def stands(out) -> str:
    """How far a killed run came; a folder in its place must be whole."""
    if out.exists():
        assert check_files(out)["files"] and Report.read(out).verified["passed"] and (out / "README.md").exists()
        assert compress.verify(out)["bit_equal"]
        return "done"
    run = out.with_name(out.name + ".partial") / "run.json"
    return f"{len(json.loads(run.read_text())['steps'])} steps" if run.exists() else "nothing"


def goes_on(warm, whole, saved, out) -> Report:
    """Run to the end and hold the result against the uninterrupted one's."""
    warm.run(RUN, saved("llama"), json.dumps(RECIPE), out, 0)
    assert check_files(out)["files"] == check_files(whole)["files"]
    assert not out.with_name(out.name + ".partial").exists()
    report, other = Report.read(out), Report.read(whole)
    for step in report.steps + other.steps:
        step.pop("seconds")
    assert (report.steps, report.measures, report.layers) == (other.steps, other.measures, other.layers)
    return report


def test_killed_at_random_moments_it_gives_the_same_bytes(quick, whole, saved, tmp_path):
    reference, seconds, _ = whole
    draw = random.Random(0)
    for number in range(KILLS):
        out = tmp_path / "out"
        child = quick.start(RUN, saved("llama"), json.dumps(RECIPE), out, 0)
        time.sleep((number + draw.random()) / KILLS * seconds)
        os.killpg(child.pid, signal.SIGKILL)
        assert quick.wait(child) in (-signal.SIGKILL, 0)
        stands(out)
        goes_on(quick, reference, saved, out)
        shutil.rmtree(out)


def test_killed_between_any_two_changes_of_the_disk_it_gives_the_same_bytes(quick, whole, saved, tmp_path):
    reference, _, changes = whole
    draw, found = random.Random(1), set()
    spread = [int(changes * (part + draw.random()) / 8) + 1 for part in range(8)]
    last = range(changes - 6, changes + 1)  # the renames that put the folder in its place, and the cleaning up
    for number in sorted({*spread, *last}):
        out = tmp_path / f"out-{number}"
        child = quick.start(RUN, saved("llama"), json.dumps(RECIPE), out, number)
        assert quick.wait(child) == -signal.SIGKILL, child.said
        found.add(stands(out))
        goes_on(quick, reference, saved, out)
    assert found >= {"3 steps", "done"} and len(found) > 2


def test_killed_again_and_again_it_arrives_without_repeating_a_step(quick, whole, saved, tmp_path):
    reference, _, changes = whole
    out, kept = tmp_path / "out", []
    run = tmp_path / "out.partial" / "run.json"
    for number in (changes // 4, changes // 4, changes // 4):
        assert quick.wait(quick.start(RUN, saved("llama"), json.dumps(RECIPE), out, number)) == -signal.SIGKILL
        steps = json.loads(run.read_text())["steps"] if run.exists() else []
        assert steps[: len(kept)] == kept  # with the seconds that they took then
        kept = steps
    assert kept
    quick.run(RUN, saved("llama"), json.dumps(RECIPE), out, 0)
    assert [step["seconds"] for step in Report.read(out).steps][: len(kept)] == [
        row["ledger"]["seconds"] for row in kept
    ]
    assert check_files(out)["files"] == check_files(reference)["files"]


@pytest.fixture
def unfinished(quick, whole, saved, tmp_path):
    """A killed run with at least one finished step."""
    out = tmp_path / "out"
    assert quick.wait(quick.start(RUN, saved("llama"), json.dumps(RECIPE), out, whole[2] // 2)) == -signal.SIGKILL
    assert list((tmp_path / "out.partial").glob("step-*.safetensors"))
    return out


def resume(saved, out, recipe=RECIPE, **options):
    batch = MODELS["llama"]()[1]
    return compress.compress(saved("llama"), recipe, output=out, calibration=[batch], validation=[batch], **options)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "the list cut": ("run.json", cut),
    "the list emptied": ("run.json", lambda path: path.write_text("")),
    "the list of another kind": ("run.json", lambda path: path.write_text("[3]")),
    "the weights cut": ("step-*.safetensors", cut),
    "a bit of the weights": ("step-*.safetensors", flip),
    "the weights gone": ("step-*.safetensors", lambda path: path.unlink()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_one_clear_line_and_force_starts_over(damage, unfinished, whole, saved):
    pattern, harm = DAMAGES[damage]
    folder = unfinished.with_name("out.partial")
    harm(next(folder.glob(pattern)))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(CompressError) as error:
        resume(saved, unfinished)
    assert str(error.value).startswith(
        f"{folder}: "
    ) and "is damaged; remove the folder or start over with --force" in str(error.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if damage == "the weights cut":
        resume(saved, unfinished, force=True)
        assert check_files(unfinished)["files"] == check_files(whole[0])["files"]
        assert not folder.exists()


def test_another_recipe_does_not_go_on_in_the_folder_of_this_one(unfinished, saved):
    folder = unfinished.with_name("out.partial")
    with pytest.raises(CompressError, match="holds an unfinished run of another model, recipe, data or version"):
        resume(saved, unfinished, RECIPE | {"seed": 7})
    assert folder.exists() and not unfinished.exists()
    resume(saved, unfinished)
    assert unfinished.exists() and not folder.exists()
