"""`python -m image_diffusion`: the console commands where their script is not on the PATH."""

# Written by hand, unlike the modules.
from .cli import main

main(prog_name="python -m image_diffusion")
