"""`files.json`: the size and CRC-32 of every file of a checkpoint, to verify it at a later start.

TensorStore reads a changed byte of array data without an error, and in some layouts a missing file as zeros; Orbax
checks nothing. Each process checksums the files that it wrote, after writing and in the background. At a start the
processes share the reading. Lists of version 0.1 have no CRC (-1) for files above 1 MiB: only their sizes are compared.
"""

import json
import os
import re
import zlib
from collections.abc import Iterator
from concurrent import futures

from etils import epath

_LIST = "files.json"
_CHUNK_BYTES = 1 << 22
_UNFINISHED = re.compile(r"\.orbax-checkpoint-tmp[^/]*/")
# Object stores answer in about 50 ms. On local disks a few threads saturate the disk and leave the cores to the data.
_REMOTE_THREADS, _LOCAL_THREADS = 16, 4


def write_share(folder: epath.Path, process: int) -> None:
    """Lists what one of several processes wrote, for `write` to collect.

    Args:
        folder: The unfinished checkpoint.
        process: Orbax puts the arrays of process N into `ocdbt.process_N` of each item.
    """
    names = [name for name in _walk(folder) if f"/ocdbt.process_{process}/" in name]
    # Items get their final names only when all processes have written.
    listed = {_UNFINISHED.sub("/", name): entry for name, entry in _checksums(folder, names).items()}
    _share(folder, process).write_text(json.dumps(listed))


def write(folder: epath.Path, num_processes: int, skip: str) -> None:
    """Lists all files of a folder in its `files.json`.

    Args:
        folder: The unfinished checkpoint.
        num_processes: How many called `write_share`; 1 if none did.
        skip: A file name to leave out.
    """
    listed: dict[str, list[int]] = {}
    for process in range(num_processes) if num_processes > 1 else ():
        share = _share(folder, process)
        listed |= json.loads(share.read_text())
        share.unlink()
    listed |= _checksums(folder, [name for name in _walk(folder) if name != skip and name not in listed])
    (folder / _LIST).write_text(json.dumps(dict(sorted(listed.items()))))


def is_listed(folder: epath.Path) -> bool:
    """Whether the folder has a list of its files."""
    return (folder / _LIST).exists()


def problem(folder: epath.Path, process: int = 0, num_processes: int = 1) -> str | None:
    """Compares a folder with its list.

    Args:
        folder: A checkpoint.
        process: This process reads its share of the files.
        num_processes: How many share the reading.

    Returns:
        The first difference, as a sentence without its period; None if the share is intact.
    """
    try:
        listed = json.loads((folder / _LIST).read_text())
        by_size = sorted(listed, key=lambda name: (listed[name][0], name))
        mine = {name: listed[name] for name in by_size[process::num_processes]}
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        return f"{folder / _LIST} cannot be read ({error})"

    def check(name: str) -> str | None:
        path, (size, crc) = folder / name, mine[name]
        try:
            found, found_crc = (_size(path), -1) if crc == -1 else _size_and_crc(path)
        except FileNotFoundError:
            return f"{path} is missing"
        if found != size:
            return f"{path} has {found} of {size} bytes"
        return None if found_crc == crc else f"{path} does not match its checksum"

    with futures.ThreadPoolExecutor(_REMOTE_THREADS) as pool:
        return next(filter(None, pool.map(check, mine)), None)


def set_aside(folder: epath.Path) -> epath.Path:
    """Renames a damaged folder to `<step>.corrupt`, so that nothing mistakes it for an intact one; returns its path."""
    target, n = folder.parent / f"{folder.name}.corrupt", 1
    while target.exists():
        n += 1
        target = folder.parent / f"{folder.name}.corrupt-{n}"
    if is_remote(folder):
        # A bucket renames by copying anyway, and fsspec's rename fails on folders, which are not objects.
        with futures.ThreadPoolExecutor(_REMOTE_THREADS) as pool:
            list(pool.map(lambda name: (folder / name).copy(target / name), _walk(folder)))
        folder.rmtree()
    else:
        folder.rename(target)
    return target


def is_remote(path: epath.Path) -> bool:
    """Whether the path is a URL of an object store."""
    return "://" in str(path)


def _share(folder: epath.Path, process: int) -> epath.Path:
    return folder / f"files.process_{process}.json"


def _walk(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _checksums(folder: epath.Path, names: list[str]) -> dict[str, list[int]]:
    with futures.ThreadPoolExecutor(_REMOTE_THREADS if is_remote(folder) else _LOCAL_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _size_and_crc(folder / name), names), strict=True))


def _size(path: epath.Path) -> int:
    """Local files by `os`: etils also looks up the owner's name, and fails if there is none (containers, NFS)."""
    return path.stat().length if is_remote(path) else os.path.getsize(path)


def _size_and_crc(path: epath.Path) -> list[int]:
    """[bytes, CRC-32]. Both `read` and `crc32` release the GIL for chunks of this size."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return [size, crc]
