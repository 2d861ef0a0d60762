"""Provenance against the documents: every token range matches the text in that row of that file."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxtrain.data import pipeline
from jaxtrain.data.provenance import DocumentSpan, Origin, StreamInspector
from jaxtrain.errors import UserError
from jaxtrain.plan import Stage
from tests.data.memory_source import MemorySource, WordTokenizer, documents
from tests.data.runs import Case, plan_of, random_case

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def watch() -> Iterator:
    """Makes `StreamInspector`s of cases; their threads end with the test."""
    with _Watcher() as watcher:
        yield watcher


class _Watcher:
    def __enter__(self) -> "_Watcher":
        self._threads: list[pipeline.Pools] = []
        return self

    def __call__(self, case: Case, **start) -> StreamInspector:
        data = case.data
        resolved = {name: source.resolve() for name, source in data.sources.items()}
        readers = data.build(resolved, seed=case.seed)
        self._threads.append(pipeline.pools(data))
        return StreamInspector(
            readers, case.plan, data.row_spec(WordTokenizer(), case.epochs), self._threads[-1], **start
        )

    def __exit__(self, *error: object) -> None:
        for threads in self._threads:
            threads.readers.shutdown()
            threads.workers.shutdown()


def tokens_of(case: Case, origin: Origin) -> list[int]:
    """The row again, only from the documents in the files."""
    source, tokenizer = case.data.sources[origin.source], WordTokenizer()
    assert isinstance(source, MemorySource)
    found = []
    for span in origin.spans:
        text = source.rows[source.files.index(span.file)][span.row]
        ids = tokenizer.encode_batch([text])[0].tolist()
        whole = [tokenizer.bos_id] * case.data.add_bos + ids + [tokenizer.eos_id]
        assert 0 <= span.first < span.end <= len(whole)
        found += whole[span.first : span.end]
    return found


@few
@given(st.integers(0, 10**6))
def test_every_row_is_made_of_the_documents_named(seed):
    case = random_case(seed)
    batches = case.run()
    ended = next((batch.step for batch in batches if batch.ended and case.epochs is not None), case.last_step)
    with _Watcher() as watch, watch(case) as stream:
        for wanted in batches[:ended]:
            batch, origins = stream.next_with_origins()
            at = case.plan.at(batch.step)
            for name, values in wanted.arrays.items():
                np.testing.assert_array_equal(batch.arrays[name], values)
            assert len(origins) == at.batch_size
            runs = [len(list(itertools.groupby(row))) for row in wanted.arrays["segment_ids"].tolist()]
            assert wanted.documents.tolist() == sorted(runs, reverse=True)
            sources = [case.plan.source_names.index(origin.source) for origin in origins]
            assert sources == case.plan.sources_of(batch.step).tolist()
            for row, origin in enumerate(origins):
                assert origin.lane == row * case.data.num_lanes // at.batch_size
                filled = wanted.arrays["tokens"][row][: origin.tokens].tolist()
                assert filled == tokens_of(case, origin)
                assert (wanted.arrays["segment_ids"][row] > 0).sum() == origin.tokens
                flat = np.arange(row * at.seq_len, (row + 1) * at.seq_len)
                assert origin.counted == (flat < at.masked_from).sum()
        if ended < case.last_step:
            with pytest.raises(UserError, match=f"the data ends with step {ended:,}"):
                stream.next()


@few
@given(st.integers(0, 10**6))
def test_any_checkpoint_gives_the_same_answer(seed):
    case = random_case(seed, epochs=(None,))
    batches = case.run()
    step = seed % case.last_step + 1
    with _Watcher() as watch:
        answers = []
        for start in range(step):
            states = batches[start - 1].states if start else {}
            with watch(case, after=start, states=states) as stream:
                calls = []
                stream.go_to(step, lambda calls=calls: calls.append(1))
                assert len(calls) == step - 1 - start
                answers.append(stream.next_with_origins()[1])
    assert all(answer == answers[0] for answer in answers)


def test_what_a_stream_gives_is_measured(watch):
    rows = [documents(50, seed, 20, 0) for seed in range(4)]
    data = pipeline.DataConfig(
        sources={name: MemorySource(rows=rows, name=name) for name in "ab"}, num_lanes=2, shuffle_window=4, workers=1
    )
    stages = [Stage(seq_len=16, batch_size=4, weights={"a": 0.75, "b": 0.25})]
    case = Case(data, plan_of(data, stages, 0, steps=20), 0, None)
    with watch(case) as stream:
        found = stream.measure(40, None)
    assert 40 <= found.documents < 50
    assert found.sources["a"]["share"] == 0.75
    assert found.documents == sum(given["documents"] for given in found.sources.values())
    assert found.tokens == found.steps * 64
    assert found.first.step == 1
    assert len(found.origins) == 4
    assert found.tokens_per_second > 0
    with watch(case) as stream:
        assert stream.measure(10**6, 3).steps == 3
    with watch(case) as stream:
        assert stream.measure(1, None).steps == 2  # the first batch waits for the sources


def test_a_row_past_the_end_says_so(watch):
    data = pipeline.DataConfig(sources={"web": MemorySource(rows=[["1 2 3", "4"]])}, num_lanes=1, shuffle=False)
    case = Case(data, plan_of(data, [Stage(seq_len=4, batch_size=2)], 0, steps=9), 0, 1)
    with watch(case) as stream:
        _, (first, second) = stream.next_with_origins()
        assert first.spans == (DocumentSpan("file-0", 0, 0, 4),)
        assert second.spans == (DocumentSpan("file-0", 1, 0, 2),)
        assert (first.tokens, second.tokens, second.counted) == (4, 2, 4)
        with pytest.raises(UserError, match="the data ends with step 1, after 1 epoch"):
            stream.go_to(3)
