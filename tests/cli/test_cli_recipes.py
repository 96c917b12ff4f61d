"""Every broken recipe through the command: its place, exit 2, no trace, no folder."""

import re

import pytest

from broken_recipes import BY_HAND, VALID, generated
from compress.cli import main

TEXTS = list({text: line for text, line, *_ in BY_HAND} | {text: line for _, text, line in generated()})


def told(capsys, *words):
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in words])
    return exit.value.code, *capsys.readouterr()


def test_every_broken_recipe_is_told_with_its_place_and_leaves_nothing(tmp_path, monkeypatch, capsys, saved):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "broken.yaml"
    assert len(TEXTS) >= 200
    for text in TEXTS:
        path.write_text(text, encoding="utf-8")
        for words in ([saved("llama"), "broken.yaml"], [saved("llama"), "broken.yaml", "--plan"]):
            code, out, err = told(capsys, *words)
            assert (code, out) == (2, ""), text
            assert err and all(re.match(r"broken\.yaml:\d+:\d+: ", line) for line in err.splitlines()), (text, err)
            assert "Traceback" not in err and "internal error" not in err
        assert [found.name for found in tmp_path.iterdir()] == ["broken.yaml"]


def test_the_recipe_that_they_are_made_from_is_none_of_them(tmp_path, monkeypatch, capsys):
    """Its first fault is the model that is missing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "valid.yaml").write_text(VALID)
    code, _, err = told(capsys, "nowhere", "valid.yaml")
    assert code == 2 and err.startswith("nowhere: is neither a folder")


def test_bytes_that_are_no_text_are_told_with_their_place(tmp_path, capsys):
    path = tmp_path / "broken.yaml"
    path.write_bytes(b"steps:\n  - \xff\n")
    code, _, err = told(capsys, "nowhere", path)
    assert code == 2 and f"{path}:2:5: " in err
    path.write_bytes(b"a" * (10**6 + 1))
    code, _, err = told(capsys, "nowhere", path)
    assert code == 2 and "more than 1000000 bytes" in err
