"""Lasting names of files, and how version 0.1 made them.

A file's name keys the shuffle, the holdout, skips, stores and caches, so it is an exact function of the location:
a path inside a Hub dataset, a local path as the user wrote it, or a URL without user info and signature parameters.
Two files of a source never share a name: that is refused.

Version 0.1 ("naming 1") passed names through the redaction for output, which cut out anything that looked like a token
and all queries of URLs. Its runs and stores keep those names if they are unambiguous, and are refused otherwise:
another name would reorder the data and train on held-out documents.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence

from jaxtrain.cli.redaction import unsigned
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, versioned

NAMING = 2  # how new names are made; recorded in a source's identity


def lasting_name(address: str, naming: int = NAMING) -> str:
    """The name of the file at an address, or of the files of a pattern. naming: the version that makes it."""
    return unsigned(address) if naming >= 2 else _redacted(address)


def named(addresses: Iterable[str], naming: int = NAMING) -> dict[str, str]:
    """Lasting name -> address, in order, without repeated addresses.

    Raises:
        UserError: Two addresses share a name.
    """
    found: dict[str, str] = {}
    for address in addresses:
        name = lasting_name(address, naming)
        if found.setdefault(name, address) != address:
            if naming < NAMING:
                raise UserError(_ambiguous([name]))
            raise UserError(
                f"two addresses of {name} differ only in credentials or signatures, which a name must not contain. "
                "Give each file a distinct address."
            )
    return found


def addresses(identity: Json, candidates: Iterable[str], root: str = "") -> list[str]:
    """The addresses of the files of a recorded identity.

    Args:
        identity: Its `files` are the names, made by its version of `naming`.
        candidates: Addresses from the current config. They contain what names omit.
        root: Prefix of every file's address, unless its name is an address. Names omit it.

    Raises:
        UserError: A name means several addresses.
    """
    naming = versioned(identity)["naming"]
    found: dict[str, set[str]] = {}
    for address in candidates:
        found.setdefault(lasting_name(address, naming).removeprefix(root), set()).add(address)
    names: Sequence[str] = identity["files"]
    shared = [name for name in names if len(found.get(name, ())) > 1]
    if shared:
        raise UserError(_ambiguous(shared))
    return [next(iter(found[name])) if name in found else name if "://" in name else root + name for name in names]


def is_exact(identity: Json) -> bool:
    """Whether a recorded identity names its files as this version does. Version 0.1 put "..." for what it cut out."""
    files: Sequence[str] = identity.get("files", ())
    return versioned(identity)["naming"] >= 2 or not any("..." in name for name in files)


def comparable(identity: Json) -> Json:
    """The identity, with this version's naming if this version makes the same names."""
    return {**versioned(identity), **({"naming": NAMING} if is_exact(identity) else {})}


def inexact(identity: Json) -> list[str]:
    """Error lines for a store whose names do not distinguish its files from others; none for most stores."""
    return [] if is_exact(identity) else [f"  source files: {_ambiguous(identity['files'])}"]


def _ambiguous(names: Sequence[str]) -> str:
    few = ", ".join(list(dict.fromkeys(names))[:3])
    return (
        f"version 0.1 gave several files the same name ({few}). Shuffle and holdout depend on the name, so the run "
        "cannot continue. Start a new run in another --workdir, and write its stores and caches again."
    )


# The code below is frozen: it reproduces the names of version 0.1.
_SECRET_VARIABLE = re.compile(
    r".*(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY(_ID)?|SECRET_?KEY|ACCOUNT_?KEY)", re.IGNORECASE
)
_SECRET_PARAMETER = re.compile(
    r"([?&](?:x-(?:amz|goog)-[\w-]*|[\w-]*(?:sig|signature|token|apikey|api_key|secret|password|credential))=)[^\s&'\"]+",
    re.IGNORECASE,
)


def _redacted(text: str, environment: Mapping[str, str] = os.environ) -> str:
    for name, value in environment.items():
        if len(value) >= 8 and value in text and _SECRET_VARIABLE.fullmatch(name):
            text = text.replace(value, "...")
    text = re.sub(r"(\w://)[^/?#\s'\"]*@", r"\1", text)
    text = re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"<>]*", r"\1", text)
    text = _SECRET_PARAMETER.sub(r"\1...", text)
    text = re.sub(r"\b(hf_|AKIA|ASIA|ya29\.)[\w.-]{6,}", r"\1...", text)
    return re.sub(r"(?i)\b(bearer|basic)\s+\S+", r"\1 ...", text)
