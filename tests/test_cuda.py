"""These tests run on a GPU. Forward passes in bf16, CUDA kernels and CUDA graphs must agree with the CPU up to
rounding, and a resumed run with an uninterrupted one."""

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sample import TOKENIZER, sampled
from test_step import make_run
from tiny import random_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import train
from fast import decode
from fast.check import check_model
from model import load_model, save_model
from sample import Rollouts, Row, generate, pack, uniforms
from step import Step, forward, rl_step
from support import distributed
from support.config import parse_config
from support.loading import pick_device
from support.record import rl_metrics
from train import new_optimizer

DEVICE = "cuda"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

ROOT = Path(__file__).parents[1]
# four tokens end a response, so that rows have different lengths; prompts and prefixes contain no end token
ENDS = [2, 100, 101, 102]
# A random number closer than NEAR to the border between two tokens can draw either token, because a GPU rounds fp32
# sums differently (on a CPU: closer than a hundredth of NEAR).
NEAR = 2e-5


def llama() -> PreTrainedModel:
    """Returns a random Llama in which two query heads share a key head."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = random_model(scale=0.15, **shape)
    model.generation_config, model.loop = GenerationConfig(eos_token_id=ENDS, pad_token_id=0), decode.LOOPS[0]
    return model


def qwen() -> PreTrainedModel:
    """Returns a random Qwen2 with three layers, four query heads per key head, biases and tied embeddings."""
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 1, "max_position_embeddings": 512, "tie_word_embeddings": True}
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=103, pad_token_id=0, **shape))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.15)
    model.generation_config, model.loop = GenerationConfig(eos_token_id=ENDS, pad_token_id=0), decode.LOOPS[0]
    return model.train()


MODELS = {"llama": llama, "qwen": qwen}
ours = functools.partial(sampled, decode=decode.decode_rows)
load_trained = functools.partial(load_model, training=True, check=check_model)


@functools.cache
def exact(name: str) -> PreTrainedModel:
    """Returns the model `name` on the CPU in float64."""
    return MODELS[name]().double()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """Returns a folder in which every model of MODELS is saved."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in MODELS.items():
        save_model(make(), tokenizer, folder / name)
    return folder


@pytest.fixture
def one_gpu():
    """Starts a process group of one rank, as training on one GPU does."""
    distributed.start(pick_device(DEVICE))
    yield pick_device(DEVICE)
    distributed.stop()


def some_rows(prompt: int = 9, prefix: int = 12, groups: int = 6, size: int = 4) -> list[Row]:
    """Returns the rows of `groups` groups, each with a random prompt of at most `prompt` tokens. The last row of each
    group has a prefix of at most `prefix` tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(longest: int) -> list[int]:
        count = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(3, 100, (count,), generator=generator).tolist()

    prompts = [ids(prompt) for _ in range(groups)]
    rows = [Row(g, (0, g, i), prompt_ids, []) for g, prompt_ids in enumerate(prompts) for i in range(size)]
    return [replace(row, prefix_ids=ids(prefix)) if i % size == size - 1 else row for i, row in enumerate(rows)]


def plain_log_p(model: PreTrainedModel, row: Row, response: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Returns the log-probs of the whole vocabulary at every token of `response` [R, V], from a forward pass of the
    row alone."""
    ids = torch.tensor([row.prompt_ids + list(response)], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]
    return (logits / temperature).double().log_softmax(-1).cpu()


@torch.no_grad()
def assert_drawn(
    name: str, rows: Sequence[Row], responses: Sequence[list[int]], budget: int, temperature: float = 1.0
) -> None:
    """Checks that every token is the one that the row's random number draws from the float64 model's distribution. A
    response must end at the first end token or at the limit of `budget` tokens. At temperature 0 every token must be
    the likeliest."""
    ends = set(exact(name).generation_config.eos_token_id)
    for row, response in zip(rows, responses, strict=True):
        inputs = len(row.prefix_ids)
        assert response[:inputs] == row.prefix_ids and not ends & {*response[inputs:-1]}
        assert response[-1] in ends or len(response) == budget
        p = plain_log_p(exact(name), row, response, temperature or 1.0)[inputs:].exp()
        token = torch.tensor(response)[inputs:, None]
        if temperature == 0:
            assert (p.gather(1, token)[:, 0] > p.max(1).values - NEAR).all()
            continue
        u = torch.from_numpy(uniforms(row.key, budget)[inputs : len(response)].astype(np.float64))
        above = p.cumsum(1).gather(1, token)[:, 0]
        below = above - p.gather(1, token)[:, 0]
        assert ((below - NEAR < u) & (u < above + NEAR)).all(), (row.key, len(response))


