"""Command lines: `--config=FILE[:ARG]`, `--config.FIELD=VALUE` and a command's own typed flags."""

import dataclasses
import difflib
import errno
import importlib
import json
import os
import re
import shutil
import sys
import textwrap
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags as absl_flags

from jaxtrain.cli import files, habits, output, record, tree, typed
from jaxtrain.cli.redaction import redact
from jaxtrain.errors import CorruptError, TransientError, UserError

REQUIRED = object()
# What the operating system refuses, and the user has to change.
_REFUSALS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag of one command: `--name=VALUE`, or, if positional, a bare VALUE.

    Attributes:
        name: Also the attribute of `Flags`.
        type: An annotation of scalars and tuples, as in configs; Literal["a", "b"] is a choice. A bool needs only
            `--name`. A positional tuple[str, ...] takes all bare values.
        help: One sentence.
        default: The value without the flag. REQUIRED makes the flag mandatory.
        positional: Whether it is a bare value.
    """

    name: str
    type: Any = str
    help: str
    default: Any = REQUIRED
    positional: bool = False


# For commands that take only a work directory: they never import the modules it names without this flag.
IMPORT = Flag(
    name="import",
    type=tuple[str, ...],
    default=(),
    help="comma-separated modules that define components of the run outside jaxtrain",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What `--help` shows and `parse_flags` accepts.

    Attributes:
        name: The command as typed, for example "python -m tools.report".
        description: What it does, for `--help`.
        examples: Complete command lines.
        flags: Its own flags.
        config: "required", "optional" or "none": whether `--config=FILE` must, may or cannot be given. "optional" also
            allows overrides, for commands that take the config from a work directory.
        resumes: Whether rerunning the same command after Ctrl-C continues from there.
    """

    name: str
    description: str
    examples: tuple[str, ...]
    flags: tuple[Flag, ...] = ()
    config: str = "required"
    resumes: bool = False


class Flags(types.SimpleNamespace):
    """The parsed command line: `config` (the spec or None), `overrides`, and an attribute for each flag."""

    config: str | None
    overrides: tuple[str, ...]

    def load_config(self) -> Any:
        """The config that the command line describes.

        Raises:
            UserError: It cannot be loaded, or is invalid.
        """
        assert self.config is not None, "only for commands whose config is required, or after checking flags.config"
        return files.load(self.config, self.overrides)


def parse_flags(command: Command, argv: Sequence[str]) -> Flags:
    """Parses the arguments. Flags cannot be abbreviated, and nothing is ignored.

    `--help` prints and raises SystemExit(0). With `--config=FILE` it also lists all fields of the config.

    Args:
        command: The command's flags.
        argv: The arguments, without the program's name.

    Returns:
        The parsed flags.

    Raises:
        UserError: An unknown flag, a wrong or missing value, two values for one flag, or a leftover argument.
    """
    known = {flag.name: flag for flag in command.flags if not flag.positional}
    if command.config != "none":
        known["config"] = Flag(name="config", help="the config file")
    raw: dict[str, str] = {}
    overrides: list[str] = []
    bare: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if command.config != "none" and argument.startswith(("--config.", "--config[")):
            overrides.append(argument)
        elif argument in ("-h", "--help"):
            raw["help"] = "true"
        elif argument.startswith("--"):
            name, equals, text = argument[2:].partition("=")
            if name == "help":
                with_file = "" if command.config == "none" else "; with --config=FILE it lists the config's fields too"
                raise UserError(f"{argument}: --help takes no value{with_file}")
            if name not in known:
                raise UserError(f"{argument}: {command.name} has no flag --{name}.{_near(name, known, command)}")
            if not equals:
                text = "true" if known[name].type is bool else _next_value(argument, arguments)
            if raw.setdefault(name, text) != text:
                quote = ": quote the value if the shell expanded its braces, or" if "}" not in text + raw[name] else ";"
                raise UserError(
                    f"--{name}={raw[name]} and --{name}={text} contradict each other{quote} keep one of them"
                )
        elif argument.startswith("-") and len(argument) > 1:
            raise UserError(f"{argument}: flags start with two dashes; did you mean -{argument}?")
        else:
            bare.append(argument)
    if "help" in raw:
        print(help_text(command))
        if "config" in raw:
            print(_fields_text(files.load(raw["config"], overrides)))
        raise SystemExit(0)
    tree.parse_overrides(overrides)  # checks their form; their fields need the file
    values = {flag.name: _value(flag, raw, command) for flag in command.flags if not flag.positional}
    values |= _positional_values(command, bare)
    if command.config == "required" and "config" not in raw:
        raise UserError(f"--config=FILE is missing, for example: {command.examples[0]}")
    for module in values.get(IMPORT.name, ()):
        try:
            importlib.import_module(module)
        except Exception as error:
            raise UserError(f"--import={module}: {type(error).__name__}: {error}") from error
    return Flags(config=raw.get("config"), overrides=tuple(overrides), **values)


