"""Rows of tasks: what is read, and mistakes named by file and line."""

from __future__ import annotations

import bz2
import dataclasses
import math
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from nomatmul.finetune.sources import load_rows
from nomatmul.finetune.tasks import TASKS, Task, find_task
from nomatmul.finetune.tsv import read_rows

OWN = Task("own", ".", ("sentence",), "label", None, ("accuracy",))


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def test_a_task_with_a_header_line(tmp_path: Path) -> None:
    file = write(tmp_path / "train.tsv", "sentence\tlabel", 'a "fine film\t1', "so bad \t0")
    rows, names = read_rows(file, TASKS["sst2"])
    assert (rows.texts, rows.labels) == ([('a "fine film',), ("so bad ",)], [1.0, 0.0])
    assert names == ("0", "1")


def test_cola_has_no_header_line_and_pairs_have_two_texts(tmp_path: Path) -> None:
    file = write(
        tmp_path / "cola.tsv", "gj04\t1\t\tFred watered the plants.", "gj04\t0\t*\tThey it."
    )
    rows, _ = read_rows(file, TASKS["cola"])
    assert rows.texts == [("Fred watered the plants.",), ("They it.",)]
    header = "index\tsentence1\tsentence2\tlabel"
    file = write(tmp_path / "rte.tsv", header, "0\ta\tb\tnot_entailment", "1\tc\td\tentailment")
    rows, names = read_rows(file, TASKS["rte"])
    assert (rows.texts, rows.labels) == ([("a", "b"), ("c", "d")], [1.0, 0.0])
    assert names[1] == "not_entailment"


def test_classes_of_ones_own_file_are_read_off_it(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "label\tsentence", "good\tx", "bad\ty", "good\tz")
    rows, names = read_rows(file, OWN)
    assert (names, rows.labels) == (("bad", "good"), [1.0, 0.0, 1.0])
    file = write(tmp_path / "b.tsv", "label\tsentence", *(f"{n}\tx" for n in (10, 9, 2)))
    assert read_rows(file, OWN)[1] == ("2", "9", "10")
    # words that only look like whole numbers
    file = write(tmp_path / "c.tsv", "label\tsentence", "m\u00b2\tx", "\u00b2\ty", "--1\tz")
    assert read_rows(file, OWN)[1] == ("--1", "m\u00b2", "\u00b2")
    file = write(tmp_path / "d.tsv", "label\tsentence", "\u00b2\tx", "--1\tz", "-1\tz")
    assert read_rows(file, OWN)[1] == ("--1", "-1", "\u00b2")


def test_line_ends_and_compression(tmp_path: Path) -> None:
    text = "\ufeffsentence\tlabel\r\none\u2028line\t1\r\nno final newline\t0"
    (tmp_path / "a.tsv").write_bytes(text.encode())
    (tmp_path / "a.tsv.bz2").write_bytes(bz2.compress(text.encode()))
    for name in ("a.tsv", "a.tsv.bz2"):
        rows, _ = read_rows(tmp_path / name, TASKS["sst2"])
        assert rows.texts == [("one\u2028line",), ("no final newline",)]


def test_a_regression_has_numbers(tmp_path: Path) -> None:
    task = find_task("own.tsv", ("a", "b"), "score", regression=True)
    file = write(tmp_path / "own.tsv", "a\tb\tscore", "x\ty\t2.5", "x\ty\t-1")
    rows, names = read_rows(file, task)
    assert (rows.labels, names) == ([2.5, -1.0], ())
    for word in ("much", "nan", "inf"):
        file = write(tmp_path / "own.tsv", "a\tb\tscore", f"x\ty\t{word}")
        with pytest.raises(ValueError, match=f"own.tsv, line 2: label '{word}' is no number"):
            read_rows(file, task)


