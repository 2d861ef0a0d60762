"""Checkpoints in s3:// buckets, which Orbax's own code does not reach (0.12: "Checkpoint path should be absolute").

It hands TensorStore a description of where arrays lie, for gs:// and for files alone. TensorStore itself reads and
writes S3, so the description for gs:// is asked for and its driver changed. A checkpoint is written under its final
name, as in gs:// buckets, since there a rename is a copy; it counts when its list of files (integrity.py) is whole.
"""

import functools
import os
from typing import Any

from etils import epath
from orbax.checkpoint._src.path import atomicity
from orbax.checkpoint._src.serialization import tensorstore_utils

_SCHEME = "s3://"


def prepare(path: epath.PathLike) -> None:
    """Before Orbax gets a path. Credentials: the environment's, those in ~/.aws, or the machine's role."""
    if _is_s3(path):
        _teach_orbax()


def temporary_path_class(path: epath.PathLike) -> Any:
    """How Orbax tells a finished save from an unfinished one; None: as it always does."""
    return atomicity.CommitFileTemporaryPath if _is_s3(path) else None


def _is_s3(path: epath.PathLike) -> bool:
    return os.fspath(path).startswith(_SCHEME)


@functools.cache
def _teach_orbax() -> None:
    theirs = tensorstore_utils.build_kvstore_tspec

    @functools.wraps(theirs)
    def build(directory: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not _is_s3(directory):
            return theirs(directory, *args, **kwargs)
        return _on_s3(theirs(f"gs://{directory.removeprefix(_SCHEME)}", *args, **kwargs))

    tensorstore_utils.build_kvstore_tspec = build


def _on_s3(spec: Any) -> Any:
    """The same with S3 for each bucket of GCS."""
    if not isinstance(spec, dict):
        return spec
    spec = {name: _on_s3(value) for name, value in spec.items()}
    return {**spec, "driver": "s3", **_server()} if spec.get("driver") == "gcs" else spec


def _server() -> dict[str, Any]:
    """As Amazon's clients take them from the environment, for other stores that speak S3 (MinIO, R2)."""
    wanted = {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    found = {key: [os.environ[name] for name in names if name in os.environ] for key, names in wanted.items()}
    spec: dict[str, Any] = {key: values[0] for key, values in found.items() if values}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # Else it looks into ~/.aws first, and prints ten lines for each array where that is not there.
        spec["aws_credentials"] = {"type": "environment"}
    return spec
