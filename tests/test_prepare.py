"""These tests give data/prepare.py made-up rows with the hub's fields for every data set, and try sets that cannot be
downloaded."""

import dataclasses
import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest
from huggingface_hub.utils import logging as hub_logging

from data.loader import Problem, load_problems, render_prompt
from evaluation.benchmarks import FILES, PAPER, choose_benchmarks
from evaluation.multiple_choice import grade_response
from reward import MATH, grade

spec = importlib.util.spec_from_file_location("prepare", Path(__file__).parents[1] / "data" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
sys.modules["prepare"] = prepare
spec.loader.exec_module(prepare)

MESSAGE = {"role": "user", "content": "Solve $x=1$."}
HUB = {  # for each set: a row as the hub has it, and fields that prepare.py must make of this row
    "aime24": (
        {"id": 60, "problem": "Find $n$.", "solution": "So 25.", "answer": "025", "url": "u", "year": "2024"},
        {"problem": "Find $n$.", "answer": "025"},
    ),
    "aime25": ({"problem": "Find $m$.", "answer": "70", "id": "0"}, {"problem": "Find $m$.", "answer": "70"}),
    "amc23": (
        {"id": 0, "problem": "How many?", "answer": 142.0, "url": "u"},
        {"problem": "How many?", "answer": "142"},
    ),
    "math500": (
        {
            "problem": "P",
            "solution": "S",
            "answer": "\\frac{14}{3}",
            "subject": "Algebra",
            "level": 3,
            "unique_id": "i",
        },
        {"problem": "P", "answer": "\\frac{14}{3}", "level": "level 3"},
    ),
    "minerva": ({"question": "Q\u2028√", "answer": "4.5e33"}, {"problem": "Q\u2028√", "answer": "4.5e33"}),
    "olympiad": (
        {"id": 1606, "question": "Q", "solution": ["S"], "final_answer": ["$2^{1009}$"], "context": None}
        | {"image_1": None, "modality": "Text-only", "difficulty": "Competition", "is_multiple_answer": False}
        | {"unit": None, "answer_type": "Numerical", "error": None, "question_type": "Open-ended"}
        | {"subfield": "Algebra", "subject": "Math", "language": "English"},
        {"problem": "Q", "answer": "$2^{1009}$", "level": "Algebra"},
    ),
    "arc_c": (
        {"id": "M_1", "question": "Q?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}}
        | {"answerKey": "2"},
        {"problem": "Q?\n\nA) x\nB) y\nC) z", "answer": "B", "options": ["x", "y", "z"]},
    ),
    "gpqa_diamond": (
        {"Question": "Q?\n", "Correct Answer": "right\n", "Record ID": "rec1", "High-level domain": "Physics"}
        | {f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)}
        | {"Subdomain": "Optics", "Explanation": "E"},
        {"level": "Physics"},
    ),
    "mmlu_pro": (
        {"question_id": 70, "question": "Q?", "options": ["a b", "N/A", "c", *"defghij"], "answer": "C"}
        | {"answer_index": 2, "cot_content": "", "category": "law", "src": "s"},
        {"answer": "B", "level": "law", "options": ["a b", "c", *"defghij"]},
    ),
    "gsm8k": (
        {"question": "Q?", "answer": "She has 48/2 = <<48/2=24>>24.\nSo 1000+24=<<1000+24=1024>>1024.\n#### 1,024"},
        {"answer": "1024", "demonstrations": ["She has 48/2 = 24.\nSo 1000+24=1024.\n\\boxed{1024}"]},
    ),
    "gsm8k_test": ({"question": "Q?", "answer": "It is 3.\n#### 3"}, {"problem": "Q?", "answer": "3"}),
    "openr1-46k": (
        {"data_source": "d", "prompt": [{"role": "system", "content": "Think."}, MESSAGE], "ability": "math"}
        | {"target": [{"role": "assistant", "content": "<think>\nok\n</think>\n\\boxed{1}"}]}
        | {"reward_model": {"ground_truth": "1", "style": "rule"}, "extra_info": {"index": 3, "split": "default"}},
        {"system": "Think.", "problem": "Solve $x=1$.", "demonstrations": ["<think>\nok\n</think>\n\\boxed{1}"]},
    ),
    "openr1-48k-complement": (  # no `target` (demonstration), because it is unknown whether this set has any
        {"prompt": [{"role": "system", "content": "Think."}, MESSAGE], "reward_model": {"ground_truth": "1"}},
        {"system": "Think.", "problem": "Solve $x=1$.", "demonstrations": []},
    ),
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Replaces the hub by two rows of each set. Returns {name: rows}, and the list of the sets that were
    requested."""
    rows, asked = {name: [row, row] for name, (row, _) in HUB.items()}, []
    by_place = {}
    for name, source in prepare.SOURCES.items():
        by_place[source.path, source.config, source.split] = rows[name]
        monkeypatch.setitem(prepare.SOURCES, name, dataclasses.replace(source, rows=(2, 2)))

    def load_dataset(path, config, split):
        asked.append(path)
        return by_place[path, config, split]

    datasets = type(sys)("datasets")
    datasets.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.chdir(tmp_path)
    return rows, asked


@pytest.mark.parametrize("name", HUB)
def test_a_set_becomes_rows_that_load_and_render(name, hub, tokenizer):
    path = prepare.prepare(name)
    assert [p.id for p in load_problems(path)] == [f"{name}-0", f"{name}-1"]
    row = json.loads(path.read_text().splitlines()[0])
    assert row.items() >= HUB[name][1].items()
    assert row["system"] and row["system"] in render_prompt(tokenizer, row["problem"], row["system"])
    for demonstration in row.get("demonstrations", ()):
        assert grade(demonstration, row["answer"]) == 1.0 and "<<" not in demonstration
    if "options" in row:
        assert "letter" in row["system"]
        gold = row["options"]["ABCDEFGHIJ".index(row["answer"])]
        assert gold == {"arc_c": "y", "gpqa_diamond": "right", "mmlu_pro": "c"}[name]
        assert grade_response(MATH, f"\\boxed{{{gold}}}", Problem("p", "?", row["answer"]), row["options"]) == (
            1.0,
            True,
        )
    if name in FILES:
        assert path == FILES[name] and choose_benchmarks(name, None)[0].problems


def test_every_set_has_a_fixture_and_the_count_the_hub_gives():
    assert HUB.keys() == prepare.SOURCES.keys() and PAPER.keys() < HUB.keys()
    counts = {name: prepare.SOURCES[name].rows[0] for name in PAPER}
    assert counts == {
        "aime24": 30,
        "aime25": 30,
        "amc23": 83,
        "math500": 500,
        "minerva": 272,
        "olympiad": 674,
        "arc_c": 1172,
        "gpqa_diamond": 198,
        "mmlu_pro": 12032,
    }


def test_options_of_gpqa_are_shuffled_by_the_question_and_always_alike():
    row, places = HUB["gpqa_diamond"][0], []
    for i in range(400):
        ours = prepare.gpqa_diamond(row | {"Record ID": f"rec{i}"})
        assert sorted(ours["options"]) == ["right", "wrong 1", "wrong 2", "wrong 3"]
        places.append(ours["answer"])
    assert all(70 < places.count(letter) < 130 for letter in "ABCD")
    assert [prepare.gpqa_diamond(row)["answer"] for _ in range(2)] == ["C", "C"]


def test_what_is_there_is_kept_and_what_is_deleted_is_fetched_again(hub, capsys):
    rows, asked = hub
    path = prepare.prepare("minerva")
    rows["minerva"][0] = {"question": "new", "answer": "5"}
    prepare.prepare("minerva")
    assert "there already" in capsys.readouterr().out and len(asked) == 1
    assert load_problems(path)[0].problem == "Q\u2028√"
    path.unlink()
    prepare.prepare("minerva")
    assert load_problems(path)[0].problem == "new"
    assert not list(path.parent.glob("*.partial"))


def test_golds_that_cannot_be_read_are_set_aside_and_named(hub, capsys):
    hub[0]["minerva"][1] = {"question": "Q", "answer": "\\frac{"}
    path = prepare.prepare("minerva")
    assert "1 left out, they cannot be graded: minerva-1" in capsys.readouterr().out
    assert len(load_problems(path)) == 1
    assert choose_benchmarks("minerva", None)[0].left_out == 1
    hub[0]["minerva"][1] = {"question": "Q", "answer": "5"}
    path.unlink()
    prepare.prepare("minerva")
    assert choose_benchmarks("minerva", None)[0].left_out == 0


def test_a_question_with_an_empty_option_is_set_aside(hub):
    row = HUB["mmlu_pro"][0]
    hub[0]["mmlu_pro"][1] = row | {"options": ["a b", "N/A", "c", " ", *"efghij"]}
    prepare.prepare("mmlu_pro")
    (result,) = choose_benchmarks("mmlu_pro", None)
    assert [p.id for p in result.problems] == ["mmlu_pro-0"] and result.left_out == 1


def run(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *words])
    with pytest.raises(SystemExit) as stop:
        prepare.main()
    return stop.value.code


def test_a_set_that_cannot_be_had_is_one_line_and_the_others_are_fetched(hub, monkeypatch, capsys):
    def gated(path, config, split, load=sys.modules["datasets"].load_dataset):
        if path == "Idavidrein/gpqa":
            raise RuntimeError("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.\nsecond line")
        return load(path, config, split)

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", gated)
    assert run(monkeypatch, "gpqa_diamond", "aime24") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "it is gated: accept its terms at https://huggingface.co/datasets/Idav" in error
    assert "hf auth login" in error
    assert FILES["aime24"].exists() and not FILES["gpqa_diamond"].exists()
    assert run(monkeypatch, "paper") == 2
    assert sum(path.exists() for path in FILES.values()) == 8


def test_without_a_network_no_retry_is_told_and_a_gated_set_is_not_blamed(hub, monkeypatch, capsys):
    message = []

    def unreachable(path, config, split):
        logger = hub_logging.get_logger("huggingface_hub.utils._http")
        message.append(logger.isEnabledFor(logging.WARNING))  # huggingface_hub logs retries as warnings
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", unreachable)
    hub_logging.set_verbosity_warning()
    assert run(monkeypatch, "gpqa_diamond", "aime24") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 == error.count("check the network") and "gated" not in error
    assert message == [False, False]


def test_changed_sets_and_wrong_names_are_one_line(hub, monkeypatch, capsys):
    rows, _ = hub
    rows["aime24"].append(rows["aime24"][0])
    assert run(monkeypatch, "aime24") == 2
    assert "HuggingFaceH4/aime_2024 has 3 rows, expected 2" in capsys.readouterr().err
    rows["minerva"][1] = {"problem": "Q", "answer": "5"}
    assert run(monkeypatch, "minerva") == 2
    message = "minerva: row 1 of math-ai/minervamath has not the fields expected (KeyError('question'))"
    assert message in capsys.readouterr().err
    rows["amc23"][0] = rows["amc23"][0] | {"answer": "12 or 13"}
    assert run(monkeypatch, "amc23") == 2
    assert "amc23: row 0 of AI-MO/aimo-validation-amc has not the fields expected" in capsys.readouterr().err
    assert run(monkeypatch, "aime") == 2
    assert "unknown set 'aime': choose from aime24" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert run(monkeypatch, "aime25") == 2
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err
    assert not Path("data").exists()