def test_a_held_out_file_may_be_called_train(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.tsv", "sentence\tlabel", f"{name}\t1", f"{name}\t0")
    rows, _ = load_rows(OWN, tmp_path / "a/train.tsv", tmp_path / "b/train.tsv")
    texts = {name: part.texts for name, part in rows.items()}
    assert texts == {"train": [("a",), ("a",)], "held_out": [("b",), ("b",)]}


HEAD = "sentence\tlabel"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((HEAD, "a\t1", "", "b\t0"), "bad.tsv, line 3: empty row"),
        ((HEAD, "a\t1", "\t", "b\t0"), "bad.tsv, line 3: empty row"),
        ((HEAD, "a\t1", "b"), "bad.tsv, line 3: 1 columns, expected 2"),
        ((HEAD, "a\t1", "b\t0\t7"), "bad.tsv, line 3: 3 columns, expected 2"),
        ((HEAD, " \t1"), "bad.tsv, line 2: column 1 is empty"),
        ((HEAD, "a\t "), "bad.tsv, line 2: column 2 is empty"),
        ((HEAD, "a\t1", "b\t2"), "bad.tsv, line 3: label '2' is not one of 0, 1"),
        ((HEAD, "a\t-1"), "bad.tsv, line 2: label '-1' is not one of 0, 1"),
        (("text\tlabel", "a\t1"), "bad.tsv has no column 'sentence'; its header names text, label"),
        (("sentence\tgold", "a\t1"), "bad.tsv has no column 'label'"),
        ((HEAD,), "bad.tsv has no rows"),
        (("",), "bad.tsv, line 1: no header line"),
        ((), "bad.tsv, line 1: no header line"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message) as info:
        read_rows(write(tmp_path / "bad.tsv", *lines), dataclasses.replace(OWN, labels=("0", "1")))
    assert "\n" not in str(info.value)


def test_glues_files_are_read_as_they_are_shipped(tmp_path: Path) -> None:
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    row = "7\t1\t2\tIs the oven on?\tIs the oven hot?\t1"
    short, empty = '"\tWhy so?\t0', "8\t1\t2\t\tWhat?\t0"
    file = write(tmp_path / "train.tsv", header, row, short, row, "", empty, row, row, "", "")
    rows, _ = read_rows(file, TASKS["qqp"])
    assert (len(rows), rows.left_out) == (4, 3)  # blank lines at the end are no rows
    mnli = "index\tsentence1\tsentence2\tlabel1\tgold_label"
    file = write(
        tmp_path / "dev_matched.tsv", mnli, "1\ta\tb\tneutral\tneutral", "2\tc\td\tneutral\t-"
    )
    rows, _ = read_rows(file, TASKS["mnli"])
    assert (rows.labels, rows.left_out) == ([1.0], 1)
    with pytest.raises(ValueError, match=r"line 3: label 'maybe' is not one of"):
        read_rows(write(file, mnli, "1\ta\tb\tx\tneutral", "2\tc\td\tx\tmaybe"), TASKS["mnli"])


def test_another_file_than_the_task_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "train.tsv", "sentence\tlabel", "a\t1", "b", "c")
    with pytest.raises(ValueError, match=r"2 of 3 rows are no rows of sst2 \(.*line 3: 1 columns"):
        read_rows(file, TASKS["sst2"])


def test_blank_lines_at_the_end_are_no_rows(tmp_path: Path) -> None:
    file = write(tmp_path / "own.tsv", HEAD, "a\t1", "b\t0", "", "\t", "")
    rows, _ = read_rows(file, OWN)
    assert (len(rows), rows.left_out) == (2, 0)


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "latin.tsv").write_bytes(b"sentence\tlabel\ncaf\xe9\t1\n")
    with pytest.raises(ValueError, match=r"latin.tsv, line 2: not UTF-8"):
        read_rows(tmp_path / "latin.tsv", TASKS["sst2"])
    with pytest.raises(OSError, match=r"absent.tsv"):
        read_rows(tmp_path / "absent.tsv", TASKS["sst2"])
    same = write(tmp_path / "same.tsv", "sentence\tlabel", "a\tx", "b\tx")
    with pytest.raises(ValueError, match="all rows have the label 'x'"):
        read_rows(same, OWN)
    many = write(tmp_path / "many.tsv", "sentence\tlabel", *(f"a\t{i / 7}" for i in range(1001)))
    with pytest.raises(ValueError, match=r"1001 different labels.*--regression"):
        read_rows(many, OWN)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("sentence\tlabel\na\tx\n".encode("utf-16"), "own is UTF-16.*iconv"),
        (b'{"sentence": "a", "label": 1}\n', "own holds JSON, not tab-separated"),
        (b'[\n {"sentence": "a", "label": 1}\n]', "own holds JSON, not tab-separated"),
        (b"sentence,label\na,1\n", "own: commas are not read"),
        (b"PK\x03\x04\x14\0", "own is a zip archive or an office document"),
    ],
)
def test_tables_of_another_kind_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "own").write_bytes(data)
    with pytest.raises(ValueError, match=message) as info:
        read_rows(tmp_path / "own", OWN)
    assert "\n" not in str(info.value)


