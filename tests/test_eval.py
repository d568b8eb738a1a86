"""These tests check eval.py: counts of scripted responses, multiple choice, the evaluation folder, and wrong
input."""

import argparse
import dataclasses
import hashlib
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import contents
from transformers import LlamaConfig, MambaConfig

import eval
from data.loader import Problem, encode_problems
from eval import evaluate
from evaluation import folder as folder_of_evaluation
from evaluation.benchmarks import PAPER, Benchmark, choose_benchmarks, load_benchmark
from evaluation.multiple_choice import grade_response, named_option, question
from evaluation.statistics import summarize
from reward import MATH, load_reward
from sample import Row

# ---- a scripted model

SCRIPT = {  # problem id: its samples, which are right, wrong, without a readable box, or cut off by the limit
    "a": ["=12;\\boxed{12}", "\\boxed{13}", "no box", "\\boxed{12}cut"],
    "b": ["\\boxed{7}", "\\boxed{7.0}", "\\boxed{+7}", "\\boxed{7}"],
    "c": ["\\boxed{1}", "", "\\boxed{", "9-cut"],
}
PROBLEMS = [
    Problem(id="a", problem="5+7?", answer="12", level="easy"),
    Problem(id="b", problem="3+4?", answer="7", level="easy"),
    Problem(id="c", problem="9-4?", answer="5", level="hard"),
]


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    """Makes eval.py take responses from SCRIPT in place of a model's, and returns (model, encoded problems)."""
    ends = [tokenizer.eos_token_id]
    config = SimpleNamespace(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)

    def answered(row: Row) -> Row:
        text = SCRIPT[row.key[2]][row.key[3]]
        truncated, text = text.endswith("cut"), text.removesuffix("cut")
        response = tokenizer(text, add_special_tokens=False)["input_ids"] + ([] if truncated else ends)
        return dataclasses.replace(row, response=response, truncated=truncated, text=text)

    def generate(model, tokenizer, rows, max_response_tokens, temperature, **_):
        return [answered(row) for row in rows]

    monkeypatch.setattr(eval, "generate", generate)
    return SimpleNamespace(generation_config=config), encode_problems(tokenizer, PROBLEMS, 99, ends)[0]


def test_evaluate_and_summarize_match_a_hand_count(scripted, tokenizer):
    model, encoded = scripted
    answers = evaluate(model, tokenizer, PROBLEMS, encoded, samples=4, temperature=1.0, max_response_tokens=99)
    assert [a.right for a in answers] == [1, 4, 0]
    assert [a.truncated for a in answers] == [1, 0, 1]
    assert [a.unread for a in answers] == [1, 0, 2]
    # a response has a token for each character, one for \boxed{, and an end token if it was not cut off
    assert answers[0].tokens == (4 + 1 + 2 + 1 + 1) + (1 + 2 + 1 + 1) + (6 + 1) + (1 + 2 + 1)
    table = summarize(answers)
    assert list(table) == ["easy", "hard", "all"]
    everything = table["all"]
    assert everything["problems"] == 3 and everything["samples"] == 4
    assert everything["accuracy"] == pytest.approx(5 / 12)
    assert everything["truncated"] == pytest.approx(2 / 12)
    assert everything["unread"] == pytest.approx(3 / 12)
    assert everything["pass@1"] == pytest.approx(5 / 12)
    # pass@2 counts pairs of samples: a right sample is in 3 of the 6 pairs of problem a, in all pairs of b, and in
    # none of c
    assert everything["pass@2"] == pytest.approx((3 / 6 + 1 + 0) / 3)
    assert everything["pass@4"] == pytest.approx(2 / 3)
    assert "pass@8" not in everything
    assert table["easy"]["accuracy"] == pytest.approx(5 / 8)
    assert table["hard"]["accuracy"] == 0 and table["hard"]["high"] > 0


