"""results/: what the protocol asks for, what is stored of a run, when that is stale, what the report says of it."""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

import train
from data.make_recipes import make_splits
from methods import METHODS
from results import protocol, runs, stored, study
from results.protocol import EQUAL, MAIN, OTHERS, REGIMES, best_of, common, equal_steps, next_trials
from results.runs import Spec
from support.errors import Broken, Diverged

BASE = common("habit")


MEASURED = {  # of a run with 800 test problems
    "right": {"greedy": runs.pack_counts([0, 1] * 400), "sampled": runs.pack_counts([4, 0] * 400)},
    "tokens": {"sampled": 1000, "trained": 900, "supervised": 0},
    "curve": {"step": [10, 20], "validation": [None, 0.5], "tokens": [900, 1900], "entropy": [0.5, None]},
}


def trial(method: str, score: float, **settings) -> dict:
    scores = {"validation": {"greedy": score + 0.1, "sampled": score - 0.1}}
    line = {"regime": "habit", "method": method, "seed": 1000, "trial": True, "settings": BASE | settings}
    return line | {"scores": scores, "made_of": {}, "probe": [[0.5]]}


# ---- the protocol


def test_the_fresh_test_split_is_new_and_leaves_the_others_as_they_are():
    rows, known = protocol.test_rows(), make_splits()
    assert Counter(row["level"] for row in rows) == dict.fromkeys(("easy", "medium", "hard", "ood"), 200)
    old = {row["problem"] for split in known.values() for row in split}
    assert len({row["problem"] for row in rows} | old) == len(rows) + len(old)
    assert {name: make_splits(fresh_seed=7)[name] for name in known} == known


def test_the_regimes_have_the_demonstrations_they_say():
    habit, silent, scarce = (protocol.training_rows(name) for name in ("habit", "silent", "scarce"))
    assert [len(rows) for rows in (habit, silent, scarce)] == [512, 128, 512]
    for rows, name in ((habit, "habit"), (silent, "silent"), (scarce, "scarce")):
        assert sum("demonstrations" in row for row in rows) == max(REGIMES[name].demonstrations)
    assert {row["problem"].count(";") for row in silent} == {6}
    assert [row["problem"] for row in scarce] == [row["problem"] for row in habit]
    weak = protocol.training_rows("weak", "slips")
    assert [("demonstrations" in row, row["problem"]) for row in weak] == [
        ("demonstrations" in row, row["problem"]) for row in habit
    ]
    assert any(row.get("demonstrations") != other.get("demonstrations") for row, other in zip(weak, habit))
    shares = [protocol.train_settings("scarce", "uft", common("scarce", n)) for n in (512, 128, 32, 8, 2)]
    assert [given["demonstration_fraction"] * 512 for given in shares] == [512, 128, 32, 8, 2]


def test_every_method_has_its_place():
    assert sorted((*MAIN, *OTHERS)) == sorted(METHODS)
    for regime in REGIMES.values():
        assert set(regime.methods) <= {*METHODS, EQUAL}


def play(method: str, score) -> tuple[list[dict], dict]:
    """The trials that are asked for where a trial's score is `score(settings)`, and what they choose."""
    trials: list[dict] = []
    while wanted := next_trials(method, BASE, trials):
        trials += [trial(method, score(settings), **settings) for settings in wanted]
        assert len(trials) < 10
    return trials, best_of(method, trials)


def test_a_best_rate_inside_the_grid_needs_three_trials():
    trials, best = play("rft", lambda s: 1 - abs(s["lr"] - 1e-4))
    assert sorted(line["settings"]["lr"] for line in trials) == [5e-5, 1e-4, 2e-4]
    assert best == BASE | {"lr": 1e-4}


@pytest.mark.parametrize(("sign", "edge"), [(1, 4e-4), (-1, 2.5e-5)])
def test_a_grid_is_extended_once_where_the_best_value_is_at_its_edge(sign, edge):
    trials, best = play("rft", lambda s: sign * s["lr"])
    assert [line["settings"]["lr"] for line in trials][3:] == [edge]
    assert best == BASE | {"lr": edge}


