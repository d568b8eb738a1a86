"""These tests check that transformers 4 can read the model folders that save_model writes. The config fields that
version 4 must find were written by transformers 4.57.6 for the same models. If the environment variable
TRANSFORMERS_4 names a Python with transformers 4 (pip install torch transformers==4.57.6), log-probs are compared
too."""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import random_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
    Phi3Config,
    Qwen3MoeConfig,
    StableLmConfig,
)

from model import load_model, save_model
from support.model_folder import make_readable, old_fields, says_the_same, share_changed, with_old_fields

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
GEMMA3 = {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}


def read(path):
    return json.loads(path.read_text())


@pytest.fixture
def old_base(tmp_path, tokenizer):
    """Makes a model folder like most on the hub: with config fields of transformers 4, with files that transformers 5
    does not write, and with bf16 weights."""
    folder = tmp_path / "old"
    save_model(random_model(vocab_size=103, rope_theta=5e5, rope_scaling=dict(LLAMA3)).bfloat16(), tokenizer, folder)
    config = read(folder / "config.json")
    config = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    config |= {"rope_theta": 5e5, "rope_scaling": LLAMA3, "torch_dtype": "bfloat16", "num_experts": 4}
    (folder / "config.json").write_text(json.dumps(config))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "added": 1}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "README.md"):
        (folder / name).write_text(f'{{"file": "{name}"}}')
    return folder


def test_the_bases_fields_and_tokenizer_files_are_kept(tmp_path, old_base):
    save_model(*load_model(str(old_base), training=True), tmp_path / "final")
    config = read(tmp_path / "final" / "config.json")
    assert config["rope_theta"] == 5e5 and config["rope_scaling"] == LLAMA3 and config["num_experts"] == 4
    assert config["dtype"] == config["torch_dtype"] == "float32"
    # config.json still has rope_parameters, the field that transformers 5 reads
    assert config["rope_parameters"] == LLAMA3 | {"rope_theta": 5e5}
    for name in ("tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja"):
        assert (tmp_path / "final" / name).read_bytes() == (old_base / name).read_bytes(), name
    assert read(tmp_path / "final" / "tokenizer_config.json") == read(old_base / "tokenizer_config.json")
    assert not (tmp_path / "final" / "README.md").exists()
    modes = {file.stat().st_mode for file in (tmp_path / "final").iterdir()}
    assert len(modes) == 1  # safetensors alone would write files that only their owner can read
    again = AutoConfig.from_pretrained(tmp_path / "final")
    assert again.rope_parameters == AutoConfig.from_pretrained(old_base).rope_parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_saved_in_the_dtype_that_the_config_names(tmp_path, tokenizer, dtype):
    """An update that moves a weight by 1e-6 is kept by saved fp32 weights and rounded away by bf16 ones."""
    # the base model's norm weights are 1, where bf16 loses a move of 1e-6
    base = random_model(vocab_size=len(tokenizer), scale=0.0).bfloat16()
    save_model(base, tokenizer, tmp_path / "base")
    model, _ = load_model(str(tmp_path / "base"), training=True)
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    for norm in norms[:2]:
        norm.data += 1e-6
    norms[2].data += 0.5
    save_model(model, tokenizer, tmp_path / "final", getattr(torch, dtype))
    config = read(tmp_path / "final" / "config.json")
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert {str(weight.dtype) for weight in stored.values()} == {f"torch.{dtype}"}
    assert config["dtype"] == config["torch_dtype"] == dtype
    changed = sum(norm.numel() for norm in (norms[:3] if dtype == "float32" else norms[2:3]))
    count = sum(weight.numel() for weight in stored.values())
    assert share_changed(tmp_path / "final", str(tmp_path / "base")) == pytest.approx(changed / count)


