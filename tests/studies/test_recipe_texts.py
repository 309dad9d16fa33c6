"""Cleaning of training texts: what goes, and above all what must stay."""

from __future__ import annotations

import pytest

from studies.recipes.clean import clean


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        ("two  spaces and a\ttab\u00a0 here ", "two spaces and a tab here"),
        ("= Ada Lovelace =", "Ada Lovelace"),
        ("== Early life ==\nBorn.", "Early life\nBorn."),
        ("### A title", "A title"),
        ("The mill (, from the Dutch) ground.", "The mill (from the Dutch) ground."),
        ("known as Jing () or Mandarin ( ; ) cuisine", "known as Jing or Mandarin cuisine"),
        ("with a diameter of up to .", "with a diameter of up to."),
        ("the club, , and more", "the club, and more"),
        ("he would _not_ give **any** '''thing''' away", "he would not give any thing away"),
        ("a <b>bold</b> step<br/> on &amp; on", "a bold step on & on"),
        ("see [[Ada Lovelace|Ada]] and [[London]]", "see Ada and London"),
        ("before\n* * *\nafter", "before\nafter"),
        ("before\n----\n17\nafter", "before\nafter"),
        ("text\nfor each variable formula_15, the\nmore", "text\nmore"),
        ("| a | b |\nend", "end"),
        ("[Illustration: a cat]\nend", "end"),
        ("   verse one\n     verse two", "verse one\nverse two"),
        ("a\n\n\n\n\nb\n\n", "a\n\nb"),
        ("\n \n", ""),
    ],
)
def test_remnants_go(raw: str, wanted: str) -> None:
    assert clean(raw) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "First paragraph.\n\nSecond paragraph.\nIts second line.",
        'Hesitation, we agreed . . . Henry said: "No ..."',
        "It costs .5 of 2 < 3 and 3 > 2 (or so); f(x) = y.",
        "snake_case_name and 2 * 3 * 4, it's 'quoted' and ''tis so",
        "Chapter 3\n\n1912 was a year.",
        "— a dash, an ellipsis…, naïve Ελληνικά",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert clean(text) == text


def test_cleaning_twice_changes_nothing_more() -> None:
    raw = "= T  =\nThe (( , ) x) ( () ) club , , . _a  b_ <i>c</i>  [ , ]\n\n\n\n* *\nend  ."
    assert clean(clean(raw)) == clean(raw)
