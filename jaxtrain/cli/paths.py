"""Default folders. Imports neither JAX nor the Hub's client, which reads its folders at import."""

import os
import pathlib
import sys

from jaxtrain.cli.redaction import redact


def default_workdir(spec: str) -> str:
    """runs/<config file>[-<arg>], with the credentials and the query of a URL in the argument removed."""
    path, _, argument = spec.partition(":")
    name, argument = pathlib.PurePath(path).stem, redact(argument).partition("?")[0]
    return os.path.join("runs", f"{name}-{argument}".replace("/", "_") if argument else name)


def keep_caches_in(workdir: str) -> None:
    """Puts the Hub client's caches into the work directory by default. A login is still found in its usual place.

    Off a terminal, the clients' progress bars would fill the log with their states.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if "HF_HOME" not in os.environ and "://" not in workdir:
        os.environ.setdefault("HF_TOKEN_PATH", os.path.expanduser("~/.cache/huggingface/token"))
        os.environ["HF_HOME"] = os.path.abspath(os.path.join(os.path.expanduser(workdir), "cache", "huggingface"))
