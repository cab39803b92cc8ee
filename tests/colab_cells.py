"""The Colab badge and set-up cell of every notebook, made from settings.ini, and the settings of those that do a step.

`python tests/colab_cells.py` writes them into the notebooks; `test_notebooks.py` holds them equal.
"""
import json
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))
WALKTHROUGHS = ("13_data", "50_train_autoencoder", "65_train_diffusion", "70_generate", "71_evaluate", "72_report")
METADATA = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []},
            "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
BADGE, SETUP = "[![Open In Colab]", "#| eval: false\n#@title Set up Colab"
FORM, PLACES = '#@title Settings { display-mode: "form" }', "# What follows from the settings"
SETTINGS = {FORM: """
preset = "auto"  #@param ["auto", "tiny", "photos64", "lhq128-fast", "lhq128", "lhq128-f8"]
#@markdown `auto`: `lhq128` on a GPU; elsewhere `tiny`, everything at its smallest in a minute.
source = "auto"  #@param {type:"string"}
#@markdown A zip or folder on Drive such as `/content/drive/MyDrive/photos.zip`, a link, `lhq`, or `synthetic`.
#@markdown `auto`: `lhq`, with `tiny` `synthetic`.
hours = 0.0  #@param {type:"number"}
#@markdown Training time for each network; 0: as long as the preset says. A run that is resumed keeps the settings it was started with.""",
            PLACES: """
if preset == "auto":
    preset = "lhq128" if torch.cuda.is_available() else "tiny"
if source == "auto":
    source = "synthetic:512" if preset == "tiny" else "lhq"
size = {"tiny": 32, "photos64": 64}.get(preset, 128)                                   # px
minutes, steps = 60 * hours or None, 40 if preset == "tiny" and not hours else None    # None: as long as the preset says
keep = in_colab() or preset != "tiny"                                                  # on Drive, or in ./runs
root = (runs_root() if keep else home) / "notebooks" / source_name(source).partition(".")[0]
data_folder = Path("data") / root.name / str(size) if in_colab() else root / f"data-{size}"
packed = root / f"data-{size}.tar" if in_colab() else None                             # one file on Drive
print(f"Preset {preset}, photos from {source}" + f", kept in {root}" * keep)"""}


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
    lines = [SETUP + ' { display-mode: "form" }', "import importlib.util, os, subprocess, sys",
             'if importlib.util.find_spec("image_diffusion") is None:',
             '    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q",',
             f'                           "git+{settings()["git_url"]}"])']
    if name in WALKTHROUGHS:
        lines += ["from google.colab import drive",
                  "# runs are kept there and survive a disconnect; a Drive that was lost is mounted again",
                  'drive.mount("/content/drive", force_remount=not os.path.isdir("/content/drive/MyDrive"))']
    return "\n".join(lines)


def write(path):
    "Put badge, set-up cell and metadata into the notebook at `path`; each must have its place already."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"] = METADATA
    settings = [(start, start + text) for start, text in SETTINGS.items()] if path.stem in WALKTHROUGHS else []
    for start, text in ((BADGE, badge(path.stem)), (SETUP, setup(path.stem)), *settings):
        cells = [cell for cell in notebook["cells"] if "".join(cell["source"]).startswith(start)]
        assert len(cells) == 1, f"{path.name} has {len(cells)} cells that start with {start!r}, not one"
        cells[0]["source"] = text.splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for path in NOTEBOOKS:
        write(path)
