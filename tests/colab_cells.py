"""The Colab badge and set-up cell of every notebook, made from settings.ini.

`python tests/colab_cells.py` writes them into the notebooks; `test_notebooks.py` holds them equal.
"""
import json
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
WALKTHROUGHS = ("01_data", "10_train_autoencoder", "15_train_diffusion", "16_generate")
METADATA = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []},
            "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
BADGE, SETUP = "[![Open In Colab]", "#| eval: false\n#@title Set up Colab"


def settings():
    "The [DEFAULT] section of settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def badge(name):
    "Markdown of the badge that opens notebook `name` in Colab."
    cfg = settings()
    page = cfg["git_url"].replace("https://github.com/", "https://colab.research.google.com/github/")
    return (f"{BADGE}(https://colab.research.google.com/assets/colab-badge.svg)]"
            f"({page}/blob/{cfg['branch']}/nbs/{name}.ipynb)")


def setup(name):
    "Source of the set-up cell of notebook `name`: install, and for walkthroughs mount Drive."
    lines = [SETUP + ' { display-mode: "form" }', "import importlib.util, subprocess, sys",
             'if importlib.util.find_spec("image_diffusion") is None:',
             '    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q",',
             f'                           "git+{settings()["git_url"]}"])']
    if name in WALKTHROUGHS:
        lines += ["from google.colab import drive", 'drive.mount("/content/drive")  # the run lives there and survives a disconnect']
    return "\n".join(lines)


def write(path):
    "Put badge, set-up cell and metadata into the notebook at `path`; each must have its place already."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"] = METADATA
    for start, text in ((BADGE, badge(path.stem)), (SETUP, setup(path.stem))):
        cells = [cell for cell in notebook["cells"] if "".join(cell["source"]).startswith(start)]
        assert len(cells) == 1, f"{path.name} has {len(cells)} cells that start with {start!r}, not one"
        cells[0]["source"] = text.splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in NOTEBOOKS:
        write(path)
