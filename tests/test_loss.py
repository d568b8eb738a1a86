"""These tests compare loss.py with hand computations, and with autograd of each method's textbook objective."""

import dataclasses
import math
from fractions import Fraction

import pytest
import torch

from loss import (
    Tokens,
    advantages,
    entropy_clip,
    ppo_surrogate,
    ppo_weight,
    token_weights,
    weighted_loss,
    weighted_tokens,
)
from methods import METHODS, coefficient_at

# ---- advantages


def by_hand(rewards, group, hybrid, baseline):
    """Returns what loss.advantages should return, computed with Python loops."""
    own, prefix = [], []
    for r, g, h in zip(rewards, group, hybrid):
        everybody = [x for x, k in zip(rewards, group) if k == g]
        on_policy = [x for x, k, y in zip(rewards, group, hybrid) if k == g and not y]
        rows = on_policy if baseline == "on_policy" else everybody
        centred = r - (sum(rows) / len(rows) if rows else 0.0)
        own.append(r if h and baseline == "on_policy" else centred)
        prefix.append(centred)
    return own, prefix


@pytest.mark.parametrize("baseline", ["on_policy", "group"])
def test_advantages_equal_the_hand_computation(baseline):
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(6).repeat_interleave(8)[torch.randperm(48, generator=generator)]
    rewards = torch.randint(0, 2, (48,), generator=generator).float()
    hybrid = torch.rand(48, generator=generator) < 0.2
    own, prefix = advantages(rewards, group, hybrid, baseline)
    want_own, want_prefix = by_hand(rewards.tolist(), group.tolist(), hybrid.tolist(), baseline)
    torch.testing.assert_close(own, torch.tensor(want_own))
    torch.testing.assert_close(prefix, torch.tensor(want_prefix))


def test_advantages_of_the_drawing():
    """In a group as drawn in loss.py, 2 of the 7 on-policy rows and the hybrid row are right. The expected advantages
    are computed by hand."""
    rewards = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 1])
    group, hybrid = torch.zeros(8, dtype=torch.long), torch.arange(8) == 7
    own, prefix = advantages(rewards, group, hybrid)
    assert own.tolist() == pytest.approx([5 / 7] * 2 + [-2 / 7] * 5 + [1.0])
    assert prefix[7].item() == pytest.approx(5 / 7)
    own, prefix = advantages(rewards, group, hybrid, "group")
    assert own.tolist() == pytest.approx([5 / 8] * 2 + [-3 / 8] * 5 + [5 / 8])
    assert prefix[7].item() == pytest.approx(5 / 8)


def test_equal_rewards_give_no_signal():
    """If all rewards of a group are equal, all advantages are 0, but with the baseline `on_policy` a hybrid
    continuation keeps its reward r_h."""
    group, hybrid = torch.zeros(4, dtype=torch.long), torch.tensor([False, False, False, True])
    for reward in (0.0, 1.0):
        own, prefix = advantages(torch.full((4,), reward), group, hybrid)
        assert own.tolist() == [0, 0, 0, reward] and prefix.tolist() == [0, 0, 0, 0]
        own, prefix = advantages(torch.full((4,), reward), group, hybrid, "group")
        assert own.tolist() == prefix.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("baseline", ["on_policy", "group"])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("is_hybrid", [False, True])
def test_a_group_of_one_is_finite(baseline, scale, is_hybrid):
    own, prefix = advantages(
        torch.ones(1), torch.zeros(1, dtype=torch.long), torch.tensor([is_hybrid]), baseline, scale
    )
    assert own.item() == (1.0 if is_hybrid and baseline == "on_policy" else 0.0)
    assert prefix.item() == (1.0 if is_hybrid and baseline == "on_policy" else 0.0)


def test_scaling_divides_by_the_unbiased_deviation():
    rewards = torch.tensor([1.0, 0, 0, 0, 1, 1])
    own, _ = advantages(
        rewards, torch.zeros(6, dtype=torch.long), torch.zeros(6, dtype=torch.bool), scale_by_std=True
    )
    torch.testing.assert_close(own, (rewards - rewards.mean()) / (rewards.std() + 1e-6))


