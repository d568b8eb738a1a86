"""These tests run train.py end to end, as a user does: files, resume, signals, wrong input."""

import contextlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import lives
import pytest
import torch
from tiny import ONE_OF_EACH, random_model

import eval as evaluation
import train
from data.loader import Encoded
from data.run_data import keep_fraction
from evaluation import try_model
from evaluation.statistics import Answers
from methods import METHODS
from model import load_model, save_model
from step import rl_step
from support import checkpoint
from support.command import ENDING
from support.config import from_dict, parse_config
from support.errors import Broken, InputError

ROOT = Path(__file__).parents[1]
SMALL = {
    "prompts_per_step": 4,
    "rollouts_per_prompt": 4,
    "steps": 4,
    "sft_steps": 2,
    "sft_batch": 4,
    "eval_every": 0,
    "save_every": 1,
    "max_response_tokens": 48,
    "eval_response_tokens": 12,
    "eval_samples": 1,
}


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    """Runs draw no figure, because drawing takes longer than their steps. Only the run of the fixture `whole` draws a
    figure."""
    monkeypatch.setattr(train, "draw_curves", lambda folder: "")


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Writes a few problems of the embedded task, and returns their folder."""
    folder = tmp_path_factory.mktemp("task")
    rows = [json.loads(line) for line in (ROOT / "data/recipes/train.jsonl").read_text().splitlines()]
    with_demonstration = [row for row in rows if row.get("demonstrations") and row["level"] == "medium"]
    write_rows(folder / "train.jsonl", with_demonstration[:8] + [r for r in rows if not r.get("demonstrations")][:4])
    write_rows(folder / "held.jsonl", [row | {"demonstrations": []} for row in rows[-4:]])
    return folder


def arguments(task: Path, out: Path, **settings) -> list[str]:
    files = {"data": task / "train.jsonl", "eval_data": task / "held.jsonl", "test_data": task / "held.jsonl"}
    settings = SMALL | files | {"out": out} | settings
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def read_log(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith("seconds_") and k != "tokens_per_second"} for row in rows
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(str(folder / "final"))[0].state_dict()


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    """Makes an uninterrupted run of 4 steps, the reference of the resume tests, and returns its folder and what it
    printed."""
    out, printed, output = tmp_path_factory.mktemp("whole") / "run", io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["train.py", *arguments(task, out)])
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(output):
            train.main()
    assert (stop.value.code, output.getvalue()) == (0, "")
    return out, printed.getvalue()


def test_a_run_writes_what_the_readme_says(whole):
    out, _ = whole
    files = "lock config.json metrics.jsonl samples.jsonl groups.jsonl eval.json curves.png checkpoint final"
    assert {p.name for p in out.iterdir()} == set(files.split())
    rows = read_log(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    named = [
        "loss",
        "grad_norm",
        "lr",
        "reward",
        "reward_on_policy",
        "reward_hybrid",
        "prefix_fraction",
        "prefix_tokens",
        "prefix_tokens_kept",
        "entropy",
        "clip_fraction",
        "response_tokens",
        "truncated",
        "unread",
        "equal_reward_groups",
        "tokens_per_second",
        "seconds_sample",
        "seconds_update",
    ]
    assert all(set(named) <= set(row) for row in rows) and "eval_all" in rows[-1]
    samples = read_log(out, "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 2, 3, 4} and any(s["hybrid"] and s["prefix"] for s in samples)
    scores = json.loads((out / "eval.json").read_text())
    assert scores["base"]["test"]["all"]["problems"] == scores["trained"]["test"]["all"]["problems"] == 4
    assert weights(out).keys() == load_model("data/base")[0].state_dict().keys()


def test_piped_output_is_plain(whole):
    _, printed = whole
    assert "\033" not in printed
    assert any(line.startswith("step=4/4 reward=") for line in printed.splitlines())
    assert "accuracy in %" in printed and "python sample.py --model" in printed


def assert_same_run(a: Path, b: Path) -> None:
    assert without_times(read_log(a)) == without_times(read_log(b))
    assert read_log(a, "samples.jsonl") == read_log(b, "samples.jsonl")
    for (name, x), y in zip(weights(a).items(), weights(b).values()):
        assert torch.equal(x, y), name
    assert json.loads((a / "eval.json").read_text()) == json.loads((b / "eval.json").read_text())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="copies this process")
def test_kill_9_and_resume_give_the_same_bits(task, whole, tmp_path, monkeypatch):
    """The run is killed from outside, in its third step. test_faults.py kills runs before their file operations."""
    monkeypatch.chdir(ROOT)
    argv, (reader, writer) = arguments(task, tmp_path / "run", resume="auto"), os.pipe()

    def work():
        monkeypatch.setattr(sys, "argv", ["train.py", *argv])
        train.main()

    def step(run, number):
        if number == 2:
            os.write(writer, b".")
            signal.pause()
        return rl_step(run, number)

    with monkeypatch.context() as patch:
        patch.setattr(train, "rl_step", step)
        process = lives.start(work, tmp_path / "run", tmp_path / "said", None, {})
    os.close(writer)  # with this process's writing end closed, os.read returns even if the run ends without writing
    assert os.read(reader, 1) == b".", (tmp_path / "said").read_text(encoding="utf-8")
    os.kill(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    with (tmp_path / "run" / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 9, "lo')  # half a line imitates a process that was killed while it wrote
    assert train.train(parse_config(argv)) == 0
    assert_same_run(tmp_path / "run", whole[0])


@pytest.fixture
def signals(monkeypatch):
    """signals(number, …) sends the signals in the given order during the second step."""
    known = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in known}

    def send(*numbers):
        def step(run, done):
            for number in numbers if done == 1 else ():
                signal.raise_signal(number)
            return rl_step(run, done)

        monkeypatch.setattr(train, "rl_step", step)

    yield send
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_after_the_step_and_says_how_to_go_on(
    task, whole, tmp_path, monkeypatch, capsys, signals, name
):
    number = getattr(signal, name, signal.SIGINT)  # Windows lacks some of the tested signals
    monkeypatch.chdir(ROOT)
    out = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(task, out, save_every=0)])
    signals(number)
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 128 + number and len(read_log(out)) == 2
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("stopped after step 2") and "--resume auto" in line
    signals()
    config = parse_config(line.split("python train.py ")[1].split())
    assert train.train(config) == 0 and "continued after step" in capsys.readouterr().out
    assert_same_run(out, whole[0])
    assert train.train(config) == 0  # resuming a finished run changes nothing
    assert_same_run(out, whole[0])


def test_a_second_signal_ends_at_once(task, tmp_path, monkeypatch, signals):
    monkeypatch.chdir(ROOT)
    signals(signal.SIGINT, signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        train.train(parse_config(arguments(task, tmp_path / "run")))
    assert stop.value.code == 128 + signal.SIGTERM and len(read_log(tmp_path / "run")) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX")
def test_signals_that_announce_an_end_are_caught_but_not_what_nohup_ignores(signals):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    train.catch_signals(alone=False)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP):
        caught = train.catch_signals(alone=False)
        signal.raise_signal(number)
        assert caught == [number]


def test_a_resumed_run_repeats_the_warnings_from_before_its_stop(task, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = shutil.copytree(whole[0], tmp_path / "run")
    rows = read_log(out)
    rows[1]["warnings"] = {"skipped": "step 2: a warning from before the stop"}
    write_rows(out / "metrics.jsonl", rows)
    assert train.train(parse_config(arguments(task, out, resume="auto"))) == 0
    assert "step 2: a warning from before the stop" in capsys.readouterr().out


def test_resume_refuses_other_settings_and_an_existing_folder(task, whole, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole[0].rglob("*")}
    for settings, message in (({}, "exists"), ({"resume": "auto", "lr": 1e-5}, "lr 0.0001")):
        assert message in refused(monkeypatch, capsys, arguments(task, whole[0], **settings))
    assert before == {p: p.stat().st_mtime_ns for p in whole[0].rglob("*")}


@pytest.mark.parametrize("what", ["data", "model", "template", "reward", "record"])
def test_resume_refuses_a_run_made_of_something_else(task, tmp_path, monkeypatch, what):
    """After a stop an input of the run, such as its data or model, changes under the same name. Resuming writes
    nothing, and the message says what changed."""
    monkeypatch.chdir(ROOT)
    model, data, reward = tmp_path / "model", tmp_path / "train.jsonl", tmp_path / "own.py"
    shutil.copytree("data/base", model)
    shutil.copy(task / "train.jsonl", data)
    reward.write_text(
        "from reward import grade\n\ndef reward(text, problem):\n    return grade(text, problem.answer)\n"
    )
    settings = {"model": model, "data": data, "reward": reward, "method": "rft", "steps": 1, "resume": "auto"}
    settings |= {"eval_data": "", "test_data": ""}
    argv = arguments(task, tmp_path / "run", **settings)
    assert train.train(parse_config(argv)) == 0
    if what == "data":
        data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    elif what == "model":
        loaded, tokenizer = load_model(str(model))
        loaded.lm_head.weight.data += 1.0
        save_model(loaded, tokenizer, model)
    elif what == "template":
        template = model / "chat_template.jinja"
        template.write_text("Today:" + template.read_text())
    elif what == "reward":
        reward.write_text(reward.read_text() + "# another\n")
    else:
        saved = tmp_path / "run" / "config.json"
        config = json.loads(saved.read_text())
        saved.write_text(json.dumps({name: value for name, value in config.items() if name != "made_of"}))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    output = {"data": rf"data \({data}\)", "model": rf"model \({model}\) ", "reward": rf"reward \({reward}\) "}
    output["record"] = output["reward"]
    with pytest.raises(ValueError, match=output.get(what, "prompts as token ids changed since")):
        train.train(parse_config(argv))
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize("where", ["in a step", "in validation"])
def test_a_reward_that_raises_loses_no_step_and_goes_on_mended(task, tmp_path, monkeypatch, capsys, where):
    """The error names the command that continues the run. Without the flag --accept_changed, a changed reward is
    refused before it grades anything."""
    monkeypatch.chdir(ROOT)
    reward, out = tmp_path / "own.py", tmp_path / "run"
    mended = "from reward import grade\n\ndef reward(text, problem):\n    return grade(text, problem.answer)\n"
    log = out / "metrics.jsonl"
    raises = f"    1 / (not os.path.exists({str(log)!r}) or open({str(log)!r}).read().count('\\n') < 2)\n"
    files = {"eval_data": "", "test_data": "", "reward": reward}
    if where == "in validation":
        raises = f"    log = {str(log)!r}\n"
        raises += "    1 / (problem.id != 'held' or not os.path.exists(log) or open(log).read().count('\\n') != 1)\n"
        row = json.loads((task / "held.jsonl").read_text().splitlines()[0]) | {"id": "held"}
        (tmp_path / "held.jsonl").write_text(json.dumps(row))
        files |= {"eval_data": tmp_path / "held.jsonl", "eval_every": 2}
    argv = arguments(task, out, **files, method="rft", steps=4, save_every=0)
    whole = arguments(task, tmp_path / "whole", **files, method="rft", steps=4)
    reward.write_text(mended)
    assert train.train(parse_config(whole)) == 0
    reward.write_text("import os\n" + mended.replace("    return", raises + "    return"))
    with pytest.raises(Broken, match=r"ZeroDivisionError: .*; mend this fault, .*--accept_changed reward") as error:
        train.train(parse_config(argv))
    assert (out / "checkpoint" / "step-00000002.pt").exists()
    reward.write_text(mended.replace("return grade", "return 0 * grade"))
    with pytest.raises(InputError, match=r"reward \(.*\) changed since; .* --accept_changed reward  the run goes on"):
        train.train(parse_config([*argv, "--resume", "auto"]))
    reward.write_text(mended)
    line = str(error.value).split("python train.py ")[1]
    assert train.train(parse_config(shlex.split(line))) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["accept_changed"] == "reward" and len(config["made_of"]["replaced rewards"]) == 1
    if where == "in validation":
        rows = read_log(tmp_path / "whole")
        rows[1] = {name: value for name, value in rows[1].items() if not name.startswith("eval_")}
        (tmp_path / "whole" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_same_run(out, tmp_path / "whole")


def test_a_reward_of_ones_own_is_used_everywhere(task, tmp_path, monkeypatch, capsys):
    """The loader, the rollouts and the evaluation use a reward that gives half a point for a box and half for a 7."""
    monkeypatch.chdir(ROOT)
    path = tmp_path / "sevens.py"
    path.write_text(
        "def sevens(response, problem):\n    return 0.5 * ('boxed' in response) + 0.5 * ('7' in response)\n"
    )
    argv = arguments(
        task, tmp_path / "run", reward=f"{path}:sevens", method="prefix-rft", steps=2, eval_response_tokens=48
    )
    assert train.train(parse_config(argv)) == 0
    output = capsys.readouterr().out
    assert "left out (not right)" in output  # the reward gives demonstrations without a 7 less than 1
    rows = read_log(tmp_path / "run")
    assert 0.3 < rows[0]["reward_on_policy"] < 1 and rows[0]["unread"] == 0
    scores = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert 0.3 < scores["base"]["test"]["all"]["accuracy"] < 1
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["reward"] == f"{path}:sevens" and len(kept["made_of"]["reward"]) == 64
    assert json.loads((tmp_path / "run" / "final" / "trained_with.json").read_text())["reward"] == f"{path}:sevens"


@pytest.mark.parametrize("method", [name for name in ONE_OF_EACH if name != "prefix-rft"])
def test_every_kind_of_method_runs(task, tmp_path, monkeypatch, capsys, method):
    """The runs make no evaluation, because evaluation does not depend on the method."""
    monkeypatch.chdir(ROOT)
    settings = {"method": method, "steps": 2, "sft_steps": 1, "eval_data": "", "test_data": ""}
    assert train.train(parse_config(arguments(task, tmp_path / "run", **settings))) == 0
    rows = read_log(tmp_path / "run")
    assert len(rows) == ("sft" in METHODS[method].stages) + 2 * ("rl" in METHODS[method].stages)
    base, final = load_model("data/base")[0].state_dict(), weights(tmp_path / "run")
    learned = any(not torch.equal(base[name], final[name]) for name in base)
    # the method dr-po gives all rows of a group the same long prefix; if all rows are right, the run learns nothing
    assert learned or all(row["equal_reward_groups"] == 1 for row in rows)


@pytest.mark.parametrize("fraction, count", [(1.0, 100), (0.1, 10), (0.07, 7), (0.001, 1), (0.0, 0)])
def test_kept_demonstrations_are_chosen_by_id(fraction, count):
    """In any order of the problems the same ids are chosen, and a larger fraction keeps the ids of a smaller one."""
    problems = [Encoded(f"p{i}", [1], [[5]] if i < 100 else [], 2) for i in range(120)]

    def kept(problems, fraction):
        return {problem.id for problem in keep_fraction(problems, fraction) if problem.demonstrations}

    actual = kept(problems, fraction)
    assert len(actual) == count and actual == kept(problems[::-1], fraction)
    assert actual <= kept(problems, 0.5) or fraction == 1.0


# ---- wrong input: one line on stderr, exit code 2, nothing written


def refused(monkeypatch, capsys, words: list[str]) -> str:
    """Returns the error message of train.py for a command line that it refuses."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with pytest.raises(SystemExit) as stop:
        train.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "Traceback" not in error
    return error


