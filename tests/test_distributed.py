"""distributed.py: two ranks give the rollouts, gradients, metrics and weights of one; nobody waits for ever."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as processes
from conftest import ALL_WRONG, BY_LENGTH
from test_step import make_run
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import step as steps
from loss import METHODS
from model import load_model, pick_device, save_model, token_stats
from reward import Reward
from sample import generate
from step import rl_step, sft_step
from support import checkpoint, distributed
from support.config import from_dict
from train import check_ranks, new_optimizer

ROOT = Path(__file__).parents[1]
CASES = {name: {"relift_buffer": 2} for name in METHODS} | {
    # three prompts on two ranks: unequal shares of rows, of lengths and of micro-batches
    "prefix-rft": {"prompts_per_step": 3, "micro_batch_tokens": 60},
    "luffy": {"micro_batch_tokens": 100, "recompute": True},
    "sft": {"micro_batch_tokens": 40},
}


RESUMED = ("prefix-rft", "relift")  # by AdamW, the others by plain descent
# AdamW makes a whole step of 1e-3 of a gradient that is only rounding: a tenth of one step
ROUNDING = {True: 1e-4, False: 1e-5}


def small_llama() -> LlamaForCausalLM:
    """Tied, without biases: the gradient of a key's bias is rounding noise, which AdamW blows up."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=103, **shape, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig(eos_token_id=[2, 60], pad_token_id=0)
    return model


def started(folder: Path, method: str, reward: Reward = BY_LENGTH) -> steps.Run:
    lr = 1e-3 if method in RESUMED else 0.1
    settings = {"lr": lr, "relift_lr": lr, "updates_per_step": 2} | CASES[method]
    model, tokenizer = load_model(str(folder / "model"), training=True, recompute=settings.get("recompute", False))
    run = make_run(tokenizer, method, model, reward=reward, **settings)
    # plain descent: AdamW turns the rounding of a gradient that is nearly 0 into a whole step; it is compared where
    # checkpoints are
    adam = method in RESUMED
    run.optimizer = new_optimizer(model, run.config) if adam else torch.optim.SGD(model.parameters())
    if run.collector:
        run.collector.optimizer = new_optimizer(model, run.config)
    return run


def one_step(run: steps.Run, number: int) -> tuple[dict, list]:
    """A step of the method's first stage."""
    if run.method.stages[0] == "sft":
        problems = [run.data.supervised[i] for i in (number, 3, 4)]
        return sft_step(run, problems, number, run.optimizer, 0.1), []
    metrics, shown, group = rl_step(run, number, record=True)
    return metrics, [*shown, group["id"]]


def three_steps(folder: Path, method: str) -> dict:
    """Metrics, samples and weights of three steps; a checkpoint after the second, in `folder`/METHOD-RANKS."""
    run = started(folder, method)
    log = [one_step(run, number) for number in (0, 1)]
    out = folder / f"{method}-{distributed.world_size()}"
    out.mkdir(exist_ok=True)
    checkpoint.save(out, 2, run)
    log.append(one_step(run, 2))
    save_model(run.model, run.tokenizer, out / "final")
    return {"log": log, "weights": distributed.full_state(run.model.state_dict())}


def resumed(folder: Path, method: str, saved_by: int) -> dict:
    """The third step, from the checkpoint that so many ranks saved."""
    run = started(folder, method)
    done = checkpoint.load(folder / f"{method}-{saved_by}", run)
    return {"log": [one_step(run, done)], "weights": distributed.full_state(run.model.state_dict())}


def equal_rewards(folder: Path) -> dict:
    """All wrong: no row has a weight, no rank makes a step, none waits."""
    run = started(folder, "prefix-rft", ALL_WRONG)
    metrics, *_ = rl_step(run, 0)
    return {"grad_norm": metrics["grad_norm"], "weights": distributed.full_state(run.model.state_dict())}


