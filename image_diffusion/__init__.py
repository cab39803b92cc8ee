"""Train a latent diffusion model from scratch on landscape photos."""

# Written by hand, unlike the modules; nbdev_export changes the version's line alone.
import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

FRONT_DOOR = {"LatentDiffusion": "generate", "prepare": "data", "train_autoencoder": "train_autoencoder", "train_diffusion": "train_diffusion"}
__all__ = list(FRONT_DOOR)


def __getattr__(name):
    "Import a name of the front door when it is first used (PEP 562): `import image_diffusion` needs no torch."
    if name not in FRONT_DOOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{FRONT_DOOR[name]}", __name__), name)


def __dir__():
    return sorted({*globals(), *FRONT_DOOR})


class FrontDoor(ModuleType):
    # Two functions have the name of their module. Whoever imports such a module binds it as an attribute of the package, and that would hide the
    # function ever after, so these modules are not bound. `from image_diffusion.train_diffusion import PRESETS` needs no binding; the module itself
    # is `importlib.import_module("image_diffusion.train_diffusion")`.
    def __setattr__(self, name, value):
        if name not in FRONT_DOOR or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = FrontDoor
