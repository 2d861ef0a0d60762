"""Support for locations that Orbax 0.12 and its libraries cannot use directly, and why a store refused a write.

* s3:// buckets ("Checkpoint path should be absolute"). Orbax describes the location of arrays to TensorStore only
  for gs:// and local files. TensorStore supports S3, so we request the description for gs:// and change its driver. A
  checkpoint is written under its final name, as in gs:// buckets, where a rename is a copy; it counts once Orbax's
  commit file exists.
* Local paths with `*`, `?`, `[` (Orbax looks for its own files with a glob, finds none and commits a checkpoint without
  arrays), a backslash (a slash to TensorStore), or bytes that are not UTF-8 or that the locale reads otherwise
  (TensorStore takes UTF-8). They get a symbolic link under a plain name.
"""

import atexit
import functools
import os
import re
import shutil
import tempfile
from typing import Any

from etils import epath
from orbax.checkpoint._src.path import atomicity
from orbax.checkpoint._src.serialization import tensorstore_utils

_S3 = "s3://"


def for_orbax(path: epath.Path) -> epath.Path:
    """The path under which Orbax can use a folder.

    Args:
        path: Absolute, or a gs:// or s3:// URL. S3 credentials are the environment's, those in ~/.aws, or the
            machine's role.
    """
    if _is_s3(path):
        _describe_s3()
    elif "://" not in str(path) and _is_misread(os.fspath(path)):
        return epath.Path(_link(os.fspath(path.parent))) / path.name
    return path


def temporary_path_class(path: epath.Path) -> Any:
    """How Orbax distinguishes finished saves from unfinished ones; None for its default."""
    return atomicity.CommitFileTemporaryPath if _is_s3(path) else None


# Errors come from Python (OSError) and from TensorStore (ValueError with the operating system's text).
_REFUSALS = {
    r"no space left|ENOSPC|quota exceeded|EDQUOT|file too large|EFBIG": "the disk is full or over quota",
    r"permission ?denied|operation not permitted|read-only file system|EACCES|EPERM|EROFS|\b403\b": (
        "writing is not allowed there"
    ),
    r"not a directory|ENOTDIR": "a part of the path is no longer a directory",
    r"no such file or directory|ENOENT|stale file handle|ESTALE": "the folder was removed during the save",
}


def refusal(error: BaseException) -> str | None:
    """Why the storage refused a write, in words; None if something else went wrong."""
    text = str(error)
    return next((words for pattern, words in _REFUSALS.items() if re.search(pattern, text, re.IGNORECASE)), None)


def _is_misread(path: str) -> bool:
    return bool(re.search(r"[*?\[\\]", path)) or os.fsencode(path) != path.encode(errors="replace")


@functools.cache
def _link(folder: str) -> str:
    place = tempfile.mkdtemp(prefix="jaxtrain-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)  # removes the link, not what it points to
    link = os.path.join(place, "link")
    os.symlink(folder, link)
    return link


def _is_s3(path: epath.PathLike) -> bool:
    return os.fspath(path).startswith(_S3)


@functools.cache
def _describe_s3() -> None:
    theirs = tensorstore_utils.build_kvstore_tspec

    @functools.wraps(theirs)
    def build(directory: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not _is_s3(directory):
            return theirs(directory, *args, **kwargs)
        return _on_s3(theirs(f"gs://{directory.removeprefix(_S3)}", *args, **kwargs))

    tensorstore_utils.build_kvstore_tspec = build


def _on_s3(spec: Any) -> Any:
    """A TensorStore description with S3 in place of each bucket of GCS."""
    if not isinstance(spec, dict):
        return spec
    spec = {name: _on_s3(value) for name, value in spec.items()}
    return {**spec, "driver": "s3", **_s3_server()} if spec.get("driver") == "gcs" else spec


def _s3_server() -> dict[str, Any]:
    """The server and credentials that Amazon's variables name, also for other S3 stores (MinIO, R2)."""
    variables = {
        "endpoint": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        "aws_region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    }
    found = {key: [os.environ[name] for name in names if name in os.environ] for key, names in variables.items()}
    spec: dict[str, Any] = {key: values[0] for key, values in found.items() if values}
    if "AWS_ACCESS_KEY_ID" in os.environ:
        # By default TensorStore looks into ~/.aws first, and prints ten lines per array if it does not exist.
        spec["aws_credentials"] = {"type": "environment"}
    return spec
