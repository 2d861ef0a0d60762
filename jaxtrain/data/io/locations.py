"""Where files are: patterns to addresses, and addresses to readable bytes.

An address is what a file is opened with: a local path, or a URL with its credentials and signature. On the Hub
(`hf://...`) it contains the commit's sha. See names.py for what is recorded of it.
"""

import concurrent.futures
import contextvars
import functools
import glob
import itertools
import json
import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote, unquote

from jaxtrain.data.io import retry
from jaxtrain.data.io.byte_ranges import BucketBytes, Bytes, HttpBytes, HubBytes, LocalBytes, ask, file_system, session
from jaxtrain.data.io.names import lasting_name, named
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

_MOST_FILES = 1_000_000  # that braces may stand for
_HUB = re.compile(r"hf://(?P<type>datasets/|spaces/|)(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<path>.+)")


def expand(patterns: Sequence[str]) -> dict[str, str]:
    """The files that patterns match, in the order of the patterns and of their braces, sorted within each.

    Returns:
        Lasting name -> address.

    Raises:
        UserError: A pattern matches no file, or two files share a name.
        TransientError: The listing failed.
    """
    found: list[str] = []
    for pattern in patterns:
        with retry.classified(lasting_name(pattern)):
            # The names of local files may have braces.
            literal = [] if "://" in pattern else _expand(pattern)
            matches = {pattern: literal} if literal else {one: _expand(one) for one in spread(pattern)}
        for one, addresses in matches.items():
            if not addresses:
                raise UserError(f"no file matches {lasting_name(one)!r}. Check the path or the pattern.")
            found += addresses
    return named(found)


def _expand(pattern: str) -> list[str]:
    if pattern.startswith(("http://", "https://")):
        return [pattern]
    if pattern.startswith("hf://"):
        return _expand_hub(pattern)
    if "://" in pattern:
        fs, path = file_system(pattern)
        matches: Any = ask(fs, "glob", path, detail=True)
        return [str(fs.unstrip_protocol(one)) for one in sorted(matches) if matches[one]["type"] == "file"]
    path = os.path.expanduser(pattern)
    local = glob.glob(path, recursive=True) or [path]  # a name with brackets does not match itself
    return sorted(path.replace(os.sep, "/") for path in local if os.path.isfile(path))


def _expand_hub(pattern: str) -> list[str]:
    """Addresses for a pattern like hf://datasets/org/name@main/data/*.parquet, at the revision's current commit."""
    from huggingface_hub import HfApi, HfFileSystem

    parts = _HUB.fullmatch(pattern)
    if parts is None:
        raise UserError(f"{pattern!r} is not of the form hf://datasets/ORG/NAME[@REVISION]/PATH.")
    revision = unquote(parts["revision"]) if parts["revision"] else None
    kind = parts["type"].rstrip("s/") or "model"
    session()
    sha = HfApi().repo_info(parts["repo"], repo_type=kind, revision=revision).sha
    root = f"{parts['type']}{parts['repo']}@{sha}"
    found: Any = HfFileSystem().glob(f"{root}/{parts['path']}", expand_info=False, detail=True)
    return [f"hf://{path}" for path in sorted(found) if found[path]["type"] == "file"]


def spread(pattern: str) -> list[str]:
    """What `braces` makes of the pattern if it has a range or a list in braces; else the pattern itself."""
    return braces(pattern) if re.search(r"\{[^{}]*(,|\.\.)[^{}]*\}", pattern) else [pattern]


def braces(pattern: str) -> list[str]:
    """Expands `{000..123}` and `{a,b}` in a pattern, in order. Numbers keep their leading zeros.

    Raises:
        UserError: The braces have another form, or expand to a million addresses or more.
    """
    choices: list[list[str]] = []
    count = 1
    for literal, inside in re.findall(r"([^{}]*)(?:\{([^{}]*)\})?", pattern):
        choices.append([literal])
        if inside:
            choices.append(_alternatives(inside, pattern))
            count *= len(choices[-1])
    if re.sub(r"\{[^{}]+\}", "", pattern).count("{") + re.sub(r"\{[^{}]+\}", "", pattern).count("}"):
        raise UserError(f"{lasting_name(pattern)!r}: its braces are unbalanced or nested.")
    if count >= _MOST_FILES:
        raise UserError(f"{lasting_name(pattern)!r} expands to {count:,} files; check its range.")
    return ["".join(parts) for parts in itertools.product(*choices)]


def _alternatives(inside: str, pattern: str) -> list[str]:
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if bounds is None:
        if "," not in inside:
            raise UserError(f"{lasting_name(pattern)!r}: {{{inside}}} is neither a range (0..99) nor a list (a,b).")
        return inside.split(",")
    first, last = int(bounds[1]), int(bounds[2])
    if last - first >= _MOST_FILES:
        raise UserError(f"{lasting_name(pattern)!r} expands to {last - first + 1:,} files; check its range.")
    if last < first:
        raise UserError(f"{lasting_name(pattern)!r}: {{{inside}}} ends before it begins.")
    padded = any(len(bound) > 1 and bound[0] == "0" for bound in bounds.groups())
    width = max(map(len, bounds.groups())) if padded else 0
    return [str(number).zfill(width) for number in range(first, last + 1)]


def locate(address: str) -> Bytes:
    """The bytes of the file at an address of `expand`."""
    if address.startswith("hf://"):
        from huggingface_hub import constants

        parts = _HUB.fullmatch(address)
        assert parts is not None, address
        assert parts["revision"] is not None, address
        revision = quote(unquote(parts["revision"]), safe="")
        url = f"{constants.ENDPOINT}/{parts['type']}{parts['repo']}/resolve/{revision}/{quote(parts['path'])}"
        return HubBytes(url, f"{parts['path']} of {parts['repo']}")
    if address.startswith(("http://", "https://")):
        return HttpBytes(address)
    return BucketBytes(address) if "://" in address else LocalBytes(os.path.expanduser(address))


def cache_key(address: str, stamp: Json | None) -> str:
    """A key that no other file or version shares, in any source of any run.

    It uses the address, since a name of version 0.1 may mean several files. stamp: See `stamps`.
    """
    return json.dumps([lasting_name(address), stamp], sort_keys=True)


def stamps(names: Sequence[str], files: Sequence[Bytes]) -> dict[str, Json]:
    """Each file's stamp by name, 16 requests at a time. Files of the Hub have none: their commit pins them."""
    # The copied context carries the deadline of the current attempt into the pool's threads.
    looks = [functools.partial(contextvars.copy_context().run, file.stamp) for file in files]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda look: look(), looks)
        return {name: stamp for name, stamp in zip(names, found, strict=True) if stamp}


def check_unchanged(known: Json, names: Sequence[str], files: Sequence[Bytes]) -> None:
    """Compares files with a checkpoint's stamps.

    Args:
        known: The stamps, by name.
        names: The names of all files.
        files: The files as they are now.

    Raises:
        UserError: A file has changed.
    """
    now = stamps(names, files)
    changed = [f"{name} (was {stamp}, is {now[name]})" for name, stamp in known.items() if now[name] != stamp]
    if changed:
        raise UserError(
            f"{len(changed)} of {len(names)} files have changed since the checkpoint: {'; '.join(changed[:3])}. "
            "Restore them, or start a new run in another --workdir."
        )
