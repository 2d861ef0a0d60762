"""Benchmarks in the loop: the log-likelihood of each choice, computed on the training mesh.

As in lm-evaluation-harness: prompt and choice are encoded together and the prompt alone, and the tokens beyond the
prompt's are the choice's; spaces at the prompt's end belong to the choice; what is longer than the model's context is
cut from the left. Choices share rows as separate segments, so that one program serves all tasks, and results do not
depend on rows, batches or hosts except by rounding.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxtrain.data import benchmarks
from jaxtrain.data.benchmarks import Question, Task
from jaxtrain.distributed import sharding
from jaxtrain.distributed.consensus import broadcast_json, on_process_0
from jaxtrain.errors import UserError
from jaxtrain.interfaces import AttentionModel, Json, Params, Tokenizer
from jaxtrain.losses.chunks import Vocabulary
from jaxtrain.losses.cross_entropy import softmax_terms
from jaxtrain.trainer.state import abstract
from jaxtrain.trainer.step import Batch, StepComponents, abstract_batch, of_positions

_SHORTEST = 128  # tokens of a row: what attention kernels ask for
_IN_FLIGHT = 2  # batches queued on the devices, so that they never wait for the host

Scores = dict[str, jax.Array]


def lower_task_step(components: StepComponents, batch_size: int, seq_len: int, micro_batches: int) -> Any:
    """Traces the scoring of one shape; `.compile()` returns the executable.

    The executable maps (params, batch) to values of each position: `nats` fp32 [B, T], the target's negative
    log-likelihood, and `greedy` bool [B, T], whether the target is the likeliest token.
    """
    vocab_size = components.model.vocab_size

    def score(logits_CV: jax.Array, vocabulary: Vocabulary, targets_C: jax.Array) -> Scores:
        logits_CV, max_C, log_z_C, target_C = softmax_terms(logits_CV, vocabulary, targets_C, vocab_size)
        # Of equal logits the first counts, as in argmax.
        likeliest_CV = jnp.where(logits_CV == max_C[:, None], -vocabulary.columns, -vocab_size)
        greedy_C = -vocabulary.max(likeliest_CV.max(axis=1)) == targets_C
        return {"nats": log_z_C - target_C, "greedy": greedy_C}

    def step(params: Params, batch: Batch) -> Scores:
        return of_positions(components, score, params, batch, micro_batches)

    options = components.compiler_options(batch_size // micro_batches, seq_len)
    function = jax.jit(step, out_shardings=sharding.replicated(components.mesh), compiler_options=options)
    params = abstract(components.model, components.optimizer, components.mesh)["params"]
    return function.lower(params, abstract_batch(components.mesh, batch_size, seq_len))


@dataclasses.dataclass(frozen=True)
class _Request:
    """Tokens int32 [n + 1] of which the last `scored` are a choice's."""

    tokens: np.ndarray
    scored: int


def encode(questions: Sequence[Question], tokenizer: Tokenizer, add_bos: bool, context: int) -> list[_Request]:
    """Encodes each choice of the questions after its prompt.

    Args:
        questions: the questions.
        tokenizer: the run's tokenizer.
        add_bos: whether documents begin with a beginning-of-sequence token.
        context: the most tokens that the model reads.
    """
    pairs = []
    for question in questions:
        for prompt, choice in zip(question.prompts, question.choices, strict=True):
            # Tokenizers join a space to the word that follows.
            stripped = prompt.rstrip()
            pairs.append((stripped, f"{prompt} {choice}"))
    before, whole = (_split(tokenizer, texts) for texts in zip(*pairs, strict=True))
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    found = []
    for prompt_ids, ids in zip(before, whole, strict=True):
        choice_ids = ids[len(prompt_ids) :]
        begin = [first] if add_bos or not len(prompt_ids) else []
        tokens = np.concatenate([np.asarray(begin, np.int32), prompt_ids, choice_ids])[-context - 1 :]
        found.append(_Request(tokens, min(len(choice_ids), len(tokens) - 1)))
    return found


