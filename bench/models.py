"""Tries the causal LM architectures of transformers, each as a tiny model with random weights: can the model be
trained, or with which error message is it refused?

    OMP_NUM_THREADS=1 python bench/models.py              tries all (minutes) and writes bench/results/models.md
    OMP_NUM_THREADS=1 python bench/models.py gpt2 opt     tries some and only prints

Every model is saved as a model folder, with the tokenizer of the embedded task and with the model's noise (dropout,
router jitter) switched on. `prove` compares sampling and log-probs of the model with plain forward passes of single
rows, without the checks of fast/check.py. Then `one_step` trains the model by one step of Prefix-RFT. Runs on two
ranks are not tried here, but in tests/test_distributed.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from common import RESULTS, machine
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import step as steps
from fast.check import check_model
from fast.decode import loop_of
from model import load_model, save_model, token_stats
from sample import Row, generate, pack
from support.config import from_dict
from support.errors import InputError
from support.loading import NOISE
from support.record import rl_metrics
from train import prepare

SIZES = {"vocab_size": 104, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "sliding_window": 12}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MIXTURE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 8, "num_experts_per_tok": 2}
MIXTURE |= {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "shared_intermediate_size": 24}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
STATE = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
STATE |= {"linear_num_heads": 2, "linear_head_dim": 8, "state_size": 8, "ssm_state_size": 8, "chunk_size": 16}
STATE |= {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_d_ssm": 64}
STATE |= {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_dt_rank": 8}
OTHERS = {"num_dense_layers": 1, "rotary_dim": 8, "window_size": 12, "block_multiple_of": 16}
OTHERS |= {"attention_head_dim": 16, "attention_chunk_size": 12, "intermediate_size_mlp": 48}
# sizes of the tiny models; the config of an architecture takes the fields that it knows
SMALL = SIZES | MIXTURE | LATENT | STATE | OTHERS
FOUR = {"num_key_value_heads": 4}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
GROUPS = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
PLAIN = """
    afmoe apertus arcee aria_text beam biogpt bitnet bloom codegen cohere cohere2 cohere2_moe ctrl cwm doge
    ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2
    gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_neox_japanese gpt_oss gptj granite_swa granitemoe
    granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3
    iquestcoder jais2 jetmoe laguna lfm3 llama mamba mellum mimo_v2_flash minimax minimax_m2 ministral ministral3
    mistral mixtral modernbert-decoder mpt nanochat nemotron olmo olmo2 olmo3 olmoe openai-gpt opt persimmon phi
    phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm
    starcoder2 vaultgemma xglm xlm
