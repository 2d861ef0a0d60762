"""What a checkpoint records about data and model, and whether a config may resume from it."""

import re
from collections.abc import Sequence
from typing import Any

from jaxtrain import cli
from jaxtrain.config import Config
from jaxtrain.data import skipped_files
from jaxtrain.data.source_reader import SourceReader
from jaxtrain.distill import teacher
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Tokenizer
from jaxtrain.plan import Plan
from jaxtrain.tokenizers.identity import mismatch

# Changing one of these changes which tokens are trained on, or what the parameters mean.
FIXED = (
    "seed",
    "epochs",
    "data.num_lanes",
    "data.shuffle",
    "data.shuffle_window",
    "data.holdout",
    "data.document_mask",
    "data.add_bos",
    "model",
    f"optimizer.{cli.KIND}",
)
# How the model is computed, not what it is.
_FREE = ("model.remat", "model.scan_layers", "model.attention", "model.max_seq_len")


def identities(config: Config, readers: Sequence[SourceReader], tokenizer: Tokenizer, plan: Plan) -> Json:
    """What every checkpoint records besides the lanes' positions."""
    return {
        "sources": {reader.name: reader.identity for reader in readers},
        "tokenizer": tokenizer.identity,
        "teacher": None,
        "plan": plan.record(),
        "config": cli.to_json(config),
    }


def is_complete(saved: Json, config: Config, plan: Plan, step: int) -> bool:
    """Whether a checkpoint ends the run that this config describes.

    Opens no source, so that a complete run is complete even if its files have changed since.

    Args:
        saved: the checkpoint's data.
        step: the checkpoint's.
    """
    if step != plan.last_step and not saved["data_ended"]:
        return False
    changed = cli.differences(cli.complete(saved["config"]), cli.to_json(config))
    fixed = any(_is_fixed(path) or _is_below(path, ("data.sources", "tokenizer", "teacher")) for path, _, _ in changed)
    return not fixed and not plan.differences(saved["plan"], step)


def check(saved: Json, now: Json, plan: Plan, step: int) -> list[str]:
    """Refuses a resume that would change the data or the meaning of the parameters.

    Args:
        saved, now: `identities` of the checkpoint and of this run.
        step: the checkpoint's.

    Returns:
        The allowed differences, as lines for the log.

    Raises:
        UserError: with all other differences, both sides shown.
    """
    changed = cli.differences(cli.complete(saved["config"]), now["config"])
    refused = [row for row in changed if _is_fixed(row[0])]
    lines = [_table(refused, now["config"])] if refused else []
    different = mismatch(saved["tokenizer"], now["tokenizer"])
    if different is not None:
        lines.append(different)
    moved = plan.differences(saved["plan"], step)
    if moved:
        # The fields that make the plan say why: a stage ends elsewhere because of its own tokens or earlier ones.
        stages = [row for row in changed if _is_below(row[0], ("stages", "total_tokens", "steps"))]
        lines += [*moved, *(["In the config:", _table(stages, now["config"])] if stages else [])]
    given_up: list[str] = []
    # A source may come or go if the plan allows it; one that stays must be the same, but may skip more than before.
    for name in saved["sources"].keys() & now["sources"].keys():
        old, new = saved["sources"][name], now["sources"][name]
        lines += [
            f"source {name!r}: {field} was {_short(old.get(field))}, is now {_short(new.get(field))}"
            for field in sorted((old.keys() | new.keys()) - {"skips"})
            if old.get(field) != new.get(field)
        ]
        more, taken_back = skipped_files.compare(name, old["skips"], new["skips"])
        given_up += more
        lines += taken_back
    if lines:
        raise UserError(
            f"the checkpoint of step {step} was trained with another config, and going on with this one would not be "
            "the same run:\n"
            + "\n".join(lines)
            + "\nSet these back; or start a new run in another --workdir (--config.init_from= keeps the parameters)."
        )
    allowed = [row for row in changed if not _is_fixed(row[0])]
    return [*(_table(allowed, now["config"]).splitlines() if allowed else []), *given_up]


def _table(rows: Sequence[tuple[str, Any, Any]], config: Json) -> str:
    """Differences of two configs as lines; an entry of `stages` with the stage's number, from 1, and name."""

    def named(path: str) -> str:
        found = re.match(r"stages\[(\d+)\]", path)
        if not found or (index := int(found[1])) >= len(config["stages"]):
            return path
        return f"{path} (stage {index + 1}, {config['stages'][index]['name']})"

    return cli.format_differences([(named(path), old, new) for path, old, new in rows])


def check_teacher(saved: Json | None, now: Json | None, step: int) -> None:
    """Raises UserError, with both sides, if the teacher is not the one that the checkpoint of `step` records."""
    different = teacher.mismatch(saved, now)
    if different is not None:
        raise UserError(
            f"the checkpoint of step {step} was trained with another teacher, and going on with this one would not be "
            f"the same run:\n{different}\nSet it back (for one of the Hub its `revision`, for a work directory the "
            "step's folder); or start a new run in another --workdir (--config.init_from= keeps the parameters)."
        )


def _is_fixed(path: str) -> bool:
    return _is_below(path, FIXED) and not _is_below(path, _FREE)


def _is_below(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith((prefix + ".", prefix + "[")) for prefix in prefixes)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
