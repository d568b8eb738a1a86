"""These tests check that two ranks give the rollouts, gradients, metrics and weights of one, and that no rank waits
for ever."""

import contextlib
import functools
import io
import json
import math
import os
import socket
import sys
from pathlib import Path

import pytest
import test_eval
import torch
import torch.multiprocessing as processes
from test_step import make_run
from tiny import ALL_WRONG, BY_LENGTH, ONE_OF_EACH, START, rounding
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

import eval as evaluation
import step as steps
import train
from model import load_model, save_model, token_stats
from reward import Reward
from step import rl_step, sft_step
from support import adapters, checkpoint, distributed
from support.config import from_dict
from support.record import example_rows, record_group, rl_metrics, sft_metrics
from train import new_optimizer

ROOT = Path(__file__).parents[1]


CASES = {name: {} for name in ONE_OF_EACH} | {
    # with three prompts, two ranks have unequal numbers of rows, tokens and micro-batches
    "prefix-rft": {"prompts_per_step": 3, "micro_batch_tokens": 60},
    "luffy": {"micro_batch_tokens": 100, "recompute": True},
    "sft": {"micro_batch_tokens": 40},
    # a group is unsolved if at most `gate` of its rows are right
    "relift": {"relift_buffer": 2, "gate": 2},
    "hpt": {"gate": 1},
    "rescue": {"gate": 2},
    "uft": {"max_grad_norm": 0.02},  # a max_grad_norm of 0.02 scales every gradient down
    "prefix-rft with adapters": {"lora_rank": 3, "lora_lr_times": 1.0, "micro_batch_tokens": 60},
}
# the methods in RESUMED update by AdamW, all other methods by SGD
RESUMED = ("prefix-rft", "relift", "prefix-rft with adapters")
# In these tests AdamW's eps is far above the rounding errors of gradients. With AdamW's default eps of 1e-8 a
# rounding error would move a weight by lr.
ADAM_EPS = 1e-3


# Many tokens end a response, so that most responses end before the limit of tokens and some are right. The
# demonstrations of make_run contain none of the tokens in ENDS.
ENDS = [2, *range(60, 69)]


def small_llama() -> LlamaForCausalLM:
    """Returns a model with tied embeddings, without biases because the gradient of a key's bias is rounding noise,
    which AdamW blows up."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=103, **shape, num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0)
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config = GenerationConfig(eos_token_id=ENDS, pad_token_id=0)
    return model


@functools.cache
def loaded(folder: Path, case: str = "") -> tuple:
    """Returns the model in `folder`, its tokenizer, and a copy of its weights before any step."""
    recompute, rank = (CASES.get(case, {}).get(name) for name in ("recompute", "lora_rank"))
    low_rank = adapters.of(from_dict({"lora_rank": rank or 0}))
    model, tokenizer = load_model(str(folder / "model"), training=True, recompute=bool(recompute), adapters=low_rank)
    return model, tokenizer, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def started(folder: Path, method: str, reward: Reward = BY_LENGTH) -> steps.Run:
    adam = method in RESUMED
    lr = 1e-3 if adam else 0.1
    settings = {"lr": lr, "relift_lr": lr, "updates_per_step": 2} | CASES[method]
    model, tokenizer, weights = loaded(folder, method)
    model.load_state_dict(weights)
    run = make_run(tokenizer, method.split()[0], model, reward=reward, **settings)
    assert not {i for problem in run.data.encoded for ids in problem.demonstrations for i in ids} & {*ENDS}
    run.optimizer = new_optimizer(model, run.config) if adam else torch.optim.SGD(distributed.trained(model).values())
    if run.collector:
        run.collector.optimizer = new_optimizer(model, run.config)
    for optimizer in (run.optimizer, *([run.collector.optimizer] if run.collector else [])):
        for group in optimizer.param_groups:
            group["eps"] = ADAM_EPS
    return run


def one_step(run: steps.Run, number: int) -> tuple[dict, list]:
    """Make one step of the method's first stage, and return its metrics and its samples."""
    if run.method.stages[0] == "sft":
        problems = [run.data.supervised[i] for i in (number, 3, 4)]
        return sft_metrics(sft_step(run, problems, number, run.optimizer, 0.1), 0.1), []
    result = rl_step(run, number)
    return rl_metrics(run, result), [*example_rows(run, result), record_group(run, result)["id"]]


def whole_weights(run: steps.Run) -> dict | None:
    """Returns a copy of all weights on the first rank, and None on the others."""
    state = distributed.full_state(run.model.state_dict())
    return {name: tensor.clone() for name, tensor in state.items()} if distributed.rank() == 0 else None


