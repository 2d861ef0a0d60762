"""Loss spikes: found in the step, named by documents, and cut out.

The step compares its loss and gradient norm with those of the steps before it (`SpikeRule`), so it can skip its own
update. Only if they stand out it computes the loss of every token. The host then reads which documents the rows hold,
as `tools.inspect_stream --at_step` does (`SpikeWatch`).
"""

import collections
import dataclasses
import logging
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.data.pipeline import StepBatch
from jaxtrain.distributed.consensus import gather_json
from jaxtrain.interfaces import Json
from jaxtrain.plan import StepPlan

if TYPE_CHECKING:
    from jaxtrain.trainer.session import Session

NO_LOSS = -1.0  # of a token that has no target
_SIGMA = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
_LEAST_SPREAD = 0.01  # of the median: the losses of a run that hardly changes are not compared more finely
_DOCUMENT_THRESHOLD = 5.0  # a document of the step stands out above this many standard deviations
_LEAST_TOKENS = 16  # of a document in a step: the mean loss of fewer says little
_NAMED = 10  # documents in the log

logger = logging.getLogger("jaxtrain")


@dataclasses.dataclass(frozen=True)
class SpikeRule:
    """When a step is a spike.

    Attributes:
        window: W, how many steps before it are compared, of the same stage.
        threshold: Standard deviations above the median, estimated by the median absolute deviation.
        skips: Whether a spike's update is skipped.
    """

    window: int
    threshold: float
    skips: bool

    def applies(self, history_2W: jax.Array, values_2: jax.Array) -> jax.Array:
        """Whether one of the values stands out from at least W / 2 earlier ones. history: NaN where there is none."""
        median_21 = jnp.nanmedian(history_2W, axis=1, keepdims=True)
        deviation_2 = jnp.nanmedian(jnp.abs(history_2W - median_21), axis=1)
        median_2 = median_21[:, 0]
        spread_2 = jnp.maximum(_SIGMA * deviation_2, _LEAST_SPREAD * jnp.abs(median_2))
        enough_2 = 2 * jnp.isfinite(history_2W).sum(axis=1) >= self.window
        return (enough_2 & (values_2 > median_2 + self.threshold * spread_2)).any()

    def nothing(self) -> np.ndarray:
        """The history at the start of a stage."""
        return np.full((2, self.window), np.nan, np.float32)


@dataclasses.dataclass(frozen=True)
class _Taken:
    """A step that has been dispatched. states: Its lanes' positions before it."""

    at: StepPlan
    states: dict[int, np.ndarray]
    found: dict[str, jax.Array]


class SpikeWatch:
    """Follows the steps of a run on the host.

    Args:
        session: the run.
        rule: when a step is a spike.
        saved: `to_json` of the checkpoint to continue from; None without one.
        states: the lanes' positions at the start.
    """

    def __init__(self, session: "Session", rule: SpikeRule, saved: Json | None, states: dict[int, np.ndarray]):
        self._session, self._rule, self._states = session, rule, states
        history = np.array((saved or {}).get("history", []), np.float32)  # None becomes NaN
        self._history: Any = history if history.shape == rule.nothing().shape else rule.nothing()
        self._taken: collections.deque[_Taken] = collections.deque()

    def history(self, at: StepPlan) -> Any:
        """The step's input: loss and gradient norm of the steps before it, fp32 [2, W]."""
        if at.step == self._session.plan.stages[at.stage - 1].first_step:
            self._history = self._rule.nothing()
        return self._history

    def add(self, at: StepPlan, batch: StepBatch, found: dict[str, jax.Array]) -> None:
        """Takes what a step returned."""
        self._history = found["history"]
        self._taken.append(_Taken(at, self._states, found))
        self._states = batch.states

    def spikes(self, ahead: int) -> list[tuple[int, Json]]:
        """(step, description) of each spike that is not reported yet, except in the `ahead` steps dispatched last.

        All processes must call it at the same steps.
        """
        found = []
        while len(self._taken) > ahead:
            taken = self._taken.popleft()
            if bool(taken.found["spike"]):
                found.append((taken.at.step, self._describe(taken)))
        return found

    def to_json(self) -> Json:
        """The state after the last step, for a checkpoint."""
        rows = np.asarray(self._history).tolist()
        return {"history": [[value if math.isfinite(value) else None for value in row] for row in rows]}

    def _describe(self, taken: _Taken) -> Json:
        loss, norm = np.asarray(taken.found["values"]).tolist()
        losses_BT = multihost_utils.process_allgather(taken.found["losses"], tiled=True)
        here: dict[str, Json] = {}
        at, plan = taken.at, self._session.plan
        for row, index, spans in self._session.addresses(at.step, taken.states):
            reader, place = self._session.readers[index], 0
            for file, file_row, first, end in spans:
                part = losses_BT[row, place : place + end - first]
                part, place = part[part != NO_LOSS], place + end - first
                address = {"source": plan.source_names[index], "file": reader.source.files[file], "row": file_row}
                key = f"{row} {index} {file} {file_row}"
                here[key] = {**address, "sum": float(part.sum(dtype=np.float64)), "tokens": len(part)}
        # A lane whose rows several hosts hold is read by each of them; a document may be in several rows.
        documents: dict[tuple[str, str, int], Json] = {}
        for part in {key: part for host in gather_json(here) for key, part in host.items()}.values():
            document = documents.setdefault(_address(part), {**part, "sum": 0.0, "tokens": 0})
            document["sum"] += part["sum"]
            document["tokens"] += part["tokens"]
        named = [
            {**{name: part[name] for name in ("source", "file", "row", "tokens")}, "loss": part["sum"] / part["tokens"]}
            for part in documents.values()
            if part["tokens"]
        ]
        named.sort(key=lambda part: (_says_little(part), -_finite(part["loss"]), *_address(part)))
        return {"loss": loss, "grad_norm": norm, "standing_out": _standing_out(named), "documents": named}


def _address(document: Json) -> tuple[str, str, int]:
    return document["source"], document["file"], document["row"]


def _says_little(document: Json) -> bool:
    return document["tokens"] < _LEAST_TOKENS and math.isfinite(document["loss"])


def _standing_out(documents: list[Json]) -> int:
    """How many of the documents stand out from the others. Those that say little are last, the rest by falling loss."""
    losses = np.array([_finite(document["loss"]) for document in documents if not _says_little(document)])
    if not len(losses):
        return 0
    median = np.median(losses)
    spread = max(_SIGMA * np.median(np.abs(losses - median)), _LEAST_SPREAD * median)
    return int((losses > median + _DOCUMENT_THRESHOLD * spread).sum())


def _finite(loss: float) -> float:
    """The loss; a huge one if it is not finite."""
    return loss if math.isfinite(loss) else 1e30


def told(step: int, spike: Json, done: str) -> str:
    """A spike in the log. done: what is done about it."""
    documents, count = spike["documents"], spike["standing_out"]
    lines = [
        f"Step {step}: spike, Loss={spike['loss']:.4f}, gradient norm {spike['grad_norm']:.4g}; {count} of "
        f"{len(documents)} documents stand out; {done}"
    ]
    lines += [
        f"  loss {document['loss']:.4f} over {document['tokens']} tokens: source {document['source']}, "
        f"{document['file']} row {document['row']}"
        for document in documents[: min(count or _NAMED, _NAMED)]
    ]
    return "\n".join(lines)
