"""A test in test_model_folder.py runs this script in another Python environment, which has transformers 4.

    v4/bin/python tests/transformers_4.py make FOLDER      makes tiny random models, like most of the hub's
    v4/bin/python tests/transformers_4.py read FOLDER      stores beside each model what version 4 reads of it

The script leaves out models for which transformers 4 has no code.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

PROJECT = Path(__file__).parents[1]
SMALL = {"vocab_size": 104, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 6}
SMALL |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SMALL |= {"pad_token_id": 0, "eos_token_id": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PRETRAINED = {"original_max_position_embeddings": 16}
LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
GEMMA = {"rope_theta": 2e6, "rope_local_base_freq": 2e4, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "qwen2": {"rope_theta": 1e6},
    "qwen3, yarn": {"rope_theta": 1e6, "rope_scaling": PRETRAINED | {"rope_type": "yarn", "factor": 4.0}},
    "qwen3": {"rope_theta": 1e6},
    "qwen3_moe": {"rope_theta": 1e6},
    "llama": {"rope_theta": 5e5},
    "llama, llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3 | PRETRAINED},
    "llama, linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama, dynamic": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "mistral": {"rope_theta": 1e6},
    "gemma3_text": GEMMA,
    "gemma3_text, linear": GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "phi3": {"rope_theta": 2e4},
    "phi3, longrope": PRETRAINED | {"rope_scaling": LONG},
    "phi3, partial": {"rope_theta": 2e4, "partial_rotary_factor": 0.5},
    "llama, longrope": PRETRAINED | {"rope_scaling": LONG},
    "stablelm": {"rope_theta": 2e4, "partial_rotary_factor": 0.5},
    "olmo2": {"rope_theta": 5e5},
    "smollm3": {"rope_theta": 5e6},
    "olmo3": {"rope_theta": 5e5, "layer_types": GEMMA["layer_types"]},
    "gpt_neox": {"rotary_pct": 0.5, "rotary_emb_base": 50_000},
    "gpt_neox_japanese": {"rotary_pct": 0.5, "rotary_emb_base": 50_000},
    "modernbert-decoder": {"global_rope_theta": 2e6, "local_rope_theta": 2e4, "layer_types": GEMMA["layer_types"]},
    "gpt2": {},
}
TEXT = "\\boxed{12}\n A+b<eos>"


def make(root: Path) -> None:
    """Saves a random model and a tokenizer for each entry of MODELS, in the format of the installed transformers."""
    file = str(PROJECT / "data" / "base" / "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, pad_token="<pad>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<bos>"]})
    for name, fields in MODELS.items():
        kind = CONFIG_MAPPING[name.split(",")[0]]
        known = kind()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            kind(**{k: v for k, v in SMALL.items() if hasattr(known, k)} | fields)
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(4)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


@torch.no_grad()
def read(root: Path) -> None:
    """Stores in each model's folder what the test compares: log-probs of a text of 40 tokens, and the ids of TEXT."""
    ids = torch.randint(4, 100, (1, 40), generator=torch.Generator().manual_seed(0))
    for folder in root.iterdir():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        log_probs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        torch.save((log_probs, AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]), folder / "read.pt")


if __name__ == "__main__":
    logging.set_verbosity_error()
    {"make": make, "read": read}[sys.argv[1]](Path(sys.argv[2]))