def test_draws_belong_to_seed_problem_and_sample(scripted, tokenizer, monkeypatch):
    """A sample's random numbers depend neither on the order of the problems nor on which other problems are
    evaluated."""
    (model, encoded), answer, keys = scripted, eval.generate, []

    def noting(model, tokenizer, rows, *args, **settings):
        assert args == (99, 0.7)
        keys.append({row.key for row in rows})
        return answer(model, tokenizer, rows, *args, **settings)

    monkeypatch.setattr(eval, "generate", noting)
    for seed, order in ((7, (0, 1, 2)), (7, (2, 1)), (8, (0, 1, 2))):
        choice = [PROBLEMS[i] for i in order], [encoded[i] for i in order]
        evaluate(model, tokenizer, *choice, samples=2, temperature=0.7, max_response_tokens=99, seed=seed)
    assert [len(result) for result in keys] == [6, 4, 6]
    assert keys[1] < keys[0] and not keys[0] & keys[2]


# ---- multiple choice

OPTIONS = ["iron", "1/2", "the sum of A and B.", "0.5 m"]


@pytest.mark.parametrize(
    "boxed, letter",
    [
        ("A", "A"),
        (" (B) ", "B"),
        ("\\text{C.}", "C"),
        ("$\\mathbf{D}$", "D"),
        ("E", None),  # the question has only the options A to D
        ("a", None),
        ("A) iron", "A"),
        ("(A) Iron.", "A"),
        ("A) lead", None),
        ("\\text{Iron}", "A"),
        ("the  sum of A and B", "C"),
        ("\\frac{1}{2}", "B"),
        ("iron and steel", None),
        ("A, B", None),
    ],
)
def test_an_option_is_named_by_letter_or_text(boxed, letter):
    assert named_option(boxed, OPTIONS) == letter


def test_two_options_of_the_same_value_are_told_apart_by_words_or_letter():
    options = ["2", "2.0", "3"]
    assert [named_option(boxed, options) for boxed in ("2", "2.0", "B", "\\frac{4}{2}")] == ["A", "B", "B", None]


def test_grading_a_choice():
    assert grade_response(MATH, "so \\boxed{iron}", Problem("p", "?", "A"), OPTIONS) == (1.0, True)
    assert grade_response(MATH, "so \\boxed{B}", Problem("p", "?", "A"), OPTIONS) == (0.0, True)
    assert grade_response(MATH, "so A", Problem("p", "?", "A"), OPTIONS) == (0.0, False)
    assert grade_response(MATH, "\\boxed{C}", Problem("p", "?", "C")) == (1.0, True)
    assert question("Which?", ["x", "y"]) == "Which?\n\nA) x\nB) y"
    with pytest.raises(ValueError, match="has 1 options"):
        question("Which?", ["x"])


def test_options_and_settings_reach_the_sampler(tmp_path, monkeypatch):
    """eval.sample_missing gives the sampling function `respond` full batches. After a stop the first batch has only
    the samples that the unfinished batch lacks."""
    result: list[tuple] = []

    def respond(model, tokenizer, draws, **settings):
        assert (model, tokenizer) == ("model", "tokenizer") and settings == how
        result.append(tuple(draws))
        rest = {"reward": 0.0, "read": True, "truncated": False, "tokens": 3, "response": ""}
        return [{"id": draw.problem.id, "sample": draw.sample} | rest for draw in draws]

    monkeypatch.setattr(eval, "respond", respond)
    how = {"reward": MATH, "temperature": 0.7, "max_response_tokens": 33, "seed": 5}
    how |= {"rows_per_call": 3, "decode": None}
    problems = [Problem("p", "1+1?", "2"), Problem("q", "Which?", "A")]
    benchmark = Benchmark("mine", Path(), 2, problems, {"q": ["x", "y"]}, 0, ["p ids", "q ids"])
    draws = [(problems[i], "pq"[i] + " ids", [(), ["x", "y"]][i], k) for i in (0, 1) for k in (0, 1)]
    for _ in range(2):  # a complete evaluation samples nothing the second time
        eval.sample_missing("model", "tokenizer", tmp_path, [benchmark], SimpleNamespace(**how))
        assert result == [tuple(draws[:3]), tuple(draws[3:])]
    (tmp_path / "generations.jsonl").write_text(
        "".join((tmp_path / "generations.jsonl").read_text().splitlines(keepends=True)[:1])
    )
    result.clear()
    eval.sample_missing("model", "tokenizer", tmp_path, [benchmark], SimpleNamespace(**how))
    assert result == [tuple(draws[1:3]), tuple(draws[3:])]