ROW = {"id": "a", "problem": "1+1", "answer": "2", "demonstrations": ["\\boxed{2}"]}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist"),
        ("", "no problems in it"),
        ('{"problem": "1"', "bad.jsonl:1: not valid JSON"),
        (json.dumps(ROW) + "\n[1]", "bad.jsonl:2: found list"),
        (json.dumps({"answer": "2"}), "bad.jsonl:1: the field 'problem' is missing"),
        (json.dumps({"problem": "1+1"}), "bad.jsonl:1: the field 'answer' is missing"),
        (json.dumps(ROW | {"answer": 2}), "bad.jsonl:1: answer is 2, expected a string"),
        (json.dumps(ROW | {"answer": "\\frac{1}{"}), "bad.jsonl:1: "),
        (json.dumps(ROW | {"problem": " "}), "bad.jsonl:1: problem is empty"),
        (json.dumps(ROW | {"demonstrations": "x"}), "bad.jsonl:1: demonstrations must be a list"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW), "bad.jsonl:2: the id 'a' stands at line 1 too"),
        (json.dumps(ROW | {"problem": "ünï"}), "the tokenizer cannot encode 'ü'"),
        (json.dumps(ROW | {"demonstrations": ["\\boxed{3}"]}), "needs demonstrations"),
        (json.dumps(ROW | {"demonstrations": []}), "needs demonstrations"),
        (json.dumps(ROW), "prompts_per_step is 4, but"),
    ],
    ids=range(15),
)
def test_wrong_data(tmp_path, monkeypatch, capsys, content, message):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    words = ["--data", str(path), "--out", str(tmp_path / "out"), "--prompts_per_step", "4"]
    error = refused(monkeypatch, capsys, words)
    assert message in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": "no/such/folder"}, "neither a folder that exists"),
        ({"max_response_tokens": 3}, "needs demonstrations"),
        ({"demonstration_fraction": 0}, "demonstration_fraction is 0, expected > 0: method prefix-rft needs"),
        ({"max_response_tokens": 4000}, "max_response_tokens (4000) exceed the model's"),
        ({"method": "sdft", "demonstration_fraction": 0}, "expected > 0: method sdft needs demonstrations"),
        ({"method": "sdft", "max_response_tokens": 400}, " after its demonstration' ("),
        ({"eval_response_tokens": 4000}, "eval_response_tokens (4000) exceed the model's"),
        ({"prompts_per_step": 4000}, "prompts_per_step is 4000"),
        ({"method": "rtf"}, "did you mean rft"),
    ],
    ids=str,
)
def test_wrong_settings(tmp_path, monkeypatch, capsys, settings, message):
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    error = refused(monkeypatch, capsys, [*words, "--out", str(tmp_path / "out")])
    assert message in error and not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template_is_trained_too(task, tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    save_model(random_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    argv = arguments(task, tmp_path / "run", model=tmp_path / "model", steps=1)
    assert train.train(parse_config(argv)) == 0
    assert "?\\n'" in capsys.readouterr().out  # without a chat template the prompt ends with a newline


def test_tensorboard_shows_the_metrics(task, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(ROOT)
    settings = {"steps": 2, "method": "rft", "tensorboard": "true", "eval_data": "", "test_data": ""}
    assert train.train(parse_config(arguments(task, tmp_path / "run", **settings))) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    log = read_log(tmp_path / "run")
    assert len(log) == 2
    for name in ("loss", "reward", "entropy", "seconds_sample"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (row["step"], pytest.approx(row[name], rel=1e-6)) for row in log
        ]
    assert "reward_hybrid" not in events.Tags()["scalars"]  # without hybrid rows the log has null for reward_hybrid
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="not installed: pip install tensorboard"):
        train.prepare(parse_config(arguments(task, tmp_path / "other", tensorboard="true")))


def test_demonstrations_that_cannot_be_used_are_counted(task, tmp_path, capsys):
    """One demonstration is longer than max_response_tokens, one is wrong, and one has no box. The run prints how many
    demonstrations it leaves out, and uses the others."""
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    used = sum(bool(row.get("demonstrations")) for row in rows)
    rows[0]["demonstrations"] = ["1" * 99 + f"\\boxed{{{rows[0]['answer']}}}"]
    rows[1]["demonstrations"] = ["\\boxed{1000}"]
    rows[2]["demonstrations"] = ["no box"]
    data = write_rows(tmp_path / "train.jsonl", rows)
    # a step takes all problems of the file, also those without a usable demonstration
    settings = {"data": data, "max_response_tokens": 80, "prompts_per_step": len(rows)}
    half, _ = train.prepare(parse_config(arguments(task, tmp_path / "half", **settings, demonstration_fraction=0.5)))
    run, counts = train.prepare(parse_config(arguments(task, tmp_path / "run", **settings)))
    assert counts.left_out == {"too long": 1, "not right": 2}
    kept = [sum(bool(problem.demonstrations) for problem in r.data.encoded) for r in (run, half)]
    assert kept == [used - 3, math.ceil((used - 3) / 2)]
    train.console.show_start(run, tmp_path, counts, 4, 0)
    output = capsys.readouterr().out
    assert f"{used - 3} with demonstrations, 1 left out (too long), 2 left out (not right)" in output
    assert f"ids {run.data.encoded[0].prompt_ids}" in output


def test_data_is_checked_before_weights_are_read(task, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    write_rows(tmp_path / "train.jsonl", [{"problem": "1+1?", "answer": "2", "demonstrations": ["no box"]}])
    with pytest.raises(ValueError, match=r"has none it can use, 1 left out \(not right\)"):
        train.prepare(parse_config(arguments(task, tmp_path / "run", data=tmp_path / "train.jsonl")))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sft", "sft_lr": 1e30, "sft_steps": 4},
        {"method": "prefix-rft", "lr": 1e39},  # 1e39 is beyond float32, so one update destroys the weights
        # with one step, the update that destroys the weights is the run's last
        {"method": "sft", "sft_lr": 1e39, "sft_steps": 1},
        {"method": "sft", "sft_lr": 1e39, "sft_steps": 6, "save_every": 1},
    ],
)
def test_a_run_that_diverges_stops_in_one_line(task, tmp_path, settings, monkeypatch):
    monkeypatch.setattr(train, "score", lambda run, who: {"validation": {}, "test": {}, "test_sampled": {}})
    with pytest.raises(
        Broken, match="not finite: the run has diverged; start again in a new folder, with a lower lr"
    ):
        train.train(parse_config(arguments(task, tmp_path / "run", max_response_tokens=80, **settings)))
    assert not (tmp_path / "run/final").exists()
    for file in checkpoint.checkpoints(tmp_path / "run"):
        weights = torch.load(file, weights_only=True)["model"].values()
        assert all(weight.isfinite().all() for weight in weights)


@pytest.mark.parametrize("error", [ValueError("too many values to unpack"), FileNotFoundError("nowhere")])
def test_a_bug_in_a_step_shows_its_traceback(task, tmp_path, monkeypatch, error):
    def step(*_, **__):
        raise error

    monkeypatch.setattr(train, "rl_step", step)
    monkeypatch.setattr(train, "score", lambda run, who: {"validation": {}, "test": {}, "test_sampled": {}})
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(task, tmp_path / "run", method="rft")])
    with pytest.raises(type(error)) as raised:
        train.main()
    assert raised.value is error


