"""A hand-written decode loop for the base model's shape (Qwen3): what sampling could cost without HuggingFace.

Fused weights, fused norms, a reserved cache; ended rows leave and equal prompts are read once, as in decode.py. It
draws from the same uniforms, so its tokens must equal ours: the bench asserts it. Only a yardstick: one
architecture, no tests, no sharding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

DROP_AT = 0.8


def fused_weights(model: PreTrainedModel) -> list[tuple[Tensor, ...]]:
    """Per layer: norm, q|k|v, q norm, k norm, output, norm, gate|up, down."""
    layers = []
    for layer in model.model.layers:
        a, m = layer.self_attn, layer.mlp
        qkv = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight])
        gate_up = torch.cat([m.gate_proj.weight, m.up_proj.weight])
        norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        layers.append(
            (norms[0], qkv, a.q_norm.weight, a.k_norm.weight, a.o_proj.weight, norms[1], gate_up, m.down_proj.weight)
        )
    return layers


@torch.inference_mode()
def hand_decode(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, uniforms: Tensor, budget: int, share_prompts: bool
) -> list[list[int]]:
    """ids, mask [B, P] left-padded prompts, uniforms [B, budget] -> responses; temperature 1."""
    c, pad, end = model.config, model.generation_config.pad_token_id, model.generation_config.eos_token_id[0]
    heads, width, hidden = c.num_attention_heads, c.head_dim, (c.hidden_size,)
    layers, embed, eps = fused_weights(model), model.model.embed_tokens.weight, c.rms_norm_eps
    angles = torch.arange(c.max_position_embeddings)[:, None] * model.model.rotary_emb.inv_freq
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    prompt, rows = ids.shape[1], torch.arange(len(ids))
    output = torch.full((len(ids), budget), pad)
    which = rows
    if share_prompts:
        both, which = torch.unique(torch.cat([ids, mask], 1), dim=0, return_inverse=True)
        ids, mask = both.chunk(2, 1)
    keys = [torch.empty(len(ids), heads, prompt + budget, width) for _ in layers]
    values = [torch.empty_like(k) for k in keys]
    bias = torch.zeros(len(ids), 1, 1, prompt + budget)
    bias[:, 0, 0, :prompt] = torch.where(mask == 1, 0.0, -1e9)
    causal = torch.full((prompt, prompt), -1e9).triu(1)
    position, token, ended, start = (mask.cumsum(1) - 1).clamp(min=0), ids, torch.zeros(len(rows)).bool(), 0
    for length in range(prompt, prompt + budget):
        x, (b, n) = embed[token], token.shape
        turn, lift = cos[position][:, :, None], sin[position][:, :, None]
        seen = bias[..., :length] if start else bias[..., :length] + causal
        for i, (norm1, qkv, q_norm, k_norm, out, norm2, gate_up, down) in enumerate(layers):
            q, k, v = F.linear(F.rms_norm(x, hidden, norm1, eps), qkv).view(b, n, 3, heads, width).unbind(2)
            q, k = F.rms_norm(q, (width,), q_norm, eps), F.rms_norm(k, (width,), k_norm, eps)
            qk = torch.cat([q, k], 2)
            left, right = qk.chunk(2, -1)
            qk = qk * turn + torch.cat([-right, left], -1) * lift
            keys[i][:, :, start:length] = qk[:, :, heads:].transpose(1, 2)
            values[i][:, :, start:length] = v.transpose(1, 2)
            q = qk[:, :, :heads].transpose(1, 2)
            a = F.scaled_dot_product_attention(q, keys[i][:, :, :length], values[i][:, :, :length], attn_mask=seen)
            x = x + F.linear(a.transpose(1, 2).reshape(b, n, heads * width), out)
            gate, up = F.linear(F.rms_norm(x, hidden, norm2, eps), gate_up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, down)
        logits = F.linear(F.rms_norm(x[:, -1], hidden, model.model.norm.weight, eps), embed)
        position = position[:, -1:] + 1
        if start == 0:
            logits, position, bias = logits[which], position[which], bias[which]
            keys, values = [k[which] for k in keys], [v[which] for v in values]
        cdf = logits.softmax(-1).cumsum(-1)
        drawn = torch.searchsorted(cdf, uniforms[rows, length - prompt, None] * cdf[:, -1:], right=True)[:, 0]
        drawn = drawn.masked_fill(ended, pad)
        output[rows, length - prompt] = drawn
        ended, start = ended | (drawn == end), length
        alive = (~ended).nonzero()[:, 0]
        if len(alive) == 0:
            break
        if len(alive) <= DROP_AT * len(rows):
            rows, drawn, ended, position, bias = (t[alive] for t in (rows, drawn, ended, position, bias))
            keys, values = [k[alive] for k in keys], [v[alive] for v in values]
        token = drawn[:, None]
    return [row[: row.index(end) + 1] if end in row else row for row in output.tolist()]
