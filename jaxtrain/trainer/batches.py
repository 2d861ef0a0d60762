"""A config's packed batches as a Grain dataset, for training loops other than jaxtrain's."""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from jaxtrain.checkpoint import restore
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.config import Config
from jaxtrain.data import ledger, pipeline
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Batch, Json
from jaxtrain.tokenizers.training import TrainTokenizer
from jaxtrain.trainer import compatibility, open_data


class BatchDataset(grain.IterDataset):
    """One shard of the rows of every batch in a config's run. See `jaxtrain.batches`.

    Sources are looked up only when the first element or state is requested, so the dataset can be pickled.
    """

    def __init__(
        self, config: Config, *, workdir: str | None = None, step: int = 0, shard: int = 0, num_shards: int = 1
    ):
        super().__init__()
        lanes = config.data.num_lanes
        if not 0 <= shard < num_shards or lanes % num_shards:
            raise UserError(
                f"shard={shard}, num_shards={num_shards}: give a num_shards that divides data.num_lanes={lanes}, and a "
                "shard from 0 to num_shards - 1"
            )
        if step < 0:
            raise UserError(f"step={step}: give 0 for the run's first batch, or the last step that was trained on")
        if workdir is None and isinstance(config.tokenizer, TrainTokenizer):
            raise UserError("the config trains its tokenizer: give the workdir that keeps it")
        self.config, self.workdir, self.step, self.shard = config, workdir, step, shard
        self.lanes = range(shard * lanes // num_shards, (shard + 1) * lanes // num_shards)

    def __iter__(self) -> "BatchIterator":
        return BatchIterator(self)


class BatchIterator(grain.DatasetIterator):
    """Iterates over batches.

    Elements are dicts of BATCH_FIELDS, each [B / num_shards, T]: the rows of this shard's lanes, in the batch's order.

    The state is JSON: the last step yielded; the position of each of the shard's lanes in each source after it, [lanes,
    S, STATE_FIELDS]; the commits of Hub datasets; and a digest of everything that determines the rows of a step. A
    state with a different digest is refused. If a branch has moved, the state's commit is read.
    """

    def __init__(self, dataset: BatchDataset):
        super().__init__()
        self._dataset = dataset
        self._batches: pipeline.HostIterator | None = None
        self._digest = ""
        self._revisions: dict[str, str] = {}

    def __next__(self) -> Batch:
        return next(self._opened()).arrays

    def get_state(self) -> dict[str, Any]:
        state = self._opened().get_state()
        return {
            "step": state["step"],
            "lanes": np.asarray(state["lanes"]).tolist(),
            "revisions": self._revisions,
            "digest": self._digest,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        if self._batches is None or state["revisions"] != self._revisions:
            self.close()
            self._batches = self._open(state["revisions"])
        batches = self._batches
        if state["digest"] != self._digest:
            raise UserError(
                f"the state belongs to other batches: its digest is {state['digest']}, this dataset's {self._digest}. "
                "Give the config, the sources' commits and the shard that it was saved with."
            )
        batches.set_state({"step": state["step"], "lanes": np.array(state["lanes"], np.int64)})

    def close(self) -> None:
        super().close()
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _opened(self) -> pipeline.HostIterator:
        if self._batches is None:
            self._batches = self._open({})
        return self._batches

    def _open(self, revisions: Mapping[str, str]) -> pipeline.HostIterator:
        """Opens the batches after `step`, from the work directory's nearest earlier checkpoint or the beginning.

        Args:
            revisions: Commits of Hub datasets by source. They override the config's revisions.
        """
        dataset = self._dataset
        fixed: dict[str, Any] = dict(dataset.config.data.sources)
        for name, revision in revisions.items():
            fixed[name] = dataclasses.replace(fixed[name], revision=revision)
        data = dataclasses.replace(dataset.config.data, sources=fixed)
        config = dataclasses.replace(dataset.config, data=data)
        plan = config.plan()
        workdir = Workdir(dataset.workdir or tempfile.mkdtemp(prefix="jaxtrain-batches-"))  # paths only: no lock
        steps = [] if dataset.workdir is None else restore.steps(dataset.workdir)
        nearest = max((step for step in steps if step <= dataset.step), default=None)
        saved = None if nearest is None else restore.load_data(str(dataset.workdir), nearest)
        config = compatibility.settled(config, saved)
        cache = config.data.cache(os.fspath(workdir.cache / "data"))
        tokenizer, opened = open_data.open_all(config, workdir, saved, cache, fetch=True, is_tool=True)
        skipped = open_data.skipped(workdir.path, saved)
        sources = {name: one.source for name, one in opened.items()}
        forgotten = open_data.forgotten(config, workdir.path, saved)
        readers = config.data.build(sources, seed=config.seed, skipped=skipped, forgotten=forgotten.documents)
        commits = {reader.name: reader.source.identity.get("revision") for reader in readers}
        self._revisions = {name: commit for name, commit in commits.items() if commit is not None}
        identities = compatibility.identities(config, readers, tokenizer, plan, forgotten)
        self._digest = _digest(identities, dataset.lanes)
        states: dict[int, np.ndarray] = {}
        if saved is not None:
            compatibility.check(saved, identities, plan, saved["step"])
            states = ledger.from_json(saved["lanes"], plan.source_names, config.data.num_lanes)
        batches = iter(
            pipeline.host_dataset(
                readers,
                plan,
                config.data.row_spec(tokenizer, config.epochs),
                list(dataset.lanes),
                pipeline.pools(config.data),
                after=0 if saved is None else saved["step"],
                states=states,
            )
        )
        assert isinstance(batches, pipeline.HostIterator)
        while batches.get_state()["step"] < dataset.step:
            next(batches)
        return batches


def _digest(identities: Json, lanes: range) -> str:
    """A digest of what determines the rows of a step. How the model is computed or how often it is saved does not."""
    config, fixed = identities["config"], [path.partition(".") for path in compatibility.FIXED]
    decisive = [
        identities["sources"],
        identities["tokenizer"]["hash"],
        identities["plan"],
        [config[name] for name in ("seed", "epochs", "stages")],
        [config["data"][field] for group, _, field in fixed if group == "data"],
        [lanes.start, lanes.stop],
        *identities["forgotten"]["documents"].items(),
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]
