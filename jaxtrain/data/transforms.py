"""Transforms and filters of single documents: pure functions, named in a source's config and hashed into its identity.

A dropped document keeps its row number, so cursors and holdout do not move when a new run changes a filter.
"""

import dataclasses
import string
from typing import Any

from jaxtrain.errors import UserError


@dataclasses.dataclass(kw_only=True)
class AtLeast:
    """Keeps documents whose `column` is at least `value`, such as FineWeb-Edu's int_score. Drops missing values."""

    column: str
    value: float

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read besides the text."""
        return (self.column,)

    def check(self) -> None:
        """Raises UserError if the column has no name."""
        if not self.column:
            raise UserError("column='': name the column with the number, for example 'int_score'")

    def __call__(self, document: dict[str, Any]) -> dict[str, Any] | None:
        number = document[self.column]
        try:
            return document if number is not None and number >= self.value else None
        except TypeError:
            raise UserError(
                f"column {self.column!r} holds {number!r}, which cannot be compared with {self.value:g}."
            ) from None


@dataclasses.dataclass(kw_only=True)
class MinLength:
    """Keeps documents of at least `characters` characters."""

    characters: int

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns to read besides the text: none."""
        return ()

    def check(self) -> None:
        """Raises UserError if `characters` is below 1."""
        if self.characters < 1:
            raise UserError(f"characters={self.characters}: give 1 or more")

    def __call__(self, document: dict[str, Any]) -> dict[str, Any] | None:
        return document if len(document["text"]) >= self.characters else None


@dataclasses.dataclass(kw_only=True)
class Template:
    """Builds the text from columns: `template="Question: {question}\\nAnswer: {answer}"`. Missing values become ""."""

    template: str

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names."""
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.template) if name))

    def check(self) -> None:
        """Raises UserError if the template is not a format string or names no column."""
        try:
            names = self.columns
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise UserError(f"template={self.template!r} is not a format string: {error}") from error
        if not names or not all(name.isidentifier() for name in names):
            raise UserError(f"template={self.template!r}: name columns in braces, for example '{{question}}'")
        if any("{" in (spec or "") or conversion not in (None, "r", "s", "a") for _, _, spec, conversion in parts):
            raise UserError(
                f"template={self.template!r}: conversions are !r, !s or !a, and formats cannot name columns"
            )

    def __call__(self, document: dict[str, Any]) -> dict[str, Any] | None:
        values = {name: "" if document[name] is None else document[name] for name in self.columns}
        try:
            return {**document, "text": self.template.format(**values)}
        except (ValueError, TypeError) as error:
            raise UserError(f"template={self.template!r} cannot be filled from {values}: {error}.") from None
