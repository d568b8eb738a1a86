"""Memory of sampling, from a model's config alone: what a token takes in the key-value cache, a row while it grows.

plan.py plans with these, eval.py chooses by them how many rows to sample together.
"""

from transformers import PreTrainedConfig


def head_width(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_bytes(config: PreTrainedConfig, size: int = 2) -> int:
    """Bytes a token takes in the key-value cache; `size`: of a number, 2 in bf16."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * size * config.num_hidden_layers * heads * head_width(config)


def token_bytes(config: PreTrainedConfig, repeated: int = 0, size: int = 2) -> int:
    """Bytes the next token of a row takes for a moment: scores, their CDF and copies (measured: 16 bytes a word), or,
    before that, a layer's keys and values of `repeated` columns for all heads: 0 with decode.one_token_attention."""
    config = config.get_text_config()
    return max(2 * size * repeated * config.num_attention_heads * head_width(config), 16 * config.vocab_size)


def row_bytes(config: PreTrainedConfig, columns: int, size: int = 2, repeated: bool = False) -> int:
    """Bytes a row of `columns` tokens takes while it is sampled. `repeated`: by HF's attention, which repeats keys
    and values for heads that share them."""
    return columns * cache_bytes(config, size) + token_bytes(config, columns if repeated else 0, size)