def some_steps(folder: Path, method: str) -> dict:
    """Returns metrics, samples and weights of two steps. With a method in RESUMED, a checkpoint is then saved in
    `folder`/METHOD-RANKS and a third step follows."""
    run = started(folder, method)
    log = [one_step(run, number) for number in (0, 1)]
    if method in RESUMED:
        out = folder / f"{method}-{distributed.world_size()}"
        out.mkdir(exist_ok=True)
        checkpoint.save(out, 2, run)
        log.append(one_step(run, 2))
        save_model(run.model, run.tokenizer, out / "final")
    return {"log": log, "weights": whole_weights(run)}


def resumed(folder: Path, method: str, saved_by: int) -> dict:
    """Make the third step after loading the checkpoint that `saved_by` ranks have saved."""
    run = started(folder, method)
    done = checkpoint.load(folder / f"{method}-{saved_by}", run)
    return {"log": [one_step(run, done)], "weights": whole_weights(run)}


def equal_rewards(folder: Path) -> dict:
    """Make a step in which all rows are wrong. No token has a weight, so no rank makes an update, and no rank waits
    for another."""
    run = started(folder, "prefix-rft", ALL_WRONG)
    metrics = rl_metrics(run, rl_step(run, 0))
    return {"grad_norm": metrics["grad_norm"], "weights": whole_weights(run)}


def scaled_down(folder: Path, max_norm: float) -> dict:
    """Calls clip_gradients on a gradient that equals the weights. Returns the computed norm and the clipped
    gradient."""
    parameters = dict(started(folder, "prefix-rft").model.named_parameters())
    for parameter in parameters.values():
        parameter.grad = parameter.detach().clone()
    norm = distributed.clip_gradients(parameters.values(), max_norm)
    actual = {"norm": norm, "gradient": distributed.full_state({n: p.grad for n, p in parameters.items()})}
    for parameter in parameters.values():
        parameter.grad = None
    return actual


def a_rank_dies(folder: Path) -> dict:
    """Make a run whose second rank exits without a message in its third step. Returns the first rank's error message
    and exit code."""
    rows = (ROOT / "data/recipes/train.jsonl").read_text().splitlines(keepends=True)[:8]
    (folder / "train.jsonl").write_text("".join(rows))
    settings = {"method": "rft", "data": folder / "train.jsonl", "out": folder / "run", "device": "cpu"}
    settings |= {"prompts_per_step": 2, "rollouts_per_prompt": 2, "max_response_tokens": 12, "eval_every": 0}
    sys.argv = ["train.py", *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]

    def step(run: steps.Run, number: int) -> steps.Step:
        if (number, distributed.rank()) == (2, 1):
            os._exit(0)
        return rl_step(run, number)

    train.rl_step, message = step, io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(message):
        try:
            train.main()
        except SystemExit as stop:
            return {"code": stop.code, "said": message.getvalue()}


def evaluated(folder: Path) -> dict[int, str]:
    """Make an evaluation in `folder`/eval-RANKS, and return what each rank printed."""
    words = [*test_eval.WORDS.split(), "--device", "cpu", "--out", str(folder / f"eval-{distributed.world_size()}")]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        evaluation.run(evaluation.parse_args(words))
    return distributed.gather_dict({distributed.rank(): printed.getvalue()})


