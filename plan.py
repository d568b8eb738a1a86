"""Estimate what a run will cost before it starts: memory of each GPU by part, rows that fit at once, tokens, hours.

    python plan.py --config configs/qwen2.5-math-7b.json --gpu H100 --gpus 8 [--method sft] [--FIELD VALUE …]

Only the model's config is read. The configs of all models that configs/ names are in configs/models/, so no network
is needed. The memory of an update is counted: the layers and the head run forward and backward on the meta device
(shapes without data), and `update_bytes` adds up the tensors that are alive. Attention is counted as a fused causal
kernel that keeps queries, keys, values and output. All other memory is computed by formulas. Tests compare the
counted and the computed memory with measured peaks. Times are estimates: a run reaches a constant share of each peak
speed on the GPU's data sheet. UPDATE_SHARE and READ_SHARE were fitted to one H200 with a model of Qwen2.5-1.5B's
shape: decoding of 256 rows, and one whole step [bench/results/gpu.md]. Other GPUs, other models, several GPUs and
transfers were not measured.
"""

import bisect
import contextlib
import functools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

import model as models
from fast.decode import PREFILL_TOKENS, whole_blocks
from methods import METHODS
from support import adapters
from support.command import Parser, command
from support.config import Config, check_range, parse_config
from support.distributed import trained
from support.errors import InputError
from support.loading import check_window, fuse_norms, load_config, prepare_layers, window_of
from support.memory import cache_bytes, head_width, inner_width, plain_caches, row_bytes, token_bytes

