"""Transforms: what they keep, what they produce, and that they are part of a source's identity."""

import pytest

from jaxtrain.data.source_reader import describe
from jaxtrain.data.transforms import AtLeast, MinLength, Template
from jaxtrain.errors import UserError


@pytest.mark.parametrize(("score", "kept"), [(2, False), (3, True), (4.5, True), (None, False)])
def test_at_least(score: float | None, kept: bool):
    document = {"text": "a", "int_score": score}
    assert AtLeast(column="int_score", value=3)(document) == (document if kept else None)


def test_min_length():
    keep = MinLength(characters=3)
    assert keep({"text": "abc"}) == {"text": "abc"}
    assert keep({"text": "ab"}) is None


def test_template_names_its_columns_and_fills_them():
    template = Template(template="Q: {question}\nA: {answer} {question}")
    assert template.columns == ("question", "answer")
    document = {"text": "x", "question": "why", "answer": None}
    made = template(document)
    assert made is not None
    assert made["text"] == "Q: why\nA:  why"
    assert document["text"] == "x"


def test_values_of_another_type_are_the_users_matter():
    with pytest.raises(UserError, match="column 'int_score' holds 'high', which cannot be compared with 3"):
        AtLeast(column="int_score", value=3)({"text": "a", "int_score": "high"})
    template = Template(template="{score:.2f}")
    template.check()
    made = template({"text": "a", "score": 0.5})
    assert made is not None
    assert made["text"] == "0.50"
    with pytest.raises(UserError, match=r"cannot be filled from {'score': 'high'}: Unknown format code 'f'"):
        template({"text": "a", "score": "high"})


@pytest.mark.parametrize("text", ["plain", "{0}", "{a", "{a.b}", "{question", "{a!z}", "{a!}", "{a:{b}}", "{}", "a}"])
def test_template_refuses_what_names_no_column(text: str):
    with pytest.raises(UserError, match="template="):
        Template(template=text).check()


def test_settings_are_part_of_the_identity():
    one, two = (describe(AtLeast(column="int_score", value=value)) for value in (3, 4))
    assert one == describe(AtLeast(column="int_score", value=3))
    assert one != two
    assert one["_kind"] == "at_least"