def test_regrading_draws_the_same_problems_and_reads_their_options(tmp_path, capsys):
    row = {"problem": "Which?", "answer": "A", "options": ["iron", "lead"], "level": "easy"}
    data = write_benchmark(tmp_path / "mine.jsonl", [row, row | {"problem": "The second of its level?"}])
    stored = {"model": "m", "problems_per_level": 1, "system": None, "reward": "math"}
    stored |= {"benchmarks": {"mine": {"file": str(data), "samples": 2, "sha256": "of the file before a correction"}}}
    (tmp_path / "settings.json").write_text(json.dumps(stored))
    rest = {"reward": 0.0, "read": False, "truncated": False, "tokens": 3}
    rows = [
        {"benchmark": "mine", "id": "mine-1", "sample": k, "response": f"\\boxed{{{text}}}"} | rest
        for k, text in enumerate(("iron", "lead"))
    ]
    write_benchmark(tmp_path / "generations.jsonl", rows)
    settings, answers = eval.regrade(tmp_path)
    assert "2 responses graded again, 1 grades changed" in capsys.readouterr().out
    (answer,) = answers["mine"]
    assert (answer.samples, answer.right, answer.unread) == (2, 1, 0) and settings["reward"] == "math"
    assert settings["benchmarks"]["mine"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    settings, answers = eval.regrade(tmp_path, "exact")  # the reward "exact" does not read options
    assert (answers["mine"][0].right, settings["reward"]) == (0, "exact")
    assert json.loads((tmp_path / "settings.json").read_text())["reward"] == "exact"
    write_benchmark(tmp_path / "generations.jsonl", rows[:1])
    with pytest.raises(ValueError, match="is not complete, so it has no results yet"):
        eval.regrade(tmp_path)


def test_the_graders_version_is_also_that_of_multiple_choice_where_options_are_read(monkeypatch):
    def versions() -> list[str]:
        return [folder_of_evaluation.grader_version(load_reward(name)) for name in ("math", "exact")]

    before = versions()
    monkeypatch.setattr(folder_of_evaluation, "sha256", lambda *paths: "of a changed file")
    assert [old != new for old, new in zip(before, versions())] == [True, False]


# ---- the evaluation folder


WORDS = (
    "--model data/base --benchmarks embedded --problems 3 --samples 4 --temperature 1 "
    "--max_response_tokens 40 --rows_per_call 10"
)


def arguments(**inputs) -> argparse.Namespace:
    args = eval.parse_args(WORDS.split())
    for name, value in inputs.items():
        setattr(args, name, value)
    return args


def without_date(folder: Path) -> dict:
    results = json.loads((folder / "results.json").read_text())
    results["settings"].pop("date")
    return results


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("eval") / "whole"
    eval.run(arguments(out=folder))
    return folder


@pytest.fixture
def no_figure(monkeypatch):
    monkeypatch.setattr(eval, "figure", lambda folder: "")


def test_a_run_keeps_every_response_and_setting(finished, tokenizer):
    rows = [json.loads(line) for line in (finished / "generations.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 3 * 4
    assert set(rows[0]) == {"benchmark", "id", "sample", "reward", "read", "truncated", "tokens", "response"}
    settings = json.loads((finished / "settings.json").read_text())
    for key in ("weights", "chat_template", "first_prompt", "grader", "versions", "date", "device"):
        assert settings[key], key
    assert settings["first_prompt"].startswith(tokenizer.bos_token)
    assert settings["temperature"] == 1.0 and settings["top_p"] == 1.0 and settings["max_response_tokens"] == 40
    results = json.loads((finished / "results.json").read_text())
    right = sum(row["reward"] for row in rows)
    assert results["results"]["embedded"]["all"]["accuracy"] == pytest.approx(right / 48)
    assert sum(c for counts in results["right"]["embedded"].values() for c in counts.values()) == right
    text = (finished / "results.md").read_text()
    assert "| embedded: ood" in text and "pass@k" in text and settings["grader"] in text
    assert (finished / "passk.png").stat().st_size > 10_000


@pytest.mark.usefixtures("no_figure")
def test_the_seed_of_the_command_line_decides_what_is_sampled(finished, tmp_path):
    """Another seed gives other responses. The same seed gives the same responses, also to fewer problems and with
    fewer samples."""
    result = {}
    for seed in ("0", "1"):
        words = f"--seed {seed} --problems 1 --samples 2 --out {tmp_path / seed}"
        eval.run(eval.parse_args([*WORDS.split(), *words.split()]))
        result[seed] = (tmp_path / seed / "generations.jsonl").read_text().splitlines()
        assert json.loads((tmp_path / seed / "settings.json").read_text())["seed"] == int(seed)
    assert set(result["0"]) < set((finished / "generations.jsonl").read_text().splitlines())
    # different seeds can give the same response to an easy problem
    assert len(result["1"]) == 8 and len(set(result["0"]) & set(result["1"])) < 4


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_stopped_evaluation_continues_to_the_same_files(
    finished, tmp_path, monkeypatch, capsys, stop_after, no_figure
):
    folder, batches, append = tmp_path / "stopped", [], eval.append_rows
    args = arguments(out=folder)

    def stopping(path, rows):
        batches.append(len(rows))
        append(path, rows)
        if len(batches) == stop_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(eval, "append_rows", stopping)
        patch.setattr(eval, "parse_args", lambda words: args)
        patch.setattr(sys, "argv", ["eval.py", "--samples", "4"])
        with pytest.raises(SystemExit) as stop:
            eval.main()
    assert stop.value.code == 130 and f"go on: python eval.py --samples 4 --out {folder}" in capsys.readouterr().err
    assert max(batches) <= 10  # each batch of responses is written before the next is sampled
    log, lines = folder / "generations.jsonl", (finished / "generations.jsonl").read_bytes().splitlines(keepends=True)
    done = 10 * stop_after
    whole = 3 if stop_after == 1 else 9
    # the log's last line is cut short, or only its line feed is missing
    last = lines[done + whole][: 25 if stop_after == 1 else -1]
    with log.open("ab") as file:
        file.write(b"".join(lines[done : done + whole]) + last)
    batches.clear()
    with monkeypatch.context() as patch:
        patch.setattr(eval, "append_rows", lambda path, rows: (batches.append(len(rows)), append(path, rows)))
        eval.run(arguments(out=folder))
    assert batches == [10 - whole] + [10] * (3 - stop_after) + [8]  # stored responses are not sampled again
    assert log.read_bytes() == (finished / "generations.jsonl").read_bytes()
    assert without_date(folder) == without_date(finished)


@pytest.mark.usefixtures("no_figure")
def test_an_evaluation_may_go_on_with_other_batches(finished, tmp_path, monkeypatch):
    """An evaluation that continues with another number of ranks or on another device samples the same tokens, and
    adds both to its settings."""
    folder = copy(finished, tmp_path / "begun")
    lines = (finished / "generations.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "generations.jsonl").write_bytes(b"".join(lines[:25]))
    stored = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(stored | {"ranks": 8, "device": "cuda:0", "rows_per_call": 20}))
    decoded, generate = [], eval.generate
    monkeypatch.setattr(eval, "generate", lambda *a, **k: decoded.append(len(a[2])) or generate(*a, **k))
    eval.run(arguments(out=folder, rows_per_call=None))
    # rows_per_call is 20 as in the stored settings, so the batches of the 48 responses end at 20, 40 and 48
    assert decoded == [15, 8]
    assert (folder / "generations.jsonl").read_bytes() == b"".join(lines)
    settings = json.loads((folder / "results.json").read_text())["settings"]
    (went_on,) = settings["continued"]
    assert went_on | {"date": ""} == {
        "device": "cpu",
        "ranks": 1,
        "rows_per_call": 20,
        "date": "",
    }
    assert settings["ranks"] == 8
    eval.run(arguments(out=folder))  # a complete evaluation samples nothing and keeps its settings
    assert folder_of_evaluation.stored_settings(folder)["continued"] == [went_on]
    # a continued evaluation adds an entry to "continued" only if ranks, device or rows_per_call changed
    for _ in range(2):
        (folder / "generations.jsonl").write_bytes(b"".join(lines[:40]))
        (folder / "results.json").unlink(missing_ok=True)
        eval.run(arguments(out=folder))
        assert [c["rows_per_call"] for c in folder_of_evaluation.stored_settings(folder)["continued"]] == [20, 10]


@pytest.mark.usefixtures("no_figure")
def test_each_rank_gets_full_calls(finished, tmp_path, monkeypatch):
    """Two ranks with rows_per_call 10 sample 20 responses per batch, so 48 responses make batches of 20, 20 and 8."""
    batches, append = [], eval.append_rows
    monkeypatch.setattr(eval.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(eval.distributed, "from_rank_0", lambda value: value)
    monkeypatch.setattr("sample.gather_dict", lambda mine: mine)
    monkeypatch.setattr(eval, "append_rows", lambda path, rows: (batches.append(len(rows)), append(path, rows)))
    eval.run(arguments(out=tmp_path / "two"))
    assert batches == [20, 20, 8]
    assert (tmp_path / "two" / "generations.jsonl").read_bytes() == (finished / "generations.jsonl").read_bytes()


def test_as_many_rows_share_a_call_as_a_gpu_holds(monkeypatch):
    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    model = SimpleNamespace(config=config, device=torch.device("cuda"))
    # `cache` is the bytes of a row's keys and values in 3 bf16 layers, with its 100 tokens rounded up to 256
    cache = 256 * 3 * 2 * 2 * 16 * 2
    most = 256 * 2 * 4 * 16 * 2  # `most` is the bytes of one layer's keys and values, repeated for all query heads
    for free, rows in ((1e10, 512), (10 * (cache + most) / 0.8 + 1, 10), (cache / 2, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (int(free), 0))
        assert eval.rows_that_fit(model, 100) == rows
    # if the GPU of rank 1 has memory for 7 rows only, every rank takes 7 rows
    monkeypatch.setattr(eval.distributed, "gather_dict", lambda mine: mine | {1: 7})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 0))
    assert eval.rows_that_fit(model, 100) == 7
    model.config = MambaConfig()
    with pytest.raises(
        ValueError, match=r"the memory of a response is unknown \(.* no attention heads\): give --rows_per_call"
    ):
        eval.rows_that_fit(model, 100)
    monkeypatch.undo()
    model.device = torch.device("cpu")
    assert eval.rows_that_fit(model, 10**9) == 512


def test_a_reward_that_raises_is_one_line_and_goes_on_mended(tmp_path, monkeypatch, capsys, no_figure):
    """The evaluation accepts the mended reward in place of the faulty reward, because no response has a grade yet."""
    reward = tmp_path / "own.py"
    words = ["--model", "data/base", "--benchmarks", "embedded", "--problems", "1", "--temperature", "0"]
    words += ["--max_response_tokens", "40", "--reward", str(reward), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *words])
    reward.write_text("def reward(text, problem):\n    return 1 / 0\n")
    with pytest.raises(SystemExit) as stop:
        eval.main()
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert f"ZeroDivisionError: division by zero ({reward}:2); mend this fault; to go on: python eval.py" in error
    reward.write_text("def reward(text, problem):\n    return 0.5\n")
    eval.main()
    assert json.loads((tmp_path / "run" / "results.json").read_text())["settings"]["reward"] == f"{reward}:reward"


def test_a_full_gpu_is_one_line(monkeypatch, capsys):
    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(eval, "run", full)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model", "data/base", "--benchmarks", "embedded"])
    with pytest.raises(SystemExit) as stop:
        eval.main()
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert error.startswith("eval.py: the GPU's memory is full: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "--rows_per_call" in error and "--max_response_tokens" in error and "to go on: python eval.py" in error


@pytest.mark.usefixtures("no_figure")
def test_a_complete_evaluation_samples_nothing_again(finished, monkeypatch):
    monkeypatch.setattr(eval, "respond", None)
    before = (finished / "generations.jsonl").read_bytes()
    eval.run(arguments(out=finished))
    assert (finished / "generations.jsonl").read_bytes() == before


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name in ("settings.json", "generations.jsonl"):
        (target / name).write_bytes((folder / name).read_bytes())
    return target


@pytest.mark.parametrize("regrade", [False, True])
def test_more_responses_than_problems_are_refused(finished, tmp_path, regrade):
    folder = copy(finished, tmp_path / "more")
    for extra in (b"<<<<<<< HEAD\n", (folder / "generations.jsonl").read_bytes().splitlines(keepends=True)[-1]):
        longer = (finished / "generations.jsonl").read_bytes() + extra
        (folder / "generations.jsonl").write_bytes(longer)
        with pytest.raises(ValueError, match=r"generations.jsonl:49: found more responses than the 48"):
            eval.regrade(folder) if regrade else eval.run(arguments(out=folder))
        assert (folder / "generations.jsonl").read_bytes() == longer


@pytest.mark.parametrize(
    "bad, message",
    [
        (b"garbage", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "found [1, 2], expected a JSON object with benchmark, id,"),
        (b'{"benchmark": "embedded", "id": "x", "sample": 0}', "expected a JSON object with benchmark, id,"),
    ],
)
@pytest.mark.parametrize("regrade", [False, True])
def test_a_damaged_line_is_named_and_nothing_is_lost(finished, tmp_path, bad, message, regrade):
    folder = copy(finished, tmp_path / "damaged")
    lines = (folder / "generations.jsonl").read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], bad + b"\n", *lines[3:]])
    (folder / "generations.jsonl").write_bytes(damaged)
    with pytest.raises(ValueError, match=f"generations.jsonl:3: .*{re.escape(message)}.*: restore it"):
        eval.regrade(folder) if regrade else eval.run(arguments(out=folder))
    assert (folder / "generations.jsonl").read_bytes() == damaged
    assert sorted(path.name for path in folder.iterdir() if path.name != "lock") == [
        "generations.jsonl",
        "settings.json",
    ]
    (folder / "settings.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"settings.json: not valid JSON"):
        eval.regrade(folder) if regrade else eval.run(arguments(out=folder))


def test_settings_without_a_field_are_refused_before_anything_is_graded(finished, tmp_path):
    folder = copy(finished, tmp_path / "damaged")
    settings = json.loads((folder / "settings.json").read_text())
    del settings["benchmarks"]
    (folder / "settings.json").write_text(json.dumps(settings))
    before = contents(folder)
    with pytest.raises(ValueError, match=r"settings.json.*expected a JSON object with model, benchmarks.*restore"):
        eval.regrade(folder)
    assert contents(folder) == before
    (folder / "settings.json").write_text(json.dumps(settings | {"benchmarks": {"aime24": {}}}))
    with pytest.raises(ValueError, match=r"settings.json: benchmark aime24: .*expected a JSON object with file, sam"):
        eval.regrade(folder)


def test_a_stored_reward_that_is_no_number_is_refused(finished, tmp_path):
    folder = copy(finished, tmp_path / "damaged")
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    rows[1]["reward"] = "x"
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"generations.jsonl:2: reward is 'x', expected a number: restore it"):
        eval.run(arguments(out=folder))