@pytest.mark.parametrize("common", [0.0, 0.1, 1.0])
def test_a_deviation_that_is_only_rounding_divides_nothing(common):
    """In floats the mean of seven rewards of 0.1 is not 0.1. Still the on-policy rows get the advantage 0, and the
    prefix gets r_h - 0.1."""
    rewards, group, hybrid = (
        torch.tensor([common] * 7 + [1.0]),
        torch.zeros(8, dtype=torch.long),
        torch.arange(8) == 7,
    )
    own, prefix = advantages(rewards, group, hybrid, scale_by_std=True)
    assert own.tolist() == [0.0] * 7 + [1.0]
    assert prefix[7].item() == pytest.approx(1 - common)
    equal, _ = advantages(torch.full((8,), common), group, hybrid, "group", scale_by_std=True)
    assert equal.tolist() == [0.0] * 8


# ---- entropy clip


def test_of_ten_entropies_the_two_highest_keep_their_weight():
    """The entropy clip with the paper's share of 20% keeps two of ten tokens."""
    entropy = torch.tensor([[0.1, 0.0, 0.3, 2.0, 0.2, 0.1, 0.4, 1.5, 0.0, 0.9]])
    kept = entropy_clip(torch.ones(1, 10, dtype=torch.bool), entropy, keep=0.2)
    assert kept.nonzero()[:, 1].tolist() == [3, 7]


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("n", [0, 1, 7, 10, 99])
def test_entropy_clip_keeps_the_highest(keep, n):
    generator = torch.Generator().manual_seed(n)
    mask = torch.zeros(20 * 10, dtype=torch.bool)
    mask[torch.randperm(200, generator=generator)[:n]] = True
    mask, entropy = mask.view(20, 10), torch.rand(20, 10, generator=generator)
    kept = entropy_clip(mask, entropy, keep)
    # the expected number of kept tokens is computed in whole percent, because 1 - keep is not exact in floats
    count = n - math.floor(n * (100 - round(100 * keep)) / 100)
    assert kept.sum() == count and not (kept & ~mask).any()
    if 0 < count < n:
        assert entropy[kept].min() >= entropy[mask & ~kept].max()
    low = entropy_clip(mask, entropy, keep, "low")
    assert low.sum() == count
    if 0 < count < n:
        assert entropy[low].max() <= entropy[mask & ~low].min()


def test_entropy_clip_breaks_ties_by_index():
    mask = torch.ones(20, 50, dtype=torch.bool)  # an unstable sort would reorder 1000 equal entropies
    for select in ("high", "low"):
        kept = entropy_clip(mask, torch.ones(20, 50), 0.3, select)
        assert kept.flatten().nonzero().flatten().tolist() == list(range(300))


def test_random_clip_draws_from_its_generator_only():
    mask, entropy = torch.ones(4, 25, dtype=torch.bool), torch.zeros(4, 25)
    draws = [entropy_clip(mask, entropy, 0.2, "random", torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any() and draws[0].sum() == 20


@pytest.mark.parametrize("name", ["prefix-rft", "prefix-rft-low", "rft-entropy-clip", "rft"])
def test_padding_never_has_a_weight(name):
    """Only response tokens keep a weight, even if padding has the highest entropy."""
    response = torch.arange(6) < torch.tensor([[6], [3], [4]])
    prefix = torch.arange(6) < torch.tensor([[2], [0], [1]])
    entropy = torch.where(response, 1.0, 9.0)
    left = weighted_tokens(METHODS[name], response, prefix, entropy, 0.2)
    assert left.any() and not (left & ~response).any()


# ---- weights: the gradient of every method is that of its own paper's objective


def test_the_surrogate_is_clipped_where_the_textbook_clips_it():
    """With the ratio r, the advantage A and the clip range 0.2, PPO's surrogate is r A, but at most 1.2 A for A > 0,
    and at most 0.8 A for A < 0."""
    ratio = torch.tensor([0.5, 1.0, 1.2, 2.0])
    assert ppo_surrogate(ratio, torch.tensor(1.0), 0.2, 0.2).tolist() == pytest.approx([0.5, 1.0, 1.2, 1.2])
    assert ppo_surrogate(ratio, torch.tensor(-1.0), 0.2, 0.2).tolist() == pytest.approx([-0.8, -1.0, -1.2, -2.0])


@pytest.mark.parametrize("moved", [False, True])
def test_ppo_weight_is_the_gradient_of_the_surrogate(moved):
    torch.manual_seed(0)
    old = torch.randn(50, 40) - 2
    log_probs = (old + (0.5 * torch.randn(50, 40) if moved else 0)).requires_grad_()
    advantage = torch.randn(50, 40) * (torch.rand(50, 40) < 0.8)
    ppo_surrogate((log_probs - old).exp(), advantage, 0.2, 0.3).sum().backward()
    weight = ppo_weight(log_probs, old, advantage, 0.2, 0.3)
    torch.testing.assert_close(weight, log_probs.grad)
    if moved:
        # PPO's clip has made some weights 0, but not all
        assert 0.1 < ((weight == 0) & (advantage != 0)).float().mean() < 0.9


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_clip_keeps_its_own_bound(advantage):
    """If PPO's clip range is 0, a token with the ratio 1 is on both bounds of the range and keeps its weight. No
    gradient flows through the weight."""
    log_probs = torch.zeros(1, 1, requires_grad=True)
    weight = ppo_weight(log_probs, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.0, 0.0)
    assert weight.item() == advantage and not weight.requires_grad


def test_an_infinite_ratio_gives_no_nan():
    weight = ppo_weight(torch.tensor([[200.0]]), torch.tensor([[-200.0]]), torch.tensor([[0.0]]), 0.2, 0.2)
    assert weight.item() == 0


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.hinted])
def test_an_infinite_ratio_weighs_nothing_where_the_advantage_is_zero(name):
    g = Group(name, moved=False)
    g.advantage = (torch.zeros(g.B, dtype=torch.float64),) * 2
    want = g.ours()
    g.old = g.old - 800
    assert (g.log_probs - g.old).exp().isinf().all()
    assert want.isfinite().all() and torch.equal(g.ours(), want)