def test_the_second_setting_is_tried_at_the_chosen_rate():
    trials, best = play("luffy", lambda s: -abs(s["lr"] - 1e-4) - abs(s.get("coefficient", 0.1) - 0.3) / 1e5)
    assert [line["settings"] for line in trials][3:] == [
        BASE | {"lr": 1e-4, "coefficient": 0.0333},
        BASE | {"lr": 1e-4, "coefficient": 0.3},
        BASE | {"lr": 1e-4, "coefficient": 0.9},  # 0.3 is at the edge
    ]
    assert best == BASE | {"lr": 1e-4, "coefficient": 0.3}


def test_supervised_steps_and_the_share_of_chord_mu_are_only_lowered():
    assert [line["settings"].get("sft_steps", 64) for line in play("sft", lambda s: 0.5)[0]][-3:] == [16, 32, 8]
    tried = [
        line["settings"].get("coefficient", 0.9) for line in play("chord-mu", lambda s: s.get("coefficient", 0.9))[0]
    ]
    assert max(tried) == 0.9


def test_of_equal_trials_the_smaller_value_is_chosen():
    assert play("rft", lambda s: 0.5)[1]["lr"] == 2.5e-5


def test_an_untuned_method_is_an_error_that_names_the_command():
    with pytest.raises(ValueError, match="tune --regime habit --methods uft"):
        protocol.chosen("habit", "uft", [])
    with pytest.raises(ValueError, match="sft is not tuned"):
        protocol.chosen("habit", "sft-rft", [])


def test_the_ablations_take_the_settings_of_prefix_rft():
    lines = play("prefix-rft", lambda s: s["lr"])[0]
    found = protocol.run_settings("habit", "prefix-rft-low", [], lines)
    assert found == [BASE | {"lr": 4e-4}]


def test_regimes_that_are_not_tuned_take_the_settings_of_habit():
    lines = play("prefix-rft", lambda s: s["lr"])[0]
    scarce = protocol.run_settings("scarce", "prefix-rft", [], lines)
    assert scarce == [{"demonstrations": n, "steps": 60, "lr": 4e-4} for n in (512, 128, 32, 8, 2)]
    weak = protocol.run_settings("weak", "prefix-rft", [], lines)
    assert weak == [BASE | {"expert": expert, "lr": 4e-4} for expert in ("short", "slips", "several")]
    assert protocol.run_settings("twin", "prefix-rft", [], lines) == [BASE | {"lr": 4e-4}]


def test_runs_with_weaker_experts_and_on_the_other_base_are_told_apart(tmp_path, monkeypatch):
    weak = Spec("weak", "prefix-rft", 0, BASE | {"expert": "slips"})
    assert weak.name == "weak-prefix-rft-demonstrations128-expertslips-steps60-seed0"
    assert runs.configuration(weak)["data"] == "runs/study/data/weak/slips.jsonl"
    assert "expert" not in runs.configuration(weak) and runs.configuration(weak)["model"] == "data/base"
    assert runs.configuration(Spec("twin", "rft", 0, BASE))["model"] == protocol.TWIN
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="first  python data/make_base"):
        runs.made_of("twin")


def test_equal_tokens():
    def run(method, step, tokens):
        curve = {"step": step, "tokens": tokens}
        return {"method": method, "seed": 0, "trial": False, "curve": curve, "settings": {"sft_steps": 10}}

    lines = [run("rft", [60], [900]), run("prefix-rft", [60], [1100]), run("rft", [60], [1000])]
    lines += [run("prefix-rft", [60], [1000])]
    with pytest.raises(ValueError, match="needs stored runs of sft-rft"):
        equal_steps("habit", lines)
    # 10 supervised steps and 300 tokens, then 20 a step: 1000 tokens at step 45, which is 35 of reinforcement
    lines += [run("sft-rft", [10, 20, 40, 60, 70], [300, 500, 900, 1300, 1500])]
    assert equal_steps("habit", lines) == 35
    assert equal_steps("habit", [*lines, run("rft", [60], [9000]) | {"seed": 5}]) == 35


# ---- what is stored


def test_counts_are_packed_without_loss():
    counts = [0, 4, 1, 3, 2, 4, 4]
    for n in (6, 7):
        assert runs.unpack_counts(runs.pack_counts(counts[:n]), n) == counts[:n]