def test_a_step_with_a_skipped_update_is_not_saved(task, tmp_path, monkeypatch):
    """After a skipped update the run goes on, but it saves no checkpoint of that step."""
    monkeypatch.setattr(train, "score", lambda run, who: {"validation": {}, "test": {}, "test_sampled": {}})
    saved, save = [], checkpoint.save

    def step(run, number):
        result = rl_step(run, number)
        run.skipped = int(number == 1)
        return result

    monkeypatch.setattr(train, "rl_step", step)
    monkeypatch.setattr(checkpoint, "save", lambda folder, done, run: (saved.append(done), save(folder, done, run)))
    assert train.train(parse_config(arguments(task, tmp_path / "run"))) == 0
    assert saved == [1, 3, 4]


def test_logs_are_cut_to_the_checkpoint_and_nothing_else_is_lost(tmp_path):
    log = tmp_path / "samples.jsonl"
    rows = [{"step": step, "problem": "a\u2028b\u0085c"} for step in (1, 1, 2, 3)]
    checkpoint.append_rows(tmp_path / "metrics.jsonl", rows[1:])
    checkpoint.append_rows(log, rows)
    whole = log.read_bytes()
    log.write_bytes(whole + b'{"step": 4, "pro')
    assert checkpoint.cut_logs(tmp_path, 3) == rows[1:]
    assert log.read_bytes() == whole
    assert checkpoint.cut_logs(tmp_path, 2) == rows[1:3]
    assert [json.loads(line) for line in log.read_text().split("\n")[:-1]] == rows[:3]
    for bad in (b"\n", b"[2]\n", b'{"x": 2}\n'):
        log.write_bytes(bad + whole)
        with pytest.raises(ValueError, match=r"samples.jsonl:1: .*: restore it"):
            checkpoint.cut_logs(tmp_path, 2)
        assert log.read_bytes() == bad + whole


