"""Peak memory of the training pass with and without its two savings, measured.

    python bench/memory.py        writes bench/results/memory.json (about two minutes on one core)

One micro-batch, forward and backward, on a Qwen2-shaped model with random weights and a vocabulary of 32 000:
`naive` holds the logits [B, R, V] and their softmax, as the textbook writes it; `chunked` is model.token_stats.
Each with and without gradient checkpointing. Weights and optimizer are not counted: they are the same in all four.
`head`: after the last layer alone, for vocabularies and lengths whose logits differ by 4 times: the peak does not.
"""

import json

import torch
from common import RESULTS, chosen, machine, peak_bytes
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import model as models

SHAPE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY, ROWS, PROMPT, RESPONSE = 32_000, 8, 32, 992


def naive(model: Qwen2ForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probs of the response as one softmax over [B, R, V]."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -RESPONSE - 1 : -1]
    log_p = logits.float().log_softmax(-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, ids[:, -RESPONSE:, None]).squeeze(-1), entropy


def chunked(model: Qwen2ForCausalLM, ids: Tensor, mask: Tensor) -> Tensor:
    return models.token_stats(model, ids, mask, RESPONSE, 1.0)


def main() -> None:
    chosen(__doc__)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=VOCABULARY, **SHAPE, num_key_value_heads=2)).train()
    ids = torch.randint(0, VOCABULARY, (ROWS, PROMPT + RESPONSE))
    mask = torch.ones_like(ids)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients stand there from the first micro-batch on
    peaks, gradients = {}, {}
    for recompute in (False, True):
        if recompute:
            models.recompute_layers(model)
        for name, stats in (("naive", naive), ("chunked", chunked)):

            def work(stats=stats) -> None:
                stats(model, ids, mask)[0].sum().backward()

            key = name + (" + recompute" if recompute else "")
            model.zero_grad(set_to_none=False)
            peaks[key] = peak_bytes(work)
            gradients[key] = model.lm_head.weight.grad.clone()
            print(f"{key:<22}{peaks[key] / 2**20:9.0f} MiB")
    heads = {}
    for vocabulary, tokens in ((32_000, 4_000), (32_000, 16_000), (128_000, 4_000)):
        config = Qwen2Config(vocab_size=vocabulary, **SHAPE, num_key_value_heads=2)
        head = Qwen2ForCausalLM(config)
        head.lm_head.weight.grad = torch.zeros_like(head.lm_head.weight)
        hidden = torch.randn(tokens, SHAPE["hidden_size"], requires_grad=True)
        targets = torch.randint(0, vocabulary, (tokens,))

        def pass_head(head=head, hidden=hidden, targets=targets) -> None:
            models.head_stats(head, hidden, targets, 1.0)[0].sum().backward()

        name = f"{vocabulary} words, {tokens} tokens"
        heads[name] = {"peak_bytes": peak_bytes(pass_head), "logits_bytes": 4 * vocabulary * tokens}
        print(f"head: {name:<28}{heads[name]['peak_bytes'] / 2**20:9.0f} MiB")
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, gradients["naive"], rtol=1e-3, atol=1e-3)
    result = {
        "what": "peak bytes of one forward and backward pass beyond weights and gradients",
        "shape": SHAPE | {"vocab_size": VOCABULARY, "rows": ROWS, "prompt": PROMPT, "response": RESPONSE},
        "logits_per_chunk": models.LOGITS_PER_CHUNK,
        "logits [B, R, V] in fp32, bytes": 4 * ROWS * RESPONSE * VOCABULARY,
        "peak_bytes": peaks,
        "head": heads,
        "chunked / naive": round(peaks["chunked"] / peaks["naive"], 4),
        "chunked + recompute / naive": round(peaks["chunked + recompute"] / peaks["naive"], 4),
        "machine": machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
