"""`python -m tools.generate`: generates text from a checkpoint."""

import json
import pathlib
import sys
from typing import Any

from jaxtrain import cli
from jaxtrain.errors import UserError

COMMAND = cli.Command(
    name="python -m tools.generate",
    description=(
        "Continues one prompt, printing text as it is generated, or many at once. The same seed gives the same text. "
        "An empty prompt starts a new document."
    ),
    examples=(
        "python -m tools.generate --workdir=runs/quickstart --prompt='def main('",
        "python -m tools.generate --workdir=runs/1b --step=20000 --prompt='Once upon' --samples=4 --temperature=0.7",
        "python -m tools.generate --workdir=runs/1b --prompts=prompts.txt --temperature=0 --json=texts.jsonl",
    ),
    flags=(
        cli.Flag(name="workdir", help="the run's work directory"),
        cli.Flag(name="prompt", type=str | None, default=None, help="the text to continue"),
        cli.Flag(name="prompts", type=str | None, default=None, help="a file with one prompt per line; - for stdin"),
        cli.Flag(name="samples", type=int, default=1, help="continuations of each prompt"),
        cli.Flag(
            name="max_new_tokens",
            type=int | None,
            default=None,
            help="the most tokens of a continuation; 128 by default, or what the model's context leaves",
        ),
        cli.Flag(name="temperature", type=float, default=0.8, help="0 always takes the likeliest token"),
        cli.Flag(name="top_k", type=int | None, default=50, help="sample among the k likeliest tokens; none: all"),
        cli.Flag(
            name="top_p",
            type=float,
            default=1.0,
            help="sample among the likeliest tokens with this total probability",
        ),
        cli.Flag(name="seed", type=int, default=0, help="seed of the random numbers"),
        cli.Flag(name="step", type=int | None, default=None, help="which checkpoint; the newest by default"),
        cli.Flag(
            name="json", type=str | None, default=None, help="also write the texts here, one JSON object per line"
        ),
        cli.IMPORT,
    ),
    config="none",
)


def main(flags: cli.Flags) -> None:
    if flags.samples < 1:
        raise UserError(f"--samples={flags.samples}: give 1 or more")
    prompts = [prompt for prompt in _prompts(flags) for _ in range(flags.samples)]
    # Importing JAX takes seconds, so validate the command line first.
    from jaxtrain.cost import memory
    from jaxtrain.model.generate import check, continuation
    from jaxtrain.trainer.generation import generate
    from jaxtrain.trainer.restored import restore

    found = restore(flags.workdir, flags.step)
    tokenizer = found.tokenizer
    prompts_ids = [found.prompt_ids(prompt) for prompt in prompts]
    max_new_tokens = flags.max_new_tokens
    if max_new_tokens is None:
        max_new_tokens = max(min(128, found.model.config.max_seq_len - max(map(len, prompts_ids))), 1)
    check(found.model, prompts_ids, max_new_tokens)  # before printing anything
    shown = _Shown(tokenizer, prompts, prompts_ids, max_new_tokens)
    assert found.model.mesh is not None
    texts = generate(
        found.model,
        found.params,
        prompts_ids,
        limit=memory.limit(found.model.mesh, None),
        max_new_tokens=max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        seed=flags.seed,
        eos_id=tokenizer.eos_id,
        on_token=shown.on_token,
    )
    continued = [continuation(tokenizer, *each) for each in zip(prompts_ids, texts, strict=True)]
    shown.end(continued)
    if flags.json is not None:
        rows = [
            {
                "step": found.step,
                "prompt": prompt,
                "text": text,
                "tokens": len(ids),
                "ended": len(ids) < max_new_tokens,
            }
            for prompt, text, ids in zip(prompts, continued, texts, strict=True)
        ]
        try:
            with open(flags.json, "w", encoding="utf-8") as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise UserError(f"--json={flags.json} cannot be written: {error}") from None


def _prompts(flags: cli.Flags) -> list[str]:
    """Returns the prompts from the flags. Raises UserError."""
    if (flags.prompt is None) == (flags.prompts is None):
        raise UserError("give --prompt=TEXT, or --prompts=FILE with one prompt per line, and not both")
    if flags.prompt is not None:
        return [flags.prompt]
    try:
        text = sys.stdin.read() if flags.prompts == "-" else pathlib.Path(flags.prompts).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={flags.prompts}: {error}") from None
    if not text:
        raise UserError(f"--prompts={flags.prompts} is empty: write one prompt per line")
    return text.removesuffix("\n").split("\n")


class _Shown:
    """Streams a single text as it is generated. For several, shows a progress bar, then prints all texts."""

    def __init__(self, tokenizer: Any, prompts: list[str], prompts_ids: list[list[int]], max_new_tokens: int):
        from tqdm import tqdm

        self._tokenizer, self._prompts, self._prompts_ids = tokenizer, prompts, prompts_ids
        self._ids: list[int] = []
        self._printed = ""
        self._bar = None
        if len(prompts) == 1:
            print(prompts[0], end="", flush=True)
        else:
            # None shows the bar only on a terminal.
            self._bar = tqdm(total=len(prompts) * max_new_tokens, unit=" tokens", disable=None)

    def on_token(self, row: int, token: int) -> None:
        from jaxtrain.model.generate import continuation

        if self._bar is not None:
            self._bar.update()
            return
        self._ids.append(token)
        text = continuation(self._tokenizer, self._prompts_ids[0], self._ids)
        if not text.endswith("\ufffd") and text.startswith(self._printed):  # otherwise a character is incomplete
            print(text[len(self._printed) :], end="", flush=True)
            self._printed = text

    def end(self, texts: list[str]) -> None:
        if self._bar is None:
            print(texts[0].removeprefix(self._printed))
            return
        self._bar.close()
        for number, (prompt, text) in enumerate(zip(self._prompts, texts, strict=True), 1):
            print(f"--- {number}\n{prompt}{text}")


if __name__ == "__main__":
    cli.leave(cli.exit_code(main, COMMAND))