def assert_same(result: Sequence[list[int]], want: Sequence[list[int]]) -> None:
    """Checks that at most one response in sixteen differs from `want`. Rounding can change a token whose random
    number lies at the border between two tokens."""
    assert len(result) == len(want) and sum(a != b for a, b in zip(result, want)) <= len(want) // 16


# ---- the training pass


def litter() -> None:
    """Leave NaN in freed memory, so that code fails if it takes an empty tensor for one of zeros."""
    held = [torch.full((size,), math.nan, device=DEVICE) for size in (2**24, *[2**20] * 16, *[2**14] * 64)]
    del held


@pytest.mark.parametrize("name", MODELS)
def test_compute_in_bf16_is_as_exact_as_that_of_a_plain_model(folder, one_gpu, name):
    """Log-probs, entropies and the gradient of a padded batch, from sharded fp32 weights, are compared with a float64
    model's. To show that fp32 compute does not use TF32, its errors must be 2^9 times smaller than those of bf16
    compute; with TF32 they would be only 2^3 times smaller."""
    rows = some_rows()
    responses = [[*row.prefix_ids, 7, 50, 11, 99 - i, 2] for i, row in enumerate(rows)]
    model, _ = load_trained(str(folder / name), one_gpu)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    rollouts = pack([replace(row, response=ids) for row, ids in zip(rows, responses)], pad_id=0)
    mask, every = rollouts.response_mask, torch.arange(len(rows))
    sign = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))

    def direct(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        log_p = [plain_log_p(model, row, response) for row, response in zip(rows, responses)]
        own = [p.gather(1, torch.tensor(response)[:, None])[:, 0] for p, response in zip(log_p, responses)]
        return torch.cat(own), torch.cat([-(p.exp() * p).sum(1) for p in log_p])

    def ours(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        return tuple(values.cpu()[mask] for values in forward(model, rollouts, every, 1.0))

    def gradient(model: PreTrainedModel, log_probs: Tensor) -> Tensor:
        model.zero_grad()
        (log_probs * sign[mask]).sum().backward()
        grads = distributed.full_state({name: parameter.grad for name, parameter in model.named_parameters()})
        return torch.cat([grad.flatten().double().cpu() for grad in grads.values()])

    models = {"ours": model, "half": MODELS[name]().bfloat16().to(one_gpu), "single": MODELS[name]().to(one_gpu)}
    passes = {"ours": ours, "half": direct, "single": ours}
    stats = {key: passes[key](models[key]) for key in models} | {"exact": direct(exact(name))}
    for which in (0, 1):
        values = {key: result[which].detach().double() for key, result in stats.items()}
        off = {key: float((values[key] - values["exact"]).abs().mean()) for key in models}
        assert off["half"] / 4 < off["ours"] < 4 * off["half"], off
        assert off["single"] < off["ours"] / 2**9, off
    gradients = {key: gradient(models[key], stats[key][0]) for key in models}
    gradients["exact"] = gradient(exact(name), stats["exact"][0])
    size = gradients["exact"].norm()
    off = {key: float((gradients[key] - gradients["exact"]).norm() / size) for key in models}
    assert off["half"] / 4 < off["ours"] < 4 * off["half"] and off["ours"] < 0.2, off
    assert off["single"] < off["ours"] / 2**9, off


@pytest.mark.parametrize("head_width", [32, 64, 128])  # CUDA chooses the attention kernel by the width of a head
def test_the_gradient_of_a_batch_that_is_mostly_padding_is_finite(tokenizer, one_gpu, tmp_path, head_width):
    """Twenty bf16 batches of eight rows have 1 to 250 prompt tokens and 1 to 250 response tokens per row. (The reason
    for this test: in runs on GSM8K, three updates in a hundred had no finite gradient, see results/smollm2.)"""
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": head_width}
    save_model(random_model(scale=0.15, **shape), tokenizer, tmp_path / "model")
    model, _ = load_trained(str(tmp_path / "model"), one_gpu)
    generator = torch.Generator().manual_seed(0)

    def ids() -> list[int]:
        count = int(torch.randint(1, 251, (), generator=generator))
        return torch.randint(3, 100, (count,), generator=generator).tolist()

    for _ in range(20):
        rollouts = pack([Row(i, (0, i), ids(), [], response=ids()) for i in range(8)], pad_id=0)
        litter()
        log_probs, entropy = forward(model, rollouts, torch.arange(8), 1.0)
        log_probs.cpu()[rollouts.response_mask].sum().backward()
        assert log_probs.isfinite().all() and entropy.isfinite().all()
        assert distributed.total_norm([p.grad for p in model.parameters()]).isfinite()


def test_updates_that_bf16_weights_would_lose_are_kept(folder, one_gpu):
    """Two updates of AdamW move a weight by about 2 lr at most. bf16 weights would lose over 90% of these moves."""
    model, tokenizer = load_trained(str(folder / "llama"), one_gpu)
    run = make_run(tokenizer, "prefix-rft", model, lr=1e-6, temperature=0.8)
    run.optimizer = new_optimizer(model, run.config)

    def weights() -> dict[str, Tensor]:
        state = distributed.full_state(dict(model.named_parameters()))
        return {name: weight.detach().clone() for name, weight in state.items()}

    before, metrics, after = weights(), rl_metrics(run, rl_step(run, 0)), weights()
    assert metrics["grad_norm"] > 0 and metrics["skipped_updates"] == 0
    for name, old in before.items():
        moved = after[name] - old
        assert 1e-7 < moved.abs().max() < 4e-6, name
        lost = (old.bfloat16() + moved.bfloat16() == old.bfloat16()).float().mean()
        assert after[name].dtype == torch.float32 and lost > 0.9, name


@pytest.mark.parametrize("offload", [False, True])
def test_a_step_with_recompute_and_offload(folder, one_gpu, tmp_path, offload):
    """With the settings recompute and offload and several micro-batches, the gradient norm is that of one micro-batch
    without these settings. The trained model can be saved and loaded again."""
    norms = {}
    for saving in (False, True):
        how = {"recompute": saving, "offload": saving and offload}
        model, tokenizer = load_trained(str(folder / "qwen"), one_gpu, **how)
        # with 60 tokens per micro-batch, an update sums the gradients of several micro-batches
        several = {"micro_batch_tokens": 60} if saving else {}
        run = make_run(tokenizer, "prefix-rft", model, lr=1e-6, **several)
        run.optimizer = new_optimizer(model, run.config)
        norms[saving] = [rl_metrics(run, rl_step(run, number))["grad_norm"] for number in range(2)]
    assert norms[True][0] == pytest.approx(norms[False][0], rel=0.01) and min(norms[True]) > 0
    if offload:
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    weights = distributed.full_state(distributed.state_of(model))
    save_model(model, tokenizer, tmp_path / "final")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).state_dict()
    start = AutoModelForCausalLM.from_pretrained(folder / "qwen", dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], weight.cpu()) for name, weight in weights.items())
    assert any(not torch.equal(start[name], weight) for name, weight in again.items())


