"""Fixtures on the loopback Hub, and the environment that they need.

The client libraries read HF_ENDPOINT and their cache folders when they are imported, so this module must be imported
before them: tests/conftest.py imports it first of all. One Hub serves the whole (xdist worker's) session; every test
that asks for it starts from an empty one.
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
    """The session's Hub, empty: no repositories, no faults, an empty log, and a client that remembers nothing."""
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
