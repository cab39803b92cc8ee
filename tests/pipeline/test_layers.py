"""The package is what the notebooks export: one module each, importing only lower-numbered ones, with no name undefined or unused."""
import ast
import re
import subprocess
import sys

from colab_cells import NOTEBOOKS, ROOT

MODULES = [path.stem[3:] for path in NOTEBOOKS]   # in order of their numbers
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "image_diffusion").glob("*.py")}


def imports(name):
    "Names of all modules that a module imports, inside functions too; those of this package as `.name`."
    names = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {f".{alias.name}" for alias in node.names} if base in (".", "image_diffusion") else {base}
    return {re.sub(r"^image_diffusion\.", ".", found) for found in names}


def test_each_notebook_makes_the_module_of_its_name():
    assert len(MODULES) == len(set(MODULES)) and all(re.fullmatch(r"\d\d_[a-z_]+", path.stem) for path in NOTEBOOKS)
    assert set(TREES) == {"__init__", "__main__", "_modidx", *MODULES}


def test_imports_point_down():
    own = {name: {found[1:] for found in imports(name) if found.startswith(".")} for name in MODULES}
    wrong = {name: higher for k, name in enumerate(MODULES) if (higher := own[name] - set(MODULES[:k]))}
    assert not wrong, f"these import modules with a higher number: {wrong}"


def test_only_plots_imports_matplotlib():
    assert {name for name in MODULES if any(found.split(".")[0] == "matplotlib" for found in imports(name))} == {"plots"}


def test_blocks_losses_and_samplers_stand_on_their_own():
    alone = "landscapes blocks bottleneck linear discriminator diffusion sampling guidance".split()
    assert not {name: found for name in alone if (found := {i for i in imports(name) if i.startswith(".")} - {".files", ".sampling"})}


def test_the_package_never_imports_its_tools():
    tools = {"nbdev", "fastcore", "execnb", "jupytext", "diffusers", "google", "IPython"}
    importers = {(name, found) for name in MODULES for found in imports(name) if found.split(".")[0] in tools}
    assert importers <= {("plots", "IPython"), ("plots", "IPython.display")}     # where a notebook runs, IPython is there already


def test_everything_exported_has_a_docstring():
    assert not [name for name in MODULES if not ast.get_docstring(TREES[name])], "the notebook has no `> sentence` under its title"
    assert not [f"{name}.{node.name}" for name in MODULES for node in TREES[name].body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not ast.get_docstring(node)]


def test_pyflakes_finds_nothing():
    found = subprocess.run([sys.executable, "-m", "pyflakes", "image_diffusion", "tests"], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout + found.stderr == ""


def test_the_table_of_guarantees_names_tests_that_exist():
    rows = re.findall(r"\]\(([\w/]+\.py)\)(.*)", (ROOT / "tests/README.md").read_text(encoding="utf-8"))
    named = {(file, name) for file, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert len(named) > 40
    assert not [name for file, name in sorted(named) if f"def test_{name}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8")]
