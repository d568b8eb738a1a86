"""These tests check how data/loader.py and evaluation/benchmarks.py read JSONL files that other editors, languages
and programs have written."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data.loader import Problem, encode_problems, has_text_after_box, load_problems, odd_rows
from evaluation.benchmarks import choose_benchmarks

ROW = {"problem": "1+1?", "answer": "2"}


@pytest.mark.parametrize(
    "line, message",
    [
        (json.dumps(ROW | {"problem": "a\ud800"}), r"problem has '\\ud800' at character 1, half of a pair"),
        (json.dumps(ROW | {"demonstrations": ["x", "\udc00"]}), r"demonstrations has '\\udc00' at character 0"),
        (json.dumps(ROW | {"level": "\ud800"}), r"level has '\\ud800'"),
        (json.dumps(ROW | {"level": "all"}), "level is 'all', the name of the total in reports"),
        (json.dumps(ROW | {"level": "a_low"}), "level is 'a_low', the name of a limit of the accuracy of level 'a'"),
        (json.dumps(ROW | {"level": "all_high"}), "level is 'all_high', the name of a limit of"),
        ("[" * 100_000, "not valid JSON"),
        ('{"problem": ' * 100_000, "not valid JSON"),
        (
            '{"problem": ' + "[" * 200 + "]" * 200 + ', "answer": "2"}',
            r"problem is \[{7}\.\.\.\]{7}, expected a string",
        ),
        ('{"problem": "1+1?", "answer": ' + "1" * 5000 + "}", "not valid JSON: .*4300 digits"),
    ],
    ids=range(10),
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(ROW | {'level': 'a'})}\n\n{line}\n")
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}:3: {message}") as caught:
        load_problems(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 150


def test_text_of_any_language_and_a_byte_order_mark_are_read(tmp_path):
    rows = [ROW | {"problem": "𝑥 = 1\u2028?"}, ROW | {"problem": "é\ud83d\ude00"}]
    # the first line has the character U+2028 itself, and the second line has 😀 as two JSON escapes
    lines = [json.dumps(rows[0], ensure_ascii=False), json.dumps(rows[1])]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [p.problem for p in load_problems(tmp_path / "a.jsonl")] == ["𝑥 = 1\u2028?", "é😀"]


@pytest.mark.parametrize(
    "path, message",
    [
        ("data/train/gsm8k.jsonl", "gsm8k is not here yet: run  python data/prepare.py gsm8k"),
        ("data/benchmarks/aime24.jsonl", "run  python data/prepare.py aime24"),
        ("data/recipes/test.jsonl", "does not exist: give a JSONL file"),
        ("train/gsm8k.jsonl", "does not exist: give a JSONL file"),
        ("/dev/null", "data file '/dev/null' is not a regular file: give a JSONL file"),
    ],
)
def test_a_missing_file_is_one_line_with_the_fix(path, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_problems(tmp_path / path)


def test_no_name_of_a_file_is_not_called_a_folder():
    for nothing in ("", Path("")):
        with pytest.raises(ValueError, match=r"^data is empty or '.': give a JSONL file"):
            load_problems(nothing)


@pytest.mark.parametrize(
    "options, answer, message",
    [
        ([1, 2], "A", "options is [1, 2], expected a list of 2 to 26 non-empty strings"),
        ("abc", "A", "options is 'abc', expected a list"),
        (["x"], "A", "options is ['x'], expected a list"),
        (["x", " "], "A", "options is ['x', ' '], expected a list"),
        ([], "A", "options is [], expected a list"),
        (["x"] * 27, "A", "options is [" + "'x', " * 6 + "...], expected a list of 2 to 26"),
        (["x", "y"], "C", "answer is 'C', expected the letter of one of the options, A, B"),
        (["x", "y"], "b", "answer is 'b', expected the letter"),
        (["x", "y"], "AB", "answer is 'AB', expected the letter"),
    ],
)
def test_options_that_cannot_be_graded_are_refused(options, answer, message, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n" + json.dumps({"problem": "?", "answer": answer, "options": options}))
    with pytest.raises(ValueError, match="^" + re.escape(f"{path}:2: {message}")):
        choose_benchmarks("", path)


def test_options_belong_to_their_line_whatever_stands_between(tmp_path):
    rows = [
        ROW | {"problem": "a\u2028b"},
        {"problem": "?", "answer": "Z", "options": ["same", "same", *map(str, range(24))]},
    ]
    rows += [ROW | {"problem": "c"}]
    path: Path = tmp_path / "mine.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")
    (tmp_path / "mine.left_out.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    (result,) = choose_benchmarks("", path)
    assert result.options == {"mine-3": rows[1]["options"]} and len(result.problems) == 3 and result.left_out == 1


THINKING = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|><think>{{ '\n' }}"


@pytest.mark.parametrize(
    "text, left, message",
    [
        ("<think>\n1+1\\boxed{2}", "1+1\\boxed{2}", "lost the <think> that their prompt ends with"),
        ("<think>1+1\\boxed{2}", "<think>1+1\\boxed{2}", "WARNING: repeat the <think> that their prompt ends with"),
        ("1+1\\boxed{2}", "1+1\\boxed{2}", None),
        ("\\boxed{2} is it, or 3?", "\\boxed{2} is it, or 3?", "go on after their box"),
        ("$\\boxed{2}$.", "$\\boxed{2}$.", None),
    ],
)
def test_the_seam_between_prompt_and_demonstration(tokenizer, monkeypatch, text, left, message):
    """If a prompt ends with the tag that a demonstration begins with, the demonstration loses this tag.
    Demonstrations that repeat a tag without its line break, or go on after the box, are counted."""
    monkeypatch.setattr(tokenizer, "chat_template", THINKING)
    (encoded,), left_out, noted = encode_problems(tokenizer, [Problem("p", "1+1", "2", (text,))], 99, [2])
    assert tokenizer.decode(encoded.prompt_ids).endswith("<|assistant|><think>\n")
    assert tokenizer.decode(encoded.demonstrations[0]) == left
    assert not left_out and noted == ({message: 1} if message else {})


def test_a_demonstration_fits_its_budget_with_its_end_token(tokenizer):
    text = "1+1=2;\\boxed{2}"
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    for budget, left in ((tokens, {"too long": 1}), (tokens + 1, {})):
        (encoded,), left_out, _ = encode_problems(tokenizer, [Problem("p", "1+1", "2", (text,))], budget, [2, 100])
        assert left_out == left and len(encoded.demonstrations) == 1 - len(left)
        assert encoded.end_id == tokenizer.eos_token_id == 2  # of several


@pytest.mark.parametrize("end", [0, 1])
def test_any_end_token_inside_a_demonstration_counts(tokenizer, end):
    text = "1+1=2;\\boxed{2}"
    ends = [2, 2]
    ends[end] = tokenizer("=", add_special_tokens=False)["input_ids"][0]
    (encoded,), left_out, _ = encode_problems(tokenizer, [Problem("p", "1+1", "2", (text,))], 99, ends)
    assert left_out == {"end token inside": 1} and not encoded.demonstrations


@pytest.mark.parametrize("absent", ["null", "NaN"])
def test_null_is_an_absent_field(tmp_path, absent):
    """The packages `datasets` and pandas write null in rows that lack a field."""
    fields = "".join(f', "{name}": {absent}' for name in ("id", "system", "level", "demonstrations"))
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"problem": "1+1", "answer": "2"{fields}}}\n')
    assert load_problems(path) == [Problem("rows-1", "1+1", "2")]
    assert odd_rows(path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="the lines are for a shell of POSIX")
@pytest.mark.parametrize("form", ["Parquet", "Arrow", "gzip", "UTF-16"])
def test_the_line_that_converts_a_file_makes_rows_that_load(tmp_path, form):
    path = tmp_path / "it is.data"
    rows = [{"problem": "1+1", "answer": "2", "demonstrations": ["\\boxed{2}"]}, {"problem": "2+2", "answer": "4"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if form in ("gzip", "UTF-16"):
        path.write_bytes(gzip.compress(text.encode()) if form == "gzip" else text.encode("utf-16"))
    else:
        pytest.importorskip("pyarrow")
        table = pytest.importorskip("pandas").DataFrame(rows)
        table.to_parquet(path) if form == "Parquet" else table.to_feather(path)
    with pytest.raises(ValueError, match=f" is {form}, expected JSONL") as error:
        load_problems(path)
    line = str(error.value).split("convert it with  ")[1]
    subprocess.run(["sh", "-c", line.replace("python", sys.executable, 1)], check=True)
    first, second = load_problems(path.with_suffix(".converted.jsonl"))
    assert first.demonstrations == ("\\boxed{2}",) and second.demonstrations == ()


def test_text_after_the_box_is_looked_for_behind_the_last_place_of_the_answer():
    assert not has_text_after_box("2 and 2 are 4, \\boxed{2}.")
    assert has_text_after_box("\\boxed{2}, I think")


def test_what_was_hardly_meant_is_told_with_its_line(tmp_path):
    rows = [
        {"problem": "1+1", "answer": "2", "note": "others' fields are fine"},
        {"problem": "2+2", "answer": "4", "demonstration": ["\\boxed{4}"]},
        {"problem": "1+1", "answer": "2"},
        {"problem": "3+3", "answer": "6", "demonstration": ["\\boxed{6}"], "sistem": "x"},
        {"problem": "1+1", "answer": "2", "system": "another prompt"},
    ]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert odd_rows(path) == [
        f"{path}: 1 rows repeat a problem that stands above them (first at line 3)",
    ]
    assert odd_rows("data/recipes/train.jsonl") == []
