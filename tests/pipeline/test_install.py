"""What a user sees first: the installation, the commands, their help, and what the README promises about them."""
import ast
import inspect
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import click
import image_diffusion
import pytest
from conftest import MAIN, ROOT, type_in
from image_diffusion.cli import main

README = (ROOT / "README.md").read_text(encoding="utf-8")


def python(code, *options):
    "What a fresh Python prints."
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", ["image_diffusion", "image_diffusion.cli"])
def test_import_alone_loads_nothing_heavy(module):
    heavy = "torch torchvision numpy matplotlib PIL tqdm".split()
    assert python(f"import {module}, sys; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_the_command_is_installed():
    assert [point.value for point in entry_points(group="console_scripts", name="image_diffusion")] == ["image_diffusion.cli:main"]
    script = Path(sys.executable).with_name("image_diffusion")
    answer = subprocess.run([script, "--version"], capture_output=True, text=True, check=True).stdout
    assert python("import image_diffusion; print(image_diffusion.__version__)") in answer


@pytest.mark.parametrize("module", ["image_diffusion", "image_diffusion.cli"])
def test_python_m_is_the_command(module):
    def done(*words): return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True)
    assert done("--help").stdout.startswith("Usage: python -m image_diffusion ")
    wrong = done("run", "no-such-file.zip")
    assert wrong.returncode == 1 and wrong.stderr.startswith("Error: 'no-such-file.zip' was not found")


def test_help_takes_less_than_a_second():
    def seconds():
        start = time.perf_counter()
        subprocess.run([*MAIN, "--help"], check=True, capture_output=True)
        return time.perf_counter() - start
    assert min(seconds() for _ in range(3)) < 1


def test_there_are_the_promised_commands():
    assert set(main.commands) == set("demo run prepare plan train-autoencoder train-diffusion generate interpolate img2img inpaint "
                                     "panorama evaluate diagnose figure".split())
    assert all(name in type_in("--help").output for name in main.commands)


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_explains_its_options(name):
    result = type_in(name, "--help")
    assert result.exit_code == 0 and "Usage:" in result.output
    assert not [o.opts[0] for o in main.commands[name].params if isinstance(o, click.Option) and not o.help]
    unit = {"--hours": "in hours", "--minutes": "in minutes", "--size": "px"}
    assert all(word in result.output for option, word in unit.items() if option in result.output)


@pytest.mark.parametrize("words, new", [
    ("doctor --run a", "diagnose"), ("vary photo.jpg", "img2img"), ("run synthetic --budget 3h", "--time-limit"),
    ("evaluate --few", "--allow-small-n"), ("generate --average=0.1", "--ema"),
    ("evaluate --protocol seed", "--protocol 192-images"),
    ("evaluate --protocol=seed", "--protocol 192-images")])
def test_an_old_spelling_is_answered_with_the_new_one(words, new):
    result = type_in(*words.split())
    assert result.exit_code == 2 and f"is called {new} since version 0.1.0." in result.output.splitlines()[-1]


def test_a_folder_may_have_the_name_of_an_old_command():
    assert "since version" not in type_in("diagnose", "--run", "doctor").output + type_in("diagnose", "--run-dir", "vary").output


@pytest.mark.parametrize("words", ["paint", "run", "generate --n few", "run synthetic --hours two", "demo --fast"])
def test_wrong_usage_points_to_the_help(words):
    result = type_in(*words.split())
    assert result.exit_code == 2 and result.output.startswith("Usage:") and "--help" in result.output and "Error:" in result.output


@pytest.mark.parametrize("command", ["pip install -e . && image_diffusion demo", 'pip install -e ".[dev]" && nbdev_test && pytest'])
def test_the_readme_has_the_two_commands(command):
    assert command in README.splitlines()


def test_the_readme_names_only_what_exists():
    code = [line for block in re.findall(r"^```.*?\n(.*?)^```", README, re.M | re.S) for line in block.splitlines()]
    code += re.findall(r"`([^`\n]+)`", README)
    typed = [match for line in code for match in re.findall(r"(?:^|&& |\$ )image_diffusion +([^#&|]+)", line)]
    assert typed
    for words in map(shlex.split, typed):
        if words[0].startswith("-"):
            continue
        assert words[0] in main.commands, words
        options = {option for parameter in main.commands[words[0]].params for option in parameter.opts} | {"--help"}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options, words


def test_the_python_of_the_readme_calls_what_there_is():
    block, = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    names = {}
    for node in ast.parse(block).body:
        if isinstance(node, ast.ImportFrom):
            exec(compile(ast.Module([node], []), "README.md", "exec"), names)
    calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
    names["model"] = names["LatentDiffusion"]                                 # its methods, without `self`
    for call in calls:
        function = eval(ast.unparse(call.func), names)
        bound = [None] * (len(call.args) + (ast.unparse(call.func) == "model.sample"))
        inspect.signature(function).bind(*bound, **{keyword.arg: None for keyword in call.keywords})
    assert len(calls) == 5


def test_the_changelog_names_what_there_is():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    renamed = re.findall(r"^\| `[^|]*\| `(\w+)\.([\w.]+)` \|$", text, re.M)
    rows = re.findall(r"^\| `\w+` \| `(\w+)` \| (.*) \|$", text, re.M)
    moved = [(room, name) for room, names in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(renamed) > 50 and len(moved) > 100
    there = {room: vars(import_module(f"image_diffusion.{room}")) for room, _ in renamed + moved}
    assert not [f"{room}.{name}" for room, name in renamed + moved if name.partition(".")[0] not in there[room]]
    assert f"## {image_diffusion.__version__} " in text


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "A wheel built from a copy of what packaging needs, with notebooks and tests lying beside."
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("image_diffusion", "nbs", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, tree]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    own = {name for name in names if ".dist-info/" not in name}
    assert own == {f"image_diffusion/{path.name}" for path in (ROOT / "image_diffusion").glob("*.py")}
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_needs_what_settings_say_and_no_tools(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))).decode()
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert any("torch>=" in line for line in needed)
    assert not [line for line in needed if re.search(r"nbdev|fastcore|jupytext|diffusers|torch[<=]=?\d", line)]


def test_the_wheel_imports_without_anything_installed(wheel):
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import image_diffusion; print(image_diffusion.__file__)"
    assert str(wheel) in python(code, "-I", "-S")
