"""Fixtures for the loopback Hub, and the environment they need.

The client libraries read HF_ENDPOINT and their cache folders at import time, so this module must be imported first.
tests/conftest.py does that. One Hub serves the whole session of an xdist worker, and every test that requests it starts
with an empty one.
"""

import atexit
import os
import pathlib
import shutil
from collections.abc import Iterator

import pytest

from tests.hub import LoopbackHub

_HUB = LoopbackHub()
atexit.register(_HUB.close)
os.environ.update(_HUB.env())


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """The session's Hub, emptied: no repositories, no faults, an empty log, and cleared client caches."""
    from huggingface_hub import HfFileSystem, close_session

    from jaxtrain.data.io import rate_limit

    rate_limit._of_server.cache_clear()
    HfFileSystem.clear_instance_cache()
    for folder in pathlib.Path(_HUB.home).iterdir():
        shutil.rmtree(folder)
    _HUB.clear()
    yield _HUB
    _HUB.clear()
    close_session()
