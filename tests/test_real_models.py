"""Models as they come from the hub: a byte-level BPE tokenizer, Qwen2 and Llama shapes, from weights to weights."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from test_train import read_log
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import plan
import train
from data.loader import encode, render_prompt
from model import load_model
from reward import Reward, grade
from support.config import from_dict

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

from plan_check import measured, measured_sampling  # noqa: E402

DRAWN = Reward(  # demonstrations are right, and about half of what a random model writes
    "drawn",
    lambda text, problem: max(grade(text, problem.answer), float(len(text) % 2)),
    lambda problem: None,
    lambda text: True,
    "none",
)
END, TURN, BEGIN = "<|endoftext|>", "<|im_end|>", "<|begin_of_text|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
PROBLEMS = [
    {
        "id": f"sum-{a}-{b}",
        "problem": f"Add {a} and {b}.",
        "answer": str(a + b),
        "system": "Think, then box the answer.",
        "demonstrations": [f"The sum of {a} and {b} is {a + b}.\n\\boxed{{{a + b}}}"],
    }
    for a in (3, 5)
    for b in (4, 9)
]
SETTINGS = {
    "prompts_per_step": 2,
    "rollouts_per_prompt": 12,
    "steps": 2,
    "sft_steps": 2,
    "sft_batch": 2,
    "save_every": 1,
    "eval_every": 0,
    "max_response_tokens": 40,
    "eval_response_tokens": 8,
    "device": "cpu",
    "lr": 1e-3,
}


def bpe(template: str | None, begin: bool) -> PreTrainedTokenizerFast:
    """Trained here on the problems; pad == eos, as Qwen's base models are often set up, or no pad at all (Llama)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, "<|im_start|>", TURN, BEGIN]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text for row in PROBLEMS for text in row["demonstrations"]] * 3, trainer)
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
        )
    names = {"eos_token": END} | ({"bos_token": BEGIN} if begin else {"pad_token": END})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.chat_template = template
    return fast


