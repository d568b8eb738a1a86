"""This file computes the memory that sampling takes, from a model's config alone.

plan.py plans with these functions, and eval.py chooses with them how many rows it samples together. Layers that keep
something else than keys and values of every token (`plain_caches`) are counted as if they kept those.
"""

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


def plain_caches(config: PreTrainedConfig) -> bool:
    """Returns whether every layer keeps keys and values of every token (no sliding windows, no recurrent states)."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config.get_text_config()).layers)


def head_width(config: PreTrainedConfig) -> int:
    names = ("head_dim", "qk_head_dim", "v_head_dim")  # latent attention has several widths
    widest = max(getattr(config, name, None) or 0 for name in names)
    return widest or config.hidden_size // config.num_attention_heads


def inner_width(config: PreTrainedConfig) -> int:
    """Returns the width inside a layer's MLP; four times the hidden size if the config does not name it."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    width = next((width for name in names if (width := getattr(config, name, None))), 4 * config.hidden_size)
    return max(width) if isinstance(width, list) else width  # a list has one width for each layer


def cache_bytes(config: PreTrainedConfig, size: int = 2) -> int:
    """Returns the bytes that a token takes in the key-value cache. `size` is the bytes of a number, 2 in bf16.

    Raises ValueError for a model without attention heads.
    """
    config = config.get_text_config()
    if not getattr(config, "num_attention_heads", None):
        raise ValueError(f"a {config.model_type} model has no attention heads")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * size * config.num_hidden_layers * heads * head_width(config)


def token_bytes(config: PreTrainedConfig, repeated: int = 0, size: int = 2) -> int:
    """Returns the bytes that a row needs for a moment while its next token is computed, the larger of two amounts.

    The last layer needs scores, their CDF and copies (measured: 16 bytes a word). An attention layer needs the keys
    and values of `repeated` columns for all heads; one_token_attention repeats none, so there it is 0.
    """
    config = config.get_text_config()
    return max(2 * size * repeated * config.num_attention_heads * head_width(config), 16 * config.vocab_size)


def row_bytes(config: PreTrainedConfig, columns: int, size: int = 2, repeated: bool = False) -> int:
    """Returns the bytes that a row of `columns` tokens takes while it is sampled.

    `repeated` says that HF's attention is used, which repeats keys and values for heads that share them.
    """
    return columns * cache_bytes(config, size) + token_bytes(config, columns if repeated else 0, size)
