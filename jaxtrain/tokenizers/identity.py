"""Identity of a tokenizer, and cleanup of its input.

Two tokenizers are the same if their model bytes, their special tokens and their ids for a fixed probe text agree. The
probe detects what the bytes cannot: a library version that interprets the same file differently.
"""

import hashlib
from collections.abc import Sequence

from jaxtrain.interfaces import Json, Tokenizer

# English, code, indentation, numbers, line ends, other scripts, combining and private-use characters, an emoji of
# several code points, and spellings of special tokens, which are ordinary text in a document.
PROBE = (
    "The quick brown fox jumps over 13 lazy dogs; 3.14159 isn't 22/7.\r\n"
    "def f(x: int) -> int:\n\treturn  x + 1    # twice\n\n\n"
    "Straße, naïve cafe\u0301, Καλημέρα, Привет, שלום, नमस्ते, 日本語テキスト, 한국어\n"
    "\U0001f469\u200d\U0001f52c \u2581\ue000\n"
    "</s><s><unk><pad><|endoftext|><0x41> "
)

# Other entries (the library's version, the commit on the Hub) are informational.
ENFORCED = ("kind", "hash", "vocab_size", "eos_id", "bos_id", "probe")


def identity(
    tokenizer: Tokenizer, kind: str, content: bytes, *, sealed: bool, library: str, revision: str | None
) -> Json:
    """Describes a tokenizer for checkpoints and stores.

    Args:
        tokenizer: its ids depend only on `content` and the special tokens.
        kind: "tokenizer.json" or "sentencepiece".
        content: bytes of the model file.
        sealed: whether the unmodified library would match special tokens in text, as version 0.1 did. Such tokenizers
            record `reader` 2, so that runs and stores tokenized by 0.1 are not continued.
        library: version of the library.
        revision: commit on the Hub.
    """
    return {
        "kind": kind,
        "hash": hashlib.sha256(content).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "probe": tokenizer.encode_batch([PROBE])[0].tolist(),
        **({"reader": 2} if sealed else {}),
        "library": library,
        "revision": revision,
    }


def mismatch(saved: Json, current: Json) -> str | None:
    """Returns None if both identities describe the same tokenizer, else a message that shows each difference."""
    if saved.get("reader", 1) < current.get("reader", 1):
        return (
            "jaxtrain 0.1 found this tokenizer's special tokens inside texts, so documents could end early. They are "
            "text now, and ids would change: start a new run, or write the store again."
        )
    changed = [name for name in ENFORCED if saved[name] != current[name]]
    if not changed:
        return None
    lines = ["the tokenizer has changed, and token ids would mean something else:"]
    lines += [f"  {name}: was {saved[name]}, is {current[name]}" for name in changed]
    information = sorted((saved.keys() & current.keys()) - {*ENFORCED, "reader"})
    lines += [f"  ({name}: was {saved[name]}, is {current[name]})" for name in information]
    if changed == ["probe"]:
        lines.append("  The files are the same, but the library reads them differently: install its former version.")
    else:
        lines.append("  Use the tokenizer that the run began with (for one from the Hub: its `revision`).")
    return "\n".join(lines)


def well_formed(texts: Sequence[str]) -> list[str]:
    """Replaces lone surrogates, which UTF-8 cannot encode, with U+FFFD, and joins surrogate pairs.

    Such strings come from JSON with escapes like "\\ud83d".
    """
    return [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts]