class Group:
    """A random mini-batch of a method: four problems with six rows of unequal length each. Usually the last row of a
    problem has demonstration tokens. With a shared prefix, and in batches of demonstrations, every row has
    demonstration tokens. If a method gives demonstrations to unsolved groups, all rows of the first problem, which is
    unsolved, have demonstration tokens."""

    def __init__(self, name: str, moved: bool, seed: int = 0):
        torch.manual_seed(seed)
        self.method = METHODS[name]
        self.B, self.R, self.V = 24, 12, 7
        self.logits = torch.randn(self.B, self.R, self.V, dtype=torch.float64, requires_grad=True)
        self.ids = torch.randint(0, self.V, (self.B, self.R))
        lengths = torch.randint(4, self.R + 1, (self.B,))
        column = torch.arange(self.R)
        self.mask = column < lengths[:, None]
        self.group = torch.arange(4).repeat_interleave(6)
        self.supervised = self.method.stages[0] == "sft"
        last, first_group = torch.arange(self.B) % 6 == 5, self.group == 0
        prefix = {
            "on_policy": torch.zeros(self.B, dtype=torch.long),
            "hybrid": torch.where(last, lengths - 2, 0),
            "demonstration": torch.where(last, lengths, 0),
            "shared_prefix": torch.full((self.B,), 2),
        }[self.method.rows]
        if self.supervised:
            prefix = lengths
        elif self.method.unsolved in ("replace", "rescue"):
            prefix = torch.where(first_group, lengths if self.method.unsolved == "replace" else 2, 0)
        self.prefix_mask = column < prefix[:, None]
        self.hybrid = prefix > 0
        self.rewards = torch.randint(0, 3, (self.B,)).double() / 2
        self.log_probs = self.logits.log_softmax(-1).gather(-1, self.ids[..., None]).squeeze(-1)
        probs = self.logits.detach().softmax(-1)
        self.entropy = -(probs * probs.log()).sum(-1)
        shift = 0.4 * torch.randn(self.B, self.R) if moved else 0.0
        self.old = self.log_probs.detach() + shift
        hinted = self.log_probs.detach() + torch.randn(self.B, self.R)
        # SDFT's teacher is the model with a demonstration in its prompt; the first problem has no demonstration, so
        # its teacher log-probs are NaN
        self.hinted = torch.where(first_group[:, None], math.nan, hinted)
        self.T_d = int(self.prefix_mask.sum())
        self.T_own = int(self.mask.sum()) - self.T_d
        self.Z = float(self.T_d if self.supervised else self.B * self.R)
        baseline = self.method.baseline or "on_policy"
        self.advantage = advantages(self.rewards, self.group, self.hybrid, baseline, bool(self.method.scale_by_std))

    def ours(self, rows: torch.Tensor | None = None, coefficient: float | None = None) -> torch.Tensor:
        """Returns the gradient that token_weights and weighted_loss give on `rows` (None: all rows) at the start of a
        run."""
        rows = torch.arange(self.B) if rows is None else rows
        generator = torch.Generator().manual_seed(3)
        tokens = Tokens(
            log_probs=self.log_probs.detach(),
            old_log_probs=self.old,
            entropy=self.entropy,
            response_mask=self.mask,
            prefix_mask=self.prefix_mask,
            weight_mask=weighted_tokens(self.method, self.mask, self.prefix_mask, self.entropy, 0.2, generator),
            advantages=torch.where(self.prefix_mask, self.advantage[1][:, None], self.advantage[0][:, None]),
            rewards=self.rewards,
            clip_low=0.2,
            clip_high=0.2,
            coefficient=coefficient_at(self.method, 0.0, coefficient),
            policy_tokens=self.T_own,
            demonstration_tokens=self.T_d,
            normalizer=self.Z,
            max_response_tokens=self.R,
            hinted_log_probs=self.hinted,
        ).at(rows, self.log_probs[rows], self.entropy[rows])
        loss = weighted_loss(self.log_probs[rows], token_weights(self.method, tokens), self.mask[rows], self.Z)
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0]


