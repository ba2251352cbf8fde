"""The packages of the wheel; all else is in pyproject.toml. configs/ becomes bltjax/configs/."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["bltjax*"]), "bltjax.configs", "bltjax.configs.studies"],
    package_dir={"bltjax.configs": "configs"},
)