def test_only_the_embedded_task_has_held_out_problems_unasked():
    recipes = {name: f"data/recipes/{name}.jsonl" for name in ("train", "validation", "test")}
    own, both = {"data": "mine.jsonl"}, {"eval_data": "v.jsonl", "test_data": "t.jsonl"}
    named = {"validation": "v.jsonl", "test": "t.jsonl"}
    assert train.data_files(from_dict({})) == {"data": recipes.pop("train"), **recipes}
    assert train.data_files(from_dict(own)) == own
    assert train.data_files(from_dict(own | both | {"sft_data": "s.jsonl"})) == own | named | {"sft_data": "s.jsonl"}
    assert train.data_files(from_dict(both)) == {"data": "data/recipes/train.jsonl"} | named


def test_the_optimizer_takes_its_settings():
    model = random_model()
    config = from_dict({"lr": 0.002, "adam_beta2": 0.95, "weight_decay": 0.03})
    (group,) = train.new_optimizer(model, config).param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.002, (0.9, 0.95), 0.03)
    assert list(map(id, group["params"])) == list(map(id, model.parameters()))


def test_the_evaluation_takes_its_settings(monkeypatch):
    """Validation and test are greedy; each test problem also has eval_samples samples at temperature 1."""
    calls = []

    def evaluate(model, tokenizer, problems, encoded, *, samples, temperature, **settings):
        calls.append((problems, encoded, samples, temperature))
        names = {"reward": "r", "max_response_tokens": 33, "seed": 5, "rows_per_call": 6, "decode": "loop"}
        assert settings | {"progress": None} == names | {"progress": None}
        return [Answers("p", samples=samples, right=1, rewards=1)]

    monkeypatch.setattr(train, "evaluate", evaluate)
    inputs = {"eval_samples": 3, "eval_response_tokens": 33, "seed": 5, "rows_per_call": 6}
    data = SimpleNamespace(held={"validation": ("v", "v ids"), "test": ("t", "t ids")})
    run = SimpleNamespace(config=from_dict(inputs), data=data, model=None, tokenizer=None, reward="r", decode="loop")
    tables = train.score(run, "base")
    assert calls == [("v", "v ids", 1, 0.0), ("t", "t ids", 1, 0.0), ("t", "t ids", 3, 1.0)]
    assert {name: table["all"]["samples"] for name, table in tables.items()} == {
        "validation": 1,
        "test": 1,
        "test_sampled": 3,
    }
    data.held.pop("validation")
    assert train.score(run, "base")["validation"] == {}


