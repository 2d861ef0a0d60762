"""Files that tools write their answers to."""

import json
import pathlib

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json


def write_json(path: str, answer: Json) -> None:
    """What `--json=FILE` asks for. Raises UserError where it cannot be written."""
    try:
        pathlib.Path(path).write_text(json.dumps(answer, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json={path} cannot be written: {error}") from error