def run(main: Callable[[Flags], int | None], command: Command, argv: Sequence[str] | None = None) -> NoReturn:
    """Parses the command line, calls `main` and exits with the code it returns (None is 0).

    A UserError becomes one message and exit code 2, and so does a path or disk that refuses. Ctrl-C becomes a message
    and 75 if the command resumes, else 130 as in shells. Other exceptions propagate: Python prints the traceback and
    exits with 1.

    Args:
        main: The command.
        command: Its flags.
        argv: The arguments, by default those of the process.
    """
    # Grain's worker processes read absl flags, which absl refuses before they are parsed. We define none.
    absl_flags.FLAGS.mark_as_parsed()
    output.protect()
    if os.environ.get("HF_HOME") == "":  # the Hub's client would keep its files in the current directory
        del os.environ["HF_HOME"]
    try:
        code = main(parse_flags(command, sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print(redact("\n".join([f"error: {error}", *getattr(error, "__notes__", ())])), file=sys.stderr)
        code = 2
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        where = f": {error.filename!r}" if error.filename else ""
        fix = "Check the path, its permissions and the space on the disk"
        print(redact(f"error: {os.strerror(error.errno)}{where}. {fix}."), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        kept = (
            ". Finished work is kept: run the same command again to resume." if command.resumes else " before the end."
        )
        print(f"\nStopped{kept}", file=sys.stderr)
        code = 75 if command.resumes else 130
    sys.exit(code or 0)


def exit_code(main: Callable[[Flags], int | None], command: Command, argv: Sequence[str] | None = None) -> int:
    """Like `run`, but returns the code, and reports outages and damaged files as one message and code 1."""
    try:
        run(main, command, argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except (TransientError, CorruptError, FloatingPointError) as error:
        # The message says what happened and where; a traceback would not help.
        print(redact(f"error: {error}"), file=sys.stderr)
        if isinstance(error, TransientError):
            print("Run the same command again once that is resolved.", file=sys.stderr)
        return 1
    except BaseException:
        print(redact(traceback.format_exc()), file=sys.stderr)
        return 1


def leave(code: int) -> NoReturn:
    """Ends the process at once. The interpreter would wait for reader threads, which may wait on a dead network."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def help_text(command: Command) -> str:
    """The text of `--help`."""
    rows = [(_form(flag), flag.help + _default_text(flag)) for flag in command.flags]
    if command.config != "none":
        rows.insert(0, ("--config.FIELD=VALUE", "changes a field of the config; --config=FILE --help lists them"))
        rows.insert(0, ("--config=FILE[:ARG]", "a Python file whose get_config(ARG) returns the config"))
    rows.append(("--help", "prints this"))
    column = max(len(form) for form, _ in rows) + 4
    width = min(shutil.get_terminal_size().columns, 120)
    lines = [
        textwrap.fill(text, width, initial_indent=f"  {form}".ljust(column), subsequent_indent=" " * column)
        for form, text in rows
    ]
    examples = [f"  {example}" for example in command.examples]
    required = [_form(flag) for flag in command.flags if flag.default is REQUIRED]
    required[:0] = ["--config=FILE[:ARG]"] if command.config == "required" else []
    usage = " ".join(["usage:", command.name, *required, "[flags]"])
    return "\n".join(
        [usage, "", textwrap.fill(command.description, width), "", "examples:", *examples, "", "flags:", *lines]
    )


def _next_value(argument: str, arguments: Iterator[str]) -> str:
    text = next(arguments, None)
    if text is None or text.startswith("--"):
        raise UserError(f"{argument} has no value: write {argument}=VALUE")
    return text


def _near(name: str, known: dict[str, Flag], command: Command) -> str:
    field = f" A field of the config is set by --config.{name}=VALUE." if "." in name else ""
    if command.config != "none" and (advice := habits.advice(name)):
        return advice + field
    near = difflib.get_close_matches(name, [*known, "help"])
    if near:
        return f" Did you mean {' or '.join(f'--{match}' for match in near)}?"
    return f" It has --{', --'.join([*known, 'help'])}.{field}"


def _value(flag: Flag, raw: dict[str, str], command: Command) -> Any:
    if flag.name not in raw:
        if flag.default is REQUIRED:
            raise UserError(f"--{flag.name} is missing ({flag.help}), for example: {command.examples[0]}")
        return flag.default
    return _parsed(flag, raw[flag.name], f"--{flag.name}={raw[flag.name]}")


def _parsed(flag: Flag, text: str, shown: str) -> Any:
    try:
        return typed.parse(text, flag.type)
    except ValueError:
        raise UserError(
            f"{shown}: {flag.name} wants {typed.name(flag.type)}, for example {typed.example(flag.type)}"
        ) from None


def _positional_values(command: Command, bare: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for flag in command.flags:
        if not flag.positional:
            continue
        if not bare:
            if flag.default is REQUIRED:
                raise UserError(f"{flag.name.upper()} is missing ({flag.help}), for example: {command.examples[0]}")
            values[flag.name] = flag.default
        elif typed.name(flag.type).startswith("tuple"):
            values[flag.name], bare = tuple(bare), []
        else:
            values[flag.name], bare = _parsed(flag, bare[0], bare[0]), bare[1:]
    if bare:
        fix = f"; for example: {command.examples[0]}"
        if "=" in bare[0]:
            name = bare[0].partition("=")[0]
            is_flag = command.config == "none" or name == "config" or any(flag.name == name for flag in command.flags)
            is_field = not is_flag and not name.startswith(("config.", "config["))
            fix = f"; did you mean --{'config.' if is_field else ''}{bare[0]}?"
            advice = habits.advice(name) if is_field else ""
            if f"--config.{name}=" not in advice:
                fix = f".{advice}" if advice else fix
        elif command.config != "none" and bare[0].endswith((".yaml", ".yml", ".toml", ".gin")):
            fix = "; a config is a Python file, given as --config=FILE.py, for example --config=configs/1b.py"
        elif os.path.exists(bare[0]):
            fix = "; quote a pattern, so that the shell does not replace it by the files that match"
        raise UserError(f"{' '.join(bare)}: not understood; {command.name} takes flags of the form --NAME=VALUE{fix}")
    return values


def _form(flag: Flag) -> str:
    if flag.positional:
        return f"{flag.name.upper()}..." if typed.name(flag.type).startswith("tuple") else flag.name.upper()
    if flag.type is bool:
        return f"--{flag.name}"
    kinds = [kind for kind in typed.options(flag.type) if kind is not type(None)]
    if all(typing.get_origin(kind) is typing.Literal for kind in kinds):
        return f"--{flag.name}={'|'.join(str(choice) for kind in kinds for choice in typing.get_args(kind))}"
    return f"--{flag.name}={'N' if kinds[0] in (int, float) else flag.name.upper()}"


def _default_text(flag: Flag) -> str:
    hidden = any(flag.default is value for value in (REQUIRED, None, False, ()))
    return "" if hidden else f" (default: {flag.default})"


def _fields_text(config: Any) -> str:
    rows = [
        (f"--{path}", typed.name(hint), json.dumps(record.public(re.split(r"[.\[]", path)[-1], value)))
        for path, hint, value in tree.leaves(config, type(config))
    ]
    paths, kinds = (max(len(row[column]) for row in rows) for column in (0, 1))
    lines = [f"  {path:<{paths}}  {kind:<{kinds}}  {value}" for path, kind, value in rows]
    return "\n".join(["", "fields of the config (flag, type, value):", *lines])