# support/watch.py reads these metrics of each step for its warnings
WATCHED = {"entropy": 1.0, "grad_norm": 1.0, "skipped_updates": 0, "truncated": 0.0, "unread": 0.0, "hybrid_rows": 0}


def test_the_sft_stage_has_a_file_of_its_own(task, tmp_path, monkeypatch):
    """sft_data feeds the sft stage, and data feeds the steps of reinforcement. demonstration_fraction is a share of
    sft_data."""
    monkeypatch.chdir(ROOT)
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    bare = [{k: v for k, v in row.items() if k != "demonstrations"} for row in rows]
    data = write_rows(tmp_path / "data.jsonl", [bare[0] | {"system": "Briefly."}, *bare[1:]])
    sft = write_rows(tmp_path / "sft.jsonl", [row | {"id": f"own-{row['id']}"} for row in rows[:8]])
    seen: dict[str, set[str]] = {"sft": set(), "rl": set()}
    calls: list[tuple] = []
    order: list[list[str]] = []
    titles: list[str] = []
    optimizers: list[torch.optim.Optimizer] = []

    def note(stage, step, run, *more):
        optimizers.append(run.optimizer)
        calls.append((stage, step, len(run.optimizer.state), *more))
        run.optimizer.state[next(run.model.parameters())]["step"] = torch.ones(())

    def sft_step(run, problems, step, optimizer, lr):
        assert optimizer is run.optimizer
        note("sft", step, run, lr)
        order.append([problem.id for problem in problems])
        seen["sft"] |= set(order[-1])

    def rl_step(run, step):
        note("rl", step, run)
        seen["rl"] |= {problem.id for problem in run.data.encoded}
        return [step]

    recorded: list[int] = []
    monkeypatch.setattr(train, "sft_step", sft_step)
    monkeypatch.setattr(train, "sft_metrics", lambda result, lr: {"loss": 0.0, **WATCHED})
    monkeypatch.setattr(train, "rl_step", rl_step)
    metrics = {"loss": 0.0, "reward": 0.0, "reward_on_policy": 0.0, **WATCHED}
    monkeypatch.setattr(train, "rl_metrics", lambda run, result: metrics)
    monkeypatch.setattr(train, "example_rows", lambda run, result: [])
    monkeypatch.setattr(train, "record_group", lambda run, result: recorded.extend(result) or {})
    monkeypatch.setattr(train, "accuracy", lambda run, name, temperature, title: titles.append(title) or {})
    settings = {"method": "sft-rft", "data": data, "sft_data": sft, "sft_batch": 4, "sft_steps": 4, "steps": 4}
    settings |= {"save_every": 0, "eval_every": 3}
    config = parse_config(arguments(task, tmp_path / "run", **settings, sft_lr=0.5))
    assert train.train(config) == 0
    # the sft stage's learning rate has one warm-up step, then falls by half a cosine
    rates = [0.5, 0.5, 0.5 * 0.75, 0.5 * 0.25]
    assert calls == [
        *[("sft", step, int(step > 0), pytest.approx(rate)) for step, rate in enumerate(rates)],
        ("rl", 0, 0),  # each stage starts with a fresh optimizer
        *[("rl", step, 1) for step in (1, 2, 3)],
    ]
    assert recorded == [0, 1, 3]  # a group is logged at step 1 and at each evaluation
    assert [id(o) for o in optimizers] == [id(optimizers[0])] * 4 + [id(optimizers[4])] * 4
    assert [title for title in titles if title.startswith("step")] == [f"step {n}: validation" for n in (3, 6, 8)]
    # final/trained_with.json names no system message, because the rows have different system messages
    assert checkpoint.trained_with(tmp_path / "run" / "final") == {"reward": "math"}
    assert seen["sft"] < {f"own-{row['id']}" for row in rows[:8]}  # demonstrations that are too long are left out
    assert seen["rl"] == {row["id"] for row in rows}
    usable, first = len(seen["sft"]), order.copy()
    for seed in (0, 1):
        order.clear()
        assert train.train(parse_config(arguments(task, tmp_path / f"seed{seed}", **settings, seed=seed))) == 0
        assert (order == first) == (seed == 0)
    _, counts = train.prepare(parse_config(arguments(task, tmp_path / "prepared", **settings)))
    assert counts.left_out == {"too long": 8 - usable}
    seen["sft"].clear()
    half = settings | {"demonstration_fraction": 0.5}
    assert train.train(parse_config(arguments(task, tmp_path / "half", **half))) == 0
    assert len(seen["sft"]) == math.ceil(usable / 2) > 0
    with pytest.raises(ValueError, match=r"method sft-rft needs demonstrations and .*data.jsonl has none it can use"):
        train.prepare(parse_config(arguments(task, tmp_path / "none", **(settings | {"sft_data": ""}))))


