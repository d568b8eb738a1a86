"""These tests check the log of a group of rollouts and its picture: each token's source (model or demonstration),
entropy and weight, and whether the entropy clip drops the token."""

import itertools
import json
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from test_plot import run

from figures import group_log
from figures.group_figure import LEFT, NOTE, RIGHT, draw_group, flow, group_figure

HOSTILE = "</title></style><script>window.hacked=1</script>\"'><img src=x onerror=hacked()>&lt;"


def a_row(tokens: str, inputs: int = 0, **fields) -> dict:
    """Returns a row whose tokens are single characters. The first `inputs` tokens come from a demonstration."""
    n = len(tokens)
    return {
        "hybrid": inputs > 0,
        "complete": inputs == n,
        "reward": 1.0,
        "truncated": False,
        "advantage": 0.5,
        "prefix_advantage": 0.25,
        "tokens": list(tokens),
        "ids": list(range(100, 100 + n)),
        "source": [1] * inputs + [0] * (n - inputs),
        "entropy": [0.25] * n,
        "kept": [1] * n,
        "weight": [0.5] * n,
        "tokens_total": n,
    } | fields


@pytest.fixture
def group() -> dict:
    """Returns a group of two on-policy rows, one of them cut off, and a hybrid row. The entropy clip keeps one of the
    hybrid row's three prefix tokens."""
    rows = [
        a_row("abc"),
        a_row("de", reward=0.0, truncated=True, advantage=-0.5, weight=[-0.5, -0.5]),
        a_row("WXYz", inputs=3, kept=[0, 1, 0, 1], weight=[0.0, 0.25, 0.0, 1.0], entropy=[0.0, 2.0, 0.5, 1.0]),
    ]
    names = {"step": 20, "method": "prefix-rft", "id": "p1", "problem": "1+1?", "answer": "2"}
    return names | {"prompt": ["1", "+", "1", "?"], "rows": rows}


@pytest.fixture
def folder(tmp_path, group) -> Path:
    """Returns a run folder whose log has a group of step 1 and a group of step 20."""
    lines = [json.dumps(group | {"step": step}) + "\n" for step in (1, 20)]
    (tmp_path / "groups.jsonl").write_text("".join(lines))
    return tmp_path


# ---- the log


def test_a_group_is_found_by_its_step_and_the_last_is_the_default(folder, group):
    assert group_log.read_group(folder) == group
    assert group_log.read_group(folder, 1)["step"] == 1
    with pytest.raises(ValueError, match="no group of step 7: choose from 1, 20"):
        group_log.read_group(folder, 7)


def test_a_damaged_log_is_told_by_its_line(folder, group, monkeypatch, capsys):
    without = {name: value for name, value in group.items() if name != "method"}
    for text, output in (
        ('{"step": 1,', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("3", "found 3, expected a JSON object with step, method"),
        (json.dumps(without), "expected a JSON object with step, method"),
    ):
        (folder / "groups.jsonl").write_text(json.dumps(group) + "\n" + text + "\n")
        capsys.readouterr()
        assert run(monkeypatch, "--group", folder) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"plot.py: {folder}/groups.jsonl:2: ") and output in error and error.count("\n") == 1
    assert [file.name for file in folder.iterdir()] == ["groups.jsonl"]


def test_the_command_writes_a_picture(folder, monkeypatch, capsys):
    capsys.readouterr()
    assert run(monkeypatch, "--group", folder) == 0
    assert run(monkeypatch, "--group", folder, 1, "--out", folder / "new" / "a.png") == 0
    files = [folder / "group-20.png", folder / "new" / "a.png"]
    assert capsys.readouterr().out.split() == [str(file) for file in files]
    assert all(file.stat().st_size > 3_000 for file in files)


