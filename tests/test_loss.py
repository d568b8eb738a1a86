"""loss.py against hand computations and autograd of each method's textbook objective."""

import math

import pytest
import torch

from loss import METHODS, advantages, entropy_clip, kept_tokens, ppo_weight, token_weights, weighted_loss

# ---- advantages


def by_hand(rewards, group, hybrid, baseline):
    """The table of loss.advantages with Python loops."""
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
    """7 on-policy rows of which 2 are right, and a hybrid row that is right."""
    rewards = torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 1])
    group, hybrid = torch.zeros(8, dtype=torch.long), torch.arange(8) == 7
    own, prefix = advantages(rewards, group, hybrid)
    assert own.tolist() == pytest.approx([5 / 7] * 2 + [-2 / 7] * 5 + [1.0])
    assert prefix[7].item() == pytest.approx(5 / 7)
    own, prefix = advantages(rewards, group, hybrid, "group")
    assert own.tolist() == pytest.approx([5 / 8] * 2 + [-3 / 8] * 5 + [5 / 8])
    assert prefix[7].item() == pytest.approx(5 / 8)


def test_equal_rewards_give_no_signal():
    """Rule 9: 0 everywhere, but a hybrid continuation keeps r_h under on_policy."""
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


# ---- entropy clip


@pytest.mark.parametrize("keep", [0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("n", [0, 1, 7, 10, 99])
def test_entropy_clip_keeps_the_highest(keep, n):
    generator = torch.Generator().manual_seed(n)
    mask = torch.zeros(20 * 10, dtype=torch.bool)
    mask[torch.randperm(200, generator=generator)[:n]] = True
    mask, entropy = mask.view(20, 10), torch.rand(20, 10, generator=generator)
    kept = entropy_clip(mask, entropy, keep)
    count = n - math.floor(n * (100 - round(100 * keep)) / 100)  # in whole numbers: no float of 1 - keep
    assert kept.sum() == count and not (kept & ~mask).any()
    if 0 < count < n:
        assert entropy[kept].min() >= entropy[mask & ~kept].max()
    low = entropy_clip(mask, entropy, keep, "low")
    assert low.sum() == count
    if 0 < count < n:
        assert entropy[low].max() <= entropy[mask & ~low].min()


def test_entropy_clip_breaks_ties_by_index():
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert entropy_clip(mask, torch.ones(2, 5), 0.3).flatten().nonzero().flatten().tolist() == [0, 1, 2]


def test_random_clip_draws_from_its_generator_only():
    mask, entropy = torch.ones(4, 25, dtype=torch.bool), torch.zeros(4, 25)
    draws = [entropy_clip(mask, entropy, 0.2, "random", torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any() and draws[0].sum() == 20


# ---- weights: the gradient of every method is that of its own paper's objective


def ppo_surrogate(ratio, advantage, low, high):
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


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
        assert 0.1 < ((weight == 0) & (advantage != 0)).float().mean() < 0.9  # the clip was at work, both ways


def test_an_infinite_ratio_gives_no_nan():
    weight = ppo_weight(torch.tensor([[200.0]]), torch.tensor([[-200.0]]), torch.tensor([[0.0]]), 0.2, 0.2)
    assert weight.item() == 0


class Group:
    """Random rows of unequal length: four problems of six rows, the last row of each guided (in SFT: every row)."""

    def __init__(self, name: str, moved: bool, seed: int = 0):
        torch.manual_seed(seed)
        self.B, self.R, self.V = 24, 12, 7
        self.logits = torch.randn(self.B, self.R, self.V, requires_grad=True)
        self.ids = torch.randint(0, self.V, (self.B, self.R))
        lengths = torch.randint(4, self.R + 1, (self.B,))
        column = torch.arange(self.R)
        self.mask = column < lengths[:, None]
        self.group = torch.arange(4).repeat_interleave(6)
        guided = (torch.arange(self.B) % 6 == 5) | (name == "sft")
        prefix = {
            "on_policy": torch.zeros(self.B, dtype=torch.long),
            "hybrid": torch.where(guided, lengths - 2, 0),
            "demonstration": torch.where(guided, lengths, 0),
            "shared_prefix": torch.full((self.B,), 2),
        }[METHODS[name].rows]
        self.prefix_mask = column < prefix[:, None]
        self.hybrid = prefix > 0
        self.rewards = torch.randint(0, 2, (self.B,)).float()
        self.log_probs = self.logits.log_softmax(-1).gather(-1, self.ids[..., None]).squeeze(-1)
        probs = self.logits.detach().softmax(-1)
        self.entropy = -(probs * probs.log()).sum(-1)
        shift = 0.4 * torch.randn(self.B, self.R) if moved else 0.0
        self.old = self.log_probs.detach() + shift
        self.Z = self.B * self.R

    def ours(self, name: str, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The gradient by token_weights and weighted_loss, on `rows` or all."""
        method = METHODS[name]
        rows = torch.arange(self.B) if rows is None else rows
        own, forced = advantages(self.rewards, self.group, self.hybrid, method.baseline or "on_policy")
        generator = torch.Generator().manual_seed(3)
        kept = kept_tokens(method, self.mask, self.prefix_mask, self.entropy, 0.2, generator)
        tokens = int(self.prefix_mask.sum())
        z = tokens if name == "sft" else self.Z
        weights = token_weights(
            method,
            self.log_probs.detach()[rows],
            self.old[rows],
            own[rows],
            forced[rows],
            self.prefix_mask[rows],
            kept[rows],
            0.2,
            0.2,
            z / max(1, tokens),
        )
        loss = weighted_loss(self.log_probs[rows], weights, self.mask[rows], z)
        return torch.autograd.grad(loss, self.logits, retain_graph=True)[0]


def top_entropy(mask, entropy, share):
    """The highest entropies of `mask`, by sorting Python tuples."""
    places = sorted((-entropy[i, t].item(), i, t) for i, t in mask.nonzero().tolist())
    kept = torch.zeros_like(mask)
    for _, i, t in places[: len(places) - math.floor((1 - share) * len(places))]:
        kept[i, t] = True
    return kept


def textbook(name: str, g: Group) -> torch.Tensor:
    """-objective of each method's paper, written out with what autograd can differentiate."""
    ratio = (g.log_probs - g.old).exp()
    policy, prefix = g.mask & ~g.prefix_mask, g.prefix_mask
    baseline = "group" if name in ("luffy", "uft") else "on_policy"
    own, forced = (
        torch.tensor(a)[:, None] for a in by_hand(*map(torch.Tensor.tolist, (g.rewards, g.group, g.hybrid)), baseline)
    )
    on_policy = (ppo_surrogate(ratio, own, 0.2, 0.2) * policy).sum() / g.Z
    guided = ppo_surrogate(ratio, forced, 0.2, 0.2)
    if name == "sft":  # token-mean cross-entropy of the demonstrations
        rows = g.hybrid
        return torch.nn.functional.cross_entropy(g.logits[rows][g.mask[rows]], g.ids[rows][g.mask[rows]])
    if name in ("rft", "relift", "sft-rft", "prefix-rft-frozen"):
        return -on_policy
    if name == "rft-entropy-clip":
        return -(ppo_surrogate(ratio, own, 0.2, 0.2) * top_entropy(g.mask, g.entropy, 0.2)).sum() / g.Z
    if name == "rft+sft":
        return -on_policy - g.log_probs[prefix].mean()
    if name == "luffy":  # ratio without clip; f(pi) with f(p) = p / (p + 0.1) on the demonstration
        shaped = g.log_probs.exp() / (g.log_probs.exp() + 0.1)
        return -((ratio * own * policy).sum() + (shaped * forced * prefix).sum()) / g.Z
    if name == "uft":
        return -on_policy - 0.001 * g.log_probs[prefix].mean()
    if name == "prefix-rft-static":
        return -on_policy - 0.001 * g.log_probs[prefix].sum() / g.Z
    kept = {
        "prefix-rft-all": lambda: prefix,
        "prefix-rft-low": lambda: top_entropy(prefix, -g.entropy, 0.2),
        "prefix-rft-random": lambda: entropy_clip(prefix, g.entropy, 0.2, "random", torch.Generator().manual_seed(3)),
    }.get(name, lambda: top_entropy(prefix, g.entropy, 0.2))()
    return -on_policy - (guided * kept).sum() / g.Z


@pytest.mark.parametrize("moved", [False, True], ids=["before an update", "after an update"])
@pytest.mark.parametrize("name", METHODS)
def test_gradient_equals_the_textbook_objective(name, moved):
    for seed in range(3):
        g = Group(name, moved, seed)
        want = torch.autograd.grad(textbook(name, g), g.logits, retain_graph=True)[0]
        assert want.abs().max() > 0
        torch.testing.assert_close(g.ours(name), want, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_sum_over_micro_batches_is_the_whole_gradient(name):
    g = Group(name, moved=True)
    parts = sum(
        g.ours(name, rows) for rows in torch.randperm(g.B, generator=torch.Generator().manual_seed(0)).split(5)
    )
    # kept tokens and denominators are those of the mini-batch, as in step.update
    torch.testing.assert_close(parts, g.ours(name), rtol=1e-4, atol=1e-7)


def test_every_method_is_another_objective():
    """No two entries of the table give the same gradient on rows of their own kind, but for named twins."""
    twins = {frozenset(p) for p in (("rft", "relift"), ("rft", "sft-rft"), ("relift", "sft-rft"))}
    same_weights = {"prefix-rft", "prefix-rft-uniform", "prefix-rft-constant"}  # they differ in the prefix length
    grads = {}
    for name, method in METHODS.items():
        grads[name] = (method.rows, Group(name, moved=True).ours(name))
    for a in grads:
        for b in grads:
            if a < b and grads[a][0] == grads[b][0] and frozenset((a, b)) not in twins and not {a, b} <= same_weights:
                assert not torch.allclose(grads[a][1], grads[b][1]), (a, b)