@pytest.mark.usefixtures("no_figure")
def test_regrading_restores_changed_grades(finished, tmp_path, monkeypatch, capsys):
    folder = copy(finished, tmp_path / "regraded")
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    uncut = [row for row in rows if not row["truncated"]]
    for row in random.Random(0).sample(uncut, 5):
        row["reward"] = 1.0 - row["reward"]
    (folder / "generations.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    monkeypatch.setattr(eval, "respond", None)
    eval.report(folder, *eval.regrade(folder))
    assert "48 responses graded again, 5 grades changed" in capsys.readouterr().out
    assert (folder / "generations.jsonl").read_bytes() == (finished / "generations.jsonl").read_bytes()
    assert without_date(folder)["results"] == without_date(finished)["results"]
    monkeypatch.setattr(folder_of_evaluation, "grader_version", lambda reward: "another")
    with pytest.raises(ValueError, match=r"graded by another version: first run {2}eval.py --regrade"):
        eval.run(arguments(out=folder))


def test_a_response_that_was_cut_off_stays_wrong_when_it_is_graded_again(finished, tmp_path, capsys):
    """The response that was cut off stays wrong although its box has the right answer."""
    folder = copy(finished, tmp_path / "regraded")
    rows = [json.loads(line) for line in (folder / "generations.jsonl").read_text().splitlines()]
    place = next(i for i, row in enumerate(rows) if row["reward"] == 1)
    rows[place] |= {"truncated": True, "reward": 0.0}
    (folder / "generations.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    before = (folder / "generations.jsonl").read_bytes()
    folder_of_evaluation.regrade(folder)
    assert "48 responses graded again, 0 grades changed" in capsys.readouterr().out
    assert (folder / "generations.jsonl").read_bytes() == before


def test_a_full_disk_leaves_the_grades_as_they_were(finished, tmp_path, monkeypatch, capsys):
    folder = copy(finished, tmp_path / "full")
    before = contents(folder)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_of_evaluation, "grade_response", full)
    monkeypatch.setattr(sys, "argv", ["eval.py", "--regrade", str(folder)])
    with pytest.raises(SystemExit) as stop:
        eval.main()
    message = f"writing to {folder}/generations.jsonl failed (No space left on device); "
    message += f"to go on: python eval.py --regrade {folder}\n"
    assert stop.value.code == 1 and capsys.readouterr().err == f"eval.py: {message}"
    assert contents(folder) | {"lock": b""} == before | {"lock": b""}


@pytest.mark.parametrize("written", [1, 2])
def test_grading_that_was_cut_off_has_to_be_done_again(finished, tmp_path, monkeypatch, written):
    """A stop before the new grades are written leaves the old grades. After a stop between writing grades and
    settings, settings.json names no grader."""
    folder, plain, calls = copy(finished, tmp_path / "cut"), folder_of_evaluation.write_settings, []
    (tmp_path / "own.py").write_text("def reward(response, problem):\n    return 0.25\n")

    def write(file, settings):
        calls.append(settings)
        if len(calls) == written:
            raise KeyboardInterrupt
        plain(file, settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder_of_evaluation, "write_settings", write)
        eval.regrade(folder, str(tmp_path / "own.py"))
    untouched = (folder / "generations.jsonl").read_bytes() == (finished / "generations.jsonl").read_bytes()
    assert untouched == (written == 1)
    monkeypatch.setattr(eval, "respond", None)
    if written == 2:
        with pytest.raises(ValueError, match=r"graded by another version: first run {2}eval.py --regrade"):
            eval.run(arguments(out=folder))
        eval.regrade(folder)
    assert json.loads((folder / "settings.json").read_text())["reward"] == "math"


def test_the_folder_of_another_evaluation_is_left_alone(finished, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"other settings .*temperature: 1.0"):
        eval.run(arguments(out=finished, temperature=0.5))
    with monkeypatch.context() as patch:
        patch.setattr(folder_of_evaluation, "model_fingerprint", lambda *a: "of another model")
        with pytest.raises(ValueError, match=r"other settings .*weights"):
            eval.run(arguments(out=finished))
    foreign = copy(finished, tmp_path / "foreign")
    lines = (foreign / "generations.jsonl").read_text().splitlines(keepends=True)
    # line 2 of the first wrong log is a response to another problem; the second wrong log has its first two samples
    # swapped
    for wrong, first_two in (2, [lines[0], lines[5]]), (1, [lines[1], lines[0]]):
        (foreign / "generations.jsonl").write_text("".join([*first_two, *lines[2:]]))
        with pytest.raises(ValueError, match=rf"jsonl:{wrong}: found response .*expected .*another evaluation"):
            eval.run(arguments(out=foreign))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(ValueError, match="holds no evaluation"):
        eval.run(arguments(out=tmp_path / "letters"))


def test_without_matplotlib_the_report_says_how_to_draw_later(monkeypatch):
    monkeypatch.setitem(sys.modules, "plot", None)
    message = eval.figure(Path("evals/x"))
    assert message == "(no passk.png: pip install matplotlib, then python plot.py --compare evals/x)"


# ---- benchmarks and input


def write_benchmark(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("system", "expected"), [(None, "Be brief."), ("", ""), ("Think.", "Think.")])
def test_a_given_system_message_replaces_that_of_each_row_even_if_it_is_empty(system, expected, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"problem": "1+1?", "answer": "2", "system": "Be brief."}) + "\n")
    assert [problem.system for problem in load_benchmark("own", path, 1, None, system).problems] == [expected]


