"""decode.py: what makes sampling fast changes no token."""

import contextlib
import copy
import functools

import pytest
import torch
from conftest import random_model
from test_sample import some_rows
from transformers import GenerationConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import decode
from model import load_model, save_model
from sample import Row, generate


@pytest.fixture(scope="module")
def model():
    return random_model()


def seen_batches(model, rows, budget=24, **settings) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """The responses, and the shape of the ids of every forward pass."""
    shapes = []
    hook_ids = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        return generate(model, rows, budget, **settings), shapes
    finally:
        hook_ids.remove()


@pytest.mark.parametrize("prefill", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_static_cache_gives_the_same_tokens(model, temperature, prefill):
    rows = some_rows(24)
    loop = generate(model, rows, 24, temperature, prefill=prefill)
    assert generate(model, rows, 24, temperature, prefill=prefill, decode="static") == loop
    assert len({len(r) for r in loop}) > 3


def test_the_static_path_is_neutral_too(model):
    saved = model.generation_config
    try:
        model.generation_config = GenerationConfig(eos_token_id=[2], pad_token_id=0, no_repeat_ngram_size=1)
        with pytest.raises(ValueError, match="not neutral"):
            generate(model, some_rows(4), 8, decode="static")
    finally:
        model.generation_config = saved


@pytest.mark.parametrize("drop_at", [0.01, 0.5, 0.999])
def test_when_ended_rows_leave_changes_nothing(model, monkeypatch, drop_at):
    rows = some_rows(24)
    want = generate(model, rows, 24)
    monkeypatch.setattr(decode, "DROP_AT", drop_at)
    assert generate(model, rows, 24) == want


def frozen(forward):
    """What a recording holds: every tensor that `forward` has when it is made, those of the cache too."""
    held = copy.copy(forward.__self__)
    held.live, held.cache = copy.copy(held.live), copy.copy(held.cache)
    held.cache.layers = [copy.copy(layer) for layer in held.cache.layers]
    return held.forward


@pytest.mark.parametrize("prefill", [False, True])
def test_passes_that_are_recorded_give_the_same_tokens(monkeypatch, prefill):
    """As on CUDA: blocks of columns, tensors that a recording must find where they were, rows that leave seldom."""
    rows, model, recordings = some_rows(24), random_model(), []
    model.generation_config.eos_token_id = [2, 11, 23, 40, 57, 80]
    want = generate(model, rows, 40, prefill=prefill)
    monkeypatch.setattr(decode, "can_record", lambda device: True)
    monkeypatch.setattr(decode, "record", lambda forward: recordings.append(frozen(forward)) or recordings[-1])
    monkeypatch.setattr(decode, "GRAPH_COLUMNS", 8)
    monkeypatch.setattr(decode, "LOOK_EVERY", 3)
    assert generate(model, rows, 40, prefill=prefill) == want
    assert 5 < len(recordings) < 10  # of six blocks or so of columns, and after each time that rows left


def test_a_pass_that_cannot_be_recorded_is_one_line(monkeypatch):
    def forward():
        raise RuntimeError("operation not permitted\nmore of it")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    with pytest.raises(ValueError, match=r"recorded \(operation not permitted\): set GRAPHS = False in decode.py$"):
        decode.record(forward)


def test_a_pass_that_reads_values_is_not_recorded(tmp_path, tokenizer, monkeypatch):
    """A CUDA graph keeps the branches and the shapes it was recorded with."""
    save_model(random_model(vocab_size=103), tokenizer, tmp_path / "m")
    own, ids = LlamaMLP.forward, torch.tensor([[3], [4]])
    reads = {
        "nothing": (lambda x: x * 1, False),
        "a row by its number": (lambda x: x[torch.zeros(len(x), dtype=torch.long)], False),
        "a branch": (lambda x: x if x.sum() > 0 else x * 1, True),
        "a shape": (lambda x: x[x > 0].sum() * x, True),
        "places": (lambda x: x + len(x.nonzero()), True),
    }
    for name, (does, found) in reads.items():
        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x, does=does: own(self, does(x)))
        assert decode.reads_values(random_model(), ids) == found, name
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: own(self, x if x.sum() > 0 else x * 1))
    assert load_model(str(tmp_path / "m"))[0].loop == "masks of ours"


def test_equal_prompts_are_read_once_and_ended_rows_leave(model):
    prompts = {"p": [1, 9, 30], "q": [1, 9], "r": [9, 1, 30]}
    rows = [Row(0, (0, 0, name, i), ids, []) for name, ids in prompts.items() for i in range(8)]
    responses, shapes = seen_batches(model, rows)
    assert shapes[0] == (3, 3) and {width for _, width in shapes[1:]} == {1}
    counts = [count for count, _ in shapes[1:]]
    assert counts == sorted(counts, reverse=True) and counts[0] <= 24 and len({len(r) for r in responses}) > 1
    for t, count in enumerate(counts, start=1):  # at most 1 / DROP_AT times the rows that go on
        assert count <= sum(len(r) > t for r in responses) / decode.DROP_AT
    assert [generate(model, [row], 24)[0] for row in rows] == responses


def test_the_same_ids_behind_other_masks_are_other_prompts(model):
    """The padding id inside a prompt: [pad, 9] and a padded [9] have equal ids and unequal masks."""
    rows = [Row(0, (0, 0, "p", 0), [0, 9], []), Row(0, (0, 0, "p", 1), [9], [])]
    assert generate(model, rows, 24) == [generate(model, [row], 24)[0] for row in rows]


def test_a_loop_that_samples_something_else_is_not_used(tmp_path, tokenizer, monkeypatch):
    """A cache that mixes its rows up: our loops give other log-probs, which load_model notices, transformers' own the
    right ones; where that one does not work either, the model is refused."""
    save_model(random_model(vocab_size=103), tokenizer, tmp_path / "m")
    load = functools.partial(load_model, str(tmp_path / "m"))
    assert load()[0].loop == "masks of ours, recordable"
    right = decode.RoomyLayer.reorder_cache
    monkeypatch.setattr(decode.RoomyLayer, "reorder_cache", lambda self, rows: right(self, rows.flip(0)))
    assert load()[0].loop == "transformers"
    model, _ = load()
    monkeypatch.undo()
    assert generate(model, some_rows(12), 12, 0.0) == generate(load()[0], some_rows(12), 12, 0.0)
    monkeypatch.setattr(decode.RoomyLayer, "reorder_cache", lambda self, rows: right(self, rows.flip(0)))
    monkeypatch.setattr(decode, "decode_static", lambda model, input_ids, **_: input_ids)
    with pytest.raises(ValueError, match="rows sampled in a batch are not what they are alone"):
        load()