def test_tokens_and_curve_of_a_run():
    sft = [{"step": i, "trained_tokens": 10, "entropy": 0.5, "response_tokens": 20} for i in range(1, 5)]
    rl = [
        {"step": i, "trained_tokens": 3, "sampled_tokens": 7, "reward": 0.1, "entropy": 0.25, "response_tokens": 30}
        | {"reward_on_policy": 0.5, "reward_hybrid": None, "relift_tokens": 2, "truncated": 0.0}
        for i in range(5, 13)
    ]
    rows = [*sft, *rl]
    rows[9]["eval_all"], rows[11]["eval_all"] = 0.4, 0.6
    assert runs.tokens_of(rows) == {"sampled": 56, "trained": 24, "supervised": 56}
    curve = runs.curve_of(rows)
    assert curve["step"] == [10, 12] and curve["validation"] == [0.4, 0.6]
    assert curve["tokens"] == [4 * 10 + 6 * 12, 4 * 10 + 8 * 12]
    assert curve["entropy"] == [(4 * 0.5 + 6 * 0.25) / 10, 0.25]
    assert curve["on_policy"] == [0.5, 0.5] and "hybrid" not in curve


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A study with 4 validation and 4 test problems in a folder of its own."""
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    monkeypatch.setattr(runs, "TEST", tmp_path / "data/test.jsonl")
    monkeypatch.setattr(runs, "TASK", str(tmp_path))
    monkeypatch.setattr(runs, "test_rows", lambda: protocol.test_rows()[::200])
    (tmp_path / "validation.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in make_splits()["validation"][::100]), encoding="utf-8"
    )
    monkeypatch.setattr(train, "draw_curves", lambda folder: "")
    runs.make_data(["habit"])
    return tmp_path


def test_a_run_its_line_and_its_probe(tiny, monkeypatch):
    spec = Spec("habit", "prefix-rft", 0, {"demonstrations": 128, "steps": 2, "prompts_per_step": 2, "lr": 1e-4})
    line = runs.line_of(spec)
    assert len(json.dumps(line)) < 4096
    assert runs.spec_of(line) == spec and line["curve"]["step"] == [2]
    for name in ("greedy", "sampled"):
        counts = runs.unpack_counts(line["right"][name], 4)
        assert sum(counts) / 4 / (4 if name == "sampled" else 1) == pytest.approx(
            line["scores"][name]["all"], abs=1e-4
        )
    assert line["tokens"]["sampled"] > 0 and line["tokens"]["supervised"] == 0
    assert runs.alike(runs.probe(spec), line["probe"])  # deterministic
    assert not runs.alike(runs.probe(Spec("habit", "rft", 0, spec.settings)), line["probe"])  # no prefix

    base = runs.line_of(Spec("habit", "base", 0, {}))
    assert base["scores"]["greedy"]["easy"] == 1.0  # 99.5% of easy ones

    (tiny / f"{spec.name}.probe.json").write_text(json.dumps({"probe": [[0.0] * 5] * 3}))
    made = (tiny / spec.name / "metrics.jsonl").stat().st_mtime_ns
    assert runs.line_of(spec)["scores"] == line["scores"]
    assert (tiny / spec.name / "metrics.jsonl").stat().st_mtime_ns > made  # trained again, not gone on


def test_a_trial_that_diverges_is_stored_as_such(tiny, monkeypatch):
    """Its probe diverges too. What else ends a trial or run is told."""
    monkeypatch.setattr(study, "RUNS", tiny)
    monkeypatch.setattr(study.os, "setpgrp", lambda: None)
    spec = Spec(
        "habit", "prefix-rft", 1000, {"demonstrations": 128, "steps": 8, "prompts_per_step": 2, "lr": 1e39}, True
    )
    sent: list[tuple] = []
    study.work(runs.line_of, spec, SimpleNamespace(send=sent.append))
    good, line = sent.pop()
    assert good and line["scores"] == {} and "the run has diverged" in line["diverged"], line
    (tiny / "habit.jsonl").write_text(json.dumps(line))
    assert stored.stored_lines(tiny / "habit.jsonl") == [line]
    assert protocol.trial_score(line) == 0 and line["probe"] and len(json.dumps(line)) < 4096
    for trial, fault in ((False, Diverged("the run has diverged")), (True, Broken("writing to x failed"))):

        def fail(config, fault=fault):
            raise fault

        monkeypatch.setattr(runs, "train", fail)
        monkeypatch.setattr(runs, "probe", lambda spec: [])
        study.work(runs.line_of, replace(spec, trial=trial), SimpleNamespace(send=sent.append))
        assert sent.pop() == (False, f"{replace(spec, trial=trial).name}: {fault}")


def test_probes_differ_only_by_more_than_rounding():
    first = [[1.0, 0.02], [0.5, 0.0]]
    assert runs.alike(first, [[1.0002, 0.02], [0.5, 1e-9]])
    assert not runs.alike(first, [[1.01, 0.02], [0.5, 0.0]])
    assert not runs.alike(first, first[:1])


def fake_lines(monkeypatch, made: list[str], probed: float = 1.0) -> None:
    """Runs that are made at once: a line for each, noted in `made`."""

    def at_once(function, specs, jobs):
        for spec in specs:
            if function is study.probe:
                yield spec, [[probed]]
            else:
                made.append(f"{spec.method} {spec.seed}")
                line = {"regime": "habit", "method": spec.method, "seed": spec.seed, "trial": spec.trial}
                line |= {"settings": spec.settings, "made_of": {"base": "a"}, "probe": [[probed]]} | MEASURED
                yield spec, line | {"scores": {"validation": {"greedy": 0.5, "sampled": 0.5}}}

    monkeypatch.setattr(study, "in_processes", at_once)
    monkeypatch.setattr(runs, "made_of", lambda regime: {"base": "a"})


def test_stored_runs_are_kept_and_stale_ones_replaced_in_their_place(tmp_path, monkeypatch):
    made: list[str] = []
    fake_lines(monkeypatch, made)
    specs = [Spec("habit", "rft", seed, {"demonstrations": 128}) for seed in (0, 1)]
    study.Study("habit", tmp_path, 1).make(specs[:1])
    study.Study("habit", tmp_path, 1).make(specs)
    assert made == ["rft 0", "rft 1"]
    fake_lines(monkeypatch, made, probed=2.0)
    study.Study("habit", tmp_path, 1).make(specs[:1])
    assert made == ["rft 0", "rft 1", "rft 0"]
    lines = stored.check_stored(tmp_path / "habit.jsonl", "habit")
    assert [(line["seed"], line["probe"]) for line in lines] == [(0, [[2.0]]), (1, [[1.0]])]


def test_a_run_that_is_stored_twice_is_refused_not_counted_twice(tmp_path, monkeypatch):
    fake_lines(monkeypatch, [])
    study.Study("habit", tmp_path, 1).make([Spec("habit", "rft", seed, {"demonstrations": 128}) for seed in (0, 1)])
    path = tmp_path / "habit.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match=r"habit.jsonl:3: the same run as in line 1: delete one of the two"):
        stored.stored_lines(path)


def test_tuning_then_runs(tmp_path, monkeypatch):
    made: list[str] = []
    fake_lines(monkeypatch, made)
    one = study.Study("habit", tmp_path, 1)
    one.tune(["sft-rft"])
    assert made.count("sft 1000") == 7 and made.count("sft-rft 1000") == 7  # 3 + 1 rates, 2 + 1 numbers of updates
    one.run(["sft-rft"], [0], one.lines)
    assert made[14:] == ["base 0", "sft-rft 0"]
    one.run(["sft-rft"], [0], one.lines)
    assert len(made) == 16
    one.lines[-1]["settings"] = one.lines[-1]["settings"] | {"lr": 1.0}
    with pytest.raises(ValueError, match=r"habit.jsonl:16: sft-rft, seed 0 was run with .*delete the line"):
        one.run(["sft-rft"], [0], one.lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--methods", "prefix-rtf"], "method 'prefix-rtf': did you mean prefix-rft?"),
        (["tune", "--regime", "scarc"], "regime 'scarc': did you mean scarce?"),
        (["run", "--seeds", "0,x"], "seeds is '0,x'"),
        (["run", "--regime", "habit", "--methods", "uft", "--seeds", "0,5"], "seeds has 5, the protocol for these"),
        (["run", "--jobs", "0"], "jobs is 0"),
        (["tune", "--quick"], "--quick chooses"),
        (["tune", "--regime", "habit", "--seeds", "0"], "tune does not read --seeds: leave it out"),
        (["report", "--regime=habit"], "report does not read --regime: leave it out"),
    ],
)
def test_bad_words_are_one_line_and_touch_nothing(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study.py", *words])
    monkeypatch.setattr(study, "make_data", lambda regimes: pytest.fail("wrote data"))
    with pytest.raises(SystemExit) as stop:
        study.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("study.py: ") and message in error and error.count("\n") == 1


def test_stored_lines_are_still_accepted(tmp_path, monkeypatch):
    """What they are compared with has not changed, else the next command would refuse them."""
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    monkeypatch.setattr(runs, "TEST", tmp_path / "data/test.jsonl")
    runs.make_data(["habit", "weak"])
    assert stored.check_stored(study.STORE / "habit.jsonl", "habit")
    assert list(runs.made_of("weak")) == ["base", "short", "slips", "several", "validation", "test"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "habit.jsonl:2: found b'{broken'"),
        ('{"regime": "habit"}', "habit.jsonl:2: run: method is None, expected a text"),
        (json.dumps(trial("rft", 0.5) | {"made_of": {"base": "b"}}), "habit.jsonl:2: made of something else"),
        (json.dumps(trial("rft", 0.5) | {"regime": "silent"}), "found a run of regime silent"),
    ],
)
def test_results_of_another_base_or_damaged_ones_are_refused(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(runs, "made_of", lambda regime: {"base": "a"})
    path = tmp_path / "habit.jsonl"
    path.write_text(json.dumps(trial("rft", 0.5) | {"made_of": {"base": "a"}}) + "\n" + line + "\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        study.Study("habit", tmp_path, 1)
    assert path.read_bytes() == before


PACKED = MEASURED["right"]["sampled"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": -1}, "run: seed is -1, expected a whole number of at least 0"),
        ({"trial": 0}, "run: trial is 0, expected true or false"),
        ({"settings": {"lr": math.inf}}, "settings: lr is inf, expected a number"),
        ({"settings": {"expert": 3}}, "settings: expert is 3, expected a text"),
        ({"made_of": {"base": None}}, "made_of: base is None, expected a text"),
        (
            {"scores": {"validation": {"greedy": math.nan, "sampled": 0.5}}},
            "scores: validation: greedy is nan, expected",
        ),
        (
            {"scores": {"validation": {"greedy": 0.5}}},
            "scores: validation: sampled is None, expected a number from 0 to 1",
        ),
        ({"scores": {"greedy": {"all": 50.0}}}, "scores: greedy: all is 50.0, expected a number from 0 to 1"),
        ({"scores": {"validation": 1}}, "scores: validation is 1, expected an object"),
        ({"probe": [[1.0], ["x"]]}, "probe[1][0] is 'x', expected a number"),
        ({"probe": None}, "run: probe is None, expected a list"),
        ({"tokens": {"sampled": 1}}, "tokens: trained is None, expected a whole number of at least 0"),
        ({"curve": {"step": [10], "tokens": [9]}}, "curve: validation is None, expected a list"),
        ({"curve": {"step": [], "tokens": [], "validation": []}}, "curve: step is empty"),
        (
            {"curve": {"step": [1], "tokens": [None], "validation": [0]}},
            "curve: tokens[0] is None, expected a number",
        ),
        ({"curve": {"step": [1], "tokens": [9], "validation": [0, 1]}}, "curve: validation has 2 values, expected 1"),
        ({"right": None}, "right is NoneType, expected an object"),
        ({"right": {"greedy": PACKED[:-4], "sampled": PACKED}}, "right: greedy: found 399 bytes, expected 400"),
        ({"right": {"greedy": "é", "sampled": PACKED}}, "right: greedy: string argument"),
        (
            {"right": {"greedy": PACKED, "sampled": PACKED}},
            "right: greedy has 4 right samples of a problem, expected at",
        ),
        ({"regime": "ceiling", "right": [0] * 199}, "right has 199 values, expected 200"),
        ({"regime": "ceiling", "right": [0] * 199 + [257]}, "right has 257 right samples of a problem, expected at"),
    ],
)
def test_a_damaged_field_of_a_stored_run_is_named(tmp_path, change, said):
    line = trial("rft", 0.5) | {"trial": False} | MEASURED
    path = tmp_path / "habit.jsonl"
    path.write_text(json.dumps(line) + "\n" + json.dumps(line | {"seed": 1} | change) + "\n")
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}:2: {said}')}.*: restore or delete the line$"):
        stored.stored_lines(path)


def test_two_studies_do_not_write_to_the_same_results(tmp_path):
    with study.locked(tmp_path / "lock"), pytest.raises(ValueError, match="at work"), study.locked(tmp_path / "lock"):
        pass