def test_a_model_remembers_its_system_message_for_evaluation(task, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    rows = [json.loads(line) for line in (task / "train.jsonl").read_text().splitlines()]
    data = write_rows(tmp_path / "data.jsonl", [row | {"system": "Step by step."} for row in rows])
    assert train.train(parse_config(arguments(task, tmp_path / "run", data=data, steps=1, method="rft"))) == 0
    words = ["--model", str(tmp_path / "run" / "final"), "--data", str(task / "held.jsonl"), "--temperature", "0"]
    words += ["--max_response_tokens", "8"]
    evaluation.run(evaluation.parse_args([*words, "--out", str(tmp_path / "as-trained")]))
    settings = json.loads((tmp_path / "as-trained" / "settings.json").read_text())
    assert settings["system"] == "Step by step." and "Step by step." in settings["first_prompt"]
    for inputs, system in ([], "Step by step."), (["--system", "Be brief."], "Be brief."), (["--system", ""], None):
        argv = ["sample.py", *words[:2], "--samples", "1", "--max_response_tokens", "2", *inputs, rows[0]["problem"]]
        monkeypatch.setattr(sys, "argv", argv)
        capsys.readouterr()
        try_model.main()
        output = capsys.readouterr().out
        assert system in output if system else "Step by step." not in output
    evaluation.run(evaluation.parse_args([*words, "--system", "Be brief.", "--out", str(tmp_path / "other")]))
    assert 'the model was trained with another system: "Step by step."' in capsys.readouterr().out
    evaluation.run(evaluation.parse_args([*words, "--system", "", "--out", str(tmp_path / "none")]))
    assert "Step by step." not in json.loads((tmp_path / "none" / "settings.json").read_text())["first_prompt"]
    evaluation.run(evaluation.parse_args([*words, "--reward", "exact", "--out", str(tmp_path / "exact")]))
    assert 'the model was trained with another reward: "math"' in capsys.readouterr().out
