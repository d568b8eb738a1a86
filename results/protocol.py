"""The study's protocol in code (README.md has it in words): regimes, methods, data, grids, what trials choose.

Everything here is a pure function of its arguments. What runs and stores stands in study.py, what is said about the
stored runs in report.py, claims.py and drawing.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from data.make_recipes import TRAIN_PROBLEMS, make_splits
from methods import METHODS
from support.config import Config, suggest
from support.errors import InputError

# of a run: "demonstrations" (how many there are), "expert" where it is a weak one, and what differs from train.py's
# defaults
Settings = dict[str, Any]
Line = dict[str, Any]  # a stored run or trial (study.py)

TRIAL_SEED = 1000
FRESH_TEST_SEED = 7919  # chosen after the protocol was committed
EQUAL = "sft-rft-equal"  # sft-rft with fewer steps: as many tokens as rft and prefix-rft
MAIN = ("rft", "sft-rft", "prefix-rft", "sft", "luffy", "uft", "relift", "hpt", "chord-phi", "rescue")
TEN_SEEDS = ("rft", "sft-rft", "prefix-rft", "sft", "luffy", "dft-rft")  # in habit
OTHERS = tuple(name for name in METHODS if name not in MAIN)
ABLATIONS = tuple(name for name in METHODS if name.startswith("prefix-rft-") and name != "prefix-rft-trust")
EXPERT = "expert"  # the kind of demonstrations that a run has unless its settings name another
TWIN = "runs/study/base-1"  # made by data/make_base.py --seed 1
EVALUATED_EVERY = 10  # steps


@dataclass(frozen=True)
class Regime:
    """What all runs of a regime have in common."""

    about: str
    steps: int  # of reinforcement
    demonstrations: tuple[int, ...]  # each number is a setting of its own
    methods: tuple[str, ...]
    tuned_in: str  # the regime whose trials choose the settings
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    experts: tuple[str, ...] = (EXPERT,)  # of make_recipes.DEMONSTRATIONS; each is a setting of its own
    base: str = Config.model


REGIMES = {
    "habit": Regime("128 of 512 problems demonstrated", 60, (128,), (*MAIN, EQUAL, *OTHERS), "habit"),
    "silent": Regime("128 problems with k = 6, 32 demonstrated", 80, (32,), (*MAIN, EQUAL), "silent"),
    "scarce": Regime(
        "few demonstrations for 512 problems",
        60,
        (512, 128, 32, 8, 2),
        ("sft-rft", "prefix-rft", "luffy", "uft"),
        "habit",
        (0, 1, 2),
    ),
    "weak": Regime(
        "habit with weaker experts",
        60,
        (128,),
        ("sft", "sft-rft", "prefix-rft", "luffy"),
        "habit",
        (0, 1, 2),
        ("short", "slips", "several"),
    ),
    "twin": Regime(
        "habit on a base of another pretraining seed",
        60,
        (128,),
        ("rft", "sft-rft", "prefix-rft", "sft"),
        "habit",
        (0, 1, 2),
        base=TWIN,
    ),
}


def check_names(regimes: Sequence[str], methods: Sequence[str]) -> None:
    """Raises InputError for a regime or method that the study does not have."""
    for word in regimes:
        if word not in REGIMES:
            raise InputError(f"regime {word!r}{suggest(word, list(REGIMES))}")
    for word in methods:
        if word not in (*METHODS, EQUAL):
            raise InputError(f"method {word!r}{suggest(word, [*METHODS, EQUAL])}")


def seeds_of(regime: str, method: str) -> tuple[int, ...]:
    if regime == "habit" and method in TEN_SEEDS:
        return tuple(range(10))
    return (0, 1, 2) if method in OTHERS else REGIMES[regime].seeds


# ---- data


def training_rows(regime: str, expert: str = EXPERT) -> list[dict]:
    """The training problems of a regime, demonstrated by one of its experts."""
    if regime == "scarce":
        return make_splits(demonstrated=TRAIN_PROBLEMS)["train"]
    rows = make_splits(expert)["train"]
    return [row for row in rows if row["problem"].count(";") == 6] if regime == "silent" else rows


def test_rows() -> list[dict]:
    """The study's own test problems."""
    return make_splits(fresh_seed=FRESH_TEST_SEED)["fresh"]


