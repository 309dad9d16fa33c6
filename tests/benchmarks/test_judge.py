"""What judge.py counts in answers, and of whom it draws its questions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import judge_counts
from benchmarks.dry_run import write_conversations, write_talker
from benchmarks.judge import Talker, conversations, judge, parse, turns


def test_repetition_is_counted_inside_an_answer():
    assert judge_counts.repeated(["a b c d a b c d"]) == pytest.approx(1 / 5)
    assert judge_counts.repeated(["a b c d", "A B, c. d!"]) == 0  # in another answer it is none
    assert judge_counts.repeated(["no", ""]) == 0
    assert judge_counts.distinct(["a b", "a c"], 1) == 3 / 4


def test_copies_are_runs_of_eight_words_of_a_training_text():
    text = "one two three four five six seven eight nine"
    assert judge_counts.copied([text], ["Zero. One, two three four five six seven eight!"]) == 0.5
    assert judge_counts.copied([text], ["one two three four", "five six seven eight nine"]) == 0
    assert judge_counts.copied(["short"], [text]) == 0


def test_sentences_are_cut_at_marks_and_lines_and_drawn_by_seed(monkeypatch):
    said = 'He said "yes" to me. Why not now?\n\nMoral: be kind now. 3 boats came home. No.'
    found = judge_counts.sentences([said])
    assert found == ["He said yes to me.", "Why not now?", "Moral: be kind now."]
    monkeypatch.setattr(judge_counts, "SENTENCES", 2)
    drawn = judge_counts.sentences([said], seed=1)
    assert drawn == judge_counts.sentences([said], seed=1)
    assert len(drawn) == 2


def test_a_parser_that_is_missing_says_nothing_and_one_that_is_there_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(judge_counts, "PARSER", str(tmp_path / "parser"))
    assert judge_counts.parsed(["One two three."]) is None
    fake = tmp_path / "parser"
    fake.write_text(
        "#!/bin/sh\nwhile read line; do case $line in Bad*) echo '+++++ error 1';; esac; done\n"
    )
    fake.chmod(0o755)
    assert judge_counts.parsed(["Good one.", "Bad one.", "Good two.", "Good three."]) == 0.75


def test_turns_are_drawn_by_seed_and_the_same_answers_count_again(tmp_path):
    file = write_conversations(tmp_path / "chat.jsonl", 10)
    rows = list(conversations(file))
    asked = turns(rows, 6, seed=3)
    assert asked == turns(rows, 6, seed=3) != turns(rows, 6, seed=4)
    assert all(before[-1]["role"] == "user" for before, _ in asked)
    model = write_talker(tmp_path / "model", file)
    words = ["--turns", "3", "--max-tokens", "5", "--threads", "1", "--out", str(tmp_path / "out")]
    words += ["--held-out", str(file), "--training", str(file), "--bits-tokens", "50"]
    document = judge(parse([str(model), *words]))
    assert document["counted_people"]["copied_8_grams"] in (0.0, 1.0)
    assert len(document["answers"]) == 3
    talker = Talker(model, 1)
    rows = [[{"role": "user", "content": "River."}]]
    ids = talker.chat.ids(talker.chat.render(rows[0], add_generation_prompt=False))
    bits = -talker.lm.token_logprobs(ids).sum() / 0.6931471805599453 / len("River.")
    assert talker.bits_per_byte(rows, 10)["bits_per_byte"] == pytest.approx(bits)

    from benchmarks.judge import write

    write(document, tmp_path / "out")
    again = judge(parse([str(tmp_path / "out/judge.json"), "--training", str(file)]))
    assert again["counted"] == document["counted"]
    assert again["ended"] == document["ended"]
