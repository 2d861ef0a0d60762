"""What makes a tokenizer the same one, and the text that it may see.

Two tokenizers are the same if the bytes of their models, their special tokens and the ids of a fixed probe text agree.
The probe catches what the bytes cannot: another version of a library that reads the same file differently.
"""

import hashlib
from collections.abc import Sequence

from jaxtrain.interfaces import Json, Tokenizer

# English, code, indentation, numbers, line ends, other scripts, combining and private characters, an emoji of several
# code points, and the spellings of special tokens, which are ordinary text in a document.
PROBE = (
    "The quick brown fox jumps over 13 lazy dogs; 3.14159 isn't 22/7.\r\n"
    "def f(x: int) -> int:\n\treturn  x + 1    # twice\n\n\n"
    "Straße, naïve cafe\u0301, Καλημέρα, Привет, שלום, नमस्ते, 日本語テキスト, 한국어\n"
    "\U0001f469\u200d\U0001f52c \u2581\ue000\n"
    "</s><s><unk><pad><|endoftext|><0x41> "
)

# Other entries (the library's version, the commit a file came from) inform only.
ENFORCED = ("kind", "hash", "vocab_size", "eos_id", "bos_id", "probe")


def identity(tokenizer: Tokenizer, kind: str, content: bytes, **information: str | None) -> Json:
    """The identity of `tokenizer`, whose ids depend on `content` (the bytes of its model file) alone."""
    return {
        "kind": kind,
        "hash": hashlib.sha256(content).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "bos_id": tokenizer.bos_id,
        "probe": tokenizer.encode_batch([PROBE])[0].tolist(),
        **information,
    }


def mismatch(saved: Json, current: Json) -> str | None:
    """None if the two identities are of one tokenizer, else the text that shows both sides of what differs."""
    changed = [name for name in ENFORCED if saved[name] != current[name]]
    if not changed:
        return None
    lines = ["the tokenizer has changed, and token ids would mean something else:"]
    lines += [f"  {name}: was {saved[name]}, is {current[name]}" for name in changed]
    information = sorted((saved.keys() | current.keys()) - set(ENFORCED))
    lines += [
        f"  ({name}: was {saved[name]}, is {current[name]})" for name in information if name in saved.keys() & current
    ]
    if changed == ["probe"]:
        lines.append(
            "  The files are the same: the tokenizer's library reads them differently. Install the version it was."
        )
    else:
        lines.append("  Give the tokenizer that the run began with (for one from the Hub: its `revision`).")
    return "\n".join(lines)


def well_formed(texts: Sequence[str]) -> list[str]:
    """The texts with lone surrogates, which have no UTF-8, replaced by U+FFFD. Pairs become their character.

    Such strings come from JSON with escapes like "\\ud83d".
    """
    return [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in texts]
