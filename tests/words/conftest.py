"""Where the real files are."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data_dir():
    folder = os.environ.get("JAXGEN_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("JAXGEN_DATA_DIR does not name a folder with the original files")
    return Path(folder)
