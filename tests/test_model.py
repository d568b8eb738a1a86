"""These tests compare token_stats in model.py with direct computations, and check loading and saving."""

import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import contents, random_model
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import model as models
from data.loader import encode
from fast.check import check_model
from model import load_model, response_text, sampling, save_model, token_stats
from support import distributed, loading
from support.loading import fuse_norms, load_config, pick_device


def rows(lengths: list[tuple[int, int]], vocab: int = 103, seed: int = 0):
    """Returns (ids, mask, R) of rows with these (prompt, response) lengths: prompts are padded left, responses right
    to R."""
    generator = torch.Generator().manual_seed(seed)
    P, R = max(p for p, _ in lengths), max(r for _, r in lengths)
    ids = torch.randint(3, vocab, (len(lengths), P + R), generator=generator)
    mask = torch.tensor([[0] * (P - p) + [1] * (p + r) + [0] * (R - r) for p, r in lengths])
    return ids, mask, R


def direct(model, ids, mask, R, temperature):
    """Returns log-probs and entropies, row by row without padding, from the whole [R, V] softmax in the model's
    dtype."""
    log_probs, entropy = torch.zeros(len(ids), R, dtype=model.dtype), torch.zeros(len(ids), R, dtype=model.dtype)
    for i in range(len(ids)):
        row = ids[i][mask[i].bool()]
        r = int(mask[i, -R:].sum())
        p = (model(input_ids=row[None]).logits[0, -r - 1 : -1] / temperature).softmax(-1)
        log_probs[i, :r] = p.gather(1, row[-r:, None])[:, 0].log()
        entropy[i, :r] = -(p * p.log()).sum(-1)
    return log_probs, entropy


def assert_rounded(result: torch.Tensor, exact: torch.Tensor) -> None:
    """Checks that `result`, computed in fp32, equals the float64 `exact` up to rounding.

    The tolerance is 2**9 times the rounding of the largest entry, because errors add up: a result goes through about
    20 sums of 32 to 103 terms. The largest error seen was 60 times the rounding of the largest entry.
    """
    close = 2**9 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    torch.testing.assert_close(result, exact.float(), rtol=0, atol=close)


def test_a_model_samples_in_eval_mode_and_is_trained_in_train_mode():
    """In train mode gradient checkpointing turns off the key-value cache, and in eval mode it does nothing."""
    model = random_model()
    with sampling(model) as policy:
        assert not policy.training and not torch.is_grad_enabled()
    assert model.training and torch.is_grad_enabled()


def test_a_response_as_text_lacks_its_end_token_and_no_space(tokenizer):
    text, ends = "1 .2 , it 's", [tokenizer.eos_token_id, 50, 51]
    for last in ([], *([end] for end in ends)):
        assert response_text(tokenizer, [*encode(tokenizer, text), *last], ends) == text


def test_a_special_token_inside_a_response_stays_in_its_text(tokenizer):
    ids = [*encode(tokenizer, "12"), tokenizer.bos_token_id, *encode(tokenizer, "3")]
    assert response_text(tokenizer, ids, [tokenizer.eos_token_id]) == f"12{tokenizer.bos_token}3"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [2**25, 103 * 4])
def test_token_stats_equal_the_direct_computation(monkeypatch, temperature, chunk):
    """Log-probs, entropies and gradients are compared with a computation in float64. Padding, other rows and the
    chunk size change neither values nor gradients."""
    monkeypatch.setattr(models, "LOGITS_PER_CHUNK", chunk)
    model, exact = random_model(scale=0.2), random_model(scale=0.2).double()
    ids, mask, R = rows([(5, 9), (2, 3), (8, 1), (3, 7)])
    weights = torch.randn(4, R)
    log_probs, entropy = token_stats(model, ids, mask, R, temperature)
    (log_probs * weights).sum().backward()
    want, want_entropy = direct(exact, ids, mask, R, temperature)
    (want * weights).sum().backward()
    assert_rounded(log_probs, want.detach())
    assert_rounded(entropy, want_entropy.detach())
    for parameter, other in zip(model.parameters(), exact.parameters()):
        assert_rounded(parameter.grad, other.grad)
    assert not entropy.requires_grad and (log_probs[mask[:, -R:] == 0] == 0).all()


