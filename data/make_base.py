"""This file pretrains the tiny base model of the embedded task from random weights and writes it as a Hugging Face
folder.

    python data/make_base.py --out FOLDER      about 5 minutes on one core; the default seed makes data/base

This file contains the tokenizer (one token per character), the corpus and the training loop. The documents of the
corpus are generated during the training, and the model sees each document once, in two stages. The first stage,
"textbook", teaches skills: calculating, and sorting a list of instructions by their labels. The second stage, "web",
teaches habits: most solutions give only the answer or follow the listed order, and the longer a recipe, the fewer
careful solutions it has. So the base model has the skills for a careful solution but seldom writes one. Post-training
has to teach the base model to write careful solutions. The corpus contains no problem of data/recipes.

Left out are a validation loss (eval.py measures the base model, see data/README.md), resuming, and GPUs (on a CPU a
repeated run gives the same weights).
"""

import math
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

# without this line a script in a subfolder does not find the modules of the project
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.make_recipes import LABELS, Recipe, instruction, make_recipe, make_splits, write_out
from support.command import Parser, command
from support.config import check_range
from support.errors import InputError
from support.files import make_folder
from support.model_folder import make_readable

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = ("\\boxed{", "\n", *(chr(code) for code in range(32, 127)))
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% endif %}{% endfor %}"  # no generation prompt, because the ? of a recipe asks for the solution
)

UPDATES = 2500
BATCH_TOKENS = 1400  # maximum number of tokens in a batch, padding included
POOL = 1024  # number of documents that are sorted by length together and cut into batches
LEARNING_RATE = 2.5e-3  # peak learning rate; 100 updates of warm-up, then half a cosine
PROBLEM_WEIGHT = 0.05  # weight of a problem's token in the loss; a token of a solution has weight 1
# share of recipes with k <= 3 whose first label may be a later one than A, so that the model learns every label
SHIFTED = 0.6


@dataclass(frozen=True)
class Stage:
    """One stage of the pretraining: its share of the updates, and the kinds of its documents."""

    name: str
    share: float
    exercises: float  # share of reading exercises among the documents; the rest are solved recipes
    sizes: dict[int, float]  # number of instructions k -> share of recipes with k instructions
    styles: dict[int, dict[str, float]]  # number of instructions k -> {style of the solution: share}


TEXTBOOK_STYLES = {"careful": 0.6, "unlabelled": 0.25, "hasty": 0.15}
STAGES = (
    Stage(
        name="textbook",
        share=0.35,
        exercises=0.4,
        sizes={1: 0.25, 2: 0.25, 3: 0.3, 4: 0.2},
        styles=dict.fromkeys((1, 2, 3, 4), TEXTBOOK_STYLES),
    ),
    Stage(
        name="web",
        share=0.65,
        exercises=0.1,
        sizes={1: 0.17, 2: 0.19, 3: 0.20, 4: 0.14, 5: 0.10, 6: 0.08, 7: 0.06, 8: 0.06},
        styles={
            1: {"careful": 0.300, "unlabelled": 0.40, "hasty": 0.000, "terse": 0.30},
            2: {"careful": 0.200, "unlabelled": 0.30, "hasty": 0.250, "terse": 0.25},
            3: {"careful": 0.100, "unlabelled": 0.25, "hasty": 0.350, "terse": 0.30},
            4: {"careful": 0.040, "unlabelled": 0.12, "hasty": 0.540, "terse": 0.30},
            5: {"careful": 0.015, "unlabelled": 0.04, "hasty": 0.645, "terse": 0.30},
            6: {"careful": 0.008, "unlabelled": 0.01, "hasty": 0.682, "terse": 0.30},
            7: {"careful": 0.005, "unlabelled": 0.00, "hasty": 0.695, "terse": 0.30},
            8: {"careful": 0.005, "unlabelled": 0.00, "hasty": 0.695, "terse": 0.30},
        },
    ),
)
# style of a solution -> probability of a wrong digit in each step
SLIPS = {"careful": 0.003, "unlabelled": 0.06, "hasty": 0.06, "terse": 0.0}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token for each printable ASCII character, newline and `\\boxed{`. Other characters
    become <unk>."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS + CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Returns the untrained model, about 0.29M parameters.

    The architecture is Qwen3, whose normalised queries and keys make this model learn faster. With architecture
    Qwen2, AutoTokenizer would load the published Qwen2 tokenizer instead of this folder's. The initial weights have a
    standard deviation of 0.06, because the default, 0.02, suits wider models. The base of the rotary positions (RoPE)
    is that of Qwen3.
    """
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **ids,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def solve(rng: random.Random, recipe: Recipe, style: str) -> str:
    """Returns a solution of a recipe in one of the four styles of the corpus.

    careful     the expert's style: right order, each step with its label
    unlabelled  right order, without the labels
    hasty       the order of the list, which gives a wrong answer
    terse       the right answer and nothing else
    """

    def blunder(value: int) -> int:
        if rng.random() >= SLIPS[style]:
            return value
        digits = list(f"{value:03d}")
        place = rng.randrange(3)
        digits[place] = str((int(digits[place]) + rng.choice((1, 2, 8, 9))) % 10)
        return int("".join(digits))

    if style == "terse":
        return write_out(int(recipe.answer), ())
    steps = recipe.listed if style == "hasty" else recipe.steps
    return write_out(recipe.start, steps, labelled=style == "careful", blunder=blunder)


def documents(rng: random.Random, stage: Stage, held_out: set[str]) -> Iterator[tuple[str, str]]:
    """Yields pairs (question, solution) of texts for one stage, infinitely many."""
    most = len(LABELS)
    while True:
        # a reading exercise sorts the instructions: `F+8;E-5;G+2?` -> `E-5;F+8;G+2`
        if rng.random() < stage.exercises:
            k = rng.randint(2, most)
            recipe = make_recipe(rng, k, first=rng.randint(0, most - k))
            yield recipe.problem[4:], ";".join(step[0] + instruction(step) for step in recipe.steps)
            continue
        k = rng.choices(*zip(*stage.sizes.items()))[0]
        recipe = make_recipe(rng, k, first=rng.randint(0, most - k) if k <= 3 and rng.random() < SHIFTED else 0)
        if recipe.problem not in held_out:
            style = rng.choices(*zip(*stage.styles[k].items()))[0]
            yield recipe.problem, solve(rng, recipe, style)


def batches(
    rng: random.Random, stage: Stage, held_out: set[str], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields batches of documents of similar length, infinitely many: right-padded ids [B, T] and loss weights [B,
    T]."""
    source = documents(rng, stage, held_out)
    while True:
        questions, solutions = zip(*(next(source) for _ in range(POOL)))
        prompts = tokenizer([tokenizer.bos_token + question for question in questions])["input_ids"]
        answers = tokenizer([text + tokenizer.eos_token for text in solutions])["input_ids"]
        pool = sorted(zip(prompts, answers), key=lambda pair: len(pair[0]) + len(pair[1]))
        groups, group = [], []
        for pair in pool:
            if group and (len(group) + 1) * (len(pair[0]) + len(pair[1])) > BATCH_TOKENS:
                groups.append(group)
                group = []
            group.append(pair)
        groups.append(group)
        rng.shuffle(groups)
        yield from (collate(group, tokenizer.pad_token_id) for group in groups)


