"""This file computes the memory that sampling takes, from a model's config alone.

plan.py uses these functions for its plan, and eval.py uses the functions to choose how many rows are sampled
together. A layer that keeps something else than keys and values of every token (see `plain_caches`) is counted as if
it kept keys and values.
"""

from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer


def plain_caches(config: PreTrainedConfig) -> bool:
    """Returns whether every layer keeps keys and values of every token (no sliding windows, no recurrent states)."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config.get_text_config()).layers)


def head_width(config: PreTrainedConfig) -> int:
    names = ("head_dim", "qk_head_dim", "v_head_dim")  # a model with latent attention has several head widths
    widest = max(getattr(config, name, None) or 0 for name in names)
    return widest or config.hidden_size // config.num_attention_heads


def inner_width(config: PreTrainedConfig) -> int:
    """Returns the width inside a layer's MLP; four times the hidden size if the config does not name this width."""
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    width = next((width for name in names if (width := getattr(config, name, None))), 4 * config.hidden_size)
    return max(width) if isinstance(width, list) else width  # some configs list a width for each layer


def cache_bytes(config: PreTrainedConfig, size: int = 2) -> int:
    """Returns the bytes that each token takes in the key-value cache of all layers. `size` is the number of bytes of
    each value, 2 in bf16.

    Raises ValueError for a model without attention heads.
    """
    config = config.get_text_config()
    if not getattr(config, "num_attention_heads", None):
        raise ValueError(f"a {config.model_type} model has no attention heads")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * size * config.num_hidden_layers * heads * head_width(config)


def token_bytes(config: PreTrainedConfig, repeated: int = 0, size: int = 2) -> int:
    """Returns the bytes that each row needs for a moment while its next token is computed: the need of the head or of
    an attention layer, whichever is larger.

    The head needs scores, their CDF and copies (measured: 16 bytes per word of the vocabulary). An attention layer
    needs the keys and values of `repeated` columns, copied for all heads; `repeated` is 0 with one_token_attention,
    which copies no keys and values.
    """
    config = config.get_text_config()
    return max(2 * size * repeated * config.num_attention_heads * head_width(config), 16 * config.vocab_size)


def row_bytes(config: PreTrainedConfig, columns: int, size: int = 2, repeated: bool = False) -> int:
    """Returns the bytes that each row of `columns` tokens takes while it is sampled.

    `repeated` is True for HF's attention, which copies keys and values for all heads that share them.
    """
    return columns * cache_bytes(config, size) + token_bytes(config, columns if repeated else 0, size)
