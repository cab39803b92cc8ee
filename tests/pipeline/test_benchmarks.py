"""The scripts of measurements take hours; that they still find what they measure is seen in seconds."""
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_finds_all_that_it_names(script, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name=script.stem)


@pytest.mark.parametrize("words, known", [(["stage1", "photos.zip"], "diffusers-32"), (["stage2", "data", "runs/kl"], "baseline")])
def test_without_names_it_lists_the_variants(words, known, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS[0].parent))
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=known):
        runpy.run_path(str(SCRIPTS[0].parent / f"{words[0]}.py"), run_name="__main__")