def test_a_file_of_ones_own_with_options_system_and_levels(tmp_path):
    row = {"problem": "2?", "answer": "A", "system": "s", "options": ["two", "three"]}
    path = write_benchmark(tmp_path / "mine.jsonl", [row | {"level": level} for level in "xxyyx"])
    write_benchmark(tmp_path / "mine.left_out.jsonl", [row])
    (result,) = choose_benchmarks("", path, per_level=2)
    assert (result.name, result.samples, result.left_out) == ("mine", 1, 1)
    assert [p.level for p in result.problems] == ["x", "x", "y", "y"]
    assert result.options[result.problems[3].id] == ["two", "three"] and result.problems[0].system == "s"
    assert choose_benchmarks("", path, system="t")[0].problems[0].system == "t"


@pytest.mark.parametrize("order", [1, -1])
def test_every_benchmark_has_to_fit_the_window(scripted, tokenizer, order):
    """The longest prompt of all benchmarks, in any order, has to fit the model's context window."""
    model, _ = scripted
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=40))
    sets = [
        Benchmark(text, Path(), 1, [Problem(id=text, problem=text, answer="1")], {}, 0)
        for text in ("1+1?", "1+1+1+1?")
    ][::order]
    lengths = [len(p.prompt_ids) for b in sets for p in encode_problems(tokenizer, b.problems, 9, [])[0]]
    # the model has no token for the demonstration's é, but an evaluation reads no demonstrations
    sets[0].problems[0] = dataclasses.replace(sets[0].problems[0], demonstrations=("é",))
    assert eval.encode_benchmarks(model, tokenizer, sets, 40 - max(lengths)) == max(lengths) > min(lengths)
    with pytest.raises(
        ValueError, match=rf"longest prompt \({max(lengths)} tokens\) .* exceed the model's 40 positions"
    ):
        eval.encode_benchmarks(model, tokenizer, sets, 41 - max(lengths))