def work(number: int, folder: Path, port: int) -> None:
    """What each of two ranks does."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start(torch.device("cpu"))
    found = {method: three_steps(folder, method) for method in CASES}
    found["resumed"] = {method: resumed(folder, method, saved_by=1) for method in RESUMED}
    found["equal"] = equal_rewards(folder)
    run = started(folder, "sft")
    found["split"] = all(isinstance(p, DTensor) for p in run.model.parameters())
    try:
        check_ranks(from_dict({"prompts_per_step": 1, "updates_per_step": 1}))
    except ValueError as error:
        found["refused"] = str(error)
    if number == 0:
        torch.save(found, folder / "found.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """folder, what one process finds, what two ranks find."""
    folder = tmp_path_factory.mktemp("ranks")
    save_model(small_llama(), AutoTokenizer.from_pretrained("data/base"), folder / "model")
    one = {method: three_steps(folder, method) for method in CASES}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.spawn(work, (folder, port), nprocs=2)
    one["resumed"] = {method: resumed(folder, method, saved_by=2) for method in RESUMED}
    return folder, one, torch.load(folder / "found.pt", weights_only=True)


def assert_same(one: dict, two: dict, atol: float) -> None:
    """Metrics (but times), samples and weights, these to `atol`."""
    for (metrics, shown), (metrics_two, shown_two) in zip(one["log"], two["log"], strict=True):
        for name, value in metrics.items():
            if not name.startswith("seconds_") and name != "tokens_per_second":
                same = metrics_two[name] is None if value is None else pytest.approx(value, rel=1e-5, abs=1e-6)
                assert same is True or metrics_two[name] == same, name
        assert shown == shown_two
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=atol, rtol=1e-5)


@pytest.mark.parametrize("method", CASES)
def test_two_ranks_equal_one(results, method):
    """Samples, loss, gradient norm, entropy, kept tokens, weights after three steps."""
    folder, one, two = results
    assert_same(one[method], two[method], ROUNDING[method in RESUMED])
    assert any(metrics["grad_norm"] > 0 for metrics, _ in one[method]["log"])
    start = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    moved = max((one[method]["weights"][name] - start[name]).abs().max() for name in start)
    assert moved > 1e-3 and two["split"]


@pytest.mark.parametrize("method", RESUMED)
def test_a_checkpoint_resumes_on_any_number_of_ranks(results, method):
    """Saved by one, resumed by two, and the other way round: the third step is that of the whole run."""
    _, one, two = results
    for found in (one["resumed"][method], two["resumed"][method]):
        assert_same({"log": one[method]["log"][2:], "weights": one[method]["weights"]}, found, ROUNDING[True])


def test_two_ranks_save_a_plain_model_folder(results):
    folder, _, two = results
    model = AutoModelForCausalLM.from_pretrained(folder / "prefix-rft-2" / "final")
    assert type(model) is LlamaForCausalLM and model.config.architectures == ["LlamaForCausalLM"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in model.state_dict().items():
        assert (weight == two["prefix-rft"]["weights"][name]).all()


def test_equal_rewards_stop_nobody(results):
    folder, _, two = results
    start = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert two["equal"]["grad_norm"] == 0
    assert all((two["equal"]["weights"][name] == start[name]).all() for name in start)


def test_more_ranks_than_problems_are_refused(results):
    want = "prompts_per_step is 1, but there are 2 ranks: start at most 1, or raise prompts_per_step"
    assert results[2]["refused"] == want


@pytest.fixture
def alone():
    """A group of one, as on a single GPU."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.stop()


def test_bf16_compute_keeps_fp32_weights(results, alone, monkeypatch):
    """As on one GPU: a mesh of one; an update of 1e-6 is not lost, and sampling runs in bf16."""
    folder, *_ = results
    half = functools.partial(distributed.MixedPrecisionPolicy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    monkeypatch.setattr(distributed, "MixedPrecisionPolicy", half)
    run = started(folder, "prefix-rft")
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-6
    run.config.__dict__["lr"] = 1e-6
    before = {name: p.full_tensor().clone() for name, p in run.model.named_parameters()}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    metrics, *_ = rl_step(run, 0)
    assert metrics["grad_norm"] > 0
    moved = [(p.full_tensor() - before[name]).abs().max().item() for name, p in run.model.named_parameters()]
    assert all(0 < m < 4e-6 for m in moved)
    ids = torch.arange(3, 13)[None]
    log_probs, _ = token_stats(run.model, ids, torch.ones_like(ids), 6, 1.0)
    exact, _ = token_stats(small_llama(), ids, torch.ones_like(ids), 6, 1.0)
    assert 0 < (log_probs - exact).abs().max() < 0.3  # bf16, not fp32
    plan = steps.plan(run, [0, 1], [0, 1], 0, 4, rows="hybrid")
    assert all(generate(run.model, plan, 12))
    read = list(run.model.plain.parameters())  # by the model that samples: bf16, and no memory is held afterwards
    assert {p.dtype for p in read} == {torch.bfloat16} and not any(p.untyped_storage().size() for p in read)


def killable(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    settings = {
        "steps": 500,
        "prompts_per_step": 4,
        "device": "cpu",
        "out": folder / "run",
        "eval_data": "",
        "eval_every": 0,
    }
    settings |= {"data": folder / "train.jsonl", "max_response_tokens": 24, "method": "rft"}
    words = [str(word) for name, value in settings.items() if value != "" for word in (f"--{name}", value)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "train.py", *words], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def test_a_killed_rank_ends_the_others_with_a_message(tmp_path):
    """torchrun sees the dead rank; the other ends in the exchange it waits in."""
    lines = (ROOT / "data/recipes/train.jsonl").read_text().splitlines()[:8]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    group = killable(tmp_path)
    log, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    try:
        while not (log.exists() and log.stat().st_size):
            assert group.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(group.pid)], capture_output=True, text=True)
        os.kill(max(map(int, children.stdout.split())), signal.SIGKILL)
        _, said = group.communicate(timeout=60)
    finally:
        group.kill()
    assert group.returncode != 0
    assert "SIGKILL" in said or "lost another rank" in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("offload", [False, True])
def test_a_step_on_cuda(results, offload):
    folder, *_ = results
    device = pick_device("cuda")
    distributed.start(device)
    try:
        model, tokenizer = load_model(str(folder / "model"), device, training=True, recompute=True, offload=offload)
        run = make_run(tokenizer, "prefix-rft", model)
        run.optimizer = new_optimizer(model, run.config)
        for number in range(2):
            metrics, *_ = rl_step(run, number)
            assert metrics["grad_norm"] > 0
        save_model(model, tokenizer, folder / f"cuda-{offload}")
    finally:
        distributed.stop()
    assert AutoModelForCausalLM.from_pretrained(folder / f"cuda-{offload}")
