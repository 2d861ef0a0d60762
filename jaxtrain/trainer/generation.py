"""Text generation within a memory limit."""

from collections.abc import Sequence
from typing import Any

from jaxtrain.cost import memory
from jaxtrain.distributed import consensus
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Model, Params
from jaxtrain.model import generate as unlimited


def generate(
    model: Model,
    params: Params,
    prompts_ids: Sequence[Sequence[int]],
    *,
    limit: int | None,
    extra: int = 0,
    max_new_tokens: int,
    **settings: Any,
) -> list[list[int]]:
    """Runs `jaxtrain.model.generate.generate` in the fewest batches of prompts that fit. All processes must call it.

    Args:
        model: the model.
        params: its parameters.
        prompts_ids: ids of each prompt.
        limit: memory of a device in bytes; None runs all prompts in one batch.
        extra: bytes in use on a device besides the parameters, such as optimizer state.
        max_new_tokens: maximum length of a continuation.
        settings: see `jaxtrain.model.generate.generate`.

    Returns:
        The ids of each continuation.

    Raises:
        UserError: one prompt per device does not fit, or as `jaxtrain.model.generate.generate`.
    """
    unlimited.check(model, prompts_ids, max_new_tokens)
    rows = len(prompts_ids)
    if limit is not None and prompts_ids:
        counts = [1 << power for power in range((rows - 1).bit_length() + 1)]

        def compile(count: int) -> Any:
            programs = unlimited.compile_programs(model, params, prompts_ids, max_new_tokens, -(-rows // count))
            return max(programs, key=lambda program: memory.needed(program) or 0)

        fewest, needs = counts[-1] + 1, "more than it has"
        try:
            fewest, _ = memory.fit(counts, compile, limit, extra)
        except memory.NothingFitsError as error:
            needs = error.needs
        count = consensus.largest(fewest)
        if count > counts[-1]:
            raise UserError(
                f"generation does not fit: even with one prompt at a time a device needs {needs}, and may use "
                f"{limit / 1e9:.3g} GB. Give shorter prompts or a smaller max_new_tokens, or use more devices."
            )
        rows = -(-rows // count)
    return unlimited.generate(model, params, prompts_ids, max_new_tokens=max_new_tokens, rows_at_once=rows, **settings)