def work(number: int, folder: Path, port: int) -> None:
    """As rank `number` of two, make all runs that the tests compare with one process, and save their results in
    found.pt."""
    torch.set_num_threads(1)
    # a model that was loaded before the fork is not split over the ranks, so each rank loads it again
    loaded.cache_clear()
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.start(torch.device("cpu"))
    actual = {method: some_steps(folder, method) for method in CASES}
    actual["resumed"] = {method: resumed(folder, method, saved_by=1) for method in RESUMED}
    actual["equal"] = equal_rewards(folder)
    actual["scaled down"] = {max_norm: scaled_down(folder, max_norm) for max_norm in (0.5, 1e6, 0)}
    actual["split"] = all(isinstance(p, DTensor) for p in started(folder, "sft").model.parameters())
    try:
        train.check_ranks(from_dict({"prompts_per_step": 1, "updates_per_step": 1}))
    except ValueError as error:
        actual["refused"] = str(error)
    actual["evaluated"] = evaluated(folder)
    actual["died"] = a_rank_dies(folder)
    torch.save(actual, folder / "found.pt")  # only the first rank saves results: a_rank_dies ended the second


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns the folder, the results of one process, and the results of two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    save_model(small_llama(), AutoTokenizer.from_pretrained("data/base"), folder / "model")
    (folder / "model" / "merges.txt").write_text("a b\n")
    one = {method: some_steps(folder, method) for method in CASES} | {"evaluated": evaluated(folder)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes.start_processes(work, (folder, port), nprocs=2, start_method=START)
    one["resumed"] = {method: resumed(folder, method, saved_by=2) for method in RESUMED}
    return folder, one, torch.load(folder / "found.pt", weights_only=True)


def assert_same(method: str, one: dict, two: dict) -> None:
    """Checks that the result `two` has the metrics (except times) and samples of the last steps of the result `one`.
    Weights may differ by the rounding errors of all gradients."""
    # `close` bounds the rounding error of metrics, which are sums of numbers near 1 over 16 rows of at most 40 tokens
    close, norm = rounding(small_llama(), columns=16 * 40), 0.0
    for (metrics, shown), (metrics_two, shown_two) in zip(one["log"][-len(two["log"]) :], two["log"], strict=True):
        for name, value in metrics.items():
            if not name.startswith("seconds_") and name != "tokens_per_second":
                same = metrics_two[name] is None if value is None else pytest.approx(value, rel=close, abs=close)
                assert same is True or metrics_two[name] == same, name
        assert shown == shown_two
    for metrics, _ in one["log"]:
        # the metric grad_norm is the mean of the gradient norms of a step's two updates
        norm += 2 * metrics["grad_norm"] + metrics.get("relift_grad_norm", 0.0)
    # `step` is the largest possible ratio of a weight's move in an update to its gradient
    step = 1e-3 / ADAM_EPS if method in RESUMED else 0.1
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=step * norm * close, rtol=2**-22)


@pytest.mark.parametrize("method", CASES)
def test_two_ranks_equal_one(results, method):
    """One rank and two ranks have equal samples and metrics in all steps, and equal weights after two or three
    steps."""
    folder, one, two = results
    assert_same(method, one[method], two[method])
    assert any(metrics["grad_norm"] > 0 for metrics, _ in one[method]["log"])
    start = loaded(folder, method)[2]
    moved = max((one[method]["weights"][name] - start[name]).abs().max() for name in start)
    assert moved > 1e-4 and two["split"]


@pytest.mark.parametrize("method", RESUMED)
def test_a_checkpoint_resumes_on_any_number_of_ranks(results, method):
    """A checkpoint is saved by one rank and resumed by two, and the other way round. The third step after resuming
    equals that of a run that was not stopped."""
    _, one, two = results
    third, _ = one[method]["log"][2]
    assert third["grad_norm"] > 0 and third.get("relift_updates", 1) == 1
    for actual in (one["resumed"][method], two["resumed"][method]):
        assert_same(method, one[method], actual)


@pytest.mark.parametrize("max_norm", [0.5, 1e6, 0])  # a max_norm of 0 leaves the gradient as it is
def test_a_gradient_is_scaled_down_by_its_norm_over_all_ranks(results, max_norm):
    folder, _, two = results
    weights = dict(AutoModelForCausalLM.from_pretrained(folder / "model").named_parameters())
    norm = math.sqrt(sum(float(weight.detach().double().square().sum()) for weight in weights.values()))
    actual = two["scaled down"][max_norm]
    # the norm sums one square per weight, and each square is rounded
    close = sum(weight.numel() for weight in weights.values()) * 2**-24
    assert actual["norm"] == pytest.approx(norm, rel=close)
    for name, weight in weights.items():
        wanted = weight.detach() * min(1.0, (max_norm or norm) / norm)
        torch.testing.assert_close(actual["gradient"][name], wanted, rtol=close, atol=0)


def test_two_ranks_save_a_plain_model_folder(results):
    folder, _, two = results
    model = AutoModelForCausalLM.from_pretrained(folder / "prefix-rft-2" / "final")
    assert (folder / "prefix-rft-2" / "final" / "merges.txt").read_text() == "a b\n"
    assert type(model) is LlamaForCausalLM and model.config.architectures == ["LlamaForCausalLM"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, weight in model.state_dict().items():
        assert (weight == two["prefix-rft"]["weights"][name]).all()


def test_equal_rewards_stop_nobody(results):
    folder, _, two = results
    start = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    assert two["equal"]["grad_norm"] == 0
    assert all((two["equal"]["weights"][name] == start[name]).all() for name in start)


def test_a_rank_that_dies_ends_the_others_with_a_message(results):
    """The other ranks notice a dead rank when they wait to exchange tensors with it. The steps that were finished
    before the rank died are in metrics.jsonl."""
    folder, _, two = results
    message = two["died"]["said"]
    assert two["died"]["code"] == 1 and message.count("\n") == 1
    assert message.startswith("train.py: rank 0: lost another rank (") and message.endswith(
        "; --resume auto continues from the last checkpoint\n"
    )
    log = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2]