# ---- sampling


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_follow_the_distribution_of_the_model(folder, request, name, compute):
    """The first two tokens of 4096 rows are compared with the float64 model by a chi-square test. With d degrees of
    freedom chi square has the mean d and the standard deviation sqrt(2 d)."""
    if compute == "bf16":
        model, _ = load_trained(str(folder / name), request.getfixturevalue("one_gpu"))
    else:
        model = MODELS[name]().to(DEVICE)
    count, temperature, prompt = 4096, 0.7, [5, 9, 30]
    rows = [Row(0, (1, "p", i), prompt, []) for i in range(count)]
    responses = ours(model, rows, 2, temperature, rows_per_call=count)
    pairs = torch.tensor([[*prompt, token] for token in range(103)])
    with torch.no_grad():
        # p[i, t] is the distribution of token t of a response whose first token is i
        p = (exact(name)(input_ids=pairs).logits[:, 2:] / temperature).softmax(-1)
    expected = count * p[0, 0][:, None] * p[:, 1]  # [first, second]
    expected[ENDS] = 0.0
    expected[ENDS, 0] = count * p[0, 0][ENDS]  # if a response ends after one token, its second token counts as 0
    result = torch.zeros_like(expected)
    for response in responses:
        first, second = (*response, 0)[:2]
        result[first, second] += 1
    often = expected >= 5
    cells = torch.cat([expected[often], expected[~often].sum()[None]])
    counts = torch.cat([result[often], result[~often].sum()[None]])
    chi_square, free = float(((counts - cells) ** 2 / cells).sum()), len(cells) - 1
    assert free > 50 and abs(chi_square - free) < 5 * math.sqrt(2 * free), (chi_square, free)


