"""Every notebook has the shape that a reader, Colab and nbdev count on, and keeps the house rules."""
import ast
import json
import re

import pytest
from colab_cells import BADGE, METADATA, NOTEBOOKS, ROOT, SETTINGS, SETUP, WALKTHROUGHS, badge, setup

from image_diffusion.train_autoencoder import PRESETS as AUTOENCODERS
from image_diffusion.train_diffusion import PRESETS as PRIORS

CELL_LINES, ROOM_LINES, COLUMNS = 60, 450, 140
ABSOLUTE_PATH = re.compile(r"(?<![\w/.:])(/[\w.-]+){2,}|\b[A-Z]:\\\\?\w")    # of Unix or Windows
SPACED_SHAPE = re.compile(r"\((?:[A-Z]|\d+), (?:(?:[A-Z]|\d+), )*[A-Z](?:, (?:[A-Z]|\d+))*\)")
DIALECT = """sitting|at[ _]hand|critics?|leash|wish(?:es)?|doctor|first[ ]attempt|typed[ ]again|type[ ]it[ ]again|yardstick|rescued?|rescues
             |heard|louder|loudly|judges?|judged|judging|in_short|brokendown|set_aside|tryagain"""    # the field has words for these
BRITISH = r"""towards|afterwards|\w*colour\w*|grey\w*|neighbour\w*|behaviour\w*|favour\w*|centred?
              |\w*(?:normal|parameter|quant|recogn|initial|optim|organ|minim|maxim|random|general)is(?:e|ed|es|er|ers|ing|ation|ations)"""
NBS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in NOTEBOOKS}


def sources(name, kind=None):
    "The texts of a notebook's cells, of all or of one kind."
    return ["".join(cell["source"]) for cell in NBS[name]["cells"] if kind in (None, cell["cell_type"])]


def exported(name):
    "The exported cells of a notebook, as lists of lines without directives."
    cells = [source.splitlines() for source in sources(name, "code") if source.startswith("#| export")]
    return [[line for line in lines if not line.startswith("#|")] for lines in cells]


def words_found(words, text):
    "Whole words of a pattern that stand in a text."
    return re.findall(rf"(?<![A-Za-z])(?:{words})(?![A-Za-z])", text, re.I | re.X)


def nothing(found):
    "Fail with a list of places, if there are any."
    found = list(found)
    assert not found, f"{len(found)} places:\n" + "\n".join(str(place) for place in found[:40])


# What Colab needs

def test_badge_setup_settings_and_metadata_are_those_of_colab_cells():
    for name, notebook in NBS.items():
        assert [text for text in sources(name, "markdown") if text.startswith(BADGE)] == [badge(name)], name
        assert [text for text in sources(name, "code") if text.startswith(SETUP)] == [setup(name)], name
        settings = [text for text in sources(name, "code") if text.startswith(tuple(SETTINGS))]
        assert settings == [start + text for start, text in SETTINGS.items()] * (name in WALKTHROUGHS), name
        assert name not in WALKTHROUGHS or "## Run this step" in "\n".join(sources(name, "markdown")), name
        assert notebook["metadata"] == METADATA, name
    assert METADATA["accelerator"] == "GPU" and METADATA["colab"]["gpuType"] == "T4"


def test_settings_name_presets_and_their_sizes():
    sizes = {"tiny": 32, "photos64": 64}
    offered = json.loads(re.search(r"preset = .*#@param (.*)", "".join(SETTINGS.values()))[1])
    assert set(offered) - {"auto"} <= set(PRIORS)
    assert all(AUTOENCODERS[f"{preset}-kl"].size == sizes.get(preset, 128) for preset in set(offered) - {"auto"})


def test_readme_badges_are_the_made_ones():
    found = re.findall(r"\[!\[[^]]*\]\([^)]*\)\]\(https://colab[^)]*\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert not found or sorted(found) == sorted(map(badge, NBS))


def test_outputs_are_small_and_name_no_path_of_a_machine():
    for path in NOTEBOOKS:
        assert path.stat().st_size < 1_000_000, path.name
        outputs = [output for cell in NBS[path.stem]["cells"] for output in cell.get("outputs", [])]
        texts = [output.get("text", "") for output in outputs]
        texts += [text for output in outputs for kind, text in output.get("data", {}).items() if not kind.startswith("image/")]
        assert not any(output["output_type"] == "error" for output in outputs), path.name
        assert not ABSOLUTE_PATH.search("".join(map("".join, texts))), path.name


# What a reader needs

def test_each_starts_with_a_title_and_one_sentence_and_ends_with_what_could_go_wrong():
    for name in NBS:
        texts = sources(name, "markdown")
        assert re.match(r"# \w.*\n\n?> \S.*[.!?]\n\n\S", texts[0]), texts[0][:200]
        headings = re.findall(r"^## .*", "\n".join(texts), re.M)
        assert headings[-1] == "## What could go wrong", name
        assert len(re.findall(r"^- ", next(text for text in texts if headings[-1] in text), re.M)) >= 2, name


def test_directives_come_first():
    for name in NBS:
        for source in sources(name, "code"):
            lines = [line.startswith("#|") for line in source.splitlines() if line.strip()]
            assert lines == sorted(lines, reverse=True), source


def test_names_are_imported_one_by_one_and_never_from_nbdev():
    for name in NBS:
        for source in sources(name, "code"):
            python = "\n".join("pass" if line.lstrip().startswith(("!", "%")) else line for line in source.splitlines())
            for node in ast.walk(ast.parse(python)):
                if isinstance(node, ast.ImportFrom):
                    assert node.module.split(".")[0] != "nbdev" and all(alias.name != "*" for alias in node.names), source
                if isinstance(node, ast.Import):
                    assert all(alias.name.split(".")[0] != "nbdev" for alias in node.names), source


# House rules

def test_no_exported_cell_is_longer_than_a_screen():
    nothing(f"{name}: {len(lines)} lines: {lines[0]}" for name in NBS for lines in exported(name) if len(lines) > CELL_LINES)


def test_no_notebook_exports_too_much():
    nothing(f"{name}: {total} lines" for name in NBS if (total := sum(map(len, exported(name)))) > ROOM_LINES)


def test_no_line_of_code_is_too_long():
    lines = [(name, line) for name in NBS for source in sources(name, "code") for line in source.splitlines()]
    nothing(f"{name}: {len(line)} columns: {line.strip()[:90]}" for name, line in lines if len(line) > COLUMNS)


def test_shapes_are_written_without_blanks():
    nothing(f"{name}: {found}" for name in NBS for source in sources(name) for found in SPACED_SHAPE.findall(source))


@pytest.mark.parametrize("words", [DIALECT, BRITISH], ids=["the field's words", "US spelling"])
def test_words(words):
    texts = {name: "\n".join(sources(name)) for name in NBS} | {"README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
    texts["90_cli"] = texts["90_cli"].replace('"doctor"', "")       # an old spelling that the command answers with the new one
    nothing(f"{name}: {word}" for name, text in texts.items() for word in words_found(words, text))