# ---- settings


def train_settings(regime: str, method: str, settings: Settings) -> dict[str, Any]:
    """Fields of support.config.Config for a run with these settings, beside its data, folder and seed."""
    given = {name: value for name, value in settings.items() if name not in ("demonstrations", "expert")}
    share = settings["demonstrations"] / max(REGIMES[regime].demonstrations)  # of those in training_rows
    return given | {"method": "sft-rft" if method == EQUAL else method, "demonstration_fraction": share}


def common(regime: str, demonstrations: int | None = None, expert: str = EXPERT) -> Settings:
    """What all runs of a regime have, whatever was tuned."""
    chosen = REGIMES[regime]
    found = {"demonstrations": demonstrations or max(chosen.demonstrations), "steps": chosen.steps}
    return found if expert == EXPERT else found | {"expert": expert}


def trial_score(line: Line) -> float:
    """What a choice looks at; 0 for a trial that diverged."""
    scores = line["scores"].get("validation", {})
    return (scores["greedy"] + scores["sampled"]) / 2 if scores else 0.0


def rate_name(method: str) -> str:
    return "sft_lr" if "rl" not in METHODS[method].stages else "lr"


def second_setting(method: str) -> str:
    """The setting, beside the rate, that a method tunes; "" for none."""
    if method in ("sft", "sft-rft"):
        return "sft_steps"
    if method == "relift":
        return "relift_lr"
    return "coefficient" if METHODS[method].coefficient is not None else ""


def stem_of(method: str) -> str:
    """The method whose trials give this one its settings: the ablations keep those of prefix-rft."""
    return "prefix-rft" if method in ABLATIONS else "sft-rft" if method == EQUAL else method


def supervised_stage(method: str) -> str:
    """The method whose chosen rate the supervised stage of this one takes; "" for none."""
    return method.removesuffix("-rft") if METHODS[method].stages == ("sft", "rl") else ""


def default_of(method: str, name: str) -> float:
    """Of a setting that is tuned."""
    value = METHODS[method].coefficient if name == "coefficient" else getattr(Config, name)
    return float(f"{value:.4g}") if isinstance(value, float) else value