def collate(pairs: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ids and loss weights, each [B, T], of (prompt ids, solution ids) pairs. Padding has weight 0."""
    width = max(len(prompt) + len(solution) for prompt, solution in pairs)
    ids, weights = torch.full((len(pairs), width), pad), torch.zeros(len(pairs), width)
    for i, (prompt, solution) in enumerate(pairs):
        end = len(prompt) + len(solution)
        ids[i, :end] = torch.tensor(prompt + solution)
        weights[i, : len(prompt)] = PROBLEM_WEIGHT
        weights[i, len(prompt) : end] = 1.0
    return ids, weights


def pretrain(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> None:
    """Trains the model in place to predict the next token, over all stages."""
    held_out = {row["problem"] for rows in make_splits().values() for row in rows}
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    update, end = 0, 0.0
    with tqdm(total=UPDATES, unit="update", file=sys.stdout, dynamic_ncols=True) as bar:
        for stage in STAGES:
            source, end = batches(rng, stage, held_out, tokenizer), end + stage.share
            while update < round(end * UPDATES):
                warm_up, cosine = min(1, (update + 1) / 100), 0.5 + 0.5 * math.cos(math.pi * update / UPDATES)
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm_up * cosine
                ids, weights = next(source)
                # The batch is right-padded and attention is causal, so no real token attends to padding and no mask
                # is needed.
                logits = model(input_ids=ids).logits[:, :-1]
                losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
                loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                update += 1
                bar.update()
                bar.set_postfix(stage=stage.name, loss=f"{loss.item():.3f}", refresh=False)


@command("make_base.py")
def main() -> None:
    parser = Parser(description="Pretrains the tiny base model of the embedded task.")
    parser.add_argument("--out", type=Path, default=Path("base"), help="folder of the new model (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the corpus (%(default)s)")
    arguments = parser.parse_args()
    check_range("--seed", arguments.seed, 0)
    out = arguments.out.resolve()
    if out.exists():
        raise InputError(f"--out {out} exists: delete it, or name a new folder")
    make_folder(out.parent)
    # A second thread gains little for such a small model, and the number of threads would change the rounding of
    # sums.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(arguments.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    pretrain(model, tokenizer, random.Random(arguments.seed))
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".make_base-") as temporary:
        model.save_pretrained(f"{temporary}/base")
        tokenizer.save_pretrained(f"{temporary}/base")
        make_readable(Path(temporary, "base"))
        Path(temporary, "base").rename(out)
    print(f"{out}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