def test_the_papers_numbers_of_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/benchmarks").mkdir(parents=True)
    for name in ("aime24", "math500"):
        write_benchmark(Path(f"data/benchmarks/{name}.jsonl"), [{"problem": "1+1?", "answer": "2"}])
    assert [b.samples for b in choose_benchmarks("aime24,math500", None)] == [32, 1]
    assert [b.samples for b in choose_benchmarks("aime24,math500", None, samples=4)] == [4, 4]
    assert list(PAPER.values()) == [32] * 3 + [1] * 6 and list(PAPER)[:3] == ["aime24", "aime25", "amc23"]
    with pytest.raises(ValueError, match=r"aime25 is not here yet: run {2}python data/prepare.py aime25"):
        choose_benchmarks("paper", None)


def test_what_is_not_given_is_the_papers():
    args = eval.parse_args(["--model", "data/base"])
    assert (args.temperature, args.max_response_tokens, args.samples) == (0.6, 8192, None)
    assert eval.parse_args(["--model", "data/base", "--temperature", "0"]).temperature == 0


@pytest.mark.parametrize(
    "words, message",
    [
        ("--benchmarks aime", "unknown benchmark 'aime': choose from aime24, .*mmlu_pro.*embedded"),
        ("", "nothing to evaluate on"),
        ("--benchmarks embedded --temperature 0 --samples 2", "temperature 0 is greedy"),
        (
            "--benchmarks embedded",
            "max_response_tokens .8192. exceed the model's 512 positions: lower max_response_tokens to 4",
        ),
        ("--benchmarks embedded --samples 0", "samples is 0, expected at least 1"),
        ("--benchmarks embedded --samples many", "invalid int value: 'many'"),
        ("--benchmarks embedded --temperature -1", "temperature is -1.0"),
        ("--data nowhere.jsonl", "'nowhere.jsonl' does not exist"),
        ("--benchmarks embedded --data mine/embedded.jsonl", "mine/embedded.jsonl has the name of the benchmark"),
        ("--data mine/math500.jsonl", "has the name of the benchmark math500 .*: rename your file"),
        ("--regrade nowhere --reward exact", "nowhere holds no evaluation"),
        ("--regrade nowhere --benchmarks embedded", "--regrade does not read --benchmarks: leave it out"),
        ("--samples=2 --regrade nowhere", "--regrade does not read --samples: leave it out"),
        ("--regrade nowhere --temperature 0.6", "--regrade does not read --temperature: leave it out"),
        ("--regrade nowhere --model data/base", "--regrade does not read --model: leave it out"),
        ("--model ./nowhere --benchmarks embedded", "model './nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, message, monkeypatch, capsys, tmp_path):
    inputs = words.split() if "--model" in words else ["--model", "data/base", *words.split()]
    inputs = words.split() if "--regrade" in words else [*inputs, "--out", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", ["eval.py", *inputs])
    with pytest.raises(SystemExit) as stop:
        eval.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith("eval.py: ")
    assert re.search(message, error), error
    assert not (tmp_path / "x").exists()