def test_padding_ids_do_not_matter():
    model = random_model()
    ids, mask, R = rows([(5, 9), (2, 3)])
    first = token_stats(model, ids, mask, R, 1.0)
    second = token_stats(model, torch.where(mask == 1, ids, 7), mask, R, 1.0)
    for a, b in zip(first, second):
        # results are equal to the bit, because padding changes neither the summed numbers nor their order
        assert torch.equal(a, b)


def test_a_loaded_model_has_fp32_weights_no_dropout_and_a_neutral_generation_config(tmp_path, tokenizer):
    """The saved model is in bf16, with dropout; its generation config has top_k 1, a penalty on repeated tokens, and
    two end tokens."""
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, attn_pdrop=0.5, resid_pdrop=0.5)
    model = GPT2LMHeadModel(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    hostile = {"top_k": 1, "repetition_penalty": 1.3, "do_sample": True, "eos_token_id": [7, 9], "min_length": 50}
    (tmp_path / "generation_config.json").write_text(json.dumps(hostile))
    model, _ = load_model(str(tmp_path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, 7, 9]
    assert model.generation_config.repetition_penalty in (None, 1.0) and not model.generation_config.min_length
    ids, mask, R = rows([(5, 9), (2, 3)], vocab=len(tokenizer))
    assert model.training
    first, second = (token_stats(model, ids, mask, R, 1.0)[0] for _ in range(2))
    assert (first == second).all()


def test_noise_that_stays_on_is_refused(tmp_path, tokenizer, monkeypatch):
    config = GPT2Config(vocab_size=103, n_embd=32, n_layer=2, n_head=2, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load_model(str(tmp_path), training=True, check=check_model)
    monkeypatch.setattr(loading, "NOISE", ())
    with pytest.raises(ValueError, match="two training passes differ: set each dropout"):
        load_model(str(tmp_path), training=True, check=check_model)


def test_a_head_of_its_own_stays_one(tmp_path, tokenizer, monkeypatch):
    """config.json says that head and embedding are tied, but the weights file holds two different matrices.
    load_model and a saved model keep both matrices, on every rank."""
    save_model(random_model(vocab_size=103), tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    model, _ = load_model(str(tmp_path / "m"), training=True, check=check_model)
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    sent = model.config, model.dtype, model.loop
    monkeypatch.setattr(distributed, "from_rank_0", lambda _: pickle.loads(pickle.dumps(sent)))
    for other in distributed.follow_first(None):  # `other` is the model that another rank builds of what rank 0 sends
        assert [name for name, _ in other.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert other.loop == model.loop
    save_model(model, tokenizer, tmp_path / "final")
    again, _ = load_model(str(tmp_path / "final"))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_save_then_load_gives_the_same_weights(tmp_path, tokenizer):
    model = random_model(vocab_size=len(tokenizer))
    save_model(model, tokenizer, tmp_path / "final")
    save_model(model, tokenizer, tmp_path / "final")
    again, _ = load_model(str(tmp_path / "final"))
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values()):
        assert (a == b).all(), name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final"]


@pytest.mark.parametrize("what", ["weights", "tokenizer"])
def test_a_save_that_fails_leaves_the_old_folder(tmp_path, tokenizer, monkeypatch, what):
    model = random_model(vocab_size=len(tokenizer))
    save_model(model, tokenizer, tmp_path / "final")
    before = contents(tmp_path / "final")

    def full(*_, **__):
        raise OSError(28, "No space left")

    monkeypatch.setattr(type(model if what == "weights" else tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tokenizer, tmp_path / "final")
    assert contents(tmp_path / "final") == before


def test_logits_of_a_chunk_of_tokens_only_exist_at_once(monkeypatch):
    """Only one chunk of tokens has logits at a time, in the forward pass and in the backward pass."""
    model, sizes = random_model(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    monkeypatch.setattr(models, "LOGITS_PER_CHUNK", 103 * 4)
    ids, mask, R = rows([(5, 9), (2, 3)])
    token_stats(model, ids, mask, R, 1.0)[0].sum().backward()
    assert max(sizes) == 4 and sum(sizes) == 2 * (9 + 3)


def test_a_token_that_cannot_come_adds_no_entropy():
    """If a token's logit is -inf, the token's entropy term 0 · -inf has to be 0, not NaN."""
    model, ids = random_model(), torch.tensor([[5, 6, 7]])
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(103))
    model.lm_head.bias.data[50:] = -torch.inf
    log_probs, entropy = token_stats(model, ids, torch.ones_like(ids), 2, 1.0)
    # the expected entropy comes from the logits of the same model without the tokens whose logit is -inf
    logits = random_model()(ids).logits[0, :2, :50].detach()
    torch.testing.assert_close(entropy[0], torch.distributions.Categorical(logits=logits).entropy())
    assert log_probs.isfinite().all()


def test_uniform_logits_have_the_entropy_of_the_vocabulary():
    model = random_model(scale=0.0)
    ids, mask, R = rows([(4, 6)])
    log_probs, entropy = token_stats(model, ids, mask, R, 1.0)
    torch.testing.assert_close(entropy, torch.full((1, 6), math.log(103)))
    torch.testing.assert_close(log_probs, torch.full((1, 6), -math.log(103)))


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_incomplete_folder_is_one_clear_line(tmp_path, tokenizer, missing):
    save_model(random_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "m")
    (tmp_path / "m" / missing).unlink()
    if missing == "tokenizer.json":
        (tmp_path / "m" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="model '") as error:
        load_model(str(tmp_path / "m"))
    assert "\n" not in str(error.value)


def test_a_runs_folder_says_where_its_model_is(tmp_path, tokenizer):
    save_model(random_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "final")
    (tmp_path / "config.json").write_text('{"method": "rft"}')
    with pytest.raises(ValueError, match=f"is the folder of a run, .*: give --model {tmp_path / 'final'}$"):
        load_model(str(tmp_path))


def test_remote_code_is_never_run(tmp_path, tokenizer):
    save_model(random_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "m")
    (tmp_path / "m" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    with pytest.raises(ValueError, match="code of its own, which is never run here") as error:
        load_model(str(tmp_path / "m"))
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def test_a_gated_model_says_how_to_get_it(monkeypatch):
    def gated(path, **_):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it …")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", gated)
    with pytest.raises(ValueError, match=r"ask for access at https://huggingface.co/a/b, then run {2}hf auth login"):
        load_config("a/b")


@pytest.mark.parametrize("cuda, mps, want", [(True, True, "cuda:2"), (False, True, "mps"), (False, False, "cpu")])
def test_the_best_device_is_chosen(monkeypatch, cuda, mps, want):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert str(pick_device()) == want and str(pick_device("cpu")) == "cpu"
    if cuda:
        assert str(pick_device("cuda")) == "cuda:2"
    else:
        with pytest.raises(ValueError, match="device is cuda, but PyTorch finds none here"):
            pick_device("cuda")


@pytest.mark.parametrize(
    "device, training, want",
    [("cuda", True, torch.float32), ("cuda", False, torch.bfloat16), ("cpu", False, torch.float32)],
)
def test_weights_are_bf16_only_for_sampling_on_cuda(monkeypatch, device, training, want):
    def asked(path, dtype, **_):
        raise OSError(f"asked for {dtype}")

    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", asked)
    with pytest.raises(ValueError, match=f"asked for {want}"):
        load_model("data/base", device, training=training)


def test_damaged_weights_are_one_line(tmp_path, tokenizer):
    save_model(random_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "m")
    weights, config = tmp_path / "m" / "model.safetensors", tmp_path / "m" / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="cannot be loaded: Error while deserializing header"):
        load_model(str(tmp_path / "m"))
    weights.write_bytes(whole)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": 64}))
    with pytest.raises(ValueError, match="its weights do not have the shapes of its config"):
        load_model(str(tmp_path / "m"))


def test_missing_weights_and_a_damaged_generation_config_are_refused(tmp_path, tokenizer):
    save_model(random_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights lack model.layers.1.mlp.up_proj.weight"):
        load_model(str(tmp_path / "m"))
    weights["model.layers.1.mlp.up_proj.weight"] = lost
    save_file(weights, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    load_model(str(tmp_path / "m"))
    (tmp_path / "m" / "generation_config.json").write_text('{"eos_token_id": [1, 5')
    with pytest.raises(ValueError, match=r"cannot be loaded: .*generation_config.json"):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize("value", [torch.nan, 3e38])
def test_weights_that_are_not_finite_or_far_too_large_are_called_damaged(tmp_path, tokenizer, value):
    model = random_model(vocab_size=len(tokenizer))
    model.lm_head.weight.data[5] = value
    save_model(model, tokenizer, tmp_path / "m")
    with pytest.raises(ValueError, match="the logits are not finite, so the weights are damaged"):
        load_model(str(tmp_path / "m"), check=check_model)


def test_a_token_without_a_row_is_refused_only_where_it_is_used(tmp_path, tokenizer):
    """Gemma 3's tokenizer, for example, has one token more than the model's embedding has rows."""
    save_model(random_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "m")
    longer = AutoTokenizer.from_pretrained(tmp_path / "m")
    longer.add_tokens(["<image>"])
    longer.save_pretrained(tmp_path / "m")
    _, longer = load_model(str(tmp_path / "m"), check=check_model)
    assert encode(longer, "1+1") == encode(tokenizer, "1+1")
    with pytest.raises(ValueError, match=r"^problem 'p': '<image>' has the id 101, but the model's embedding has"):
        encode(longer, "1<image>", "problem 'p'")
    longer.pad_token = "<image>"
    longer.save_pretrained(tmp_path / "m")
    GenerationConfig(eos_token_id=[101, 6]).save_pretrained(tmp_path / "m")
    model, _ = load_model(str(tmp_path / "m"), check=check_model)
    assert model.generation_config.eos_token_id == [2, 6]  # the embedding lacks token 101, which is never sampled
    assert model.generation_config.pad_token_id == 2
    longer.eos_token = "<image>"
    longer.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="end token has the id 101, but the embedding has only 101 rows"):
        load_model(str(tmp_path / "m"))


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            r"the weights are quantised \(bitsandbytes\): give the model that they were made from$",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised \(gptq\)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantised \(quantization\)"),  # MLX
        ({"compression_config": {"quant_method": "sparseml"}}, r"quantised \(sparseml\)"),
        ({"model_type": "t5"}, "this is an encoder-decoder model: give a causal model$"),
    ],
)
def test_what_is_out_of_scope_is_said_from_the_config(tmp_path, tokenizer, fields, message):
    save_model(random_model(vocab_size=len(tokenizer)), tokenizer, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path / "m"))


def test_a_folder_of_an_organisations_name_does_not_hide_the_hub(tmp_path, monkeypatch):
    (tmp_path / "Qwen").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda path, **_: GPT2Config(name_or_path=path))
    assert load_config("Qwen/Qwen2.5-0.5B").name_or_path == "Qwen/Qwen2.5-0.5B"
    for name in ("no/such/folder", "data/base"):  # names of no folder here and of no model on the hub
        with pytest.raises(ValueError, match="neither a folder that exists nor a hub name"):
            load_config(name)
    (tmp_path / "Qwen" / "Qwen2.5-0.5B").mkdir()
    with pytest.raises(
        ValueError, match=r"is a folder here, but holds no model .*: if the hub's model is meant, rename"
    ):
        load_config("Qwen/Qwen2.5-0.5B")


def test_an_adapter_is_called_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "data/base"}')
    with pytest.raises(ValueError, match=r"is an adapter \(LoRA\): merge it into its model, and give"):
        load_model(str(tmp_path))


class AddsItsInput(LlamaRMSNorm):
    def forward(self, hidden_states):
        return super().forward(hidden_states) + hidden_states


class TakesAGate(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * gate)


def test_norms_are_fused_where_that_changes_nothing():
    """On CUDA every norm of a Llama is fused. A norm that adds its input, takes a gate as second argument or has no
    weight is not fused. This test fuses norms on the CPU."""
    model, ids = random_model(), torch.arange(3, 13)[None]
    arguments = ids, torch.ones_like(ids), 6, 1.0

    def log_probs_and_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        log_probs, _ = token_stats(model, *arguments)
        log_probs.sum().backward()
        return log_probs.detach(), model.model.norm.weight.grad

    want = log_probs_and_gradient()
    fuse_norms(model)
    fused = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert len(fused) == 2 * model.config.num_hidden_layers + 1 and all("norm" in name for name in fused)
    for result, expected in zip(log_probs_and_gradient(), want):
        assert torch.allclose(result, expected, atol=1e-5)
    other = torch.nn.Sequential(AddsItsInput(8), TakesAGate(8), type(model.model.norm)(8))
    other[2].weight = None
    fuse_norms(other)
    assert not any("forward" in vars(norm) for norm in other)