SHIPPED = Path(__file__).parent / "configs" / "models"  # the config.json of each model that configs/ names
GIB, MIB = 2**30, 2**20
# for each GPU: memory in GiB as CUDA reports it; and from the GPU's data sheet TFLOP/s in bf16 (dense), GB/s of
# memory, GB/s of PCIe
GPUS = {
    "3090": (23.5, 71, 936, 32),
    "4090": (23.5, 165, 1008, 32),
    "L40S": (44.4, 362, 864, 32),
    "A100": (79.2, 312, 2039, 32),
    "H100": (79.2, 989, 3350, 64),
    "H200": (139.7, 989, 4800, 64),
}
USABLE = 0.92  # share of a GPU's memory that a run can use; the driver and fragmentation take the rest
UPDATE_SHARE = 0.16  # share of the peak TFLOP/s that the updates of a whole step reach
READ_SHARE = 0.4  # share of the peak GB/s at which the forward pass of a new token reads weights and caches
TRANSFER_SHARE = 0.75  # share of PCIe's GB/s that offloading reaches; assumed, not measured
HOST_BANDWIDTH = 30e9  # bytes per second of the host's memory, in which AdamW works with --offload; assumed
# seconds that each layer adds to the forward pass of a new token, beside reading its weights and caches
LAYER_SECONDS = 0.0001
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # names that configs use for the number of experts
MEAN_RESPONSE = 0.4  # assumed mean response length as a share of max_response_tokens


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the living tensors that were made inside this context, and keeps the largest count as
    `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.count(tensor.untyped_storage(), inputs)
        return result

    def count(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = id(storage)
        if key in self.known or key in inputs:
            return
        self.known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class FusedAttention(torch.autograd.Function):
    """Makes and keeps the tensors that a fused attention kernel would, without values."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows, heads, tokens, _ = query.shape
        out = query.new_empty(rows, tokens, heads, value.shape[3]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


def fused_attention(module, query, key, value, mask, **_: Any) -> tuple[Tensor, None]:
    if getattr(module, "sliding_window", None):  # with a sliding window HF copies keys and values for all heads
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    return FusedAttention.apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register("planned", fused_attention)


class FusedNorm(torch.autograd.Function):
    """Makes and keeps the tensors that PyTorch's RMS norm would on CUDA, without values.

    On the meta device PyTorch would split the norm into several operations, which keep more tensors.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:2])


def empty_model(shape: Any, dtype: torch.dtype, fused: bool = False) -> Any:
    """Returns the model of a config `shape` without weights. With `fused` its RMS norms become single kernels, as on
    CUDA (support/loading.py, fuse_norms)."""
    shape._attn_implementation = "planned"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation="planned").train()
    if fused:
        fuse_norms(model)
        for module in model.modules():
            if "forward" in vars(module):
                module.forward = lambda x, weight=module.weight: FusedNorm.apply(x, weight)
    return model


def update_bytes(
    shape: Any,
    rows: int,
    prompt: int,
    response: int,
    dtype: torch.dtype,
    recompute: bool,
    fused: bool = True,
    low_rank: Config | None = None,
) -> int:
    """Returns the largest number of bytes that the forward and backward pass of a micro-batch holds at once, beside
    weights and gradients."""
    model = empty_model(shape, dtype, fused)
    prepare_layers(model, torch.device("meta"), recompute, low_rank)
    for parameter in trained(model).values():  # a new gradient is added to the accumulated one and freed
        parameter.data = parameter.data.to(dtype)
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    length = prompt + response
    with LiveBytes() as counted, torch.device("meta"):
        ids = torch.zeros(rows, length, dtype=torch.long)
        made = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        hidden = made.last_hidden_state[:, prompt - 1 : -1].reshape(rows * response, -1)
        del made
        log_probs, _ = models.head_stats(model, hidden, ids[:, prompt:].reshape(-1), 1.0)
        del hidden
        log_probs.sum().backward()
    return counted.peak


# ---- the plan


@dataclass
class Counts:
    """Numbers of a model's parameters, and in `cache` the bytes of each token in the key-value cache.

    `total` counts all parameters, `passed` the parameters through which each token passes (in a mixture of experts
    only a few experts), and `trained` the trained parameters (with adapters only the adapters). Of the trained
    parameters `root` counts those outside the layers (embedding, head, last norm), and `layer` those of the largest
    layer. `layers` is the number of layers.
    """

    total: int
    passed: int
    trained: int
    root: int
    layer: int
    layers: int
    cache: int


def shape_of(path: str) -> Any:
    """Returns the config of a model from its folder, from the copy in configs/models/, or from the hub."""
    shipped = SHIPPED / f"{path.replace('/', '--')}.json"
    if shipped.exists() and not Path(path).exists():
        return AutoConfig.from_pretrained(shipped)
    return load_config(path)


def experts_share(shape: Any) -> float:
    """Returns the share of the experts through which each token passes; 1 for models that are no mixture of
    experts."""
    text = shape.get_text_config()
    numbers = [n for name in EXPERTS if (n := getattr(text, name, None))]
    passed = getattr(text, "num_experts_per_tok", None)
    return passed / numbers[0] if numbers and passed else 1.0


def count(shape: Any, low_rank: Config | None = None) -> Counts:
    cache = cache_bytes(shape)
    model = empty_model(shape, torch.bfloat16)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    if low_rank:
        adapters.add(model, low_rank)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    nested = {id(inner) for layer in layers for inner in layer.modules() if inner is not layer}
    layers = [layer for layer in layers if id(layer) not in nested]
    if not layers:
        raise ValueError("the model's layers cannot be told from its other parts")
    # a parameter that several layers share is counted once
    owner = {id(p): i for i, layer in enumerate(layers) for p in trained(layer).values()}
    sizes = [sum(p.numel() for p in trained(layer).values() if owner[id(p)] == i) for i, layer in enumerate(layers)]
    all_trained = sum(p.numel() for p in trained(model).values())
    return Counts(
        total=total,
        passed=total - round(experts * (1 - experts_share(shape))),
        trained=all_trained,
        root=all_trained - sum(sizes),
        layer=max(sizes),
        layers=len(layers),
        cache=cache,
    )


def rows_of_a_pass(config: Config, length: float) -> int:
    """Returns how many rows of `length` tokens fit into a micro-batch of micro_batch_tokens."""
    return max(1, int(config.micro_batch_tokens // length))


def pass_bytes(config: Config, shape: Any, prompt: int, rows: int) -> int:
    """Returns update_bytes of a micro-batch of `rows` rows of full length on a GPU."""
    how = (prompt, config.max_response_tokens, torch.bfloat16, config.recompute)
    return update_bytes(shape, rows, *how, low_rank=adapters.of(config))


def plan(config: Config, shape: Any, gpus: int, prompt: int) -> dict[str, dict[str, float]]:
    """Returns the bytes that each part of the memory takes on one GPU, during an update and during sampling."""
    n = count(shape, adapters.of(config))
    length = prompt + config.max_response_tokens
    rows = rows_of_a_pass(config, length)
    split = 0 if config.offload else n.trained / gpus
    state = {"frozen weights, bf16": 2 * n.total} if config.lora_rank else {}
    state |= {"weights, fp32": 4 * split, "optimizer, fp32": 8 * split}
    update = state | {
        "gradients, fp32": 4 * split,
        "weights in bf16 (root and two layers)": 2 * n.root + 4 * n.layer,
        "gradients in bf16 and on their way": 2 * n.root + 8 * n.layer,
        f"activations, {rows} x {length} tokens, and logits": pass_bytes(config, shape, prompt, rows),
    }
    if "rl" not in METHODS[config.method].stages:
        return {"update": update}
    sampling = state | {"weights in bf16 (all)": 2 * n.trained}
    sampling |= sampling_bytes(shape, config.rows_per_call, whole_blocks(length))
    return {"update": update, "sampling": sampling}


def block_bytes(shape: Any, tokens: int = PREFILL_TOKENS, size: int = 2) -> int:
    """Returns the bytes of a forward pass over `tokens` prompt tokens, without key-value caches. Each number that the
    forward pass computes has `size` bytes."""
    shape = shape.get_text_config()
    return size * tokens * (3 * inner_width(shape) + 6 * shape.num_attention_heads * head_width(shape))


def sampling_bytes(shape: Any, rows: int, columns: int, tokens: int = PREFILL_TOKENS, size: int = 2) -> dict:
    """Returns the bytes of sampling `rows` rows of up to `columns` tokens in one call. Prompts are read in blocks of
    `tokens` tokens."""
    one_token = rows * token_bytes(shape, 0 if plain_caches(shape) else columns, size)
    return {
        f"key-value caches, {rows} x {columns} tokens": rows * columns * cache_bytes(shape, size),
        "a block of prompts, or a token of all rows": max(block_bytes(shape, tokens, size), one_token),
    }


def rows_sampled_at_once(shape: Any, sampling: dict[str, float], free: float, columns: int) -> int:
    """Returns the largest number of rows that can be sampled in one call; 0 if not even the weights fit. `sampling`
    is the entry "sampling" of what `plan` returns."""
    left = free - sum(list(sampling.values())[:-2])  # the last two parts of `sampling` grow with the number of rows
    beside_block = (left - block_bytes(shape)) / (columns * cache_bytes(shape))
    return max(0, int(min(beside_block, left / row_bytes(shape, columns, repeated=not plain_caches(shape)))))


def rows_updated_at_once(
    config: Config, shape: Any, update: dict[str, float], free: float, prompt: int, most: int
) -> int:
    """Returns how many rows of full length, 0 to `most`, fit into one micro-batch of an update.

    The function tries out numbers of rows. A straight line through the memory of one and two rows would promise too
    many, because with few rows the memory peaks at another place of the forward and backward pass.
    """
    left = free - sum(list(update.values())[:-1])  # the last part of `update` grows with the number of rows
    needed = functools.cache(functools.partial(pass_bytes, config, shape, prompt))
    line = 2 + int(max(0, left - needed(2)) / max(1, needed(2) - needed(1)))
    most = min(most, line)
    return most if needed(most) <= left else bisect.bisect_right(range(1, most), left, key=needed)


def host_bytes(config: Config, n: Counts) -> dict[str, float]:
    """Returns the bytes of host memory that the processes of all GPUs take together. A checkpoint is made of whole
    tensors on the host."""
    offloaded = 16 * n.trained if config.offload else 0
    return {
        "to load": (2 if config.lora_rank else 4) * n.total,
        "during the run": offloaded,
        "while a checkpoint is saved": offloaded + 12 * n.trained,
        "while final/ is saved": offloaded + 4 * n.total,
    }


def offload_seconds(config: Config, n: Counts, gpus: int, gpu: str, rows: int, mean: float, crossings: int) -> float:
    """Returns the seconds that offloading adds to one update over `rows` rows of `mean` tokens each.

    `crossings` is how often a forward and backward pass moves 4 bytes per parameter: weights to the GPU, or gradients
    back. The host adds up the gradients, and AdamW on the host reads four numbers per parameter and writes three.
    """
    passes = -(-rows // gpus // rows_of_a_pass(config, mean))
    over_pcie = passes * crossings * 4 * n.trained / gpus / (GPUS[gpu][3] * 1e9 * TRANSFER_SHARE)
    return over_pcie + (passes * 12 + 28) * n.trained / HOST_BANDWIDTH


def hours(config: Config, shape: Any, gpus: int, gpu: str, prompt: int, mean: float) -> dict[str, float]:
    """Returns estimates of the tokens and seconds of each step, and of the hours of the run."""
    _, tflops, bandwidth, _ = GPUS[gpu]
    n, stages, length = count(shape, adapters.of(config)), METHODS[config.method].stages, prompt + mean
    flops = tflops * 1e12 * UPDATE_SHARE * gpus
    # FLOP of an update per parameter and token: forward 2, backward 2, and 2 for gradients of unfrozen weights
    passes = 4 if config.lora_rank else 6
    passes += 2 * config.recompute
    result: dict[str, float] = {}
    if "sft" in stages:
        rows = config.sft_batch
        result["sft steps"] = config.sft_steps
        result["sft tokens of the run"] = config.sft_steps * rows * length
        result["sft seconds a step"] = passes * n.passed * rows * length / flops
        if config.offload:
            result["sft seconds a step"] += offload_seconds(config, n, gpus, gpu, rows, length, crossings=3)
        result["sft hours"] = config.sft_steps * result["sft seconds a step"] / 3600
    if "rl" in stages:
        rows = config.prompts_per_step * config.rollouts_per_prompt
        calls = -(-rows // gpus // config.rows_per_call)
        alive = min(config.rows_per_call, rows / gpus) * mean / config.max_response_tokens
        read = 2 * n.total + alive * n.cache * (prompt + mean / 2)
        token = n.layers * LAYER_SECONDS + read / (bandwidth * 1e9 * READ_SHARE)
        result["steps"] = config.steps
        result["response tokens a step"] = rows * mean
        result["response tokens of the run"] = config.steps * rows * mean
        result["seconds sampling"] = calls * config.max_response_tokens * token
        # the forward pass for old log-probs takes 2 more FLOP per parameter and token
        result["seconds updating"] = (passes + 2) * n.passed * rows * length / flops
        seconds = result["seconds sampling"] + result["seconds updating"]
        if config.offload:
            part, updates = rows // config.updates_per_step, config.updates_per_step
            result["seconds offloading"] = updates * offload_seconds(config, n, gpus, gpu, part, length, crossings=4)
            seconds += result["seconds offloading"]
        result["hours"] = config.steps * seconds / 3600
    return result


@contextlib.contextmanager
def planned(path: str, shape: Any) -> Iterator[None]:
    """Turns any error of running a model without data into an InputError of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # models were not made to run without data and can raise any error
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        fix = "try a short run, with a small micro_batch_tokens and rows_per_call"
        raise InputError(f"model {path!r} ({shape.model_type}) cannot be planned ({reason}): {fix}") from error


def advice(config: Config, n: Counts, fits: bool, updated: int, sampled: int, length: int) -> list[str]:
    """Returns advice on what to change if the run does not fit, or if more rows at once would save transfers between
    host and GPU.

    `updated` and `sampled` are the numbers of full-length rows that fit into a micro-batch of an update and into a
    sampling call.
    """
    lines = []
    rows = rows_of_a_pass(config, length)
    if updated and (not fits or (config.offload and updated > rows)):
        why = "each pass moves 16 bytes a parameter" if fits else "the most that fit"
        lines.append(f"--micro_batch_tokens {updated * length}: {updated} rows a pass, {why}")
    if not updated or not sampled:
        lines.append("more GPUs: weights, gradients and optimizer are split over them")
        if not config.recompute:
            lines.append("--recompute true: keeps one layer's activations instead of all")
        if not config.lora_rank:
            lines.append(f"--lora_rank 16: adapters on frozen weights of 2 bytes ({2 * n.total / GIB:.0f} GiB)")
        if not config.offload:
            lines.append(f"--offload true: 16 bytes a parameter ({16 * n.total / GIB:.0f} GiB) go to host memory")
        lines.append("--max_response_tokens: activations and caches grow with it")
    if 0 < sampled < config.rows_per_call:
        lines.append(f"--rows_per_call {sampled}")
    return lines


def in_bytes(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"


def in_numbers(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def show(config: Config, gpu: str, gpus: int, prompt: int | None, mean: float | None) -> None:
    """Print memory, rows and times of the run. Raises InputError, before the first line, for a model or settings that
    cannot be planned."""
    shape, budget = shape_of(config.model), config.max_response_tokens
    window = window_of(shape)
    if prompt is None:
        prompt = 1024 if budget > 1024 else 256
        prompt = max(1, min(prompt, window - budget)) if window else prompt
    check_window(window, prompt, budget, "max_response_tokens", "the longest prompt, --prompt")
    mean, length = MEAN_RESPONSE * budget if mean is None else mean, prompt + budget
    if not 0 < mean <= budget:
        raise InputError(f"mean_response is {mean:g}, expected above 0 and at most max_response_tokens ({budget})")
    free = GPUS[gpu][0] * GIB * USABLE
    rl = "rl" in METHODS[config.method].stages
    per_update = config.prompts_per_step * config.rollouts_per_prompt // config.updates_per_step
    most = -(-(per_update if rl else config.sft_batch) // gpus)
    with planned(config.model, shape):
        n, parts = count(shape, adapters.of(config)), plan(config, shape, gpus, prompt)
        updated = rows_updated_at_once(config, shape, parts["update"], free, prompt, most)
    number = f"{n.total / 1e9:.2f} billion" if n.total > 1e8 else f"{n.total / 1e6:.2f} million"
    adapted = f", adapters of {n.trained / 1e6:.1f} million" if config.lora_rank else ""
    print(f"{config.model}: {number} parameters, {n.layers} layers; {gpus} x {gpu}, {config.method}" + adapted)
    for phase, sizes in parts.items():
        print(f"\n{phase}, on each GPU")
        for name, size in sizes.items():
            print(f"  {name:<52}{in_bytes(size):>12}")
        total = sum(sizes.values())
        verdict = "fits" if total <= free else "DOES NOT FIT"
        print(f"  {'total':<52}{in_bytes(total):>12}   {verdict} {in_bytes(free)} usable")
    sampled = config.rows_per_call
    if rl:
        sampled = rows_sampled_at_once(shape, parts["sampling"], free, whole_blocks(length))
        print(f"\nrows that can be sampled at once: {sampled} (rows_per_call is {config.rows_per_call})")
        if not plain_caches(shape):
            print("  some layers keep a sliding window or a state: each is counted as a cache of all tokens, which")
            print("  transformers' attention repeats for all heads; a window takes less")
    held = rows_of_a_pass(config, length)
    print(f"rows of {length} tokens that fit into a pass of the update: {updated} (micro_batch_tokens holds {held})")
    for line in advice(config, n, sum(parts["update"].values()) <= free, updated, sampled, length):
        print(f"  change  {line}")
    print("\nhost memory")
    for when, size in host_bytes(config, n).items():
        print(f"  {when:<52}{in_bytes(size):>12}")
    print(f"\nestimates, for prompts of {prompt} and responses of {mean:.0f} tokens on average (--mean_response)")
    for name, value in hours(config, shape, gpus, gpu, prompt, mean).items():
        if name.endswith("hours") and value < 1:
            name, value = name.replace("hours", "seconds of the run"), 3600 * value
        print(f"  {name:<52}{in_numbers(value):>12}")
    _, tflops, bandwidth, pcie = GPUS[gpu]
    print(f"  assumed: {UPDATE_SHARE:.0%} of {tflops} TFLOP/s in updates, {READ_SHARE:.0%} of {bandwidth} GB/s")
    print(f"  in decoding, and {1e3 * LAYER_SECONDS * n.layers:.1f} ms a pass beside it; evaluation not counted")
    if config.offload:
        print(f"  {TRANSFER_SHARE:.0%} of {pcie} GB/s over PCIe, not beside the rest but after it")
    if n.passed < n.total:
        print(f"  and {n.passed / 1e9:.2f} billion parameters on a token; the mixture's other experts take no time")


@command("plan.py")
def main() -> None:
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog="--config FILE and every --FIELD VALUE of train.py are also options of plan.py: --model, --method, …",
    )
    parser.add_argument("--gpu", default="H100", choices=GPUS)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument(
        "--prompt", type=int, help="tokens of the longest prompt (default: 1024; 256 if responses have at most 1024)"
    )
    parser.add_argument(
        "--mean_response", type=float, help="mean tokens of a response (default: 0.4 times max_response_tokens)"
    )
    args, rest = parser.parse_known_args()
    check_range("gpus", args.gpus, 1)
    if args.prompt is not None:
        check_range("prompt", args.prompt, 1)
    show(parse_config(rest), args.gpu, args.gpus, args.prompt, args.mean_response)


if __name__ == "__main__":
    main()
