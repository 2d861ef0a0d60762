"""Overrides and checks of a config tree: dataclasses, tuples and dicts of plain values."""

import contextlib
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxtrain.cli import habits, kinds, typed
from jaxtrain.errors import UserError

_FORM = re.compile(r"--config((?:\.[^.\[\]]+|\[[^\[\]]+\])+)", re.DOTALL)
_KEY = re.compile(r"\.([^.\[\]]+)|\[([^\[\]]+)\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One override as given: `--config.stages[0].seq_len=64` has the keys ("stages", "0", "seq_len")."""

    flag: str
    keys: tuple[str, ...]
    text: str


def parse_overrides(flags: Sequence[str]) -> list[Change]:
    """Parses `--config.a.b=value` strings without looking up fields.

    `stages[0]` and `stages.0` are the same; a key with dots goes in brackets: `sources[my.source]`. Of several
    overrides of one field, the last counts.

    Raises:
        UserError: A string has another form, or a field comes before the group that another override replaces.
    """
    changes: dict[tuple[str, ...], Change] = {}
    previous = None
    for flag in flags:
        target, equals, text = flag.partition("=")
        form = _FORM.fullmatch(target)
        if not form or not equals:
            raise UserError(f"{flag}: an override is written --config.FIELD=VALUE, with the value after '='")
        keys = tuple(dotted or bracketed.strip("'\"") for dotted, bracketed in _KEY.findall(form[1]))
        change = Change(flag=flag, keys=keys, text=text)
        if previous is not None and previous.keys == keys and _are_files(previous.text, text):
            raise UserError(
                f"{previous.flag} and {flag}: quote the value if the shell expanded its braces, or keep one of them"
            )
        for other in changes:
            if len(other) > len(keys) and other[: len(keys)] == keys:
                raise UserError(f"{flag} replaces what {changes[other].flag} changes: give it first, or remove it")
        changes.pop(keys, None)
        changes[keys] = previous = change
    return list(changes.values())


def _are_files(a: str, b: str) -> bool:
    """Whether two values of one field are two files, as the shell makes them of a pattern with braces."""
    endings = [re.search(r"\.[a-z]\w*$", text) for text in (a, b)]
    return a != b and all(endings) and endings[0][0] == endings[1][0]  # type: ignore[index]


def override(config: Any, flags: Sequence[str]) -> Any:
    """A copy of the config with `--config.a.b=value` strings applied, typed by the annotations.

    New objects are created along each path: a dataclass used in two places changes in only one of them. Where a
    dataclass is wanted, the value names its class: `--config.optimizer=Muon`, `--config.data.sources.code=TextFiles`,
    `--config.data.sources.web.transforms[0]=MinLength`. Its fields can be set by further overrides.

    Raises:
        UserError: A field is unknown (the message has the nearest names) or a value is wrong (it has the expected
            type).
    """
    changes = parse_overrides(flags)
    for change in changes:
        given = {other.keys[-1]: other for other in changes if other.keys[:-1] == change.keys}
        config = _changed(config, type(config), change, "config", 0, config, given)
    return config


def check(config: Any) -> None:
    """Checks every value against its annotation, then calls every dataclass's `check()`, children before parents.

    Raises:
        UserError: The first problem, with its dotted path.
    """
    check_types(config)
    _check_rules(config, type(config), "config")


def check_types(value: Any, hint: Any = Any, path: str = "config") -> None:
    """Checks the values of a whole tree against the annotations.

    Raises:
        UserError: The first value that does not fit, with its dotted path.
    """
    fitting = [option for option in typed.options(hint) if typed.fits(value, option)]
    if not fitting:
        raise UserError(
            f"{path}={_shown(value)}: wants {typed.name(hint)}; this is {_kind(value)}{_advice(value, hint)}"
        )
    if typed.is_config(value):
        _check_stray(value, path)
    for option in fitting:
        try:
            for key, (child, child_hint) in typed.entries(value, option).items():
                if not isinstance(key, str):
                    raise UserError(f"{path}: the keys of a dict are strings; {key!r} is {_kind(key)}")
                check_types(child, child_hint, join(path, value, key))
            return
        except UserError:
            if option is fitting[-1]:
                raise


def leaves(value: Any, hint: Any = Any, path: str = "config") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, annotation, value) of every value that an override can set, in order."""
    below = typed.entries(value, hint)
    if not typed.is_group(value) or (not below and not typed.is_config(value)):
        yield path, hint, value
    for key, (child, child_hint) in below.items() if typed.is_group(value) else ():
        yield from leaves(child, child_hint, join(path, value, key))


def join(path: str, parent: Any, key: str) -> str:
    """The dotted path of an entry: config.stages[0], config.sources.web, config.sources[my.source]."""
    return f"{path}[{key}]" if isinstance(parent, tuple) or re.search(r"[.\[\]=\s]", key) else f"{path}.{key}"


def _changed(
    value: Any, hint: Any, change: Change, path: str, depth: int, root: Any, given: Mapping[str, Change]
) -> Any:
    """The value with the change applied at `change.keys[depth:]` below it. given: overrides of the fields below it."""
    if depth == len(change.keys):
        return _parsed(value, hint, change, given)
    key = change.keys[depth]
    if value is None:
        value = _default(hint, change, path)
    below = typed.entries(value, hint)
    if key not in below:
        added = typed.entry_hint(_dict_hint(hint)) if isinstance(value, dict) else None
        if isinstance(value, tuple) and key == str(len(value)):
            added = typed.element_hint(hint)
        if added is None or depth + 1 < len(change.keys):
            raise _unknown(value, change, path, key, root)
        below[key] = (None, added)
    child, child_hint = below[key]
    child = _changed(child, child_hint, change, join(path, value, key), depth + 1, root, given)
    if isinstance(value, tuple):
        return (*value[: int(key)], child, *value[int(key) + 1 :])
    return {**value, key: child} if isinstance(value, dict) else dataclasses.replace(value, **{key: child})


def _dict_hint(hint: Any) -> Any:
    return next((option for option in typed.options(hint) if typed.fits({}, option)), Any)


def _parsed(value: Any, hint: Any, change: Change, given: Mapping[str, Change]) -> Any:
    if hint is Any and value is not None and not typed.is_group(value):
        hint = type(value)
    with contextlib.suppress(ValueError):
        return typed.parse(change.text, hint)
    target = change.flag.partition("=")[0]
    known = {} if hint is Any else kinds.choices(value, lambda cls: typed.class_fits(cls, hint))
    cls = kinds.chosen(change.text, known)
    if cls is not None and typed.class_fits(cls, hint):
        return _made(cls, value, change, given)
    usage = f"; or choose {' or '.join(known)}" if known else ""
    if typed.is_group(value):
        keys = ", ".join(typed.entries(value, hint))
        below, advice = next(leaves(value, hint, target), (target, hint, None)), habits.advice(change.text)
        raise UserError(
            f"{change.flag}: {_kind(value)} cannot be written as text; set its entries, for example "
            f"{below[0]}={typed.example(below[1])} ({keys}){usage}" + (advice and f".{advice}")
        )
    example = typed.example(hint)
    fix = f", for example {target}={example}" if example else usage or "; set it in the config file"
    raise UserError(f"{change.flag}: wants {typed.name(hint)}{fix}")


def _made(cls: type, value: Any, change: Change, given: Mapping[str, Change]) -> Any:
    """An instance of a class that an override names.

    It keeps what the config sets in the value that it replaces: fields of the same name with another value than their
    default. Fields without a default come from the overrides below it.
    """
    fields, hints = dataclasses.fields(cls), typing.get_type_hints(cls)
    kept = {field.name: getattr(value, field.name) for field in _set_fields(value)}
    settings = {
        field.name: kept[field.name]
        for field in fields
        if field.name in kept and typed.fits(kept[field.name], hints[field.name])
    }
    for field in fields:
        if not _has_default(field) and field.name not in settings:
            target = change.flag.partition("=")[0]
            if field.name not in given:
                wanted = typed.example(hints[field.name]) or "VALUE"
                raise UserError(f"{change.flag}: a {cls.__name__} needs --{target[2:]}.{field.name}={wanted} too")
            settings[field.name] = _parsed(None, hints[field.name], given[field.name], {})
    return cls(**settings)


def _set_fields(value: Any) -> Iterator[dataclasses.Field]:
    """The fields of a dataclass whose values are not their defaults."""
    for field in dataclasses.fields(value) if typed.is_config(value) else ():
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if getattr(value, field.name) != made:
            yield field


def _default(hint: Any, change: Change, path: str) -> Any:
    """Overriding a field of an optional group that is None turns the group on, if all its fields have defaults."""
    if any(typing.get_origin(option) is dict for option in typed.options(hint)):
        return {}
    classes = [option for option in typed.options(hint) if dataclasses.is_dataclass(option)]
    if len(classes) == 1 and isinstance(classes[0], type):
        required = [field.name for field in dataclasses.fields(classes[0]) if not _has_default(field)]
        if not required:
            return classes[0]()
    raise UserError(f"{change.flag}: {path} is none and has no fields to set; give it a value in the config file")


def _has_default(field: dataclasses.Field) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _unknown(value: Any, change: Change, path: str, key: str, root: Any) -> UserError:
    """The error for an unknown key: the nearest names beside it, or the paths where the name exists."""
    below = list(typed.entries(value, Any))
    if not typed.is_config(value) and not isinstance(value, dict | tuple):
        return UserError(f"{change.flag}: {path} is {_kind(value)} and has no fields; override it with --{path}=VALUE")
    if isinstance(value, tuple):
        return UserError(f"{change.flag}: {path} has {len(below)} elements, numbered from 0; there is no [{key}]")
    near = [join(path, value, match) for match in difflib.get_close_matches(key, below)]
    if not near:
        # The same name somewhere else in the tree: --config.learning_rate for --config.optimizer.learning_rate.
        paths = [leaf for leaf, _, _ in leaves(root, type(root))]
        last = {leaf: re.split(r"[.\[]", leaf)[-1] for leaf in paths}
        close = difflib.get_close_matches(key, set(last.values()), n=1, cutoff=0.8)
        near = [leaf for leaf in paths if last[leaf] in close][:3]
    exact = any(re.split(r"[.\[]", match)[-1] == key for match in near)
    hint = f" Did you mean {' or '.join(f'--{match}' for match in near)}?" if near else ""
    hint += "" if exact else habits.advice(key)
    noun = "field" if typed.is_config(value) else "entry"
    return UserError(f"{change.flag}: {path} has no {noun} {key!r}.{hint} A{_kind(value)[1:]} has: {', '.join(below)}.")


def _check_stray(config: Any, path: str) -> None:
    """Rejects attributes that are not fields: a plain dataclass accepts any, so a typo would go unnoticed."""
    fields = [field.name for field in dataclasses.fields(config)]
    for attribute in getattr(config, "__dict__", {}):
        if attribute not in fields:
            near = difflib.get_close_matches(attribute, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(fields)}"
            raise UserError(f"{path}.{attribute}: {_kind(config)} has no field {attribute!r}{hint}")


def _check_rules(value: Any, hint: Any, path: str) -> None:
    for key, (child, child_hint) in typed.entries(value, hint).items():
        _check_rules(child, child_hint, join(path, value, key))
    rule = getattr(value, "check", None) if typed.is_config(value) else None
    if rule is None:
        return
    try:
        rule()
    except ValueError as error:
        # A message that starts with a field's name continues the path: "config.optimizer.learning_rate must be ...".
        first = re.match(r"\w*", str(error))
        separator = "." if first and first[0] in typed.entries(value, hint) else ": "
        raise UserError(f"{path}{separator}{error}") from error
    except Exception as error:
        error.add_note(f"in the check() of {path} ({type(value).__name__})")
        raise


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _advice(value: Any, hint: Any) -> str:
    """How to fix common mistakes in config files."""
    members = typed.options(hint)
    if isinstance(value, float) and not math.isfinite(value):
        return ": numbers have to be finite"
    if isinstance(value, float) and int in members and value.is_integer():
        return f": write {int(value):_}"
    if isinstance(value, list):
        return ": write a tuple, (a, b), or (a,) for one element"
    if isinstance(value, type):
        return f": write {value.__name__}(), an instance"
    if callable(value) and not typed.is_config(value):
        return ": a function has no fields to compare or keep; write a dataclass with __call__"
    if typed.is_config(value):
        for member in members:
            if Protocol in getattr(member, "__bases__", ()):
                return f" without {', '.join(typed.missing_members(value, member))}"
    return ""