@pytest.mark.parametrize(
    "words, output",
    [
        (["--group", "none"], "none has no groups.jsonl"),
        (["--group", "FOLDER", "last"], "--group takes a run folder and a step"),
        (["--group", "FOLDER", "1", "2"], "--group takes a run folder and a step"),
        (["--group", "FOLDER", "--compare"], "give run folders, or --group RUN [STEP]"),
        ([], "give run folders, or --group RUN [STEP]"),
    ],
)
def test_wrong_words_are_told_in_one_line(words, output, folder, monkeypatch, capsys):
    before = sorted(folder.iterdir())
    assert run(monkeypatch, *[str(folder) if word == "FOLDER" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert output in error and error.count("\n") == 1
    assert sorted(folder.iterdir()) == before


# ---- words and colours


def test_whose_a_token_is(group):
    whole = a_row("ab", inputs=2)
    rows = [*group["rows"], whole]
    assert [[group_log.source(row, t) for t in range(len(row["tokens"]))] for row in rows] == [
        ["own"] * 3,
        ["own"] * 2,
        ["prefix"] * 3 + ["continuation"],
        ["demonstration"] * 2,
    ]
    assert [group_log.kind(row) for row in rows] == ["on-policy", "on-policy", "hybrid", "demonstration"]
    assert [group_log.verdict(row) for row in rows] == ["✓ right", "✗ cut off", "✓ right", "✓ right"]
    assert group_log.verdict(a_row("a", reward=0.4)) == "reward 0.40"
    assert [part[2] for part in group_log.parts(rows[2])] == [0.25, 0.5]
    # the second prefix token is framed, because the entropy clip keeps it and drops the others; the continuation
    # loses no token, so it has no frame
    assert group_log.framed(rows[2]) == [False, True, False, False]


def test_every_token_is_seen():
    shown = {
        " a": "·a",
        "\n\n": "↵↵",
        "\t": "⇥",
        "": "∅",
        "\x1b[31m": "�[31m",
        "<eos>": "<eos>",
        "x" * 99: "x" * 23 + "…",
    }
    assert {text: group_log.visible(text) for text in shown} == shown
    assert [group_log.signed(value) for value in (0, 0.25, -0.5, 0.001)] == ["0", "+0.25", "−0.50", "+0.001"]


# ---- the picture


def test_what_does_not_fit_is_counted():
    cells, note = flow(["abcd"] * 20, 20, 8)
    assert len(cells) == 20 and note == ""
    assert cells[0].x == LEFT and all(b.x == pytest.approx(a.x + a.width) for a, b in itertools.pairwise(cells))
    for tokens, total in ((["abcd"] * 500, 3000), (["x" * 24] * 5, 5)):
        cells, note = flow(tokens, total, 8)
        end = cells[-1].x + cells[-1].width
        assert end <= RIGHT - NOTE < end + cells[-1].width and note == f"… {total - len(cells)} more"
    assert flow(["a"] * 10, 322, 8)[1] == "… 312 more"
    assert flow([], 0, 8) == ([], "")


def test_the_picture_shows_what_the_log_says(group):
    figure = group_figure(group)
    axis = figure.axes[0]
    texts = [text.get_text() for text in axis.texts]
    boxes = [(to_hex(patch.get_facecolor()), patch) for patch in axis.patches if patch.get_y() < 400]
    legend = next(text.get_position()[1] for text in axis.texts if text.get_text().startswith("beginning of a demon"))
    above = [(colour, patch) for colour, patch in boxes if patch.get_y() + patch.get_height() < legend - 6]

    def drawn(colour: str) -> list:
        return [patch for result, patch in above if result == colour.lower()]

    counts = {name: len(drawn(colour)) for name, (colour, _) in group_log.SOURCES.items()}
    # the tokens of a prefix and of a whole demonstration have the same colour
    assert counts == {"prefix": 1, "demonstration": 1, "continuation": 1, "own": 5}
    assert len(drawn(group_log.DROPPED)) == 2
    assert [text for text in texts if len(text) == 1 and text in "abcdeWXYz"] == list("abcdeWXYz")
    assert "1  on-policy" in texts and "✗ cut off" in texts and "A = −0.50" in texts
    assert "prefix: the expert's first 3 tokens, A = +0.25" in texts
    figure.draw_without_rendering()
    assert all(text.get_window_extent().x1 <= figure.bbox.width for text in axis.texts)
    # a weight w has a bar of 6.5 |w| points, which stands on the zero line if w > 0 and hangs below it if w < 0
    standing, hanging = drawn(group_log.MORE), drawn(group_log.LESS)
    assert [bar.get_height() / 6.5 for bar in standing + hanging] == pytest.approx([0.5] * 3 + [0.25, 1] + [0.5] * 2)
    zero_lines = {round(line.get_ydata()[0], 3) for line in axis.lines}
    assert all(round(bar.get_y() + bar.get_height(), 3) in zero_lines for bar in standing)
    assert all(round(bar.get_y(), 3) in zero_lines for bar in hanging)
    entropy = [patch.get_height() for patch in drawn("#8C8C8C")]
    # the group's largest entropy, 2 nats, has the longest bar, 9 points
    assert entropy[-4:] == pytest.approx([0, 9, 2.25, 4.5])


def test_any_text_can_be_drawn(group, tmp_path, recwarn):
    """A $ in a text begins no formula, a character without a glyph gives no warning, and a long answer can be
    drawn."""
    group["rows"][0]["tokens"] = ["$x^$", "$\\frac{$", "漢字😀"]
    group |= {"problem": f"\n{HOSTILE} 漢字😀", "answer": "$" * 300}
    assert draw_group(group, tmp_path / "g.png").stat().st_size > 10_000
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    draw_group(group | {"problem": "", "rows": [a_row("")]}, tmp_path / "empty.png")
