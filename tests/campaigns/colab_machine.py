"""A stand-in for a Colab machine: a fresh kernel whose `/content` and `/var/colab` are its own, and are gone with it.

The kernel runs in a mount namespace (`unshare`, Linux): its root is in memory and shows everything of this computer but `/content`,
which is empty.
The folder that plays Google Drive outlives the machine; `tests/fakes/google/colab` mounts it.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from colab_cells import ROOT
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

START = r"""
set -eu
new=$1; shift
mount -t tmpfs machine "$new"
mount --make-runbindable "$new"
mkdir -p "$new/content" "$new/tmp.machine" "$new/var/colab"
touch "$new/var/colab/hostname"
show() {
    case $1 in /content|/var|/var/colab) ;; *)
        if [ -L "$1" ]; then cp -P "$1" "$new$1"; elif [ -d "$1" ]; then mkdir -p "$new$1"; mount --rbind "$1" "$new$1"; fi ;;
    esac
}
for place in /* /var/*; do show "$place"; done
exec chroot "$new" sh -c 'cd /content && exec "$@"' sh "$@"
"""
UNSHARE = ["unshare", *(["-r"] if hasattr(os, "getuid") and os.getuid() else []), "-m", "--propagation", "private"]


def skip_reason(folder):
    "Why this computer cannot play a Colab machine; empty if it can."
    if not sys.platform.startswith("linux"):
        return "it needs Linux's mount namespaces"
    try:
        tried = subprocess.run([*UNSHARE, "sh", "-c", START, "sh", folder, "ls", "/content"], capture_output=True, text=True)
    except FileNotFoundError:
        return "it needs the command unshare"
    return "" if tried.returncode == 0 else f"unshare gives no mount namespace here ({tried.stderr.strip()})"


def choose(source, **settings):
    "Change values in a form, as a Colab user would: the text between the name and its `#@param`."
    for name, value in settings.items():
        source = re.sub(rf"^{name} = .*?(  #@param)", lambda found: f"{name} = {value!r}{found[1]}", source, flags=re.M)
    return source


def walkthrough(cells):
    "The cells of a step alone: set-up, imports, what is exported, and the section `Run this step`."
    kept, here, title = [], True, False
    for cell in cells:
        heading = re.search(r"^## (.*)", cell.source, re.M) if cell.cell_type == "markdown" else None
        if heading:
            here = heading[1] == "Run this step"
        title = title or bool(heading)
        if cell.cell_type == "code" and (here or "#| export" in cell.source):
            kept.append(cell)
    return kept


class Machine:
    "One Colab machine, with one kernel. `drive` outlives it."

    def __init__(self, folder, drive, **environment):
        self.folder, self.updates = Path(folder), 0
        (self.folder / "root").mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if name not in ("IMAGE_DIFFUSION_HOME", "IN_TEST", "MPLBACKEND")}
        path = os.pathsep.join([str(ROOT / "tests/fakes"), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.environment = kept | {"PYTHONPATH": path, "FAKE_DRIVE": str(drive), "TMPDIR": "/tmp.machine",
                                   "IPYTHONDIR": "/tmp.machine/ipython", "OMP_NUM_THREADS": "1",
                                   "CUDA_VISIBLE_DEVICES": "", "COLAB_RELEASE_TAG": "release"} | environment
        kernel = [*UNSHARE, "sh", "-c", START, "sh", str(self.folder / "root"),
                  sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (self.folder / "kernels/colab").mkdir(parents=True)
        (self.folder / "kernels/colab/kernel.json").write_text(json.dumps({"argv": kernel, "display_name": "Colab", "language": "python"}))
        specs = KernelSpecManager(kernel_dirs=[str(self.folder / "kernels")], ensure_native_kernel=False)
        self.manager = AsyncKernelManager(kernel_name="colab", kernel_spec_manager=specs, connection_file=str(self.folder / "kernel.json"))

    def run(self, cells, timeout=300):
        "Run cells in a kernel that starts now and is gone afterward, with its disk; returns the notebook. Raises what a cell raises."
        notebook = nbformat.v4.new_notebook(cells=cells)
        client = Client(notebook, km=self.manager, timeout=timeout, startup_timeout=120)
        client.machine = self
        try:
            client.execute(env=self.environment)
        finally:
            self.die()
        return notebook

    def die(self):
        "Kill -9."
        if self.manager.provisioner and self.manager.provisioner.process and self.manager.provisioner.process.poll() is None:
            self.manager.provisioner.process.kill()


class Client(NotebookClient):
    "Counts how often a picture was replaced in its place."

    def process_message(self, msg, cell, cell_index):
        self.machine.updates += msg["msg_type"] == "update_display_data"
        return super().process_message(msg, cell, cell_index)