def make(shape: str, folder: Path) -> Path:
    """A model folder as published: bf16 weights, several end tokens, a generation config with top_k."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 448}
    if shape == "qwen2":
        tokenizer, model = bpe(TEMPLATE, begin=False), Qwen2ForCausalLM(Qwen2Config(**size, tie_word_embeddings=True))
    else:
        tokenizer, model = bpe(None, begin=True), LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids([END, TURN])
    model.generation_config.do_sample, model.generation_config.top_k = True, 20
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def task(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    make(request.param, folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return request.param, folder


def test_prompts(task):
    """The chat template where there is one, else the plain one after the token that begins a text."""
    shape, folder = task
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    text = render_prompt(tokenizer, "Add 3 and 4.", "Box it.")
    ids = encode(tokenizer, text)
    if shape == "qwen2":
        assert text == (
            "<|im_start|>system\nBox it.<|im_end|>\n<|im_start|>user\nAdd 3 and 4.<|im_end|>\n<|im_start|>assistant\n"
        )
        assert ids.count(tokenizer.convert_tokens_to_ids(TURN)) == 2
    else:
        assert text == BEGIN + "Box it.\n\nAdd 3 and 4.\n"
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


@pytest.mark.parametrize("method", ["sft", "rft", "luffy", "prefix-rft"])
def test_from_weights_to_weights(task, method, capsys, monkeypatch):
    """from_pretrained, a step, resume, the second step, final, from_pretrained."""
    shape, folder = task
    out = folder / method
    settings = SETTINGS | {"model": str(folder / "model"), "data": str(folder / "train.jsonl"), "method": method}
    settings |= {"out": str(out), "resume": "auto", "recompute": shape == "llama", "prefill": shape == "llama"}
    config = from_dict(settings)
    monkeypatch.setattr(train, "load_reward", lambda name: DRAWN)
    monkeypatch.setattr(train, "catch_signals", lambda: [15])  # ends after its first step
    assert train.train(config) == 128 + 15
    monkeypatch.setattr(train, "catch_signals", list)
    assert train.train(config) == 0
    rows = read_log(out)
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["grad_norm"] > 0
    said = capsys.readouterr().out
    assert said.count("ids [") == 2  # the first prompt, once a start
    folders = (out / "final", folder / "model")
    final, start = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in folders)
    assert final.config.architectures == start.config.architectures
    moved = [(a - b).abs().max() for a, b in zip(final.state_dict().values(), start.state_dict().values())]
    assert max(moved) > 1e-4
    again, tokenizer = load_model(str(out / "final"))
    assert again.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids([END, TURN])
    assert again.generation_config.pad_token_id == tokenizer.eos_token_id


def test_a_checkpoint_of_another_model_is_one_line(task, tmp_path):
    shape, folder = task
    settings = SETTINGS | {"model": str(folder / "model"), "data": str(folder / "train.jsonl"), "method": "sft"}
    config = from_dict(settings | {"out": str(folder / "other"), "resume": "auto", "sft_steps": 1})
    assert train.train(config) == 0
    other = make({"qwen2": "llama", "llama": "qwen2"}[shape], tmp_path / "model")
    saved = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(saved | {"model": str(other)}))
    with pytest.raises(ValueError, match="checkpoint of another model") as error:
        train.train(dataclasses.replace(config, model=str(other)))
    assert "\n" not in str(error.value)


def test_a_tokenizer_without_an_end_token_is_one_line(task, tmp_path):
    _, folder = task
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos_token") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_capped_logits_are_refused(tmp_path):
    """Gemma 2 bends its logits after the head: token_stats would be wrong."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "vocab_size": 448, "head_dim": 8}
    model = Gemma2ForCausalLM(Gemma2Config(**size, final_logit_softcapping=1.0))
    model.save_pretrained(tmp_path)
    bpe(TEMPLATE, begin=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="logits are not those of its output head"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("recompute", [False, True])
def test_planned_memory_is_the_measured_one(recompute):
    """plan.py, which counts tensors without data, against the profiler's record of a real pass."""
    size = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = Qwen2Config(**size, num_hidden_layers=3, vocab_size=2000)
    _, beyond = measured(shape, 3, 16, 112, recompute)
    counted = plan.update_bytes(shape, 3, 16, 112, torch.float32, recompute)
    assert counted == pytest.approx(beyond, rel=0.15)


@pytest.mark.parametrize("rows, prompt, response", [(32, 16, 8), (64, 128, 2)])
def test_planned_memory_of_sampling_is_the_measured_one(rows, prompt, response):
    """Where caches and the scores of a token, or caches and the pass over the prompts need most of it."""
    size = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = Qwen2Config(**size, num_hidden_layers=12, vocab_size=4000)
    parts = plan.sampling_bytes(shape, rows, prompt + response, rows * prompt, size=4)
    assert sum(parts.values()) == pytest.approx(measured_sampling(shape, rows, prompt, response), rel=0.15)


@pytest.mark.parametrize("vocabulary, columns", [(128_256, 9216), (4_000_000, 64)])
def test_the_most_rows_that_fit_are_named(vocabulary, columns):
    size = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape = LlamaConfig(**size, num_key_value_heads=8, vocab_size=vocabulary)
    free, weights = 60e9, 15e9
    rows = plan.rows_at_once(shape, {"weights": weights} | plan.sampling_bytes(shape, 7, columns), free, columns)
    needed = [weights + sum(plan.sampling_bytes(shape, n, columns).values()) for n in (rows, rows + 1)]
    assert rows > 10 and needed[0] <= free < needed[1]


def test_a_plan_reads_the_config_only(tmp_path, capsys):
    size = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    LlamaConfig(**size, num_key_value_heads=8, vocab_size=128256).save_pretrained(tmp_path)
    values = json.loads((ROOT / "configs" / "llama-3.1-8b.json").read_text()) | {"model": str(tmp_path)}
    plan.show(from_dict(values), "H100", 8, 1024, None)
    said = capsys.readouterr().out
    assert "8.03 billion parameters" in said and said.count("   fits ") == 2 and "change" not in said
    plan.show(from_dict(values), "4090", 1, 1024, None)
    said = capsys.readouterr().out
    assert said.count("DOES NOT FIT") == 2 and "--offload true" in said and "--rows_per_call" not in said


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_setting_in_configs_is_a_config(path):
    values = json.loads(path.read_text())
    for method in ("sft", "rft", "luffy", "prefix-rft"):
        assert from_dict(values | {"method": method}).model == values["model"]
    assert path.stem in (ROOT / "configs" / "README.md").read_text()
