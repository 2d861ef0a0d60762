"""Two tokenizers compared byte by byte: where their tokens end in a text, and which outcomes both can say.

Bytes are those of the text in UTF-8, so a token may end within a character.
"""

from collections.abc import Sequence

import numpy as np

from jaxtrain.errors import UserError
from jaxtrain.interfaces import SpellingTokenizer, Tokenizer
from jaxtrain.tokenizers.engine import HARD_TEXTS

# A tokenizer that does not reproduce this follows hardly any document.
_PLAIN = "The quick  brown Fox isn't\n\tat 3.14,\n\n  or [is] it? "
# Larger cells are not told from the rest: this bounds what the loss gathers for each stored token.
MEMBERS = 128


class Speller:
    """Follows texts through the tokens of a tokenizer.

    Attributes:
        tokenizer: The tokenizer.
        lossless: Whether its tokens spell every text, except perhaps for a space before it.
    """

    def __init__(self, tokenizer: Tokenizer, whose: str):
        """Checks that tokens can be followed.

        Args:
            tokenizer: The tokenizer.
            whose: Whose it is, for the message.

        Raises:
            UserError: It does not know its tokens' bytes, or changes ordinary text.
        """
        if not isinstance(tokenizer, SpellingTokenizer):
            raise UserError(
                f"{whose} tokenizer, a {type(tokenizer).__name__}, does not have `spellings`, the bytes of its tokens, "
                "so they cannot be aligned with another tokenizer's: add them (jaxtrain/interfaces.py)."
            )
        self.tokenizer = tokenizer
        self._lengths = np.array(list(map(len, tokenizer.spellings)), np.int64)
        plain, *hard = (self._spells(text) for text in (_PLAIN, *HARD_TEXTS))
        if not plain:
            raise UserError(
                f"{whose} tokenizer changes ordinary text (it normalizes, strips or drops some of it), so its tokens "
                "have no place in the text to align at. Choose a byte-level tokenizer, or one with byte fallback."
            )
        self.lossless = all(hard)

    def _spells(self, text: str) -> bool:
        return self.follow(self.tokenizer.encode_batch([text])[0])[0] in (text.encode(), f" {text}".encode())

    def follow(self, tokens: np.ndarray) -> tuple[bytes, np.ndarray]:
        """The bytes that tokens spell, and where each token ends in them, int64 [n]. Special tokens have no bytes."""
        spelled = b"".join(map(self.tokenizer.spellings.__getitem__, tokens.tolist()))
        return spelled, self._lengths[tokens].cumsum()


def predicts(ends: np.ndarray) -> np.ndarray:
    """Which tokens of a document predict what follows their end, bool [n]: the last that ends there, EOS excluded.

    Args:
        ends: Where each token ends, ascending, EOS included, [n].
    """
    found = np.diff(ends, append=0) > 0
    found[-2:-1] = True  # what follows it is the end
    return found


def cells(
    theirs: Sequence[bytes], their_eos: int, ours: Sequence[bytes], our_eos: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The outcomes of a next token that two vocabularies can both say.

    A cell is a token that both have. To it belong, on either side, the tokens that only one has and whose longest
    prefix among the common ones it is: "thermodynamics", a token here, is "thermo" and "dynamics" there. So a
    distribution over either vocabulary is one over the cells, and the rest.

    Args:
        theirs: The bytes of the teacher's tokens; b"" for special ones.
        their_eos: The teacher's end-of-document token, which has a cell with ours.
        ours: The bytes of the student's tokens.
        our_eos: The student's end-of-document token.

    Returns:
        The cell of each of their tokens, int32 [their vocabulary], by the id of our token that it is, or -1; and our
        tokens, by cell, int32 [N], with the place where those of each id begin, int32 [our vocabulary + 1]. None if the
        vocabularies are the same.
    """
    if list(theirs) == list(ours) and their_eos == our_eos:
        return None
    common: dict[bytes, int] = {}
    our_ids, their_ids = _by_spelling(ours), _by_spelling(theirs)
    cell_of_theirs, cell_of_ours = np.full(len(theirs), -1, np.int32), np.full(len(ours), -1, np.int32)
    cell_of_theirs[their_eos] = cell_of_ours[our_eos] = our_eos
    for spelling in our_ids.keys() & their_ids.keys():
        # "<0x41>" of byte fallback comes before "A" and hardly ever occurs: pair the last with the last.
        common[spelling] = our_ids[spelling][-1]
        for their, our in zip(reversed(their_ids[spelling]), reversed(our_ids[spelling]), strict=False):
            cell_of_theirs[their] = cell_of_ours[our] = our
    for spellings, found in ((theirs, cell_of_theirs), (ours, cell_of_ours)):
        for id in np.flatnonzero(found < 0).tolist():
            prefixes = (spellings[id][:size] for size in range(len(spellings[id]), 0, -1))
            found[id] = next((common[prefix] for prefix in prefixes if prefix in common), -1)
    in_cells = np.flatnonzero(cell_of_ours >= 0).astype(np.int32)
    sizes = np.bincount(cell_of_ours[in_cells], minlength=len(ours))
    cell_of_theirs[(cell_of_theirs >= 0) & (sizes[cell_of_theirs] > MEMBERS)] = -1
    members = in_cells[np.argsort(cell_of_ours[in_cells], kind="stable")]
    return cell_of_theirs, members, np.concatenate([[0], sizes.cumsum()]).astype(np.int32)


def _by_spelling(spellings: Sequence[bytes]) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = {}
    for id, spelling in enumerate(spellings):
        if spelling:
            found.setdefault(spelling, []).append(id)
    return found
