"""Where all lanes stand, gathered from the hosts: for the checkpoint, and for what each source has given."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.data.lanes import STATE_FIELDS
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.plan import Plan, StagePlan

FORMAT = 1
_COUNTED = ("tokens", "unique_tokens", "documents", "epoch")


def gather(states: Mapping[int, np.ndarray], num_lanes: int) -> np.ndarray:
    """This host's lanes, lane → int64 [S, F], with those of the others: int64 [V, S, F]. All processes call it."""
    lanes_N = np.array(sorted(states), np.int64)
    states_NSF = np.stack([states[lane] for lane in lanes_N.tolist()])
    if jax.process_count() > 1:
        lanes_N, states_NSF = _from_all(lanes_N, states_NSF)
    return join(lanes_N, states_NSF, num_lanes)


def _from_all(lanes_N: np.ndarray, states_NSF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lanes of all hosts, one host after the other, and their states.

    A host sends its own lanes alone, padded to the most that any has: 4,096 hosts that each sent a table of 16,384
    lanes and 3 sources would get 16 GB each.
    """
    most = int(np.max(multihost_utils.process_allgather(np.array([len(lanes_N)], np.uint32))))
    mine = np.full((most, 1 + states_NSF[0].size), -1, np.int64)
    mine[: len(lanes_N), 0] = lanes_N
    mine[: len(lanes_N), 1:] = states_NSF.reshape(len(lanes_N), -1)
    # As pairs of uint32: the gather cuts int64 to 32 bits without x64 mode, and says nothing.
    pairs = multihost_utils.process_allgather(mine.view(np.uint32))
    found = np.ascontiguousarray(pairs).view(np.int64).reshape(-1, mine.shape[1])
    found = found[found[:, 0] >= 0]
    return found[:, 0], found[:, 1:].reshape(-1, *states_NSF.shape[1:])


def join(lanes_N: np.ndarray, states_NSF: np.ndarray, num_lanes: int) -> np.ndarray:
    """The states in the order of lanes: int64 [V, S, F]. Every lane is there, and its copies agree."""
    states_VSF = np.zeros((num_lanes, *states_NSF.shape[1:]), np.int64)
    states_VSF[lanes_N] = states_NSF
    missing = np.setdiff1d(np.arange(num_lanes), lanes_N)
    assert not len(missing), f"no host reads lanes {missing}"
    agree = (states_VSF[lanes_N] == states_NSF).all(axis=(1, 2))
    assert agree.all(), f"hosts disagree on lanes {np.unique(lanes_N[~agree])}"
    return states_VSF


def to_json(states_VSF: np.ndarray, source_names: Sequence[str]) -> Json:
    return {
        "format": FORMAT,
        "fields": list(STATE_FIELDS),
        "sources": list(source_names),
        "lanes": states_VSF.reshape(len(states_VSF), -1).tolist(),
    }


def from_json(saved: Json, source_names: Sequence[str], num_lanes: int) -> dict[int, np.ndarray]:
    """Lane → int64 [S, F] in the order of `source_names`; a source that is new begins at its beginning.

    Raises UserError for another format or number of lanes.
    """
    if saved["format"] != FORMAT or saved["fields"] != list(STATE_FIELDS):
        raise UserError(
            f"the checkpoint's data state has format {saved['format']}, this version reads format {FORMAT}: go on with "
            "the version of jaxtrain that wrote it"
        )
    if len(saved["lanes"]) != num_lanes:
        raise UserError(f"the checkpoint has {len(saved['lanes'])} lanes, data.num_lanes is {num_lanes}: set it back")
    lanes = np.array(saved["lanes"], np.int64).reshape(num_lanes, len(saved["sources"]), len(STATE_FIELDS))
    states_VSF = np.zeros((num_lanes, len(source_names), len(STATE_FIELDS)), np.int64)
    for index, name in enumerate(source_names):
        if name in saved["sources"]:
            states_VSF[:, index] = lanes[:, saved["sources"].index(name)]
    return dict(enumerate(states_VSF))


def by_source(states_VSF: np.ndarray, source_names: Sequence[str]) -> dict[str, Json]:
    """What each source has given so far: tokens, unique_tokens, documents, epoch (of its slowest lane), share."""
    field = {name: states_VSF[:, :, index] for index, name in enumerate(STATE_FIELDS)}
    total = max(int(field["tokens"].sum()), 1)
    return {
        name: {
            "tokens": int(field["tokens"][:, index].sum()),
            "unique_tokens": int(field["unique"][:, index].sum()),
            "documents": int(field["documents"][:, index].sum()),
            "epoch": int(field["epoch"][:, index].min()),
            "share": float(field["tokens"][:, index].sum() / total),
        }
        for index, name in enumerate(source_names)
    }


class StageEnds:
    """What every source had given by the end of each stage: a stage's own part is the difference of two.

    Kept in every checkpoint, since the lanes' state tells only where the run stands now.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        nothing: Json = {name: dict.fromkeys(_COUNTED, 0) for name in plan.source_names}
        self._totals: dict[int, Json] = {0: nothing}  # by the last step of the stage

    def _stage(self, step: int) -> StagePlan:
        return self._plan.stages[self._plan.at(step).stage - 1]

    def restore(self, saved: Sequence[Json], step: int, given: Mapping[str, Json]) -> None:
        """saved: `to_json` of the checkpoint of `step`, where the sources had given `given` (as `by_source`).

        The plan's stages count, not the saved ones: after `step` they may be others now.
        """
        for end in saved:
            if end["step"] < step:
                self.note(end["step"], end["sources"])
        self.note(step, given)

    def note(self, step: int, given: Mapping[str, Json]) -> None:
        """Keeps what was given by a step, if a stage ends with it. A source that came later had given nothing."""
        if self._stage(step).last_step == step:
            counted = {name: {key: given[name][key] for key in _COUNTED} for name in given}
            self._totals[step] = {**self._totals[0], **counted}

    def in_stage(self, step: int, given: Mapping[str, Json]) -> dict[str, Json] | None:
        """The part of `given`, by a step, that the step's stage has taken so far.

        tokens, unique_tokens, documents, epochs (completed meanwhile by the slowest lane), share. None where the stage
        began before a checkpoint that does not tell: that of an earlier version.
        """
        before = self._totals.get(self._stage(step).first_step - 1)
        if before is None:
            return None
        parts = {name: {key: given[name][key] - before[name][key] for key in _COUNTED} for name in given}
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
        """One entry for each stage that has ended, in order, with what every source had given since the run began."""
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
