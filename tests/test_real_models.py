"""These tests load, train and save small models like those of the hub, with a byte-level BPE tokenizer and the
architecture of Qwen2 or Llama. Other tests compare plan.py with measured memory."""

import contextlib
import copy
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from measured_memory import measured_sampling, measured_update
from test_train import read_log
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
)

import plan
import step
import train
from data.loader import Problem, encode, encode_problems, render_prompt
from model import load_model, response_text
from reward import Reward, grade
from support import adapters
from support.config import from_dict

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))

from models import by_length, make, one_step, prove, tiny  # noqa: E402

DRAWN = Reward(  # the reward DRAWN is 1 for demonstrations and for about half of a random model's responses
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
    "rollouts_per_prompt": 8,
    "steps": 2,
    "sft_steps": 2,
    "sft_batch": 2,
    "save_every": 1,
    "eval_every": 0,
    "max_response_tokens": 120,
    "eval_response_tokens": 8,
    "device": "cpu",
    "lr": 1e-3,
}


def bpe(template: str | None, begin: bool) -> PreTrainedTokenizerFast:
    """Trains a tokenizer on the demonstrations. The padding token is the end token, as often with Qwen's base models,
    or missing (Llama)."""
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


def publish(shape: str, folder: Path) -> Path:
    """Makes a model folder as on the hub, with bf16 weights, several end tokens, and top_k in the generation
    config."""
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
    publish(request.param, folder / "model")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))
    return request.param, folder


def test_prompts(task):
    """A prompt is rendered by the chat template if there is one, else it is plain text after the tokenizer's
    bos_token."""
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


