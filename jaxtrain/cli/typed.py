"""The annotations of config dataclasses: which values fit one, and which value a text represents.

Annotations: bool, int, float, str, None, Literal, unions, tuple, dict with str keys, dataclasses, protocols and other
base classes, Callable, Any. Config values are plain: scalars, tuples, dicts and dataclass instances.
"""

import collections.abc
import dataclasses
import decimal
import inspect
import math
import re
import sys
import types
import typing
from typing import Any, Literal, Protocol

_EXAMPLES = {bool: "true", int: "1000", float: "3e-4", str: "text", types.NoneType: "none"}


def is_config(value: Any) -> bool:
    """Whether the value is an instance of a dataclass (not the class itself)."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def is_group(value: Any) -> bool:
    """Whether the value has fields or entries that are set individually."""
    return is_config(value) or isinstance(value, dict) or (isinstance(value, tuple) and any(map(is_config, value)))


def options(hint: Any) -> tuple[Any, ...]:
    """The members of a union; for any other annotation, the annotation itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def name(hint: Any) -> str:
    """The annotation as written, without modules; a Literal as its values."""
    if len(options(hint)) > 1:
        return " | ".join("None" if option is types.NoneType else name(option) for option in options(hint))
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return re.sub(r"\b[A-Za-z_][\w.]*\.(?=[A-Za-z_])", "", text)


def example(hint: Any) -> str:
    """Text that `parse` accepts for the annotation; empty if there is none."""
    members = options(hint)
    if len(members) > 1:
        return " or ".join(filter(None, map(example, members)))
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(str, arguments))
    if typing.get_origin(hint) is tuple:
        items = [example(item) for item in (arguments[:1] * 2 if arguments[-1] is ... else arguments)]
        return f"({','.join(items)})" if all(items) else ""
    return _EXAMPLES.get(hint, "")


def entries(value: Any, hint: Any) -> dict[str, tuple[Any, Any]]:
    """Everything addressable below the value: key -> (child, the child's annotation). Empty for scalars."""
    if is_config(value):
        hints = typing.get_type_hints(type(value))
        return {field.name: (getattr(value, field.name), hints[field.name]) for field in dataclasses.fields(value)}
    hint = next((option for option in options(hint) if fits(value, option)), Any)
    if isinstance(value, tuple):
        arguments = typing.get_args(hint) or (Any, ...)
        hints = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return {str(i): (child, hints[i]) for i, child in enumerate(value)}
    if isinstance(value, dict):
        return {key: (child, entry_hint(hint)) for key, child in value.items()}
    return {}


def entry_hint(hint: Any) -> Any:
    """The annotation of a dict's values."""
    return (typing.get_args(hint) or (str, Any))[1]


def element_hint(hint: Any) -> Any:
    """The annotation of the elements of a tuple of any length; None for other annotations."""
    arguments = [typing.get_args(option) for option in options(hint) if typing.get_origin(option) is tuple]
    return next((found[0] for found in arguments if found[-1] is ...), None)


def fits(value: Any, hint: Any) -> bool:
    """Whether the value's own type is right, ignoring its elements, entries and fields.

    An int fits float, as in Python's typing; a bool fits neither. NaN and infinities do not fit: JSON has none. Nor do
    ints beyond the range of float.
    """
    if len(options(hint)) > 1:
        return any(fits(value, option) for option in options(hint))
    origin = typing.get_origin(hint) or hint
    if origin in (Any, object):
        return value is None or isinstance(value, str | int | float | tuple | dict) or is_config(value)
    if origin is Literal:
        return any(value == literal and type(value) is type(literal) for literal in typing.get_args(hint))
    if origin in (int, float):
        accepted = int if origin is int else (int, float)
        return isinstance(value, accepted) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if origin in (tuple, collections.abc.Sequence):
        arguments = typing.get_args(hint) or (Any, ...)
        return isinstance(value, tuple) and (
            arguments[-1] is ... or origin is not tuple or len(arguments) == len(value)
        )
    if origin in (dict, collections.abc.Mapping):
        return isinstance(value, dict)
    if origin in (bool, str, types.NoneType):
        return isinstance(value, origin)
    if origin is collections.abc.Callable:
        return is_config(value) and callable(value)
    assert isinstance(origin, type), f"configs cannot have fields of the type {hint} (see the top of this file)"
    if Protocol in origin.__bases__:
        return is_config(value) and not missing_members(value, origin)
    return is_config(value) and isinstance(value, origin)


