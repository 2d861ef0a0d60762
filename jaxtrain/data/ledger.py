"""The positions of all lanes, gathered from the hosts, for checkpoints and for each source's totals."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.data.lanes import STATE_FIELDS
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.plan import Plan, StagePlan

FORMAT = 1
_FIELDS_V0_1 = STATE_FIELDS.index("ended") + 1  # the first fields, all that version 0.1 had
_COUNTED = ("tokens", "unique_tokens", "documents", "epoch")


def gather(states: Mapping[int, np.ndarray], num_lanes: int) -> np.ndarray:
    """Gathers the states of all lanes from all hosts. Collective: every process must call it.

    Args:
        states: This host's lanes: lane → int64 [S, F].
        num_lanes: V, the number of lanes of the run.

    Returns:
        int64 [V, S, F].
    """
    lanes_N = np.array(sorted(states), np.int64)
    states_NSF = np.stack([states[lane] for lane in lanes_N.tolist()])
    if jax.process_count() > 1:
        # Each host sends only its own lanes, padded to the largest count of any host. If 4,096 hosts each sent a table
        # of 16,384 lanes and 3 sources, every host would receive 16 GB.
        most = int(np.max(multihost_utils.process_allgather(np.array([len(lanes_N)], np.uint32))))
        mine = np.full((most, 1 + states_NSF[0].size), -1, np.int64)
        mine[: len(lanes_N), 0] = lanes_N
        mine[: len(lanes_N), 1:] = states_NSF.reshape(len(lanes_N), -1)
        # As pairs of uint32: without x64 mode the gather silently truncates int64 to 32 bits.
        pairs = multihost_utils.process_allgather(mine.view(np.uint32))
        found = np.ascontiguousarray(pairs).view(np.int64).reshape(-1, mine.shape[1])
        found = found[found[:, 0] >= 0]
        lanes_N, states_NSF = found[:, 0], found[:, 1:].reshape(-1, *states_NSF.shape[1:])
    return join(lanes_N, states_NSF, num_lanes)


def join(lanes_N: np.ndarray, states_NSF: np.ndarray, num_lanes: int) -> np.ndarray:
    """Sorts gathered states by lane: int64 [V, S, F]. Asserts that every lane is present and its copies agree."""
    states_VSF = np.zeros((num_lanes, *states_NSF.shape[1:]), np.int64)
    states_VSF[lanes_N] = states_NSF
    missing = np.setdiff1d(np.arange(num_lanes), lanes_N)
    assert not len(missing), f"no host reads lanes {missing}"
    agree = (states_VSF[lanes_N] == states_NSF).all(axis=(1, 2))
    assert agree.all(), f"hosts disagree on lanes {np.unique(lanes_N[~agree])}"
    return states_VSF


def to_json(states_VSF: np.ndarray, source_names: Sequence[str]) -> Json:
    """The states of all lanes, for a checkpoint."""
    return {
        "format": FORMAT,
        "fields": list(STATE_FIELDS),
        "sources": list(source_names),
        "lanes": states_VSF.reshape(len(states_VSF), -1).tolist(),
    }


def from_json(saved: Json, source_names: Sequence[str], num_lanes: int) -> dict[int, np.ndarray]:
    """Restores what `to_json` saved. A source that is new to the run starts at its beginning.

    Args:
        saved: The result of `to_json`.
        source_names: The sources of the run now.
        num_lanes: The number of lanes of the run now.

    Returns:
        Lane → int64 [S, F], in the order of `source_names`.

    Raises:
        UserError: The format or the number of lanes differs.
    """
    fields = len(saved["fields"])
    if saved["format"] != FORMAT or saved["fields"] != list(STATE_FIELDS[:fields]) or fields < _FIELDS_V0_1:
        raise UserError(
            f"the checkpoint's data state has format {saved['format']}, this version reads format {FORMAT}: continue "
            "with the version of jaxtrain that wrote it"
        )
    if len(saved["lanes"]) != num_lanes:
        raise UserError(f"the checkpoint has {len(saved['lanes'])} lanes, data.num_lanes is {num_lanes}: set it back")
    lanes = np.array(saved["lanes"], np.int64).reshape(num_lanes, len(saved["sources"]), fields)
    states_VSF = np.zeros((num_lanes, len(source_names), len(STATE_FIELDS)), np.int64)
    for index, name in enumerate(source_names):
        if name in saved["sources"]:
            states_VSF[:, index, :fields] = lanes[:, saved["sources"].index(name)]
    return dict(enumerate(states_VSF))


def by_source(states_VSF: np.ndarray, source_names: Sequence[str]) -> dict[str, Json]:
    """Each source's totals so far.

    Args:
        states_VSF: The states of all lanes.
        source_names: The sources, in the order of S.

    Returns:
        By source: tokens, unique_tokens, documents, epoch (of its slowest lane), share, cut_documents, padding.
    """
    field = {name: states_VSF[:, :, index] for index, name in enumerate(STATE_FIELDS)}
    total = max(int(field["tokens"].sum()), 1)
    return {
        name: {
            "tokens": int(field["tokens"][:, index].sum()),
            "unique_tokens": int(field["unique"][:, index].sum()),
            "documents": int(field["documents"][:, index].sum()),
            "epoch": int(field["epoch"][:, index].min()),
            "share": float(field["tokens"][:, index].sum() / total),
            "cut_documents": int(field["cut"][:, index].sum()),
            "padding": int(field["padding"][:, index].sum()),
        }
        for index, name in enumerate(source_names)
    }


class StageEnds:
    """Each source's totals at the end of every stage; a stage's own part is the difference of two.

    Every checkpoint keeps them, since the state of the lanes only shows where the run is now.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        nothing: Json = {name: dict.fromkeys(_COUNTED, 0) for name in plan.source_names}
        self._totals: dict[int, Json] = {0: nothing}  # by the last step of the stage

    def _stage(self, step: int) -> StagePlan:
        return self._plan.stages[self._plan.at(step).stage - 1]

    def restore(self, saved: Sequence[Json], step: int, totals: Mapping[str, Json]) -> None:
        """Restores the totals of a checkpoint.

        The current plan's stages apply, not the saved ones: those after `step` may have changed.

        Args:
            saved: The `to_json` of the checkpoint.
            step: The step of the checkpoint.
            totals: Each source's totals at `step`, as `by_source` returns them.
        """
        for end in saved:
            if end["step"] < step:
                self.note(end["step"], end["sources"])
        self.note(step, totals)

    def note(self, step: int, totals: Mapping[str, Json]) -> None:
        """Records the totals at `step` if a stage ends there. A source added later counts as 0."""
        if self._stage(step).last_step == step:
            counted = {name: {key: totals[name][key] for key in _COUNTED} for name in totals}
            self._totals[step] = {**self._totals[0], **counted}

    def in_stage(self, step: int, totals: Mapping[str, Json]) -> dict[str, Json] | None:
        """The part of the totals that the stage of `step` has contributed so far.

        Args:
            step: A step of the stage.
            totals: Each source's totals at `step`, as `by_source` returns them.

        Returns:
            By source: tokens, unique_tokens, documents, epochs (completed in the stage by the slowest lane), share.
            None if the stage began before a checkpoint of an earlier version, which lacks these totals.
        """
        before = self._totals.get(self._stage(step).first_step - 1)
        if before is None:
            return None
        parts = {name: {key: totals[name][key] - before[name][key] for key in _COUNTED} for name in totals}
        total = max(sum(part["tokens"] for part in parts.values()), 1)
        return {
            name: {
                "tokens": part["tokens"],
                "unique_tokens": part["unique_tokens"],
                "documents": part["documents"],
                "epochs": part["epoch"],
                "share": part["tokens"] / total,
            }
            for name, part in parts.items()
        }

    def to_json(self) -> list[Json]:
        """One entry per finished stage, in order, with each source's totals since the start of the run."""
        return [
            {
                "stage": stage.index,
                "name": stage.name,
                "step": stage.last_step,
                "sources": self._totals[stage.last_step],
            }
            for stage in self._plan.stages
            if stage.has_steps and stage.last_step in self._totals
        ]
