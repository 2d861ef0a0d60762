"""`files.json`: what files a folder holds, so that a later process can tell cheaply whether it is whole.

TensorStore reads a changed byte in array data without an error (measured: a flipped byte in a chunk gives other
numbers), and a missing file as zeros in some layouts; Orbax checks nothing. Sizes are kept for all files and CRC-32 for
those up to 1 MiB, which covers all metadata: a CRC of everything would read 12 GB at each start of a 1B model.
"""

import json
import zlib
from collections.abc import Iterator
from concurrent import futures

from etils import epath

_NAME = "files.json"
_CRC_BYTES = 1 << 20
# Object stores take about 50 ms for each request.
_THREADS = 16


def write(folder: epath.Path, skip: str) -> None:
    """Lists every file of the folder, at any depth, in its `files.json`, but for the name `skip`."""
    names = sorted(name for name in _walk(folder) if name != skip)
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        entries = dict(zip(names, pool.map(lambda name: _size_and_crc(folder / name), names), strict=True))
    (folder / _NAME).write_text(json.dumps(entries))


def copy(folder: epath.Path, target: epath.Path) -> None:
    """All files of a folder; in a bucket, where a rename would be the same and fsspec's fails on what is no object."""
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(lambda name: (folder / name).copy(target / name), _walk(folder)))


def is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def set_aside(folder: epath.Path) -> epath.Path:
    """Renames a damaged folder, so that nothing takes it for a whole one; returns its new place."""
    target, n = folder.parent / f"{folder.name}.corrupt", 1
    while target.exists():
        n += 1
        target = folder.parent / f"{folder.name}.corrupt-{n}"
    if is_remote(folder):
        copy(folder, target)
        folder.rmtree()
    else:
        folder.rename(target)
    return target


def problem(folder: epath.Path) -> str | None:
    """What is wrong with a folder that was listed, in one line; None if all is as it was written."""

    def check(entry: tuple[str, list[int]]) -> str | None:
        path, expected = folder / entry[0], entry[1]
        try:
            found = _size_and_crc(path)
        except FileNotFoundError:
            return f"{path} is missing"
        if found == expected:
            return None
        return f"{path} was changed" if found[0] == expected[0] else f"{path} has {found[0]} of {expected[0]} bytes"

    try:
        entries = json.loads((folder / _NAME).read_text())
    except (FileNotFoundError, ValueError) as error:
        return f"{folder / _NAME} cannot be read ({error})"
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        return next(filter(None, pool.map(check, entries.items())), None)


def _walk(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, f"{prefix}{path.name}/")
        else:
            yield prefix + path.name


def _size_and_crc(path: epath.Path) -> list[int]:
    """[bytes, CRC-32]; the latter is -1 for large files."""
    size = path.stat().length
    return [size, zlib.crc32(path.read_bytes()) if size <= _CRC_BYTES else -1]