def test_a_template_that_refuses_a_system_message_is_one_line(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refuse + "{{ messages[0]['content'] }}"
    assert render_prompt(tokenizer, "1+1") == "1+1"
    with pytest.raises(
        ValueError, match=r"refuses a system and a user message: remove the field system \(it says: no"
    ):
        render_prompt(tokenizer, "1+1", "Think.")


@pytest.mark.parametrize("problem", ["content | upper", "content[:3]", "content | tojson", "role"])
def test_a_template_that_changes_the_problem_is_one_line(tokenizer, problem):
    """The error does not advise to remove the system message, because that would not help."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0].content }}{{ messages[-1]." + problem + " }}"
    with pytest.raises(ValueError, match=r"leaves out or changes the user message: use a template that takes text$"):
        render_prompt(tokenizer, 'Is "a\nb" long?', "Think.")


def test_a_template_that_leaves_a_message_out_is_one_line(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    # a chat template that expects a list of message parts writes nothing if the message is plain text
    parts = "{% for part in messages[-1]['content'] %}{{ part['text'] }}{% endfor %}"
    tokenizer.chat_template = "user:" + parts
    with pytest.raises(ValueError, match=r"leaves out or changes the user message: use a template that takes text$"):
        render_prompt(tokenizer, "1+1")
    tokenizer.chat_template = "{{ messages[-1]['content'] | trim }}"
    assert render_prompt(tokenizer, " 1+1\n") == "1+1"
    with pytest.raises(ValueError, match=r"leaves out or changes the system message: remove the field system$"):
        render_prompt(tokenizer, "1+1", "Think.")


def test_a_template_that_writes_the_date_writes_the_same_on_any_day(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}{% if strftime_now is defined %}! {% endif %}"
    tokenizer.chat_template += "{{ messages[0]['content'] }}"
    assert render_prompt(tokenizer, "1+1") == "26 Jul 2024! 1+1"
    tokenizer.chat_template = "{% set day = '%d' %}{{ strftime_now(day) }}"
    with pytest.raises(ValueError, match="asks for today's date in a way that cannot be answered"):
        render_prompt(tokenizer, "1+1")


def test_an_unknown_token_that_is_written_or_has_other_work_is_no_unknown_character(tokenizer):
    assert encode(tokenizer, "1<unk>2") == [*encode(tokenizer, "1"), tokenizer.unk_token_id, *encode(tokenizer, "2")]
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.unk_token = tokenizer.bos_token  # as in GPT-2, the unknown token is the token that begins a text
    assert encode(tokenizer, tokenizer.bos_token + "1")[0] == tokenizer.bos_token_id
    for text in ("12é4", "\\boxed{é}"):
        with pytest.raises(ValueError, match="problem: the tokenizer cannot encode 'é'"):
            encode(copy.deepcopy(AutoTokenizer.from_pretrained("data/base")), text, "problem")


def test_nothing_that_vanishes_makes_an_answer_right(tokenizer):
    """The responses contain ids that have no token, special tokens, and a special token that is part of the
    answer."""
    before, after, end = encode(tokenizer, "\\boxed{25"), encode(tokenizer, "1}"), tokenizer.eos_token_id
    for between in (900, tokenizer.pad_token_id):
        text = response_text(tokenizer, [*before, between, *after, end], [end])
        assert grade(text, "251") == 0.0 and text.startswith("\\boxed{25") and text.endswith("1}")
    special = copy.deepcopy(tokenizer)
    special.add_special_tokens({"additional_special_tokens": ["\\boxed{"]})
    responses = [*encode(special, "\\boxed{251}"), end], [end], []
    assert [response_text(special, ids, [end]) for ids in responses] == ["\\boxed{251}", "", ""]


def test_a_demonstration_whose_answer_the_tokenizer_loses_is_named(tokenizer):
    problem = Problem("p", "1+1?", "2", ("1+1=2 \\boxed{2}",))
    encode_problems(tokenizer, [problem], 50, [2])

    class Forgetful:
        """This tokenizer loses a part of a text when it decodes the text's ids."""

        chat_template, eos_token_id, unk_token_id, bos_token_id = None, 2, None, -1
        lost = "2}", "}"

        def __call__(self, text, **_):
            return {"input_ids": list(text.encode())}

        def decode(self, ids, **_):
            return bytes(ids).decode().replace(*self.lost)

    with pytest.raises(
        ValueError, match=r"demonstration of 'p': the tokenizer loses '2}' \(character 13; it gives back '}'"
    ):
        encode_problems(Forgetful(), [problem], 50, [2])
    Forgetful.lost = "1+1=", ""  # a demonstration that loses only "1+1=" still has the right answer
    (encoded,), left_out, _ = encode_problems(Forgetful(), [problem], 50, [2])
    assert encoded.demonstrations and not left_out


@pytest.mark.parametrize("method", ["sft", "rft", "luffy", "prefix-rft"])
def test_from_weights_to_weights(task, method, capsys, monkeypatch):
    """A run loads a published model, makes a step, is resumed for the second step, and saves final/, which is loaded
    again."""
    shape, folder = task
    out = folder / method
    settings = SETTINGS | {"model": str(folder / "model"), "data": str(folder / "train.jsonl"), "method": method}
    settings |= {"out": str(out), "resume": "auto", "recompute": shape == "llama"}
    config = from_dict(settings)
    monkeypatch.setattr(train, "load_reward", lambda name: DRAWN)
    # signal 15 (terminate) makes the run end after one step
    monkeypatch.setattr(train, "catch_signals", lambda alone: [15])
    assert train.train(config) == 128 + 15
    monkeypatch.setattr(train, "catch_signals", lambda alone: [])
    assert train.train(config) == 0
    rows = read_log(out)
    assert [row["step"] for row in rows] == [1, 2] and rows[0]["grad_norm"] > 0
    message = capsys.readouterr().out
    assert message.count("ids [") == 2  # each start of the run prints its first prompt once
    folders = (out / "final", folder / "model")
    final, start = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in folders)
    assert final.config.architectures == start.config.architectures
    moved = [(a - b).abs().max() for a, b in zip(final.state_dict().values(), start.state_dict().values())]
    assert max(moved) > 1e-4
    again, tokenizer = load_model(str(out / "final"))
    assert again.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids([END, TURN])
    assert again.generation_config.pad_token_id == tokenizer.eos_token_id


