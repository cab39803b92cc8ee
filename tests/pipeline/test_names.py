"""Every name that is used is defined, and every name that is imported is used."""
import subprocess
import sys

from conftest import ROOT


def test_pyflakes_finds_nothing():
    found = subprocess.run([sys.executable, "-m", "pyflakes", "image_diffusion", "tests"], cwd=ROOT, capture_output=True, text=True)
    assert found.stdout + found.stderr == ""