def test_rows_through_pipes(tmp_path: Path) -> None:
    """Each pipe is read once, from its first byte; one pipe cannot serve for both."""
    text = "sentence\tlabel\n" + "".join(f"row {i}\t{i % 2}\n" for i in range(3000))
    names, writers = [tmp_path / "one", tmp_path / "two"], []
    for name in names:
        os.mkfifo(name)
        writers.append(
            threading.Thread(target=name.write_bytes, args=(bz2.compress(text.encode()),))
        )
        writers[-1].start()
    rows, classes = load_rows(find_task(str(names[0])), *names)
    for writer in writers:
        writer.join()
    assert find_task(str(names[0])).name == "pipe"
    assert classes == ("0", "1")
    for part in (rows["train"], rows["two"]):
        assert part.texts == [(f"row {i}",) for i in range(3000)]
    with pytest.raises(ValueError, match="is named twice"):
        load_rows(find_task(str(names[0])), names[0], names[0])


def test_tasks_are_found_by_name() -> None:
    assert find_task("SST-2") is TASKS["sst2"]
    assert (TASKS["cola"].epochs, TASKS["sst2"].epochs) == (15, 5)
    assert find_task("mine.tsv").metrics == ("accuracy", "macro_f1")
    for name, message in (
        ("sst3", "unknown task 'sst3': name one of cola, sst2"),
        ("a.csv", "commas are not read"),
        ("A.CSV.gz", "commas are not read"),
    ):
        with pytest.raises(ValueError, match=message):
            find_task(name)
    with pytest.raises(ValueError, match="sst2 is a task of GLUE"):
        find_task("sst2", ("text",))
    with pytest.raises(ValueError, match="3 text columns"):
        find_task("a.tsv", ("a", "b", "c"))


def test_scores_are_the_definitions() -> None:
    from nomatmul.evaluate.glue import METRICS, glue_scores

    found, truth = [1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 1]
    tp, fp, fn, tn = 3, 1, 1, 1
    got = glue_scores(METRICS, found, truth)
    assert got["accuracy"] == pytest.approx(4 / 6)
    assert got["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    other = 2 * tn / (2 * tn + fp + fn)
    assert got["macro_f1"] == pytest.approx((got["f1"] + other) / 2)
    root = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert got["matthews"] == pytest.approx((tp * tn - fp * fn) / root)
    ranks = glue_scores(("pearson", "spearman"), [1, 2, 3, 40], [1.0, 2.0, 3.0, 4.0])
    assert ranks["spearman"] == pytest.approx(1)
    assert 0.7 < ranks["pearson"] < 0.9
    constant = glue_scores(("pearson", "spearman", "matthews"), [1, 1, 1], [0, 1, 1])
    assert set(constant.values()) == {0.0}
    for bad, message in (
        ((("accuracy",), [1], [1, 2]), "predictions for"),
        ((("accuracy",), [], []), "no rows"),
        ((("pearson",), [math.nan, 1], [0, 1]), "must be finite"),
        ((("bleu",), [1], [1]), "metric 'bleu' is not known"),
    ):
        with pytest.raises(ValueError, match=message):
            glue_scores(*bad)


def test_rows_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for `datasets`: names of the set, its splits and columns."""
    asked = []

    def load_dataset(name: str, task: str, split: str) -> list[dict[str, object]]:
        asked.append((name, task, split))
        labels = [0, 2, 1] if split == "train" else [2, 1]
        return [{"premise": f"p{i}", "hypothesis": "h", "label": i} for i in labels]

    fake = SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    rows, names = load_rows(TASKS["mnli"], "hub")
    assert names == ("entailment", "neutral", "contradiction")
    assert list(rows) == ["train", "validation_matched", "validation_mismatched"]
    assert asked[1] == ("nyu-mll/glue", "mnli", "validation_matched")
    assert rows["train"].labels == [0.0, 2.0, 1.0]
    assert rows["train"].texts[0] == ("p0", "h")
    fake.load_dataset = lambda *_, split: [{"premise": "p", "hypothesis": "h", "label": -1}]
    with pytest.raises(ValueError, match="mnli train, row 0: label -1 is out of range"):
        load_rows(TASKS["mnli"], "hub")
    with pytest.raises(ValueError, match="own is no task of GLUE"):
        load_rows(OWN, "hub")


def test_a_file_of_ones_own_that_is_missing_is_named(tmp_path):
    for path, message in (
        (tmp_path / "reviews.tsv", r"reviews\.tsv does not exist"),
        (tmp_path, "is a directory, not a file"),
    ):
        task = find_task(str(tmp_path / "reviews.tsv"))
        with pytest.raises(ValueError, match=message):
            load_rows(task, path)
