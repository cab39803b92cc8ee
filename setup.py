"Package metadata, read from settings.ini (the one place where it is written)."
import shlex
from configparser import ConfigParser

import setuptools

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
lib = cfg["lib_path"]
spdx = {"apache2": "Apache-2.0"}
statuses = ["1 - Planning", "2 - Pre-Alpha", "3 - Alpha", "4 - Beta", "5 - Production/Stable", "6 - Mature", "7 - Inactive"]
pythons = "3.11 3.12 3.13 3.14".split()
extras = ("dev", "hub", "tensorboard", "app")

setuptools.setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    license=spdx[cfg["license"]], license_files=["LICENSE"],
    classifiers=["Development Status :: " + statuses[int(cfg["status"]) - 1],
                 "Intended Audience :: " + cfg["audience"], "Programming Language :: Python :: 3"]
                + ["Programming Language :: Python :: " + p for p in pythons[pythons.index(cfg["min_python"]):]],
    packages=setuptools.find_packages(include=[lib, lib + ".*"]), include_package_data=True,
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={extra: shlex.split(cfg[f"{extra}_requirements"]) for extra in extras},
    python_requires=">=" + cfg["min_python"],
    long_description=open("README.md", encoding="utf-8").read(), long_description_content_type="text/markdown",
    entry_points={"console_scripts": shlex.split(cfg["console_scripts"]), "nbdev": [f"{lib}={lib}._modidx:d"]})
