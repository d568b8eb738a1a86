"""These tests check that the faster decoding loop in fast/decode.py changes no token."""

import contextlib
import copy
import functools

import pytest
import torch
from test_sample import sampled, some_rows
from tiny import random_model
from transformers.models.llama.modeling_llama import LlamaMLP

from data.loader import encode_problems, load_problems
from fast import decode
from fast.check import check_model
from methods import METHODS
from model import load_model, save_model
from sample import Row, generate, plan_group

ours = functools.partial(sampled, decode=decode.decode_rows)


@pytest.fixture(scope="module")
def model():
    return ready_model()


def ready_model():
    model = random_model()
    model.loop = decode.LOOPS[0]
    return model


def seen_batches(model, rows, budget=24, **settings) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Returns the responses, and the shape of the input ids of every forward pass."""
    shapes = []
    hook_ids = model.model.embed_tokens.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    try:
        return ours(model, rows, budget, **settings), shapes
    finally:
        hook_ids.remove()


@pytest.mark.parametrize("method", ["rft", "prefix-rft", "luffy"])
def test_both_loops_give_equal_rows_on_the_base(method):
    """The loops of fast/decode.py and of transformers give the same tokens. With a float64 model the two loops also
    give the same log-probs, bit for bit after rounding to float32. (In a float32 model, sums in another order may
    differ in the last bits.)"""
    model, tokenizer = load_model("data/base", check=check_model)
    problems = [p for p in load_problems("data/recipes/train.jsonl") if p.demonstrations][:3]
    encoded, *_ = encode_problems(tokenizer, problems, 96, model.generation_config.eos_token_id)
    settings = {"rows": METHODS[method].rows, "rollouts": 3, "hybrid": 1, "share": lambda generator: 0.5}
    settings |= {"key": (0, 0), "max_response_tokens": 96}
    rows = [row for i, problem in enumerate(encoded) for row in plan_group(problem, i, **settings)]
    loop = decode.loop_of(model)
    assert loop is decode.decode_rows and sampled(model, rows, 20) == sampled(model, rows, 20, decode=loop)
    want, result = (generate(model.double(), tokenizer, rows, 20, decode=one) for one in (None, loop))
    assert result == want and sum(len(row.log_probs) for row in want) > 60


@pytest.mark.parametrize("drop_at", [0.01, 0.5, 0.999])
def test_when_ended_rows_leave_changes_nothing(model, monkeypatch, drop_at):
    rows = some_rows(24)
    want = ours(model, rows, 24)
    monkeypatch.setattr(decode, "DROP_AT", drop_at)
    assert ours(model, rows, 24) == want


def frozen(forward):
    """Returns a copy of the method `forward` that always uses the present tensors and key-value cache, as a CUDA
    graph does."""
    held = copy.copy(forward.__self__)
    held.live, held.cache = copy.copy(held.live), copy.copy(held.cache)
    held.cache.layers = [copy.copy(layer) for layer in held.cache.layers]
    return held.forward


def test_passes_that_are_recorded_give_the_same_tokens(monkeypatch):
    """The test imitates CUDA graphs on the CPU: the decoding loop reads the key-value cache in blocks of 8 columns,
    repeats each forward pass with the tensors of its recording, and drops ended rows less often."""
    rows, model, recordings = some_rows(24), ready_model(), []
    model.generation_config.eos_token_id = [2, 11, 23, 40, 57, 80]
    want = ours(model, rows, 40)
    monkeypatch.setattr(decode, "can_record", lambda device: True)
    monkeypatch.setattr(decode, "record", lambda forward: recordings.append(frozen(forward)) or recordings[-1])
    monkeypatch.setattr(decode, "GRAPH_COLUMNS", 8)
    monkeypatch.setattr(decode, "LOOK_EVERY", 3)
    assert ours(model, rows, 40) == want
    # the loop records a forward pass for each further block of the cache, about six times, and whenever ended rows
    # have left the batch
    assert 5 < len(recordings) < 10


def test_a_pass_that_cannot_be_recorded_is_one_line(monkeypatch):
    def forward():
        raise RuntimeError("operation not permitted\nmore of it")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    with pytest.raises(
        ValueError, match=r"recorded \(operation not permitted\): set GRAPHS = False in fast/decode.py$"
    ):
        decode.record(forward)


def test_a_pass_that_reads_values_is_not_recorded(tmp_path, tokenizer, monkeypatch):
    """A CUDA graph repeats the branches and shapes of its recording, even if new values of the tensors ask for
    others."""
    save_model(random_model(vocab_size=103), tokenizer, tmp_path / "m")
    own, ids = LlamaMLP.forward, torch.tensor([[3], [4]])
    reads = {
        "nothing": (lambda x: x * 1, False),
        "a row by its number": (lambda x: x[torch.zeros(len(x), dtype=torch.long)], False),
        "a branch": (lambda x: x if x.sum() > 0 else x * 1, True),
        "a shape": (lambda x: x[x > 0].sum() * x, True),
        "places": (lambda x: x + len(x.nonzero()), True),
    }
    for name, (does, result) in reads.items():
        monkeypatch.setattr(LlamaMLP, "forward", lambda self, x, does=does: own(self, does(x)))
        assert decode.reads_values(random_model(), ids) == result, name
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: own(self, x if x.sum() > 0 else x * 1))
    assert load_model(str(tmp_path / "m"), check=check_model)[0].loop == "masks of ours"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError()])
def test_full_memory_is_no_reason_for_another_loop(tmp_path, tokenizer, monkeypatch, error):
    save_model(random_model(vocab_size=103), tokenizer, tmp_path / "m")

    def full(*_, **__):
        raise error

    monkeypatch.setattr(decode, "reads_values", full)
    with pytest.raises((torch.OutOfMemoryError, MemoryError)):
        load_model(str(tmp_path / "m"), check=check_model)


def test_equal_prompts_are_read_once_and_ended_rows_leave(model):
    prompts = {"p": [1, 9, 30], "q": [1, 9], "r": [9, 1, 30]}
    rows = [Row(0, (0, 0, name, i), ids, []) for name, ids in prompts.items() for i in range(8)]
    responses, shapes = seen_batches(model, rows)
    assert shapes[0] == (3, 3) and {width for _, width in shapes[1:]} == {1}
    counts = [count for count, _ in shapes[1:]]
    assert counts == sorted(counts, reverse=True) and counts[0] <= 24 and len({len(r) for r in responses}) > 1
    # no forward pass has more than 1 / DROP_AT rows per unfinished row, because ended rows leave the batch
    for t, count in enumerate(counts, start=1):
        assert count <= sum(len(r) > t for r in responses) / decode.DROP_AT
    assert [ours(model, [row], 24)[0] for row in rows] == responses


def test_the_same_ids_behind_other_masks_are_other_prompts(model):
    """A prompt may contain the padding id: the prompts [pad, 9] and [9] then have equal padded ids but other
    masks."""
    rows = [Row(0, (0, 0, "p", 0), [0, 9], []), Row(0, (0, 0, "p", 1), [9], [])]
    assert ours(model, rows, 24) == [ours(model, [row], 24)[0] for row in rows]


def test_a_loop_that_samples_something_else_is_not_used(tmp_path, tokenizer, monkeypatch):
    """With a cache that mixes up its rows, the loops of fast/decode.py give wrong log-probs. load_model notices the
    difference and takes transformers' own loop. If transformers' loop is wrong too, load_model refuses the model."""
    save_model(random_model(vocab_size=103), tokenizer, tmp_path / "m")
    load = functools.partial(load_model, str(tmp_path / "m"), check=check_model)
    right, _ = load()
    assert right.loop == "masks of ours, recordable"
    reorder = decode.RoomyLayer.reorder_cache
    monkeypatch.setattr(decode.RoomyLayer, "reorder_cache", lambda self, rows: reorder(self, rows.flip(0)))
    model, _ = load()
    assert model.loop is None and decode.loop_of(model) is None
    result = sampled(model, some_rows(12), 12, 0.0)
    monkeypatch.setattr(type(model), "_sample", lambda model, input_ids, **_: input_ids)
    with pytest.raises(ValueError, match="rows sampled in a batch differ from rows alone"):
        load()
    monkeypatch.undo()
    assert result == ours(right, some_rows(12), 12, 0.0)


@pytest.mark.parametrize("tokens", [1, 30, 100])
def test_long_prompts_read_in_blocks_give_the_same_rows(model, monkeypatch, tokens):
    rows = some_rows()
    want = ours(model, rows, 24)
    monkeypatch.setattr(decode, "PREFILL_TOKENS", tokens)
    assert ours(model, rows, 24) == want
