"""The work directory: its paths, and a lock so that only one run uses it at a time, from processes that all see it.

Local directories are locked with `flock`, which the kernel releases however the process ends. Without `flock` (gs://,
s3://, some network file systems), a lease replaces it: the file `lock` names the holder, which rewrites it every 30 s.
A run that finds a lease watches it for 75 s: if it changes, the holder is alive and the directory is refused. Clocks of
different machines are never compared.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from typing import IO

import fsspec.config
import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jaxtrain.cli.redaction import redact
from jaxtrain.distributed.consensus import on_process_0
from jaxtrain.errors import TransientError, UserError
from jaxtrain.interfaces import Json

_HEARTBEAT_SECONDS = 30.0
_WATCH_SECONDS = 75.0
# How long a network file system may take to show a new file to another host.
_VISIBLE_SECONDS = 10.0

logger = logging.getLogger("jaxtrain")


class Workdir:
    """A run's directory, local or a gs:// or s3:// URL. All processes create one and use it as a context manager.

    `with Workdir(path) as workdir:` creates the directory, refuses one that not all processes share, and locks it.

    Raises:
        UserError: It cannot be used, or another run uses it.
    """

    def __init__(self, path: epath.PathLike):
        self.is_local = "://" not in os.fspath(path)
        if not self.is_local and not re.match(r"(gs|s3)://[^/]", os.fspath(path)):
            raise UserError(f"--workdir={path}: give a local directory, or a gs:// or s3:// URL.")
        self.path = epath.Path(path)
        if self.is_local:
            # Orbax refuses relative paths.
            self.path = epath.Path(os.path.abspath(self.path.expanduser()))
        else:
            # A cached listing lacks what other processes, or TensorStore in this one, have written since.
            for protocol in ("s3", "gcs"):
                fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
        self.checkpoints = self.path / "checkpoints"
        self.config = self.path / "config.json"
        self.programs = self.path / "programs.json"
        self.skips = self.path / "skips.json"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "log.txt"
        self.spikes = self.path / "spikes.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.tasks = self.path / "tasks"
        self.wandb_id = self.path / "wandb_id.txt"
        # What has to be local: compiled programs, tokenizers, buffers.
        self.cache = self.path / "cache"
        if not self.is_local:
            root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
            digest = hashlib.blake2b(os.fspath(path).encode(), digest_size=8).hexdigest()
            self.cache = epath.Path(root) / "jaxtrain" / digest
        # Token stores are only read from local paths.
        self.tokens = self.path / "tokens" if self.is_local else self.cache / "tokens"
        self._lock = contextlib.ExitStack()

    def __enter__(self) -> "Workdir":
        with self._lock:
            on_process_0(self._lock_directory, f"--workdir={self.path} cannot be used: see process 0's message.")
            self._check_shared()
            try:
                self.cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _refused(self.cache, error) from error
            # No error: keep the lock.
            self._lock = self._lock.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def _check_shared(self) -> None:
        """Process 0 writes a file that all must see."""
        if jax.process_count() == 1:
            return
        number = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(30))))
        token = self.path / f".shared-{number}"
        if jax.process_index() == 0:
            token.write_text(str(number))
        multihost_utils.sync_global_devices("workdir token")
        deadline = time.monotonic() + _VISIBLE_SECONDS
        while not (seen := token.exists()) and time.monotonic() < deadline:
            time.sleep(0.5)
        seen_by = np.ravel(multihost_utils.process_allgather(np.asarray([seen])))
        if jax.process_index() == 0:
            token.unlink()
        if not seen_by.all():
            blind = ", ".join(map(str, np.flatnonzero(~seen_by.astype(bool))))
            raise UserError(
                f"--workdir={self.path} is not shared by all processes: {blind} cannot see what process 0 writes there."
                " Give a network file system that all hosts mount, or a gs:// or s3:// URL."
            )

    def _lock_directory(self) -> None:
        """Creates the directory and takes its lock."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self.path / "lock"
            self._lock.enter_context((_flocked(lock) if self.is_local else None) or _Lease(lock))
        except UserError:
            raise
        except FileExistsError:
            raise UserError(f"--workdir={self.path} is a file; give a directory.") from None
        except OSError as error:
            raise _refused(self.path, error) from None
        except Exception as error:  # bucket clients raise their own errors
            what = f"--workdir={self.path}: {type(error).__name__}: {redact(str(error)).strip()}"
            if isinstance(error, ImportError):
                raise UserError(f"{what}. For s3 and gs install jaxtrain[s3] or jaxtrain[gcs].") from None
            if "Credentials" in type(error).__name__:
                raise UserError(f"{what}. Set up the bucket's credentials as for the cloud provider's tools.") from None
            raise TransientError(what) from None

    def write_config(self, config: Json) -> None:
        """Writes `config.json`, on process 0."""
        if jax.process_index() == 0:
            try:
                write_atomically(self.config, json.dumps(config, indent=2) + "\n")
            except OSError as error:
                raise _refused(self.config, error) from error


def write_atomically(path: epath.Path, content: str | bytes) -> None:
    """Replaces a file so that a reader, also after a kill, sees either the old or the new one."""
    temporary = path.parent / f"{path.name}.tmp"
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def _refused(path: epath.Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written: {error}. Give a --workdir that you can write to.")


def _holder() -> Json:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}


def _in_use(path: epath.Path, holder: str) -> UserError:
    return UserError(
        f"{path.parent} is in use by another run ({holder.strip() or 'holder unknown'}). Wait for it, stop it, or "
        "give another --workdir."
    )


def _flocked(path: epath.Path) -> IO[str] | None:
    """The locked file, which unlocks when closed; None if the file system has no locks."""
    file = open(path, "a+")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            file.seek(0)
            refusal = _in_use(path, file.read())
            file.close()
            raise refusal from error
        file.close()
        return None
    file.truncate(0)
    file.write(json.dumps(_holder()))
    file.flush()
    return file


class _Lease:
    """A lock file that its holder keeps rewriting."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._identity = {**_holder(), "token": secrets.token_hex(8)}
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="workdir lease", daemon=True)

    def __enter__(self) -> "_Lease":
        found = self._read()
        if found:
            logger.warning("%s exists: waiting %.0f s to see whether its run is alive.", self._path, _WATCH_SECONDS)
            deadline = time.monotonic() + _WATCH_SECONDS
            while time.monotonic() < deadline:
                time.sleep(_WATCH_SECONDS / 30)
                now = self._read()
                if now and now != found:
                    raise _in_use(self._path, now)
                if not now:
                    break
        self._write()
        # If two runs take it at the same time, the last writer has it.
        time.sleep(_WATCH_SECONDS / 30)
        if not self._is_mine():
            raise _in_use(self._path, self._read())
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._is_mine():
            self._path.unlink()

    def _read(self) -> str:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""

    def _is_mine(self) -> bool:
        return self._identity["token"] in self._read()

    def _write(self) -> None:
        self._beats += 1
        self._path.write_text(json.dumps({**self._identity, "beat": self._beats}))

    def _run(self) -> None:
        while not self._stop.wait(_HEARTBEAT_SECONDS):
            try:
                if not self._is_mine():
                    # This process was suspended for over a minute and another run took over: two must not write.
                    logger.error("Another run has taken the lease %s; this one stops.", self._path)
                    os._exit(1)
                self._write()
            except OSError as error:
                logger.warning("The lease %s could not be renewed: %s", self._path, error)
