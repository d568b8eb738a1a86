"""These tests check how commands end: with a closed output, with Ctrl-C, on a terminal that shows only ASCII, and on
a full disk."""

import io
import os
import subprocess
import sys

import pytest
from tiny import command_module

from support.errors import Unwritten
from support.files import replacing

COMMANDS = ["train", "eval", "sample", "plot", "data.prepare"]
ENDS = {  # each key is the body of a command's main(); its values are exit code, output in ASCII and error message
    "print('é▁')": (0, "??\n", ""),
    "raise InputError('lr is 0')": (2, "", "x.py: lr is 0\n"),
    "raise Broken('the disk is full')": (1, "", "x.py: the disk is full\n"),
    "raise KeyboardInterrupt": (130, "", "\nx.py: stopped\n"),
    "sys.exit(3)": (3, "", ""),
}


@pytest.mark.parametrize("does", [*ENDS, "print('x')", "print('x' * 100_000)", "print('x'), sys.exit(0)"])
def test_an_end_is_one_line(does):
    """Each body of main() in ENDS must give the exit code, output and message listed there. A body that is not in
    ENDS prints into a pipe with a closed reader, and must end with exit code 141 and no message."""
    code = "import sys\nfrom support.command import command\n"
    code += f"from support.errors import Broken, InputError\nwith command('x.py'):\n    {does}"
    reader, writer = os.pipe()
    if does not in ENDS:
        os.close(reader)
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = [sys.executable, "-c", code]
    ended = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, env=env, cwd=os.curdir)
    os.close(writer)
    want, printed, message = ENDS.get(does, (141, "", ""))
    assert (ended.returncode, ended.stderr) == (want, message)
    if does in ENDS:
        with open(reader) as pipe:
            assert pipe.read() == printed


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_shown_where_there_are_few_characters(name, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        command_module(name).main()
    assert stop.value.code == 0 and b"usage" in out.buffer.getvalue()


@pytest.mark.parametrize(
    "name, function, words",
    [
        ("sample", "generate", "--model data/base 1;A+2?"),
        ("plot", "draw", "nowhere"),
        ("data.prepare", "prepare", "aime24"),
    ],
)
def test_ctrl_c_is_one_line(name, function, words, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command_module(name), function, stopped)
    monkeypatch.setattr(sys, "argv", [name, *words.split()])
    with pytest.raises(SystemExit) as stop:
        command_module(name).main()
    assert stop.value.code == 130 and capsys.readouterr().err == f"\n{name.removeprefix('data.')}.py: stopped\n"


@pytest.mark.parametrize("name", [*COMMANDS[1:], "data.make_base", "data.make_sums", "data.smollm2"])
def test_an_option_that_is_none_is_one_line(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--nonsense", "1"])
    with pytest.raises(SystemExit) as stop:
        command_module(name).main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and "usage" not in message, message
    assert "--nonsense" in message or "required" in message or "invalid" in message


def test_a_problem_may_begin_with_a_minus_sign(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "-612;B*2?", "--model", "data/base", "--temperature", "0"])
    command_module("sample").main()
    assert capsys.readouterr().out.startswith("prompt  <bos>-612;B*2?\n  -> ")


def test_defaults_are_those_of_the_project_wherever_it_is_started(tmp_path):
    code = "import train, support.config; c = support.config.Config(); f = train.data_files(c)"
    code += "\nimport os, sys; sys.exit(not all(map(os.path.exists, [c.model, *f.values()])) or len(f) != 3)"
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env).returncode == 0


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    with replacing(path) as partial:
        partial.write_text("1")
    assert path.read_text() == "1"
    with pytest.raises(Unwritten, match=rf"writing to {path} failed \(No space left\)"), replacing(path) as partial:
        partial.write_text("2")
        raise OSError(28, "No space left")
    assert path.read_text() == "1" and list(tmp_path.iterdir()) == [path]