def top_entropy(mask, entropy, share):
    """Returns the mask of the `share` of tokens in `mask` with the highest entropy, by sorting Python tuples."""
    places = sorted((-entropy[i, t].item(), i, t) for i, t in mask.nonzero().tolist())
    kept = torch.zeros_like(mask)
    for _, i, t in places[: len(places) - math.floor((1 - share) * len(places))]:
        kept[i, t] = True
    return kept


def cross_entropy(g: Group, weight=1.0):
    """Returns weight * -log p of each demonstration token, from the logits; one number per token."""
    mask = g.prefix_mask
    nll = torch.nn.functional.cross_entropy(g.logits[mask], g.ids[mask], reduction="none")
    return nll * (weight[mask] if isinstance(weight, torch.Tensor) else weight)


def textbook(name: str, g: Group, coefficient: float | None = None) -> torch.Tensor:
    """Returns the loss of method `name` as its source states it, written out in terms that autograd can
    differentiate.

    `coefficient` takes the place of the source's coefficient, where the source has one as a setting."""

    def c(of_the_source: float) -> float:
        return of_the_source if coefficient is None else coefficient

    ratio, p = (g.log_probs - g.old).exp(), g.log_probs.exp()
    policy, prefix = g.mask & ~g.prefix_mask, g.prefix_mask
    group_baseline = name in ("luffy", "uft", "srft", "rescue", "prefix-rft-trust", "dr-po")
    own, inputs = (
        torch.tensor(a, dtype=torch.float64)[:, None]
        for a in by_hand(
            *map(torch.Tensor.tolist, (g.rewards, g.group, g.hybrid)), "group" if group_baseline else "on_policy"
        )
    )
    # UFT and CHORD divide advantages by the standard deviation of the baseline's rewards
    if name in ("uft", "chord-mu", "chord-phi"):
        for k in range(4):
            members = (g.group == k) & (torch.ones_like(g.hybrid) if group_baseline else ~g.hybrid)
            std = g.rewards[members].std()
            own = torch.where((members & (std > 0))[:, None], own / (std + 1e-6), own)
    surrogate, plain = ppo_surrogate(ratio, own, 0.2, 0.2), ratio * own
    clipped_rl, plain_rl = -(surrogate * policy).sum(), -(plain * policy).sum()
    of_prefix = ppo_surrogate(ratio, inputs, 0.2, 0.2)
    # SRFT weighs each row by the row's mean entropy
    entropy = (g.entropy * g.mask).sum(1, keepdim=True) / g.mask.sum(1, keepdim=True)
    q = p.detach()
    # `shown` marks the tokens whose problem has a demonstration for SDFT's teacher
    L, shown = g.R, g.mask & (g.group != 0)[:, None]
    kept = {
        "prefix-rft-all": lambda: prefix,
        "prefix-rft-low": lambda: top_entropy(prefix, -g.entropy, 0.2),
        "prefix-rft-random": lambda: entropy_clip(prefix, g.entropy, 0.2, "random", torch.Generator().manual_seed(3)),
        "prefix-rft-frozen": lambda: torch.zeros_like(prefix),
    }.get(name, lambda: top_entropy(prefix, g.entropy, 0.2))
    ends = ("", "-frozen", "-all", "-low", "-random", "-uniform", "-constant")
    of_the_paper = tuple(f"prefix-rft{end}" for end in ends)
    losses = {
        ("sft", "sft-rft"): lambda: cross_entropy(g).mean(),
        ("dft", "dft-rft"): lambda: cross_entropy(g, q).mean(),
        ("rft",): lambda: clipped_rl / g.Z,
        ("relift",): lambda: plain_rl / g.Z,
        ("rescue", "dr-po"): lambda: clipped_rl / g.Z,
        ("rft-entropy-clip",): lambda: -(surrogate * top_entropy(g.mask, g.entropy, 0.2)).sum() / g.Z,
        # LUFFY's script divides the RL term, a sum over all tokens, by the maximum length L only, and multiplies the
        # token mean of the SFT term by its coefficient c times the number of rows. So the script's gradient is that
        # of loss.py times the number of rows.
        ("rft+sft",): lambda: (plain_rl / L + c(0.1) * g.B * cross_entropy(g).mean()) / g.B,
        ("luffy",): lambda: -((plain * policy).sum() + (p / (p + c(0.1)) * inputs * prefix).sum()) / g.Z,
        # both terms of UFT's loss are token means; the common factor T_own / Z (T_own: number of policy tokens) only
        # scales the step
        ("uft",): lambda: (clipped_rl / g.T_own + c(0.001) * cross_entropy(g).mean()) * g.T_own / g.Z,
        ("chord-mu",): lambda: (
            ((1 - c(0.6)) * clipped_rl / g.T_own + c(0.6) * cross_entropy(g).mean()) * g.T_own / g.Z
        ),
        ("chord-phi",): lambda: (
            ((1 - c(0.1)) * clipped_rl / g.T_own + c(0.1) * cross_entropy(g, q * (1 - q)).mean()) * g.T_own / g.Z
        ),
        # HPT's RL term is a sum over tokens divided by the maximum length L; each demonstration that replaces a group
        # adds its token mean
        ("hpt",): lambda: (
            (
                plain_rl / L
                - c(1.0)
                * sum(
                    (g.log_probs[i] * prefix[i]).sum() / prefix[i].sum()
                    for i in g.hybrid.nonzero().flatten().tolist()
                )
            )
            / g.B
        ),
        ("srft",): lambda: (
            (
                -(torch.where(g.rewards[:, None] == 1, 0.1 * entropy.exp(), -1.0) * g.log_probs * policy).sum() / L
                # the setting `coefficient` does not change SRFT's constant 0.1 in p / (p + 0.1)
                - (p / (p + 0.1) * inputs * prefix).sum() / L
                + c(0.1) * g.B * cross_entropy(g, (0.5 * (-entropy).exp()).expand_as(q)).mean()
            )
            / g.B
        ),
        # over sampled tokens, half the squared difference of policy and teacher log-probs has the gradient of SDFT's
        # KL divergence
        ("sdft",): lambda: (ratio.detach()[shown] * (g.log_probs[shown] - g.hinted[shown]).square() / 2).sum() / g.Z,
        ("prefix-rft-trust",): lambda: (plain_rl - ((p / q.clamp(min=0.1)) * prefix).sum()) / g.Z,
        ("prefix-rft-static",): lambda: (clipped_rl - c(0.001) * (g.log_probs * prefix).sum()) / g.Z,
        of_the_paper: lambda: (clipped_rl - (of_prefix * kept()).sum()) / g.Z,
    }
    result = [loss for names, loss in losses.items() if name in names]
    if not result:
        pytest.skip(f"the loss of {name} as its source states it is not written here yet: add it to `losses`")
    return result[0]()


