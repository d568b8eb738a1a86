"""These tests check support/adapters.py. Micro-batches and several ranks are tried with adapters in test_step.py and
test_distributed.py."""

import importlib.util

import peft
import pytest
import torch
from test_step import make_run
from tiny import random_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from model import load_model, save_model, token_stats
from step import rl_step
from support import adapters, checkpoint
from support.config import from_dict
from support.distributed import trained
from support.errors import InputError
from train import new_optimizer

IDS = torch.arange(3, 33).view(2, 15)


def log_probs(model: torch.nn.Module) -> torch.Tensor:
    return token_stats(model, IDS, torch.ones_like(IDS), 9, 1.0)[0].detach()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_the_model_that_was_trained(tokenizer, tmp_path, dtype):
    """The folder final/ is a plain fp32 model, into whose weights the adapters are merged. peft can read the folder
    adapter/ and put its matrices on the base model."""
    save_model(random_model(), tokenizer, tmp_path / "base")
    (tmp_path / "base" / "merges.txt").write_text("a b\n")
    config = from_dict({"lora_rank": 3, "lora_alpha": 5, "base_dtype": dtype})
    model, _ = load_model(str(tmp_path / "base"), training=True, adapters=adapters.of(config))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    plain = log_probs(model)
    for parameter in trained(model).values():
        parameter.data += 0.02
    save_model(model, tokenizer, tmp_path / "final")
    adapters.save(model, tmp_path / "adapter")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert (tmp_path / "final" / "merges.txt").exists()  # a tokenizer file of the base model was copied into final/
    assert final.dtype == torch.float32 and final.state_dict().keys() == random_model().state_dict().keys()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=getattr(torch, dtype))
    by_peft = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).base_model.model
    torch.testing.assert_close(log_probs(by_peft), log_probs(model), rtol=0, atol=0)
    far = (log_probs(model) - plain).abs().max()
    close = 1e-4 if dtype == "float32" else 0.1
    assert far > 4 * close and (log_probs(final) - log_probs(model)).abs().max() < close


def test_adapters_start_where_they_make_no_difference_and_by_the_seed():
    plain, starts = log_probs(random_model()), []
    for seed in (0, 0, 1):
        model = random_model()
        adapters.add(model, adapters.of(from_dict({"lora_rank": 3, "seed": seed})))
        assert torch.equal(log_probs(model), plain)
        starts.append(torch.cat([p.flatten() for name, p in trained(model).items() if "lora_A" in name]))
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("targets, count", [("", 2 * 7), ("q_proj, v_proj", 2 * 2)])
def test_only_adapters_of_the_target_layers_are_trained_and_stand_in_a_checkpoint(
    tokenizer, tmp_path, targets, count
):
    run = make_run(tokenizer, lora_rank=3, lora_targets=targets, lr=1e-4)
    run.optimizer = new_optimizer(run.model, run.config)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    rl_step(run, 4)
    moved = {name for name, parameter in run.model.named_parameters() if not torch.equal(before[name], parameter)}
    layers = {name.split(".lora_")[0] for name in moved}
    assert len(layers) == count and len(moved) == 2 * count and all(".lora_" in name for name in moved)
    assert not targets or {layer.rpartition(".")[2] for layer in layers} == {"q_proj", "v_proj"}
    checkpoint.save(tmp_path, 1, run)
    saved = checkpoint.read_checkpoint(checkpoint.checkpoints(tmp_path)[0])
    assert saved["model"].keys() == moved and len(saved["optimizer"]["state"]) == len(moved)


def test_the_rate_of_adapters_is_a_multiple(tokenizer):
    """The learning rate of adapters is read off AdamW's first step, which moves a weight by the rate whatever the
    gradient is."""
    for settings, rate in (({"lora_rank": 3}, 1e-3), ({"lora_rank": 3, "lora_lr_times": 2}, 2e-4), ({}, 1e-4)):
        run = make_run(tokenizer, lr=1e-4, updates_per_step=1, **settings)
        run.optimizer = new_optimizer(run.model, run.config)
        before = [parameter.clone() for parameter in trained(run.model).values()]
        rl_step(run, 4)
        moves = [(a - b).abs().max().item() for a, b in zip(trained(run.model).values(), before)]
        assert max(moves) == pytest.approx(rate, rel=1e-2)


def test_a_run_with_adapters_goes_on_to_the_bit(tokenizer, tmp_path):
    """Two steps, and two more steps of a new run that loads their checkpoint, give the same weights as four steps of
    one run."""

    def started(rank=3):
        run = make_run(tokenizer, lora_rank=rank, lr=1e-4)
        run.optimizer = new_optimizer(run.model, run.config)
        return run

    whole, first, second = started(), started(), started()
    for step in range(4):
        rl_step(whole, step)
    for step in range(2):
        rl_step(first, step)
    checkpoint.save(tmp_path, 2, first)
    for parameter in trained(second.model).values():
        parameter.data.zero_()
    for step in range(checkpoint.load(tmp_path, second), 4):
        rl_step(second, step)
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, second.model.state_dict()[name])
    for rank in (0, 2):
        with pytest.raises(InputError, match=r"is the checkpoint of another model: .* differs"):
            checkpoint.load(tmp_path, started(rank))


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lora_rank 97", "lora_rank is 97, expected at most 96, the smaller dimension of down_proj"),
        (
            "--lora_rank 4 --lora_targets q_proj,nose",
            "this model's blocks have no linear layer nose, expected of these: down_",
        ),
        ("--lora_rank -1", "lora_rank is -1, expected at least 0"),
        ("--lora_rank 4 --lora_alpha 0", "lora_alpha is 0.0, expected at least"),
        ("--lora_rank 4 --base_dtype float16", "base_dtype is 'float16'"),
    ],
)
def test_adapters_that_cannot_be_are_one_line(refused, words, message):
    assert message in refused("train.py", *words.split())


def test_a_model_without_linear_layers_in_its_blocks_is_one_line():
    # the blocks of GPT-2 have Conv1D layers in place of nn.Linear
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
    with pytest.raises(InputError, match=r"no linear layer \(any\), expected of these: none"):
        adapters.add(model, adapters.of(from_dict({"lora_rank": 1})))


def test_without_peft_there_is_one_line_with_the_command(refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name, *rest)
    )
    assert refused("train.py", "--lora_rank", 4).endswith("peft is not installed: pip install peft\n")