def class_fits(cls: type, hint: Any) -> bool:
    """Whether instances of a dataclass fit the annotation, whatever their fields hold."""
    blank = object.__new__(cls)
    for field in dataclasses.fields(cls):
        object.__setattr__(blank, field.name, None)
    return fits(blank, hint)


def missing_members(value: Any, protocol: type) -> list[str]:
    """Attributes and methods of the protocol that the value lacks."""
    members: set[str] = set()
    for base in protocol.__mro__:
        if Protocol in base.__bases__:
            members |= inspect.get_annotations(base).keys() | vars(base).keys()
    public = (member for member in members if not member.startswith("_") or member == "__call__")
    # The class first: a property is not evaluated.
    return sorted(member for member in public if not (hasattr(type(value), member) or hasattr(value, member)))


def parse(text: str, hint: Any) -> Any:
    """The value that the text represents for this annotation.

    Ints may be written 1_000_000 or 1e6; bools true, false, 1, 0; None as none or null; tuples (1,2) or 1,2.

    Raises:
        ValueError: There is none.
    """
    members = options(hint)
    if len(members) > 1:
        # None first and str last, since every text is a str.
        for member in sorted(members, key=lambda member: (member is not types.NoneType, member is str)):
            try:
                return parse(text, member)
            except ValueError:
                continue
        raise ValueError(text)
    origin = typing.get_origin(hint) or hint
    if origin is str:
        return text
    if origin is tuple:
        return _parse_tuple(text, typing.get_args(hint) or (str, ...))
    if origin is int:
        return _parse_int(text)
    if origin is float:
        number = float(text)
        if not math.isfinite(number):
            raise ValueError(text)
        return number
    literals: dict[str, Any] = {}
    if origin is Literal:
        literals = {str(literal): literal for literal in typing.get_args(hint)}
    elif origin is bool:
        literals, text = {"true": True, "1": True, "false": False, "0": False}, text.lower()
    elif origin is types.NoneType:
        literals, text = {"none": None, "null": None}, text.lower()
    if text not in literals:
        raise ValueError(text)
    return literals[text]


def _parse_int(text: str) -> int:
    """Exact at any size: 1e23 is 10**23, which no float equals. float() bounds the exponent before expanding the
    digits.
    """
    if not math.isfinite(float(text)):
        raise ValueError(text)
    number = decimal.Decimal(text)
    if number != number.to_integral_value():
        raise ValueError(text)
    return int(number)


def _parse_tuple(text: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Parentheses around the whole and a trailing comma are optional."""
    items = _split(text)
    if len(items) == 1 and items[0][:1] + items[0][-1:] in ("()", "[]"):
        items = _split(items[0][1:-1])
    if "" in items:
        raise ValueError(text)
    hints = arguments[:1] * len(items) if arguments[-1] is ... else arguments
    if len(hints) != len(items):
        raise ValueError(text)
    quoted = re.compile(r"""(['"])(.*)\1""")
    return tuple(parse(quoted.sub(r"\2", item), hint) for item, hint in zip(items, hints, strict=True))


def _split(text: str) -> list[str]:
    """Splits at commas outside brackets, and strips spaces."""
    items, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append("")
        else:
            items[-1] += character
    if depth:
        raise ValueError(text)
    items = [item.strip() for item in items]
    return items[:-1] if items[-1] == "" else items
