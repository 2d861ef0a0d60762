"""Loss spikes: found in the step, named by documents, and cut out.

Every run compares each step's loss and gradient norm with those of the steps before it (`SpikeRule`). Without
`spike_threshold` the host does, some steps later and at no cost to the step. With it the step does, so it can skip its
own update, and computes the loss of every token if it stands out. The host then reads which documents the rows hold, as
`tools.inspect_stream --at_step` does (`SpikeWatch`).
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
THRESHOLD = 10.0  # of the host's comparison
_AT_ONCE = 16  # steps that the host compares together, to wait for their values once
_READ_AGAIN = 10  # spikes found by the host whose documents are read again; a run that diverges has many
_SIGMA = 1.4826  # standard deviations of a normal distribution in its median absolute deviation
_LEAST_SPREAD = 0.01  # of the median: the losses of a run that hardly changes are not compared more finely
_DOCUMENT_THRESHOLD = 5.0  # a document of the step stands out above this many standard deviations
_PRIOR_TOKENS = 16  # a mean loss over so many tokens counts half
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

    def usual(self, values_W: np.ndarray) -> tuple[float, float] | None:
        """The median of loss or gradient norm, and what is a spike above it; None if too few are known (finite)."""
        known = values_W[np.isfinite(values_W)].astype(np.float64)
        if 2 * len(known) < self.window:
            return None
        median = float(np.median(known))
        spread = max(_SIGMA * np.median(np.abs(known - median)), _LEAST_SPREAD * abs(median))
        return median, median + self.threshold * float(spread)

    def applies_on_host(self, history_2W: np.ndarray, values_2: np.ndarray) -> bool:
        """`applies` in NumPy, or whether a value is not finite."""
        found = zip(map(self.usual, history_2W), values_2, strict=True)
        return not np.isfinite(values_2).all() or any(usual is not None and value > usual[1] for usual, value in found)

    def nothing(self) -> np.ndarray:
        """The history at the start of a stage."""
        return np.full((2, self.window), np.nan, np.float32)


@dataclasses.dataclass(frozen=True)
class _Taken:
    """A step that has been dispatched.

    Attributes:
        states: Its lanes' positions before it.
        values: Its loss and gradient norm.
        found: What a step that compares itself returned.
    """

    at: StepPlan
    states: dict[int, np.ndarray]
    values: tuple[jax.Array, jax.Array]
    found: dict[str, jax.Array] | None


class SpikeWatch:
    """Follows the steps of a run on the host.

    Args:
        session: the run.
        rule: when a step is a spike.
        in_step: whether the step compares itself.
        saved: `to_json` of the checkpoint to continue from; None without one.
        states: the lanes' positions at the start.
    """

    def __init__(
        self, session: "Session", rule: SpikeRule, in_step: bool, saved: Json | None, states: dict[int, np.ndarray]
    ):
        self._session, self._rule, self._in_step, self._states = session, rule, in_step, states
        history = np.array((saved or {}).get("history", []), np.float32)  # None becomes NaN
        self._history: Any = history if history.shape == rule.nothing().shape else rule.nothing()
        self._taken: collections.deque[_Taken] = collections.deque()
        self._read_again = 0

    def inputs(self, at: StepPlan) -> dict[str, Any]:
        """The step's inputs by name: `history`, see `train_step`, if it compares itself."""
        if self._in_step and self._begins(at):
            self._history = self._rule.nothing()
        return {"history": self._history} if self._in_step else {}

    def _begins(self, at: StepPlan) -> bool:
        return at.step == self._session.plan.stages[at.stage - 1].first_step

    def add(
        self, at: StepPlan, batch: StepBatch, metrics: dict[str, jax.Array], found: dict[str, jax.Array] | None = None
    ) -> None:
        """Takes what a step returned."""
        if found is not None:
            self._history = found["history"]
        self._taken.append(_Taken(at, self._states, (metrics["loss"], metrics["grad_norm"]), found))
        self._states = batch.states

    def spikes(self, ahead: int) -> list[tuple[int, Json]]:
        """(step, description) of each spike that is not reported yet, except in the `ahead` steps dispatched last.

        The host's own comparison may leave more steps for later unless `ahead` is 0. All processes must call it at the
        same steps.
        """
        if not self._in_step and ahead and len(self._taken) < ahead + _AT_ONCE:
            return []
        taken = [self._taken.popleft() for _ in range(len(self._taken) - ahead)]
        compared = [one.values if one.found is None else one.found["spike"] for one in taken]
        is_spike = self._compare if not self._in_step else lambda at, spike: bool(spike)
        return [
            (one.at.step, self._describe(one))
            for one, value in zip(taken, jax.device_get(compared), strict=True)
            if is_spike(one.at, value)
        ]

    def _compare(self, at: StepPlan, values: Any) -> bool:
        """Compares a step on the host."""
        if self._begins(at):
            self._history = self._rule.nothing()
        values_2 = np.array(values, np.float32)
        if not values_2.any():  # no token has a loss
            return False
        spike = self._rule.applies_on_host(self._history, values_2)
        added_21 = np.where(np.isfinite(values_2).all(), values_2, np.nan)[:, None]
        self._history = np.concatenate([self._history[:, 1:], added_21], axis=1)
        return spike

    def to_json(self) -> Json:
        """The state after the last step, for a checkpoint; all steps are reported."""
        rows = np.asarray(self._history).tolist()
        return {"history": [[value if math.isfinite(value) else None for value in row] for row in rows]}

    def _describe(self, taken: _Taken) -> Json:
        loss, norm = map(float, jax.device_get(taken.values))
        if taken.found is None and self._read_again == _READ_AGAIN:
            return {"loss": loss, "grad_norm": norm, "standing_out": 0, "documents": []}
        self._read_again += 1
        losses_BT = None
        if taken.found is not None:
            losses_BT = multihost_utils.process_allgather(taken.found["losses"], tiled=True)
        here = self._parts(taken, losses_BT)
        # A lane whose rows several hosts hold is read by each of them; a document may be in several rows.
        documents: dict[tuple[str, str, int], Json] = {}
        for part in {key: part for host in gather_json(here) for key, part in host.items()}.values():
            document = documents.setdefault(_address(part), {**part, "sum": 0.0, "tokens": 0})
            document["sum"] += part["sum"]
            document["tokens"] += part["tokens"]
        named = [
            {name: part[name] for name in ("source", "file", "row", "tokens")}
            | ({} if losses_BT is None else {"loss": part["sum"] / part["tokens"]})
            for part in documents.values()
            if part["tokens"]
        ]
        standing_out = 0
        if taken.found is not None and named:
            # A distilled step's loss is not the documents' cross-entropy.
            alone = self._session.components.distilled is None
            usual = self._rule.usual(np.asarray(taken.found["history"])[0, :-1]) if alone else None
            named, standing_out = _ranked(named, usual)
        return {"loss": loss, "grad_norm": norm, "standing_out": standing_out, "documents": named}

    def _parts(self, taken: _Taken, losses_BT: np.ndarray | None) -> dict[str, Json]:
        """The parts of documents in this host's rows by a unique name: tokens, and their summed loss (0 without)."""
        found: dict[str, Json] = {}
        at, plan = taken.at, self._session.plan
        try:
            addresses = self._session.addresses(at.step, taken.states)
        except Exception as error:
            if losses_BT is not None:
                raise
            # Nothing depends on it.
            logger.warning("The documents of step %d could not be read again: %s", at.step, error)
            return {}
        for row, index, spans in addresses:
            reader, place = self._session.readers[index], 0
            for file, file_row, first, end in spans:
                part = np.zeros(end - first) if losses_BT is None else losses_BT[row, place : place + end - first]
                part = part[part != NO_LOSS]
                address = {"source": plan.source_names[index], "file": reader.source.files[file], "row": file_row}
                key, place = f"{row} {place}", place + end - first
                found[key] = {**address, "sum": float(part.sum(dtype=np.float64)), "tokens": len(part)}
        return found