"""
MODELS: dict[str, dict] = {name: {} for name in PLAIN.split()} | {
    "bailing_hybrid": FOUR | LINEAR | {"q_lora_rank": 24, "num_expert_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": FOUR,
    "deepseek_v3": FOUR | GROUPS,
    "deepseek_v4": {"o_lora_rank": 16, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 8},
    "diffllama": {"attention_dropout": 0.0},
    "dots1": GROUPS | {"n_shared_experts": 1},
    "falcon, alibi": {"alibi": True},
    "glm4_moe_lite": FOUR,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granite": {"logits_scaling": 8.0},
    "granite, unscaled": {"logits_scaling": 1.0},
    "granitemoehybrid": LINEAR,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": FOUR | LINEAR | {"num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "minicpm3": FOUR,
    "nemotron_h": {"layers_block_type": ["linear_attention", "mlp", "full_attention"], "n_groups": 2},
    "olmo_hybrid": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "xlstm": {"num_heads": 4},
    "zamba2": FOUR
    | {"num_hidden_layers": 4, "attention_hidden_size": 64, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "gemma3": {  # gemma3 also needs settings for vision
        "text_config": SIZES | {"layer_types": ["sliding_attention", "full_attention"]},
        "vision_config": SIZES | {"num_hidden_layers": 1, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
        "image_token_index": 103,
    },
}
# The random models get these eight end tokens, so that they end many rows early. No text of the task contains the
# tokens.
ENDS = [2, 6, 11, 45, 58, 67, 79, 95]
BUDGET = 40


def tiny(name: str) -> PreTrainedConfig:
    """Returns the config of a tiny model of architecture `name`."""
    kind, fields = CONFIG_MAPPING[name.split(",")[0]], MODELS[name]
    known = kind()
    free = [key for key in SMALL if hasattr(known, key) and not isinstance(getattr(kind, key, None), property)]
    return kind(**({key: SMALL[key] for key in free} | fields))


def make(name: str, folder: Path) -> None:
    """Saves a tiny model in `folder`. The weight matrices are scaled up, so that the token distributions are far from
    uniform."""
    config, fields = tiny(name), MODELS[name]
    text = config.get_text_config()
    for key, value in vars(text).items():
        if any(word in key for word in NOISE) and isinstance(value, float) and key not in fields:
            setattr(text, key, 0.1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained("data/base").save_pretrained(folder)


@torch.no_grad()
def plain_logits(model: PreTrainedModel, row: Row, response: list[int]) -> torch.Tensor:
    """Returns the logits [tokens of the response, V] of one row in a plain forward pass: without padding, mask,
    positions and cache."""
    ids = torch.tensor([row.prompt_ids + response])
    return model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1]


def prove(folder: Path) -> str | None:
    """Checks sampling, log-probs and saving of a model and returns the name of its decoding loop. Raises an
    AssertionError that names the failed check."""
    model, tokenizer = load_model(str(folder), training=True, check=check_model)
    generator = torch.Generator().manual_seed(0)

    def some(n):
        return torch.randint(14, 44, (n,), generator=generator).tolist()

    rows = [Row(i, (i,), some(2 + 3 * (i % 4)), some(2 * i) if i % 2 else []) for i in range(8)]
    # three more rows with an equal prompt, like rows of a group
    rows += [Row(8, (8, i), rows[0].prompt_ids, []) for i in range(3)]

    def respond(rows: list[Row], temperature: float = 1.0) -> list[Row]:
        return generate(model, tokenizer, rows, BUDGET, temperature, decode=loop_of(model))

    sampled = respond(rows)
    together = [row.response for row in sampled]
    assert len({len(r) for r in together}) > 1, "no row ended early"
    assert [respond([row])[0].response for row in rows] == together, "a row depends on its batch"
    for row in respond(rows, 0.0):
        logits, own = plain_logits(model.eval(), row, row.response), slice(len(row.prefix_ids), None)
        assert logits.argmax(-1).tolist()[own] == row.response[own], "greedy tokens are not the argmax"
    model.train()
    rollouts = pack(sampled, model.generation_config.pad_token_id)
    batch = rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask.shape[1], 1.0
    (log_probs, _), (again, _) = token_stats(model, *batch), token_stats(model, *batch)
    # two training passes give equal log-probs to the bit on most CPUs; the tolerance is for other CPUs
    assert torch.allclose(log_probs, again, rtol=0, atol=1e-5), "two training passes differ"
    for i, (row, response) in enumerate(zip(rows, together)):
        p = plain_logits(model.eval(), row, response).log_softmax(-1)
        want = p.gather(1, torch.tensor(response)[:, None])[:, 0]
        assert torch.allclose(log_probs[i, : len(response)], want, rtol=1e-4, atol=1e-4), (
            f"log-probs are off by {(log_probs[i, : len(response)] - want).abs().max():.1e}"
        )
    save_model(model.train(), tokenizer, folder / "final")
    final = AutoModelForCausalLM.from_pretrained(folder / "final", dtype=torch.float32).eval()
    last = rows[-1], together[-1]
    assert torch.equal(plain_logits(final, *last), plain_logits(model.eval(), *last)), "saved weights are others"
    return model.loop


def by_length(_reward: object, texts: list[str], _problems: list) -> list[float]:
    return [float(len(text) % 2) for text in texts]


def one_step(folder: Path) -> float:
    """Makes one step of Prefix-RFT with the setup of train.py, and returns the gradient norm."""
    settings = {"model": str(folder), "prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 1}
    settings |= {"max_response_tokens": 80, "out": str(folder / "run"), "device": "cpu", "eval_every": 0}
    steps.grade_all = by_length
    run, _ = prepare(from_dict(settings))
    return rl_metrics(run, steps.rl_step(run, 0))["grad_norm"]


def verdict(name: str, folder: Path) -> str:
    """Returns the cells of an architecture in the table of models.md: "trained" with the decoding loop, "refused"
    with the error message, or "FAILED" with the exception."""
    try:
        make(name, folder)
        loop = prove(folder) or "transformers"
        assert one_step(folder) > 0, "no gradient"
        return f"trained | {loop}"
    except Exception as error:
        message = " ".join(str(error).split())[:300].replace(str(folder), name).replace("|", "/")
        refused = isinstance(error, InputError)
        return f"refused | {message}" if refused else f"FAILED | {type(error).__name__}: {message}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=MODELS, metavar="NAME")
    names = parser.parse_args().names
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as root:
        for name in names or sorted(MODELS):
            lines.append(f"| {name} | {verdict(name, Path(root, name.replace(', ', '-')))} |")
            print(lines[-1], flush=True)
    if not names:
        made_with = f"transformers {transformers.__version__}, torch {torch.__version__}, {machine()['device']}"
        head = f"# Causal LMs of transformers, made tiny\n\nWritten by bench/models.py ({made_with}).\n"
        head += "\n| architecture | | decoding loop (LOOPS of fast/decode.py), or the line |\n|---|---|---|\n"
        (RESULTS / "models.md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