NEOX = {"rotary_emb_base": 5e4, "rotary_pct": 0.5}
BERT = {"global_rope_theta": 2e6, "local_rope_theta": 2e4}
LONG = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
PHI = {"hidden_size": 128, "num_attention_heads": 4, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    "config, old",
    [
        (LlamaConfig(rope_theta=5e5), {"rope_theta": 5e5}),
        (LlamaConfig(rope_theta=5e5, rope_scaling=dict(LLAMA3)), {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            StableLmConfig(rope_theta=2e4, partial_rotary_factor=0.5),
            {"rope_theta": 2e4, "partial_rotary_factor": 0.5},
        ),
        (Gemma3TextConfig(**copy.deepcopy(GEMMA3)), GEMMA3),
        (GPTNeoXConfig(**NEOX), NEOX),
        (ModernBertDecoderConfig(**BERT), BERT),
        (
            Phi3Config(rope_theta=2e4, rope_scaling=copy.deepcopy(LONG), pad_token_id=0, **PHI),
            {
                "rope_theta": 2e4,
                "rope_scaling": LONG,
                "partial_rotary_factor": 1.0,
                "original_max_position_embeddings": 16,
            },
        ),
        (Qwen3MoeConfig(num_experts=5, rope_theta=1e6), {"rope_theta": 1e6, "num_experts": 5}),
    ],
    ids=["plain", "llama3", "partial", "two kinds of layer", "gpt_neox", "modernbert", "longrope", "experts"],
)
def test_old_fields_are_made_where_the_base_has_none(tmp_path, config, old):
    config.save_pretrained(tmp_path)
    new = read(tmp_path / "config.json")
    assert old_fields(new) == old
    both = with_old_fields(new, {})
    (tmp_path / "config.json").write_text(json.dumps(both))
    other = copy.deepcopy(both) | {name: 7.0 for name in old if "theta" in name or "base" in name}
    assert says_the_same(both) and not says_the_same(other)
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


def test_of_a_model_with_vision_the_text_parts_own_fields_are_taken():
    original = {"model_type": "x", "image_token": 7, "text_config": {"model_type": "x_text", "rope_theta": 3.0}}
    assert with_old_fields({"model_type": "x_text"}, original) == {"model_type": "x_text", "rope_theta": 3.0}
    whole = with_old_fields({"model_type": "x", "text_config": {"model_type": "x_text"}}, original)
    assert whole == original


def test_a_tokenizer_of_transformers_5_gets_names_that_4_knows(tmp_path, tokenizer):
    random_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    words = read(file) | {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]}
    file.write_text(json.dumps(words))
    make_readable(tmp_path)
    assert read(file)["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert read(file)["additional_special_tokens"] == ["<a>"] and "extra_special_tokens" not in read(file)


def test_the_shipped_base_is_read_by_both():
    assert read_base("config.json")["rope_theta"] == 1e6
    assert read_base("tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert AutoModelForCausalLM.from_pretrained("data/base").config.rope_parameters["rope_theta"] == 1e6


def read_base(name):
    with open(f"data/base/{name}") as file:
        return json.load(file)


@pytest.mark.skipif("TRANSFORMERS_4" not in os.environ, reason="TRANSFORMERS_4 names no Python with transformers 4")
def test_transformers_4_reads_the_same_log_probs_and_tokens(tmp_path):
    """transformers 4 reads models that it has made, before and after load_model and save_model. transformers 4 also
    reads models whose config transformers 5 has written, without the old fields."""
    made, five, final = tmp_path / "made", tmp_path / "five", tmp_path / "final"

    def run(what, folder):
        subprocess.run(
            [os.environ["TRANSFORMERS_4"], Path(__file__).with_name("transformers_4.py"), what, folder], check=True
        )

    run("make", made)
    run("read", made)
    shutil.copytree(made, five)
    for folder in made.iterdir():
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(five / folder.name)
        for base in (made, five):
            save_model(*load_model(str(base / folder.name), training=True), final / f"{folder.name} {base.name}")
    run("read", final)
    for folder in final.iterdir():
        first = made / folder.name.rpartition(" ")[0]
        (before, ids), (after, other_ids) = (torch.load(f / "read.pt", weights_only=True) for f in (first, folder))
        assert ids == other_ids, folder.name
        assert torch.allclose(before, after, rtol=0, atol=1e-5), folder.name