def grid(method: str, name: str) -> list[float]:
    """The three values of a setting that are tried at first, in rising order."""
    default = default_of(method, name)
    if name == "sft_steps":
        return [default // 4, default // 2, default]
    factors = (1 / 9, 1 / 3, 1) if only_down(method, name) else (1 / 3, 1, 3)
    if name == rate_name(method):
        factors = (0.5, 1, 2)
    return [float(f"{factor * default:.3g}") for factor in factors]


def only_down(method: str, name: str) -> bool:
    """Whether no value above the default is tried: more supervised steps cost more, and chord-mu has c < 1."""
    return name == "sft_steps" or (method == "chord-mu" and name == "coefficient")


def extension(method: str, name: str, values: Sequence[float], best: float) -> float | None:
    """The value beyond the edge of a grid at which the best one lies; None where it lies inside."""
    if best == values[0]:
        return values[0] // 2 if name == "sft_steps" else float(f"{values[0] ** 2 / values[1]:.3g}")
    if best == values[-1] and not only_down(method, name):
        return float(f"{values[-1] ** 2 / values[-2]:.3g}")
    return None


def best_of(method: str, trials: Sequence[Line]) -> Settings:
    """The settings of the highest score; of equals those with the smaller values."""
    order = (rate_name(method), second_setting(method))

    def rank(line: Line) -> tuple:
        values = [line["settings"].get(name, default_of(method, name)) if name else 0 for name in order]
        return -trial_score(line), *values

    return min(trials, key=rank)["settings"]


def next_trials(method: str, base: Settings, trials: Sequence[Line]) -> list[Settings]:
    """Settings that the protocol tries next, given the stored trials of the method (those that start from `base`);
    [] when it is done: first the rate, extended once at an edge, then likewise the second setting."""
    found = [line for line in trials if base.items() <= line["settings"].items()]
    fixed = base
    for name in (rate_name(method), second_setting(method)):
        if not name:
            continue
        tried = {value_of(method, name, line): line for line in found if is_variant(method, fixed, name, line)}
        values = grid(method, name)
        if missing := [value for value in values if value not in tried]:
            return [with_value(method, fixed, name, value) for value in missing]
        best = min(values, key=lambda value: (-trial_score(tried[value]), value))
        beyond = extension(method, name, values, best)
        if beyond is not None and beyond not in tried:
            return [with_value(method, fixed, name, beyond)]
        best = min(tried, key=lambda value: (-trial_score(tried[value]), value))
        fixed = with_value(method, fixed, name, best)
    return []


def with_value(method: str, fixed: Settings, name: str, value: float) -> Settings:
    """`fixed` with another value of a setting; the second setting is not written where it has its default."""
    if name != rate_name(method) and value == default_of(method, name):
        return fixed
    return fixed | {name: value}


def value_of(method: str, name: str, line: Line) -> float:
    return line["settings"].get(name, default_of(method, name))


def is_variant(method: str, fixed: Settings, name: str, line: Line) -> bool:
    """Whether the settings of a trial are `fixed` but for the value of `name`."""
    return with_value(method, fixed, name, value_of(method, name, line)) == line["settings"]


# ---- what the trials choose


def trials_of(method: str, lines: Sequence[Line]) -> list[Line]:
    return [line for line in lines if line["trial"] and line["method"] == method]


def tuning_base(regime: str, method: str, lines: Sequence[Line]) -> Settings:
    """What all trials of a method have; InputError where the trials of its supervised stage are missing."""
    base = common(regime)
    if stage := supervised_stage(method):
        base["sft_lr"] = chosen(regime, stage, lines)["sft_lr"]
    return base


def chosen(regime: str, method: str, lines: Sequence[Line]) -> Settings:
    """The settings that the trials among `lines`, those of the regime, choose for a method; InputError where they
    are not complete."""
    base = tuning_base(regime, method, lines)
    trials = trials_of(method, lines)
    if next_trials(method, base, trials):
        raise InputError(
            f"{method} is not tuned in regime {regime}: first run  python results/study.py tune --regime "
            f"{regime} --methods {method}"
        )
    return best_of(method, [line for line in trials if base.items() <= line["settings"].items()])


def equal_steps(regime: str, lines: Sequence[Line]) -> int:
    """Steps of reinforcement after which sft-rft has sampled and trained as many tokens as rft and prefix-rft have in
    the mean of their runs (of the regime's own seeds); InputError where there are no such runs."""
    own = [line for line in lines if not line["trial"] and line["seed"] in REGIMES[regime].seeds]
    runs = {name: [line for line in own if line["method"] == name] for name in MAIN[:3]}
    if missing := [name for name, found in runs.items() if not found]:
        raise InputError(f"{EQUAL} needs stored runs of {', '.join(missing)} in its regime: run those first")
    aims = [line["curve"]["tokens"][-1] for name in ("rft", "prefix-rft") for line in runs[name]]
    aim, reached = sum(aims) / len(aims), []
    for line in runs["sft-rft"]:
        steps, tokens = [0, *line["curve"]["step"]], [0, *line["curve"]["tokens"]]
        after = next((i for i, value in enumerate(tokens) if value >= aim), len(tokens) - 1)
        share = min(1.0, (aim - tokens[after - 1]) / (tokens[after] - tokens[after - 1]))
        reached.append(steps[after - 1] + share * (steps[after] - steps[after - 1]))
    settings = runs["sft-rft"][0]["settings"]
    return max(1, round(sum(reached) / len(reached)) - settings.get("sft_steps", Config.sft_steps))


def run_settings(regime: str, method: str, lines: Sequence[Line], tuning: Sequence[Line]) -> list[Settings]:
    """The settings of a method's runs: for each number of demonstrations and each expert. `lines`: what is stored of
    its regime, `tuning`: of the one it was tuned in."""
    tuned = chosen(REGIMES[regime].tuned_in, stem_of(method), tuning)
    if method == EQUAL:
        return [tuned | common(regime) | {"steps": equal_steps(regime, lines)}]
    asked = product(REGIMES[regime].demonstrations, REGIMES[regime].experts)
    return [tuned | common(regime, number, expert) for number, expert in asked]
