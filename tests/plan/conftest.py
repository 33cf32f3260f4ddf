"""Tiny configurations of every family as folders, made once."""

import pytest

from mmpeft_fast.models import FAMILIES
from tests.plan.real_step import tiny_config_folder


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    return {name: tiny_config_folder(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}
