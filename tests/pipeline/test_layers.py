"""A module imports only modules with a lower number, inside functions too."""
import ast

import pytest
from conftest import ROOT
from test_export import MODULES


def imports(source):
    "Names of all modules that a source text imports, with those of this package as `.name`."
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            here = node.level or node.module == "image_diffusion"
            base = "." * node.level + (node.module or "") if node.level else node.module
            bare = here and base in (".", "image_diffusion")          # `from . import x`
            names |= {f".{alias.name}" for alias in node.names} if bare else {base}
    return {"." + name.partition(".")[2] if name.startswith("image_diffusion.") else name for name in names}


def module_imports(name):
    return imports((ROOT / "image_diffusion" / f"{name}.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("source, found", [
    ("import image_diffusion.data as d", {".data"}), ("from image_diffusion import data", {".data"}),
    ("from .data import CLASSES", {".data"}), ("from . import data", {".data"}),
    ("def f():\n    from image_diffusion.data import CLASSES", {".data"}), ("import matplotlib.pyplot", {"matplotlib.pyplot"})])
def test_every_way_to_import_is_seen(source, found):
    assert imports(source) == found


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    own = {found[1:] for found in module_imports(name) if found.startswith(".")}
    assert own <= set(MODULES[:MODULES.index(name)]), f"{name} imports {own - set(MODULES[:MODULES.index(name)])}"


def test_only_plots_imports_matplotlib():
    importers = {name for name in MODULES if any(found.split(".")[0] == "matplotlib" for found in module_imports(name))}
    assert importers == {"plots"}


def test_the_floor_imports_nothing_of_the_package():
    floor = "landscapes blocks bottleneck linear discriminator diffusion sampling guidance".split()
    assert not {name: found for name in floor if (found := {i for i in module_imports(name) if i.startswith(".")} - {".files", ".sampling"})}


def test_the_package_never_imports_its_tools():
    tools = {"nbdev", "fastcore", "execnb", "jupytext", "diffusers", "google", "IPython"}
    importers = {(name, found) for name in MODULES for found in module_imports(name) if found.split(".")[0] in tools}
    assert importers <= {("plots", "IPython"), ("plots", "IPython.display")}     # where a notebook runs, IPython is there already