def test_two_ranks_write_the_evaluation_of_one_process(results):
    folder, one, two = results
    assert two["evaluated"][0].count("evaluation ->") == 1 and two["evaluated"][1] == ""
    assert one["evaluated"][0].count("written to") == two["evaluated"][0].count("written to") == 1
    both = [(folder / f"eval-{ranks}" / "generations.jsonl").read_bytes() for ranks in (1, 2)]
    assert both[0] == both[1]
    results_of_one, results_of_two = (test_eval.without_date(folder / f"eval-{ranks}") for ranks in (1, 2))
    assert (results_of_one["settings"].pop("ranks"), results_of_two["settings"].pop("ranks")) == (1, 2)
    assert results_of_one == results_of_two


def test_more_ranks_than_problems_are_refused(results):
    want = "prompts_per_step is 1, but there are 2 ranks: start at most 1, or raise prompts_per_step"
    assert results[2]["refused"] == want


def test_a_tied_weight_stands_once_in_the_state():
    """A tied weight is stored under its first name only. A checkpoint or final/ with both names would be larger, and
    the two copies could differ."""
    names = set(distributed.state_of(small_llama()))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


@pytest.fixture
def alone():
    """Starts a process group of one rank, as on a single GPU."""
    loaded.cache_clear()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.stop()
    loaded.cache_clear()


@pytest.mark.parametrize("method", ["sft", "luffy"])
def test_gradients_of_micro_batches_add_up_in_host_memory(results, alone, monkeypatch, method):
    """This tests --offload without a GPU: two steps with several passes per update equal the same steps without
    --offload. (Published SFT baselines had lost the gradients of all passes but the last [2604.23747].)"""
    in_host_memory = functools.partial(CPUOffloadPolicy, pin_memory=False)
    monkeypatch.setattr(distributed, "OffloadPolicy", in_host_memory)
    folder, one, _ = results
    passes, forward = [], steps.forward
    monkeypatch.setattr(steps, "forward", lambda *words: passes.append(words[2]) or forward(*words))
    assert_same(method, one[method], some_steps(folder, method))
    # checks that some update has several micro-batches
    assert isinstance(loaded(folder, method)[0], FSDPModule) and len(passes) > 4


def test_bf16_compute_keeps_fp32_weights(results, alone, monkeypatch):
    """On a mesh of one rank, as on one GPU, fp32 weights keep updates of 1e-6, and sampling computes in bf16."""
    folder, *_ = results
    half = functools.partial(distributed.MixedPrecisionPolicy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    monkeypatch.setattr(distributed, "MixedPrecisionPolicy", half)
    run = started(folder, "prefix-rft")
    run.config.__dict__["lr"] = 1e-6
    run.optimizer = new_optimizer(run.model, run.config)
    before = {name: p.full_tensor().clone() for name, p in run.model.named_parameters()}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}
    metrics = rl_metrics(run, rl_step(run, 0))
    assert metrics["grad_norm"] > 0
    moved = [(p.full_tensor() - before[name]).abs().max().item() for name, p in run.model.named_parameters()]
    assert all(0 < m < 4e-6 for m in moved)  # each of two AdamW updates moves a weight by about lr at most
    run.model.load_state_dict(loaded(folder)[2])
    ids = torch.arange(3, 13)[None]
    models = run.model, small_llama().bfloat16(), small_llama()
    log_probs, half, exact = (token_stats(m, ids, torch.ones_like(ids), 6, 1.0)[0] for m in models)
    off, plain_off = (log_probs - exact).abs().max(), (half - exact).abs().max()
    # the run computes in bf16: its log-probs differ from those in fp32 about as much as a plain bf16 model's do
    assert plain_off / 10 < off < 10 * plain_off
    assert all(row.response for row in steps.sample_groups(run, [0, 1], 0, [0, 1], rows="hybrid", rollouts=4))
    read = list(run.model.plain.parameters())  # the model's copy for sampling is in bf16 and is freed afterwards
    assert {p.dtype for p in read} == {torch.bfloat16} and not any(p.untyped_storage().size() for p in read)