def test_a_checkpoint_of_another_model_is_one_line(task, tmp_path, monkeypatch):
    shape, folder = task
    settings = SETTINGS | {"model": str(folder / "model"), "data": str(folder / "train.jsonl"), "method": "sft"}
    config = from_dict(settings | {"out": str(folder / "other"), "resume": "auto", "sft_steps": 1})
    assert train.train(config) == 0
    other = publish({"qwen2": "llama", "llama": "qwen2"}[shape], tmp_path / "model")
    saved = json.loads((folder / "other" / "config.json").read_text())
    (folder / "other" / "config.json").write_text(json.dumps(saved | {"model": str(other)}))
    with pytest.raises(ValueError, match=r"made of something else: model .* changed since"):
        train.train(dataclasses.replace(config, model=str(other)))
    monkeypatch.setattr(train.checkpoint, "check_ingredients", lambda *a: None)
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


@pytest.mark.parametrize(
    "name, loop",
    [
        ("gpt2", "masks of ours, recordable"),  # GPT-2 learns positions, so padding must not count as a position
        ("opt", "masks of ours, recordable"),
        ("bloom", "masks of ours"),  # BLOOM takes no position ids
        ("falcon, alibi", "masks of the model"),  # Falcon with ALiBi reads positions off the mask
        ("gemma3", "masks of ours, recordable"),  # Gemma 3 has sliding windows, and its folder has vision settings
        ("phimoe", "masks of ours, recordable"),  # PhiMoE's router has noise, which is switched off
        ("qwen3_next", "masks of ours, recordable"),  # Qwen3-Next's recurrent states can be cut down to some rows
        ("mamba", None),
    ],
)
def test_another_architecture_is_sampled_and_trained(tmp_path, monkeypatch, name, loop):
    """A row is sampled the same in a batch as alone, log-probs of sampling and training agree, weights are saved, and
    a step is made. bench/models.py checks this for all architectures."""
    make(name, tmp_path)
    assert prove(tmp_path) == loop
    monkeypatch.setattr(step, "grade_all", by_length)
    assert one_step(tmp_path) > 0


@pytest.mark.parametrize(
    "name, message",
    [
        ("gemma2", "the logits are not the outputs of the head"),  # Gemma 2 caps its logits
        ("cohere", "the logits are not the outputs of the head"),  # Cohere scales its logits
        ("granite", "the logits are not the outputs of the head"),
        ("rwkv", "rows sampled in a batch differ from rows alone"),
    ],
)
def test_what_cannot_work_is_one_line_and_nothing_written(tmp_path, task, name, message):
    make(name, tmp_path / "model")
    values = SETTINGS | {"model": str(tmp_path / "model"), "out": str(tmp_path / "run"), "method": "sft"}
    with pytest.raises(ValueError, match=f"model '.*' cannot be loaded: {message}") as error:
        train.train(from_dict(values))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 4], ids=["all weights", "adapters"])
@pytest.mark.parametrize("recompute", [False, True])
def test_planned_memory_is_the_measured_one(recompute, rank):
    """plan.py, which counts tensors without data, is compared with the profiler's record of a real update."""
    size = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = Qwen2Config(**size, num_hidden_layers=3, vocab_size=2000)
    low_rank = adapters.of(from_dict({"lora_rank": rank}))
    beyond = measured_update(shape, 3, 16, 112, recompute, low_rank)
    counted = plan.update_bytes(shape, 3, 16, 112, torch.float32, recompute, fused=False, low_rank=low_rank)
    assert counted == pytest.approx(beyond, rel=0.02)


@pytest.mark.parametrize("fused, measured_gib", [(False, 48.68), (True, 43.34)])
def test_planned_memory_is_that_of_an_h200(fused, measured_gib):
    """The memory was measured for Qwen2.5-1.5B in bf16 on 8 rows of 2,048 tokens, with HuggingFace's norms and with
    fused norms [bench/results/gpu.md]."""
    size = {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2}
    shape = Qwen2Config(**size, num_hidden_layers=28, vocab_size=151_936, tie_word_embeddings=True)
    counted = 2 * 1.5437e9 + plan.update_bytes(shape, 8, 256, 1792, torch.bfloat16, False, fused)
    assert counted / 2**30 == pytest.approx(measured_gib, rel=0.01)


