"""The scripts of measurements take hours; that they still find what they measure is seen in seconds."""
import runpy
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_finds_all_that_it_names(script, monkeypatch):
    monkeypatch.syspath_prepend(str(script.parent))
    runpy.run_path(str(script), run_name=script.stem)


def test_scripts_without_contestants_list_them(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS[0].parent))
    for name, known in (("stage1", "diffusers-32"), ("stage2", "first-attempt")):
        monkeypatch.setattr(sys, "argv", [name, "photos", "run"][:2 + (name == "stage2")])
        with pytest.raises(SystemExit, match=known):
            runpy.run_path(str(SCRIPTS[0].parent / f"{name}.py"), run_name="__main__")