def _address(document: Json) -> tuple[str, str, int]:
    return document["source"], document["file"], document["row"]


def _ranked(documents: list[Json], usual: tuple[float, float] | None) -> tuple[list[Json], int]:
    """Sorts documents by how far they stand out, and counts those that do.

    The mean loss of few tokens says little, so each shrinks toward the usual loss as if _PRIOR_TOKENS more had that.
    Those stand out, at most half, without which the step's loss is no spike, and those almost as far out. If the
    gradient norm alone is one: those whose loss is far above the other documents' and above the usual.

    Args:
        documents: at least one, each with its mean `loss` and its `tokens`.
        usual: the median of the steps' losses, and above what a loss is a spike; None if they are not known.
    """
    documents = sorted(documents, key=_address)
    losses = np.array([_finite(document["loss"]) for document in documents])
    tokens = np.array([document["tokens"] for document in documents])
    median, limit = usual or (float(np.median(losses)), math.inf)
    shrunk = median + (losses - median) * tokens / (tokens + _PRIOR_TOKENS)
    order = np.argsort(-shrunk, kind="stable")
    shrunk, tokens, sums = shrunk[order], tokens[order], (losses * tokens)[order]
    # The mean loss without the first k documents, for each k.
    without = [float(sums[k:].sum() / max(tokens[k:].sum(), 1)) for k in range(len(order) + 1)]
    needed = next((k for k, mean in enumerate(without) if mean <= limit), 0)
    needed = 0 if 2 * needed > len(order) else needed
    middle = np.median(shrunk)
    spread = max(_SIGMA * np.median(np.abs(shrunk - middle)), _LEAST_SPREAD * abs(middle))
    # While the loss falls fast, a spike for a step is too much to ask.
    least = max(middle + _DOCUMENT_THRESHOLD * spread, min(limit, 1.5 * median) if usual else -math.inf)
    if needed:
        least = max(least, (median + shrunk[needed - 1]) / 2)
    return [documents[at] for at in order], max(needed, int((shrunk > least).sum()))


def _finite(loss: float) -> float:
    """The loss; a huge one if it is not finite."""
    return loss if math.isfinite(loss) else 1e30


def told(step: int, spike: Json, done: str) -> str:
    """A spike in the log. done: what is done about it."""
    documents, count = spike["documents"], spike["standing_out"]
    what = f"Step {step}: spike, Loss={spike['loss']:.4f}, gradient norm {spike['grad_norm']:.4g}"
    if not documents:
        return f"{what}; tools.inspect_stream --at_step={step} lists its documents; {done}"
    if "loss" not in documents[0]:
        return (
            f"{what}; its {len(documents)} documents are in spikes.jsonl, with the loss of each from "
            f"--config.spike_threshold={THRESHOLD:g} on; {done}"
        )
    lines = [f"{what}; {count} of {len(documents)} documents stand out; {done}"]
    lines += [
        f"  loss {document['loss']:.4f} over {document['tokens']} tokens: source {document['source']}, "
        f"{document['file']} row {document['row']}"
        for document in documents[: min(count or _NAMED, _NAMED)]
    ]
    return "\n".join(lines)