@pytest.mark.parametrize(
    "rows, prompt, response, layers, words",
    [(32, 16, 8, 12, 4000), (64, 128, 2, 12, 4000), (16, 16, 112, 1, 500)],
)
def test_planned_memory_of_sampling_is_the_measured_one(rows, prompt, response, layers, words):
    """Beside the key-value caches, most memory is needed by a token's scores or by the forward pass over the prompts.
    In the case with one layer, its keys and values would need the most memory if sampling repeated them for all
    heads."""
    size = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape = Qwen2Config(**size, num_hidden_layers=layers, vocab_size=words)
    parts = plan.sampling_bytes(shape, rows, prompt + response, rows * prompt, size=4)
    assert sum(parts.values()) == pytest.approx(measured_sampling(shape, rows, prompt, response), rel=0.15)


@pytest.mark.parametrize("vocabulary, columns", [(128_256, 9216), (4_000_000, 64)])
def test_the_most_rows_that_fit_are_named(vocabulary, columns):
    size = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    shape = LlamaConfig(**size, num_key_value_heads=8, vocab_size=vocabulary)
    free, weights = 60e9, 15e9
    rows = plan.rows_sampled_at_once(
        shape, {"weights": weights} | plan.sampling_bytes(shape, 7, columns), free, columns
    )
    needed = [weights + sum(plan.sampling_bytes(shape, n, columns).values()) for n in (rows, rows + 1)]
    assert rows > 10 and needed[0] <= free < needed[1]


def test_the_rows_of_a_pass_are_those_whose_own_count_fits():
    """rows_updated_at_once is tested with memory that has room for none, one, some and all of 16 rows."""
    config, shape = from_dict({}), plan.shape_of("data/base")
    sizes = [plan.update_bytes(shape, rows, 100, 96, torch.bfloat16, False) for rows in range(1, 17)]
    for left in (sizes[0] - 1, sizes[0], sizes[1], sizes[7] + 1, sizes[14], 2 * sizes[15]):
        result = plan.rows_updated_at_once(config, shape, {"static": 5, "activations": 7}, left + 5, 100, 16)
        assert result == sum(size <= left for size in sizes)


def test_offloading_moves_16_bytes_a_parameter_and_pays_for_every_pass(monkeypatch):
    """With --offload, weights move to the GPU for old log-probs, forward and backward pass, and gradients move back
    to the host [support/distributed.py]."""
    shape, values = plan.shape_of("data/base"), {"prompts_per_step": 4, "rollouts_per_prompt": 8}
    monkeypatch.setattr(plan, "HOST_BANDWIDTH", float("inf"))
    seconds = []
    for rows in (1, 4):
        config = from_dict(values | {"offload": True, "micro_batch_tokens": 100 * rows})
        numbers = plan.hours(config, shape, 1, "4090", prompt=60, mean=40)
        seconds.append(numbers["seconds offloading"])
        assert 3600 * numbers["hours"] == pytest.approx(
            config.steps * sum(value for name, value in numbers.items() if name.startswith("seconds "))
        )
    parameters = plan.count(shape).total
    assert seconds[0] == pytest.approx(32 * 16 * parameters / (0.75 * 32e9))
    assert seconds[0] == pytest.approx(4 * seconds[1])
    assert plan.host_bytes(config, plan.count(shape))["during the run"] == 16 * parameters
    assert plan.hours(from_dict(values), shape, 1, "4090", 60, 40).keys() == numbers.keys() - {"seconds offloading"}


