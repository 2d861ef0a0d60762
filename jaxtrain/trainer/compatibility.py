"""What a checkpoint records about data and model, and the check whether a config may resume from it."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from jaxtrain import cli
from jaxtrain.config import Config
from jaxtrain.data import forgotten as forgotten_lists
from jaxtrain.data import skipped_files
from jaxtrain.data.forgotten import Forgotten
from jaxtrain.data.source_reader import SourceReader
from jaxtrain.distill import teacher
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Tokenizer
from jaxtrain.plan import Plan
from jaxtrain.tokenizers.identity import mismatch

# Changing one of these changes the tokens trained on or the meaning of the parameters.
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
# Fields that affect how the model or the ids are computed, not what they are.
_FREE = ("model.remat", "model.scan_layers", "model.attention", "model.max_seq_len", "tokenizer.engine")


def settled(config: Config, saved: Json | None) -> Config:
    """The config of a resume, with what it leaves open as in the checkpoint.

    That is a shuffle window, if the checkpoint had one set; and how the step is computed, if the checkpoint is from
    before the trainer chose that (tuning.py).
    """
    if saved is None:
        return config
    then: Any = cli.complete(saved["config"])
    window = then["data"]["shuffle_window"]
    if config.data.shuffle_window is None and window is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, shuffle_window=window))
    if saved.get("programs") is None:
        model, loss = _as_then(config.model, then["model"]), _as_then(config.loss, then["loss"])
        tokens = config.micro_batch_tokens or then["micro_batch_tokens"]
        config = dataclasses.replace(config, model=model, loss=loss, micro_batch_tokens=tokens)
    return config


def _as_then(part: Any, then: Json) -> Any:
    """A component's config with what it leaves to the trainer as in a record."""
    fields = (("remat", "auto"), ("scan_layers", None), ("chunk_tokens", None))
    then = {name: then[name] for name, unset in fields if getattr(part, name, ()) == unset and name in then}
    return dataclasses.replace(part, **then)


def identities(
    config: Config, readers: Sequence[SourceReader], tokenizer: Tokenizer, plan: Plan, forgotten: Forgotten
) -> Json:
    """Returns what every checkpoint records besides the lanes' positions."""
    return {
        "sources": {reader.name: reader.identity for reader in readers},
        "tokenizer": tokenizer.identity,
        "teacher": None,
        "plan": plan.record(),
        "config": cli.to_json(config),
        "forgotten": forgotten.to_json(),
    }


def is_complete(saved: Json, config: Config, plan: Plan, step: int) -> bool:
    """Whether a checkpoint is the end of this config's run.

    Opens no source, so a complete run is recognized even if its files have changed since.

    Args:
        saved: the checkpoint's data state.
        config: the config of this run.
        plan: the plan of this run.
        step: the checkpoint's step.
    """
    if step != plan.last_step and not saved["data_ended"]:
        return False
    changed = cli.differences(cli.complete(saved["config"]), cli.to_json(config))
    decisive = (*FIXED, "data.sources", "tokenizer", "teacher")
    fixed = any(_is_below(path, decisive) and not _is_below(path, _FREE) for path, _, _ in changed)
    return not fixed and not plan.differences(saved["plan"], step)


def check(saved: Json, now: Json, plan: Plan, step: int) -> list[str]:
    """Refuses a resume that would change the data or the meaning of the parameters.

    Args:
        saved: `identities` of the checkpoint.
        now: `identities` of this run.
        plan: the plan of this run.
        step: the checkpoint's step.

    Returns:
        The allowed differences, as lines for the log.

    Raises:
        UserError: there are other differences; the message shows both sides of each.
    """
    changed = cli.differences(cli.complete(saved["config"]), now["config"])
    refused = [row for row in changed if _is_fixed(row[0])]
    lines = [_table(refused, now["config"])] if refused else []
    different = mismatch(saved["tokenizer"], now["tokenizer"])
    if different is not None:
        lines.append(different)
    moved = plan.differences(saved["plan"], step)
    if moved:
        # Show the fields that explain the plan: a stage ends elsewhere because its tokens or earlier ones changed.
        stages = [row for row in changed if _is_below(row[0], ("stages", "total_tokens", "steps"))]
        lines += [*moved, *(["In the config:", _table(stages, now["config"])] if stages else [])]
    given_up: list[str] = []
    # The plan decides if a source may be added or removed. One that stays must be the same, but may skip more rows.
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
    old, new = (forgotten_lists.from_json(one.get("forgotten", {"documents": {}}), step) for one in (saved, now))
    lines += forgotten_lists.compare(old, new, step)
    if lines:
        raise UserError(
            f"the checkpoint of step {step} was trained with another config, and continuing with this one would not "
            "be the same run:\n"
            + "\n".join(lines)
            + "\nSet these back; or start a new run in another --workdir (--config.init_from= keeps the parameters)."
        )
    allowed = [row for row in changed if not _is_fixed(row[0])]
    return [*(_table(allowed, now["config"]).splitlines() if allowed else []), *given_up]


def _table(rows: Sequence[tuple[str, Any, Any]], config: Json) -> str:
    """Formats differences of two configs. Entries of `stages` show the stage's number, from 1, and its name."""

    def named(path: str) -> str:
        found = re.match(r"stages\[(\d+)\]", path)
        if not found or (index := int(found[1])) >= len(config["stages"]):
            return path
        return f"{path} (stage {index + 1}, {config['stages'][index]['name']})"

    return cli.format_differences([(named(path), old, new) for path, old, new in rows])


def check_teacher(saved: Json | None, now: Json | None, step: int) -> None:
    """Raises UserError if the teacher differs from the one recorded in the checkpoint of `step`."""
    different = teacher.mismatch(saved, now)
    if different is not None:
        raise UserError(
            f"the checkpoint of step {step} was trained with another teacher, and continuing with this one would not "
            f"be the same run:\n{different}\nSet it back (a Hub model's `revision`, a work directory's step folder); "
            "or start a new run in another --workdir (--config.init_from= keeps the parameters)."
        )


def _is_fixed(path: str) -> bool:
    return _is_below(path, FIXED) and not _is_below(path, _FREE)


def _is_below(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith((prefix + ".", prefix + "[")) for prefix in prefixes)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
