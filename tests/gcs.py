"""A loopback server that speaks Google Cloud Storage: gcp-storage-emulator plus the features it lacks.

TensorStore reads and writes by generation. The emulator tracks generations but neither reports nor honors them. gcsfs
moves objects, which the emulator does not support.
"""

import contextlib
import importlib
import socket
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import pytest


class Bucket:
    """The objects of one bucket, as stored by the server."""

    def __init__(self, storage: Any, name: str, url: str):
        self._storage, self.name, self.url = storage, name, url

    def env(self) -> dict[str, str]:
        """Environment variables that point gcsfs and TensorStore to this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # otherwise it asks Google about the bucket
        }

    def put(self, name: str, data: bytes) -> None:
        import requests

        where = f"{self.url}/upload/storage/v1/b/{self.name}/o"
        requests.post(where, params={"uploadType": "media", "name": name}, data=data, timeout=60).raise_for_status()

    def delete(self, name: str) -> None:
        self._storage.delete_file(self.name, name)

    def __call__(self, prefix: str = "") -> dict[str, bytes]:
        names = [each["name"] for each in self._storage.get_file_list(self.name, prefix)[0]]
        return {name: self._storage.get_file(self.name, name) for name in names}


@contextlib.contextmanager
def serve(*names: str) -> Iterator[list[Bucket]]:
    """Serves buckets with these names. Skips the test if the `buckets` extra is not installed."""
    pytest.importorskip("gcsfs")
    module = pytest.importorskip("gcp_storage_emulator.server")
    _teach(module)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = module.create_server("localhost", port, in_memory=True)
    for name in names:
        module.buckets.create_bucket(name, server._storage)
    server.start()
    try:
        yield [Bucket(server._storage, name, f"http://localhost:{port}") for name in names]
    finally:
        server.stop()


def _teach(server: Any) -> None:
    """Adds ifGenerationMatch, ifGenerationNotMatch, the header with an object's generation, and moveTo."""
    objects, missing = server.objects, importlib.import_module("gcp_storage_emulator.exceptions").NotFound
    theirs = {"download": objects.download, "insert": objects.insert}
    if theirs["download"].__module__ == __name__:
        return  # an earlier test has added them

    def generation(request: Any, storage: Any, name: str) -> str:
        try:
            return storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except missing:
            return "0"

    def asked(request: Any, name: str) -> str | None:
        return request.query.get(name, [None])[0]

    def download(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> None:
        found = generation(request, storage, request.params["object_id"])
        if found != "0" and asked(request, "ifGenerationNotMatch") == found:
            response.status = HTTPStatus.NOT_MODIFIED
        elif asked(request, "ifGenerationMatch") not in (None, found):
            response.status = HTTPStatus.PRECONDITION_FAILED
        else:
            theirs["download"](request, response, storage)
            if found != "0":
                response["X-Goog-Generation"] = found

    def insert(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> None:
        wanted = asked(request, "ifGenerationMatch")
        if wanted not in (None, generation(request, storage, str(asked(request, "name")))):
            response.status = HTTPStatus.PRECONDITION_FAILED
        else:
            theirs["insert"](request, response, storage)

    def move(request: Any, response: Any, storage: Any, *rest: Any, **more: Any) -> None:
        request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.copy(request, response, storage)
        if response.status == HTTPStatus.OK:
            storage.delete_file(request.params["bucket_name"], request.params["object_id"])

    where = r"/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<dest_object_id>.*[^/]+)"
    server.HANDLERS = ((where, {server.POST: move}), *server.HANDLERS)
    objects.download = download
    mine = {theirs["download"]: download, theirs["insert"]: insert}
    for _, methods in server.HANDLERS:
        methods.update({method: mine.get(handler, handler) for method, handler in methods.items()})