@pytest.mark.parametrize("how", [{}, {"decode": None}, {"rows_per_call": 5}, {"temperature": 0.0}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_response_is_what_the_cpu_draws(name, how):
    """In fp32 the GPU draws the CPU's tokens: with the decoding loop of fast/decode.py and with HuggingFace's loop,
    in one call or several, sampled or greedily."""
    rows, settings = some_rows(), {"temperature": 1.0} | how
    responses = ours(MODELS[name]().to(DEVICE), rows, 24, **settings)
    assert len({len(response) for response in responses}) > 3
    assert_drawn(name, rows, responses, 24, settings["temperature"])
    assert_same(responses, ours(MODELS[name](), rows, 24, settings["temperature"]))


def test_a_row_does_not_depend_on_its_batch():
    """A row gets the same response together with others, alone, in another order and with 5 rows per call, whether
    the rows have one prompt or different prompts."""
    model = llama().to(DEVICE)
    for rows in (some_rows(groups=1, size=12), some_rows(groups=12, size=1), some_rows()):
        together = ours(model, rows, 24)
        assert_drawn("llama", rows, together, 24)
        assert_same(ours(model, rows[::-1], 24)[::-1], together)
        assert_same(ours(model, rows, 24, rows_per_call=5), together)
        alone = [ours(model, [row], 24)[0] for row in rows[-4:]]
        assert_drawn("llama", rows[-4:], alone, 24)


@pytest.mark.parametrize("name", MODELS)
def test_graphs_change_no_token(name, monkeypatch):
    """With and without CUDA graphs, prompts of up to 40 and prefixes of up to 60 tokens get the same responses of 1
    to 300 tokens. Equal prompts are sampled in two calls of generate, because a graph kept from the first call must
    read the second call's cache."""
    model, budget = MODELS[name]().to(DEVICE), 300
    batches = [some_rows(40, 60, groups=9), some_rows(40, 60, groups=1, size=8), some_rows(7, groups=1)[:1]]
    batches.append([replace(row, key=(*row.key, "again")) for row in batches[0]])
    ends = GenerationConfig(eos_token_id=[2], pad_token_id=0)
    for one in (model, exact(name)):
        monkeypatch.setattr(one, "generation_config", ends)
    result = {}
    for graphs in (False, True):
        monkeypatch.setattr(decode, "GRAPHS", graphs)
        for i, rows in enumerate(batches):
            litter()
            result[graphs, i] = ours(model, rows, budget)
    for i, rows in enumerate(batches):
        assert_drawn(name, rows, result[True, i], budget)
        assert len(rows) == 1 or sum(a != b for a, b in zip(result[True, i], result[False, i])) <= len(rows) // 8
    lengths = [len(response) for response in result[True, 0]]
    assert min(lengths) < 64 and max(lengths) == budget and len(set(lengths)) > 12


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_as_drawn_are_those_of_the_training_pass(folder, one_gpu, tokenizer, name):
    """The log-probs that generate returns equal those of training's forward pass, in fp32 up to rounding. In bf16 the
    mean difference of the log-probs is below 4 times the error of a plain bf16 model, also after updates."""
    rows, single = some_rows(), MODELS[name]().to(one_gpu)

    @torch.no_grad()
    def both(model: PreTrainedModel) -> tuple[Rollouts, Tensor, Tensor]:
        """Returns rollouts, and two log-probs of each sampled token: from sampling and from the training pass."""
        drawn = generate(model, TOKENIZER, rows, 24, 0.7, decode=decode.decode_rows)
        assert all(len(row.log_probs) == len(row.response) - len(row.prefix_ids) for row in drawn)
        rollouts = pack(drawn, pad_id=0)
        return rollouts, torch.tensor([value for row in drawn for value in row.log_probs]), result(model, rollouts)

    @torch.no_grad()
    def result(model: PreTrainedModel, rollouts: Rollouts) -> Tensor:
        log_probs, _ = forward(model, rollouts, torch.arange(len(rows)), 0.7)
        return log_probs.cpu()[rollouts.response_mask & ~rollouts.prefix_mask]

    first, drawn, trained = both(single)
    torch.testing.assert_close(drawn, trained, atol=1e-4, rtol=0)
    close = 4 * (result(MODELS[name]().bfloat16().to(one_gpu), first) - trained).abs().mean()
    model, _ = load_trained(str(folder / name), one_gpu)
    run = make_run(tokenizer, "prefix-rft", model, lr=0.01)
    run.optimizer = new_optimizer(model, run.config)
    for step in range(3):
        before = result(model, first)
        _, drawn, trained = both(model)
        assert (drawn - trained).abs().mean() < close, step
        metrics = rl_metrics(run, rl_step(run, step))
        # grad_norm would be NaN if the step read the NaN that `litter` has left in freed memory
        assert metrics["grad_norm"] > 0 and (result(model, first) - before).abs().mean() > 4 * close


# ---- a run


def test_a_run_that_goes_on_is_one_that_was_not_stopped(one_gpu, tmp_path, monkeypatch):
    """One run is stopped after step 2 of 4 and resumed. Some CUDA kernels (attention, backward) add in no fixed
    order, so the metrics of resumed and whole run agree to 1e-3 only. If AdamW's state were lost, the weights would
    differ by about lr."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(train, "draw_curves", lambda folder: "")
    lines = (ROOT / "data/recipes/train.jsonl").read_text().splitlines(keepends=True)
    demonstrated = [line for line in lines if json.loads(line).get("demonstrations")]
    (tmp_path / "train.jsonl").write_text("".join(demonstrated[:12]))
    (tmp_path / "held.jsonl").write_text("".join(lines[-4:]))
    lr = 1e-5
    settings = {"data": tmp_path / "train.jsonl", "eval_data": tmp_path / "held.jsonl", "test_data": "", "lr": lr}
    settings |= {"device": DEVICE, "steps": 4, "prompts_per_step": 4, "rollouts_per_prompt": 4, "save_every": 0}
    settings |= {"max_response_tokens": 80, "eval_response_tokens": 48, "eval_every": 2, "micro_batch_tokens": 600}
    caught: list[int] = []
    monkeypatch.setattr(train, "catch_signals", lambda alone: caught)

    def run(out: Path) -> int:
        words = [str(word) for item in (settings | {"out": out}).items() for word in (f"--{item[0]}", item[1])]
        return train.train(parse_config([*words, "--resume", "auto"]))

    def step(run, number: int) -> Step:
        if number == 1:
            caught.append(15)
        return rl_step(run, number)

    assert run(tmp_path / "whole") == 0
    monkeypatch.setattr(train, "rl_step", step)
    assert run(tmp_path / "parts") == 128 + 15 and not (tmp_path / "parts" / "final").exists()
    caught.clear()
    monkeypatch.setattr(train, "rl_step", rl_step)
    assert run(tmp_path / "parts") == 0

    def read(name: str) -> list[list[dict]]:
        texts = [(tmp_path / out / name).read_text() for out in ("whole", "parts")]
        return [[json.loads(line) for line in text.splitlines()] for text in texts]

    whole, parts = read("metrics.jsonl")
    # support/watch.py warns with the words "not the policy" if log-probs of sampling and training differ
    assert "not the policy" not in str(whole)
    assert [row["step"] for row in parts] == [1, 2, 3, 4] and any(row["grad_norm"] > 0 for row in parts[2:])
    for row, other in zip(whole, parts, strict=True):
        for name, value in row.items():
            if not name.startswith("seconds_") and name != "tokens_per_second":
                close = pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value
                assert other[name] == close, (row["step"], name)
    assert len(whole) == 4 and read("samples.jsonl")[0] == read("samples.jsonl")[1]
    start, one, two = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in ("data/base", tmp_path / "whole" / "final", tmp_path / "parts" / "final")
    )
    apart = torch.cat([(one[name] - two[name]).abs().flatten() for name in one]).mean()
    moved = torch.cat([(one[name] - start[name]).abs().flatten() for name in one]).mean()
    assert moved > lr / 2 and apart < lr / 100, (moved / lr, apart / lr)
