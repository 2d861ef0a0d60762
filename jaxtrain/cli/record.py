"""Configs as JSON, without secrets, and the differences between two of them."""

import dataclasses
import hashlib
import json
import re
from typing import Any

from jaxtrain.cli import kinds, tree, typed
from jaxtrain.cli.redaction import without_secrets
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

KIND = "_kind"
# In a field's metadata: its value in records from before it existed, if that is not today's default.
BEFORE = "before"

_SECRET_FIELD = re.compile(
    r"((hf|api|auth|access|bearer|security|session)_?)?token|(.*_)?(secret|password|passwd|api_?key|credentials?)"
    r"|(access|secret|private|account)_?key(_id)?",
    re.IGNORECASE,
)
_REMOVED = "(removed)"


class _Absent:
    """A value that one side of a comparison lacks (None is a value)."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT = _Absent()


def to_json(config: Any) -> Json:
    """Converts a config to JSON types: dict, list, str, int, float, bool, None.

    A dataclass carries "_kind", its stable name (kinds.py); tuples become lists. Secrets are left out (user and
    password in URLs, signatures and tokens in their query strings, fields that hold a token, secret, password or API
    key), so configs that differ only in secrets are equal.
    """
    return {KIND: kinds.kind_of(type(config)), **_group(config)}


def from_json(recorded: Any) -> Any:
    """The config that `to_json` recorded, in this version or an earlier one.

    Raises:
        UserError: It names a class that is not a config, or one whose module the user has not imported.
    """
    if isinstance(recorded, list):
        return tuple(map(from_json, recorded))
    if not isinstance(recorded, dict):
        return recorded
    recorded = upgrade(recorded)
    fields = {name: from_json(value) for name, value in recorded.items() if name != KIND}
    if KIND not in recorded:
        return fields
    cls = kinds.class_of(recorded[KIND])
    unknown = fields.keys() - {field.name for field in dataclasses.fields(cls)}
    if unknown:
        raise UserError(f"the checkpoint's {recorded[KIND]} has {', '.join(sorted(unknown))}, unknown to this version")
    return cls(**{name: value for name, value in _before(cls).items() if name not in fields}, **fields)


def upgrade(recorded: Any) -> Any:
    """A record of any version, with current names: kinds instead of the module paths of version 0.1."""
    if isinstance(recorded, list):
        return [upgrade(item) for item in recorded]
    if not isinstance(recorded, dict):
        return recorded
    upgraded = {name: upgrade(value) for name, value in recorded.items()}
    if "_class" in upgraded:
        return {KIND: kinds.kind_of_path(upgraded.pop("_class")), **upgraded}
    if "." in str(upgraded.get("class")):  # describes a transform, or the source of a store
        described = {KIND: kinds.kind_of_path(upgraded.pop("class")), **upgraded}
        return sealed(described) if described.pop("digest", None) else described
    return upgraded


def complete(recorded: Any) -> Any:
    """Like `upgrade`, and also adds fields that did not exist then, with the values that those records imply."""
    if isinstance(recorded, list):
        return [complete(item) for item in recorded]
    if not isinstance(recorded, dict):
        return recorded
    recorded = upgrade(recorded)
    filled = {name: complete(value) for name, value in recorded.items()}
    if KIND in recorded:
        added = _before(kinds.class_of(recorded[KIND])).items()
        filled |= {name: public(name, value) for name, value in added if name not in filled}
    return filled


def sealed(described: Json) -> Json:
    """The description of a component with its digest, for identities."""
    text = json.dumps(described, sort_keys=True)
    return {**described, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _before(cls: type) -> Json:
    """The default of each field in records from before the field existed."""
    values = {}
    for field in dataclasses.fields(cls):
        if BEFORE in field.metadata:
            values[field.name] = field.metadata[BEFORE]
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
    return values


def _group(group: Any) -> Json:
    return {key: public(key, child) for key, (child, _) in typed.entries(group, Any).items()}


def public(key: str, value: Any) -> Any:
    """Converts the value of a field or entry to JSON types without secrets, for storage and display."""
    if typed.is_config(value):
        return to_json(value)
    if isinstance(value, dict):
        return _group(value)
    if isinstance(value, tuple):
        return [public(key, item) for item in value]
    if not isinstance(value, str):
        return value
    if value and _SECRET_FIELD.fullmatch(key):
        return _REMOVED
    return without_secrets(value)


def differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Compares two JSON values.

    An entry or element of only one side is one row with ABSENT on the other. A changed class is a row `path._kind`. 1
    and 1.0 are equal; 1 and True are not.

    Args:
        old: The old value.
        new: The new value.
        path: The dotted path of both.

    Returns:
        (dotted path, old value, new value) of each difference, in the old value's order.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in [*old, *new]}
    elif isinstance(old, list) and isinstance(new, list):
        longest = range(max(len(old), len(new)))
        pairs = {str(i): (_element(old, i), _element(new, i)) for i in longest}
    else:
        same = old == new and isinstance(old, bool) == isinstance(new, bool)
        return [] if same else [(path, old, new)]
    rows = []
    for key, (before, after) in pairs.items():
        parent = tuple(old) if isinstance(old, list) else old
        below = tree.join(path, parent, key)
        rows += differences(before, after, below if path else below.removeprefix("."))
    return rows


def _element(items: list[Any], i: int) -> Any:
    return items[i] if i < len(items) else ABSENT


def format_differences(rows: list[tuple[str, Any, Any]]) -> str:
    """A table with one line per difference: path, old value, arrow, new value."""
    cells = [(path, _cell(old), _cell(new)) for path, old, new in rows]
    paths, olds = (max((len(row[column]) for row in cells), default=0) for column in (0, 1))
    return "\n".join(f"  {path:<{paths}}  {old:>{olds}}  ->  {new}" for path, old, new in cells)


def _cell(value: Any) -> str:
    text = repr(value) if value is ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