@pytest.mark.parametrize("moved", [False, True], ids=["before an update", "after an update"])
@pytest.mark.parametrize("name", METHODS)
def test_gradient_equals_the_textbook_objective(name, moved):
    for seed in range(3):
        g = Group(name, moved, seed)
        want = torch.autograd.grad(textbook(name, g), g.logits, retain_graph=True)[0]
        assert want.abs().max() > 0
        # a gradient sums some hundred terms, and float64 rounds each by about 1e-16
        torch.testing.assert_close(g.ours(), want, rtol=1e-9, atol=1e-12)


def test_sdft_is_the_gradient_of_the_divergence_in_the_mean_over_tokens():
    """Averaged over the tokens that can be sampled at a position, SDFT's gradient is the gradient of the KL
    divergence between model and teacher, before and after an update."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    log_p, hinted, old = logits.log_softmax(0), *torch.randn(2, 7, dtype=torch.float64).log_softmax(1)
    want = torch.autograd.grad((log_p.exp() * (log_p - hinted)).sum(), logits, retain_graph=True)[0]
    for sampled in (log_p.detach(), old):
        t = Tokens(log_p, sampled, *[log_p.exp()] * 6, 0.2, 0.2, 1.0, 7, 0, 1.0, 1, hinted)
        weights = METHODS["sdft"].policy_weight(t).detach()
        result = torch.autograd.grad(-(sampled.exp() * weights * log_p).sum(), logits, retain_graph=True)[0]
        torch.testing.assert_close(result, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_sum_over_micro_batches_is_the_whole_gradient(name):
    g = Group(name, moved=True)
    chunks = torch.randperm(g.B, generator=torch.Generator().manual_seed(0)).split(5)
    # micro-batches take the entropy clip and the token counts from the mini-batch
    parts = sum(g.ours(rows) for rows in chunks)
    torch.testing.assert_close(parts, g.ours(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.coefficient is not None])
def test_the_coefficient_setting_takes_the_place_of_the_methods_own(name):
    g, own = Group(name, moved=True), METHODS[name].coefficient
    assert torch.equal(g.ours(), g.ours(coefficient=own))
    for c in (0.0, 0.3 * own):
        want = torch.autograd.grad(textbook(name, g, c), g.logits, retain_graph=True)[0]
        torch.testing.assert_close(g.ours(coefficient=c), want, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(g.ours(), want)


@pytest.mark.parametrize("c", [0.0, 1e-30, 0.1])
def test_the_shaped_weight_is_finite_where_a_probability_underflows(c):
    """LUFFY's weight f'(p) p is compared with exact fractions. Where p underflows to 0, the weight is 0."""
    log_p = torch.tensor([[-200.0, -100.0, -87.0, -60.0, -3.0, 0.0]])
    g = Tokens(*[log_p] * 3, *[log_p < 1] * 3, torch.ones(1, 6), torch.ones(1), 0.2, 0.2, c, 0, 6, 6.0, 6)
    p = [Fraction(value) for value in log_p.exp().flatten().tolist()]
    assert p[0] == 0 < p[1]  # p[0] underflows to 0, and p[1] is smaller than the smallest normal float
    want = [float(Fraction(c) * x / (x + Fraction(c)) ** 2) if x else 0.0 for x in p]
    assert token_weights(METHODS["luffy"], g)[0].tolist() == pytest.approx(want, rel=1e-5)


def test_a_coefficient_falls_along_half_a_cosine_in_the_first_fifth_of_a_run():
    method = METHODS["chord-mu"]
    result = [coefficient_at(method, progress, None) for progress in (0, 0.05, 0.1, 0.2, 0.3, 1)]
    assert result == pytest.approx([0.6, 0.6 * (1 + 0.5**0.5) / 2, 0.3, 0.0, 0.0, 0.0])
    assert coefficient_at(method, 0.0, 0.3) == 0.3 and coefficient_at(method, 1.0, 0.3) == 0.0
    ends_above = dataclasses.replace(method, coefficient_end=0.05)
    # a coefficient that begins below its end value does not change, because a coefficient never rises
    assert coefficient_at(ends_above, 0.0, 0.01) == coefficient_at(ends_above, 1.0, 0.01) == 0.01
    assert coefficient_at(METHODS["luffy"], 0.7, None) == 0.1 and coefficient_at(METHODS["rft"], 0.7, None) == 1.0


def test_every_method_is_another_objective():
    """No two methods of METHODS with equal rows, stages, schedule and handling of unsolved groups give the same
    gradient."""
    grads = {name: Group(name, moved=True).ours() for name in METHODS}
    for a in METHODS:
        for b in METHODS:
            one, other = METHODS[a], METHODS[b]
            alike = (one.rows, one.stages, one.schedule, one.unsolved) == (
                other.rows,
                other.stages,
                other.schedule,
                other.unsolved,
            )
            if a < b and alike:
                assert not torch.allclose(grads[a], grads[b]), (a, b)


def test_log_probs_outside_the_mask_do_not_reach_the_loss_even_if_they_are_infinite():
    log_probs = torch.tensor([[-1.0, -torch.inf]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss = weighted_loss(log_probs, torch.tensor([[2.0, 0.0]]), mask, normalizer=4)
    loss.backward()
    assert loss.item() == 0.5 and log_probs.grad.tolist() == [[-0.5, 0.0]]