def _split(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    ids, lengths = tokenizer.encode_batch(texts)
    return np.split(ids, np.cumsum(lengths)[:-1])


class TaskEvaluator:
    """Asks the model the questions of tasks. All processes must create it and call `run`.

    Args:
        names: the tasks, see `benchmarks.find`.
        limit: questions of each task; None for all.
        folder: where the questions are kept; None to keep none.
        tokenizer: the run's tokenizer.
        add_bos: whether documents begin with a beginning-of-sequence token.
        components: the components of a step.
        batch_size: the most rows of a batch.
        executable: returns the compiled `lower_task_step` for `shape`, given the documents of each row, most first.

    Attributes:
        shape: batch size and row length.

    Raises:
        UserError: a task does not exist, or its questions cannot be read.
        TransientError: the Hub cannot be reached.
    """

    def __init__(
        self,
        names: Sequence[str],
        limit: int | None,
        folder: epath.Path | None,
        tokenizer: Tokenizer,
        add_bos: bool,
        components: StepComponents,
        batch_size: int,
        executable: Callable[[np.ndarray], Any],
    ):
        self._executable, self._mesh = executable, components.mesh
        self._questions = _read(names, limit, folder)
        every = [question for _, questions in self._questions.values() for question in questions]
        model = components.model
        context = model.config.max_seq_len
        self._requests = encode(every, tokenizer, add_bos, context)
        longest = max(len(request.tokens) - 1 for request in self._requests)
        seq_len = min(max(1 << (longest - 1).bit_length(), _SHORTEST), context)
        self._rows = _rows([len(request.tokens) - 1 for request in self._requests], seq_len)
        devices = sharding.batch_ways(self._mesh.shape)
        self.shape = (-(-min(batch_size, len(self._rows)) // devices) * devices, seq_len)
        if isinstance(model, AttentionModel):  # processes must agree on it: here, before anything compiles
            model.attention_choice(*self.shape)

    def run(self, params: Params) -> Json:
        """Returns `eval_tasks`: task → each of its metrics, its standard error (`acc_stderr`), and `questions`."""
        nats, greedy = self.scores(params)
        found, begin = {}, 0
        for name, (task, questions) in self._questions.items():
            end = begin + sum(len(question.choices) for question in questions)
            found[name] = _results(task, questions, nats[begin:end], greedy[begin:end])
            begin = end
        return {"eval_tasks": found}

    def scores(self, params: Params) -> tuple[np.ndarray, np.ndarray]:
        """Scores all choices of all questions, in order.

        Returns:
            The negative log-likelihood of each choice, and whether each of its tokens is the likeliest.
        """
        size = self.shape[0]
        nats, greedy = np.zeros(len(self._requests)), np.zeros(len(self._requests), bool)
        flying: collections.deque[tuple[list[list[int]], Scores]] = collections.deque()

        def take() -> None:
            rows, scores = flying.popleft()
            host = jax.device_get(scores)
            for row, _, place, number in _places(rows, self._requests):
                end = place + len(self._requests[number].tokens) - 1
                begin = end - self._requests[number].scored
                nats[number] = host["nats"][row, begin:end].sum(dtype=np.float64)
                greedy[number] = host["greedy"][row, begin:end].all()

        for begin in range(0, len(self._rows), size):
            rows = self._rows[begin : begin + size]
            documents = np.sort([len(row) + 1 for row in rows])[::-1]  # with padding
            flying.append((rows, self._executable(documents)(params, self._batch(rows))))
            if len(flying) > _IN_FLIGHT:
                take()
        while flying:
            take()
        return nats, greedy

    def _batch(self, rows: list[list[int]]) -> Batch:
        shapes = abstract_batch(self._mesh, *self.shape)
        arrays = {name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}
        for row, index, place, number in _places(rows, self._requests):
            tokens = self._requests[number].tokens
            cells = (row, slice(place, place + len(tokens) - 1))
            arrays["tokens"][cells], arrays["targets"][cells] = tokens[:-1], tokens[1:]
            arrays["segment_ids"][cells], arrays["positions"][cells] = index + 1, np.arange(len(tokens) - 1)
        return {
            name: jax.make_array_from_callback(array.shape, shapes[name].sharding, array.__getitem__)
            for name, array in arrays.items()
        }


def _read(names: Sequence[str], limit: int | None, folder: epath.Path | None) -> dict[str, tuple[Task, list[Question]]]:
    """The questions by title. Process 0 reads and broadcasts them."""
    found = {}
    for name in names:
        task, title = benchmarks.find(name), benchmarks.title(name)
        if title in found:
            raise UserError(f"two tasks have the name {title!r}, and results go by name: rename one, or give it once")
        kept = None if folder is None else folder / f"{title}.json"
        documents = broadcast_json(
            on_process_0(lambda t=task, n=title, k=kept: benchmarks.read(t, n, k)[:limit], f"task {title} failed")
        )
        if not documents:
            raise UserError(f"task {title}: {task.dataset.name} has no question in {task.dataset.split!r}")
        found[title] = (task, benchmarks.questions(task, documents, title))
    return found


def _rows(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Places texts side by side, in order, in rows of `seq_len` tokens."""
    rows: list[list[int]] = []
    room = 0
    for number, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = seq_len
        rows[-1].append(number)
        room -= length
    return rows


def _places(rows: Sequence[Sequence[int]], requests: Sequence[_Request]) -> Iterator[tuple[int, int, int, int]]:
    """Yields (row, index in the row, first column, number of the request)."""
    for row, numbers in enumerate(rows):
        place = 0
        for index, number in enumerate(numbers):
            yield row, index, place, number
            place += len(requests[number].tokens) - 1


def _results(task: Task, questions: Sequence[Question], nats: np.ndarray, greedy: np.ndarray) -> Json:
    values: Mapping[str, list[float]] = {"acc": [], "acc_norm": [], "nats": []}
    begin = 0
    for question in questions:
        end = begin + len(question.choices)
        mine, lengths = nats[begin:end], [len(choice) for choice in question.choices]
        is_alone = len(mine) == 1
        values["acc"].append(float(greedy[begin] if is_alone else np.argmin(mine) == question.answer))
        if "acc_norm" in task.metrics:
            values["acc_norm"].append(float(np.argmin(mine / lengths) == question.answer))
        values["nats"].append(mine[question.answer])
        begin = end
    found: Json = {}
    for metric in task.metrics:
        mean, error = _mean(values["nats" if metric == "perplexity" else metric])
        if metric == "perplexity":  # the error of exp(x) is exp(x) times that of x, to first order
            mean = math.exp(min(mean, 700.0))
            error *= mean
        found |= {metric: mean, f"{metric}_stderr": error}
    return found | {"questions": len(questions)}


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error from the sample's deviation; NaN for a single value."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), spread / math.sqrt(len(values))
