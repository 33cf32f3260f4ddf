"""Builds two packages from one repository: mmpeft_fast from the root, mmpeft_kernels from the source root kernels/."""

from setuptools import find_packages, setup

# kernels/ itself has no __init__.py and is never packaged: Hugging Face publishes a package of that name.
setup(
    packages=find_packages(include=["mmpeft_fast", "mmpeft_fast.*"]) + find_packages("kernels"),
    package_dir={"mmpeft_fast": "mmpeft_fast", "mmpeft_kernels": "kernels/mmpeft_kernels"},
    package_data={"mmpeft_fast.study": ["*.css"], "mmpeft_kernels": ["*.json", "tuned/*.json"]},
)
