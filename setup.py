"""What pyproject.toml cannot express: ``configs/`` is part of the wheel, as ``tmass_dist/configs``."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tmass_dist*"]), "tmass_dist.configs"],
    package_dir={"tmass_dist.configs": "configs"},
)