def test_with_adapters_the_weights_are_frozen_and_the_rest_is_small():
    """The adapters of a matrix have rank * (inputs + outputs) weights; each layer of this 7B model has seven matrices
    with adapters."""
    config, shape = from_dict({"lora_rank": 16, "max_response_tokens": 20}), plan.shape_of("Qwen/Qwen2.5-7B")
    wide, narrow, inner = 3584, 512, 18944
    trained = 28 * 16 * (2 * (wide + wide) + 2 * (wide + narrow) + 3 * (wide + inner))
    counts = plan.count(shape, adapters.of(config))
    assert (counts.trained, counts.root, counts.layer) == (trained, 0, trained // 28)
    parts = plan.plan(config, shape, 2, 16)["update"]
    assert parts["frozen weights, bf16"] == 2 * counts.total > 15e9  # each GPU holds all frozen weights
    assert parts["weights, fp32"] + parts["optimizer, fp32"] + parts["gradients, fp32"] == 16 * trained / 2
    assert plan.host_bytes(config, counts)["while a checkpoint is saved"] == 12 * trained < 5e8
    assert plan.host_bytes(config, counts)["while final/ is saved"] == 4 * counts.total


PLAIN = ["gpt2", "bloom", "gpt_neox", "llama", "qwen2", "qwen3_moe", "deepseek_v3"]
WINDOWS = ["mixtral", "gemma2", "gemma3", "phi3", "mistral", "gpt_oss"]
MIXTURES = ["qwen3_moe", "deepseek_v3", "mixtral", "gpt_oss"]
# plan.py refuses the models in NOT_PLANNED, because their attention is unusual or missing
NOT_PLANNED = ["falcon", "mamba", "mamba2", "falcon_mamba", "ctrl"]


@pytest.mark.parametrize("name", PLAIN + WINDOWS + NOT_PLANNED)
def test_a_model_is_planned_or_refused_in_one_line(monkeypatch, capsys, name):
    monkeypatch.setattr(plan, "load_config", lambda path: tiny(name))
    with contextlib.ExitStack() as stack:
        if name in NOT_PLANNED:
            begin = rf"^model 'data/base' \({name}\) cannot be planned \([^\n]*\): try a short run[^\n]*$"
            stack.enter_context(pytest.raises(ValueError, match=begin))
        plan.show(from_dict({"max_response_tokens": 20}), "H100", 1, None, None)
    message = capsys.readouterr().out
    assert message.count("rows that can be sampled at once") == (name not in NOT_PLANNED) == bool(message)
    assert ("a sliding window or a state" in message) == (name in WINDOWS)
    assert ("the mixture's other experts" in message) == (name in MIXTURES)


def test_of_a_mixture_only_the_experts_of_a_token_take_time():
    """Qwen3-30B-A3B has 30.5 billion parameters, of which a token activates 3.3 billion (its model card)."""
    size = {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    size |= {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    counts = plan.count(Qwen3MoeConfig(**size, vocab_size=151_936, tie_word_embeddings=False))
    assert counts.total / 1e9 == pytest.approx(30.5, abs=0.1)
    assert counts.passed / 1e9 == pytest.approx(3.3, abs=0.1)


def test_layers_that_are_nested_or_shared_are_counted_once():
    shape = tiny("zamba2")
    counts = plan.count(shape)
    weights = dict(plan.empty_model(shape, torch.bfloat16).named_parameters())
    assert counts.total == sum(weight.numel() for weight in weights.values())
    assert counts.root == sum(weight.numel() for name, weight in weights.items() if ".layers." not in name) > 0
    assert counts.layers == shape.num_hidden_layers


def test_a_plan_counts_the_keys_that_are_repeated_for_a_sliding_window():
    size = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 1}
    plain, window = (MistralConfig(**size, vocab_size=100, sliding_window=width) for width in (None, 64))
    of_plain, of_window = (list(plan.sampling_bytes(shape, 100, 8192, 1).values()) for shape in (plain, window))
    assert of_plain[0] == of_window[0] == 100 * 8192 * 2 * 2 * 8 * 128
    assert of_window[1] == 4 * of_window[0] > of_plain[1]
    rows = [plan.rows_sampled_at_once(shape, {"caches": 0, "block": 0}, 60e9, 8192) for shape in (plain, window)]
    assert rows[0] > 4 * rows[1] > 0


@pytest.mark.parametrize(
    "words, message",
    [
        ("--mean_response 97", "mean_response is 97, expected above 0 and at most max_response_tokens (96)"),
        ("--mean_response 0", "mean_response is 0, expected above 0"),
        ("--prompt 417", "--prompt (417 tokens) and max_response_tokens (96) exceed the model's 512 positions"),
        ("--max_response_tokens 600", "exceed the model's 512 positions: lower max_response_tokens to 511"),
        ("--prompt 0", "prompt is 0, expected at least 1"),
        ("--gpus x", "argument --gpus: invalid int value: 'x' (see python plan.py --help)"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(refused, words, message):
    assert message in refused("plan.py", *words.split())


def test_a_plan_reads_the_config_only(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plan, "rows_updated_at_once", lambda *values: 4 * (sum(values[2].values()) <= values[3]))
    size = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    size |= {"max_position_embeddings": 131072}
    LlamaConfig(**size, num_key_value_heads=8, vocab_size=128256).save_pretrained(tmp_path)
    values = json.loads((ROOT / "configs" / "llama-3.1-8b.json").read_text()) | {"model": str(tmp_path)}
    plan.show(from_dict(values), "H100", 8, 1024, None)
    message = capsys.readouterr().out
    assert "8.03 billion parameters" in message and message.count("   fits ") == 2 and "change" not in message
    assert "host memory\n  to load                                                29.92 GiB\n" in message
    plan.show(from_dict(values), "4090", 1, 1024, None)
    message = capsys.readouterr().out
    assert message.count("DOES NOT FIT") == 2 and "--offload true" in message and "--rows_per_call" not in message
    plan.show(from_dict(values | {"rows_per_call": 512, "max_response_tokens": 7100}), "H100", 8, 900, None)
    message = capsys.readouterr().out  # with CUDA graphs, 8,000 tokens of key-value cache are rounded up to 8,192
    left = (
        79.2 * 2**30 * 0.92 - (2 + 12 / 8) * 8.0303e9
    )  # a GPU holds the bf16 weights, and an eighth of the fp32 weights and of the optimizer's state
    block = 2**14 * 2 * (3 * 14336 + 6 * 4096)  # bytes that the forward pass over 2^14 prompt tokens needs
    fit = int((left - block) / (8192 * 2 * 32 * 8 * 128 * 2))
    assert "512 x 8192 tokens" in message and f"--rows_per_call {fit}\n" in message


def test_the_plan_of_the_embedded_task_has_units_to_read(capsys):
    plan.show(from_dict({}), "4090", 1, None, None)
    message = capsys.readouterr().out
    assert message.startswith("data/base: 0.29 million parameters")
    assert " MiB" in message and "seconds of the run" in message
    assert not re.search(r"[^\d.]0\.0+ (GiB|hours)", message) and "hours" not in message


SIZES = {
    "0.5b": 0.494,
    "1.5b": 1.544,
    "3b": 3.086,
    "7b": 7.616,
    "8b": 8.030,
    "1.7b": 1.721,
    "135m": 0.1345,
}  # published


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_the_model_of_every_config_is_planned_without_a_network(monkeypatch, path):
    monkeypatch.delattr(plan.models, "load_config")
    model = json.loads(path.read_text())["model"]
    size = next(size for part, size in SIZES.items() if f"-{part}" in model.lower())
    assert plan.count(plan.shape_of(model)).total / 1e9 == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda path: path.stem)
def test_every_setting_in_configs_is_a_config(path):
    values = json.loads(path.read_text())
    for method in ("sft", "rft", "luffy", "prefix-rft"):
        assert from_dict(values | {"method": method}).model == values["model"]
    assert path.stem in (ROOT / "configs" / "README.md").read_text()
