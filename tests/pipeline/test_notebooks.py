"""Every notebook has the shape that a reader, Colab and nbdev count on."""
import ast
import json
import re

import pytest
from colab_cells import BADGE, METADATA, NOTEBOOKS, ROOT, SETTINGS, SETUP, WALKTHROUGHS, badge, setup

from image_diffusion.train_autoencoder import PRESETS as AUTOENCODERS
from image_diffusion.train_diffusion import PRESETS as PRIORS

MODULES = sorted(path for path in (ROOT / "image_diffusion").glob("*.py") if not path.name.startswith("_"))
PLACE = re.compile(r"(?<![\w/.:])(/[\w.-]+){2,}|\b[A-Z]:\\\\?\w")    # an absolute path, of Unix or Windows
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def sources(path, kind):
    "The texts of a notebook's cells of one kind."
    return ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def plain_python(source):
    "A cell without shell and magic lines, parsed."
    return ast.parse("\n".join("pass" if line.lstrip().startswith(("!", "%")) else line for line in source.splitlines()))


@every_notebook
def test_badge_setup_and_metadata_are_the_made_ones(path):
    assert [text for text in sources(path, "markdown") if text.startswith(BADGE)] == [badge(path.stem)]
    assert [text for text in sources(path, "code") if text.startswith(SETUP)] == [setup(path.stem)]
    assert json.loads(path.read_text(encoding="utf-8"))["metadata"] == METADATA


@every_notebook
def test_walkthroughs_have_the_made_settings(path):
    code = sources(path, "code")
    assert [text for text in code if text.startswith(tuple(SETTINGS))] == [start + text for start, text in SETTINGS.items()] * (path.stem in WALKTHROUGHS)


def test_settings_name_presets_and_their_sizes():
    sizes = {"tiny": 32, "photos64": 64}
    offered = json.loads(re.search(r"preset = .*#@param (.*)", "".join(SETTINGS.values()))[1])
    assert set(offered) - {"auto"} <= set(PRIORS)
    assert all(AUTOENCODERS[f"{preset}-kl"].size == sizes.get(preset, 128) for preset in set(offered) - {"auto"})


def test_metadata_selects_a_t4():
    assert METADATA["accelerator"] == "GPU" and METADATA["colab"]["gpuType"] == "T4"


@every_notebook
def test_starts_with_a_title_and_one_sentence_and_ends_with_what_can_go_wrong(path):
    texts = sources(path, "markdown")
    assert re.match(r"# \w.*\n> \S.*[.!?]\n\n\S", texts[0]), texts[0][:200]
    headings = [line for text in texts for line in text.splitlines() if line.startswith("## ")]
    assert headings[-1] == "## What could go wrong"
    bullets = re.findall(r"^- ", next(text for text in texts if "## What could go wrong" in text), re.M)
    assert len(bullets) >= 2


@every_notebook
def test_directives_come_first(path):
    for source in sources(path, "code"):
        lines = [line.startswith("#|") for line in source.splitlines() if line.strip()]
        assert lines == sorted(lines, reverse=True), source


@every_notebook
def test_names_are_imported_one_by_one_and_never_from_nbdev(path):
    for source in sources(path, "code"):
        for node in ast.walk(plain_python(source)):
            if isinstance(node, ast.ImportFrom):
                assert node.module.split(".")[0] != "nbdev" and all(alias.name != "*" for alias in node.names), source
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "nbdev" for alias in node.names), source


@every_notebook
def test_outputs_are_small_and_name_no_place_on_a_machine(path):
    assert path.stat().st_size < 1_000_000
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
            texts = [output.get("text", "")] + [value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")]
            assert not PLACE.search("".join("".join(text) for text in texts)), texts


@pytest.mark.parametrize("text, told", [("saved in /home/me/runs", True), (r"C:\Users\me", True), ("40/50/60 img/s", False),
                                        ("see https://example.org/a/b", False), ("data/images.npy", False)])
def test_paths_are_recognized(text, told):
    assert bool(PLACE.search(text)) == told


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_everything_exported_says_what_it_is(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the notebook has no `> sentence` under its title"
    silent = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not ast.get_docstring(node)]
    assert not silent


def test_readme_badges_are_the_made_ones():
    found = re.findall(r"\[!\[[^]]*\]\([^)]*\)\]\(https://colab[^)]*\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert not found or sorted(found) == sorted(badge(path.stem) for path in NOTEBOOKS)
