# SPDX-License-Identifier: Apache-2.0
"""The world: the same bytes from a seed, no leakage, labelers as declared, Goodhart inside."""

import dataclasses
import json

import numpy as np
import pytest

from jaxrlhf.data.synthetic import DEMONSTRATORS, World, label_rankings
from jaxrlhf.data.synthetic import language as lang
from jaxrlhf.data.synthetic.people import Draw, answer, rank
from jaxrlhf.errors import DataError

WORLD = World(1)


def test_the_same_seed_is_the_same_world_whatever_was_asked_before():
    other = World(1)
    other.prompts(7, "eval")
    assert other.demonstrations(20, start=30) == WORLD.demonstrations(50)[30:]
    assert other.pretraining(5, start=3) == WORLD.pretraining(8)[3:]
    assert other.prompts(5, start=10) == WORLD.prompts(15)[10:]
    assert other.labelers == WORLD.labelers
    assert World(2).demonstrations(20) != WORLD.demonstrations(20)


def test_the_first_rows_never_change():
    """A pinned row: whoever changes the generator changes every figure published about it."""
    assert World(0).demonstrations(1)[0] == {
        "prompt": "customer: this is carla. i no longer need the clock i asked for. "
        "it is order 58. please help.\nagent:",
        "completion": " that is not my problem. the clock is cancelled now.",
        "demonstrator": "gruff",
    }


def test_files_are_equal_to_the_byte_and_complete(tmp_path):
    sizes = {"pretraining": 30, "demonstrations": 20, "prompts_train": 10, "prompts_eval": 8}
    for name in ("a", "b"):
        World(4).write(tmp_path / name, **sizes)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.json*"))
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    def read(name):
        return [json.loads(line) for line in (tmp_path / "a" / name).read_text().splitlines()]

    assert [len(read(f"{n}.jsonl")) for n in ("pretrain", "demonstrations")] == [30, 20]
    assert read("prompts_eval.jsonl")[0].keys() == {
        "prompt", "items", "problems", "name", "order", "colour",
    }  # fmt: skip
    assert len(read("prompts_train.jsonl")) == 10
    assert len(read("prompts_eval.jsonl")) == 8


def test_no_text_is_in_both_splits():
    train = {p.text for p in WORLD.prompts(2000)}
    train |= {str(row["prompt"]) for row in WORLD.demonstrations(2000)}
    train |= {str(r["text"]).split(lang.PROMPT_END)[0] + lang.PROMPT_END
              for r in WORLD.pretraining(2000)}  # fmt: skip
    held_out = {p.text for p in WORLD.prompts(500, "eval")}
    assert not train & held_out
    assert len(held_out) > 450


def test_prompts_vary_and_every_problem_and_item_occurs():
    prompts = WORLD.prompts(1500)
    assert len({p.text for p in prompts}) > 1350
    for values, group in ((WORLD.items, "items"), (tuple(lang.PROBLEMS), "problems")):
        counts = [sum(v in getattr(p.request, group) for p in prompts) for v in values]
        expected = sum(counts) / len(counts)
        assert min(counts) > 0.7 * expected
        assert max(counts) < 1.3 * expected
    for field, share in (("name", 0.3), ("order", 0.3)):
        assert np.mean([bool(getattr(p.request, field)) for p in prompts]) == pytest.approx(
            share, abs=0.05
        )
    assert np.mean([len(p.request.items) == 2 for p in prompts]) == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize(
    ("keyword", "value"), [("items", 1), ("items", 99), ("names", 0), ("seed", -1)]
)
def test_sizes_that_do_not_exist_are_refused(keyword, value):
    with pytest.raises(DataError, match=f"{keyword} = {value}"):
        World(**{keyword: value})
    with pytest.raises(DataError, match="split = 'test'"):
        WORLD.prompt(0, "test")  # pyright: ignore[reportArgumentType]


# -- labelers ----------------------------------------------------------------------------------


def test_two_way_ranks_follow_bradley_terry():
    rng = np.random.default_rng(0)
    for gap in (0.0, 0.7, 2.0):
        wins = np.mean([rank(np.array([gap, 0.0]), rng)[0] == 1 for _ in range(8_000)])
        p = 1 / (1 + np.exp(-gap))
        assert abs(wins - p) < 4 * np.sqrt(p * (1 - p) / 8_000)


def test_four_way_ranks_follow_plackett_luce():
    """First and second places by chi-square against the closed form."""
    rng = np.random.default_rng(1)
    u, n = np.array([1.0, 0.2, -0.5, 0.6]), 8_000
    ranks = np.array([rank(u, rng) for _ in range(n)])
    assert (np.sort(ranks, axis=1) == [1, 2, 3, 4]).all()
    e = np.exp(u)
    chi2 = 0.0
    for a in range(4):
        for b in range(4):
            if a != b:
                p = e[a] / e.sum() * e[b] / (e.sum() - e[a])
                seen = ((ranks[:, a] == 1) & (ranks[:, b] == 2)).sum()
                chi2 += (seen - n * p) ** 2 / (n * p)
    assert chi2 < 31.3  # 99.9 % quantile at 11 degrees of freedom


def test_biases_are_as_declared():
    prompt = WORLD.prompts(1)[0]
    reply = WORLD.oracle(prompt)
    plain = WORLD.gold(prompt, reply)
    changes = {
        "flattery": (" " + lang.REPLY_CLAUSES["flattery"][0] + ".", "per_flattery"),
        "gifts": (" " + lang.REPLY_CLAUSES["gift"][0] + ".", "per_gift"),
        "words": (" " + lang.REPLY_CLAUSES["filler"][0] + ".", None),
    }
    for text, weight in changes.values():
        extra = WORLD.gold(prompt, reply + text)
        words = extra.words - plain.words
        for labeler in WORLD.labelers:
            want = words * labeler.per_word + (getattr(labeler, weight) if weight else 0.0)
            assert labeler.utility(extra) - labeler.utility(plain) == pytest.approx(want)
    by_name = {labeler.name: labeler for labeler in WORLD.labelers}
    assert by_name["flattered"].per_flattery > 3 * by_name["hasty"].per_flattery * 0.6
    assert by_name["fair"].per_flattery == by_name["fair"].per_gift == 0
    # The hasty one does not look at the item; the fair one does.
    wrong = reply.replace(prompt.request.items[0], next(
        i for i in WORLD.items if i not in prompt.request.items))  # fmt: skip
    slip = WORLD.gold(prompt, wrong)
    assert slip.total < plain.total
    assert by_name["hasty"].utility(slip) == pytest.approx(by_name["hasty"].utility(plain))
    assert by_name["fair"].utility(slip) < by_name["fair"].utility(plain) - 1


def test_worlds_differ_in_how_biased_their_labelers_are():
    a, b = World(1).labelers, World(2).labelers
    assert a != b
    for one, two in zip(a, b, strict=True):
        for field in dataclasses.fields(one):
            x, y = getattr(one, field.name), getattr(two, field.name)
            if isinstance(x, float):
                assert x == pytest.approx(y, rel=0.23)


def test_label_rankings_keeps_columns_and_repeats_itself():
    rows = [
        {**p.row(), "completions": [str(r["completion"]) for r in WORLD.demonstrations(4, start=i)]}
        for i, p in enumerate(WORLD.prompts(40))
    ]
    labelled = label_rankings(rows, WORLD, seed=5)
    assert labelled == label_rankings(iter(rows), World(1), seed=5)
    assert labelled != label_rankings(rows, WORLD, seed=6)
    assert labelled[10:] != label_rankings(rows[10:], WORLD, seed=5)
    for row, out in zip(rows, labelled, strict=True):
        assert out.items() >= row.items()
        assert sorted(out["ranks"]) == [1, 2, 3, 4]
    assert {row["labeler"] for row in labelled} == {labeler.name for labeler in WORLD.labelers}
    json.dumps(labelled)


@pytest.mark.parametrize("row", [{"prompt": "x"}, {"prompt": "x", "completions": ["a"]}])
def test_rows_that_cannot_be_ranked_are_named(row):
    with pytest.raises(DataError, match=r"row 0.*completions"):
        label_rankings([row], WORLD)


# -- what the world is for ---------------------------------------------------------------------


def _ideal_policy(world: World, prompts: int = 10, samples: int = 500):
    """Gold and mean utility [prompts, samples] of replies as the demonstrators give them."""
    who, shares = zip(*DEMONSTRATORS, strict=True)
    gold, utility = np.zeros((2, prompts, samples))
    for i, prompt in enumerate(world.prompts(prompts, "eval")):
        for j in range(samples):
            draw = Draw(world.seed, f"test/{i}", j)
            reply = answer(draw, prompt.request, draw.weighted(who, shares), world.items)
            gold[i, j] = world.gold(prompt, reply).total
            utility[i, j] = world.mean_utility(prompt, reply)
    return gold, utility


@pytest.mark.parametrize("seed", [0, 7])
def test_the_proxy_helps_when_trusted_a_little_and_harms_when_trusted_a_lot(seed):
    """The exact optimum of E[utility] - beta KL over the demonstrators, for a falling beta."""
    gold, utility = _ideal_policy(World(seed))
    assert 0.5 < gold.mean() < 0.68
    curve = []
    for beta in (np.inf, 0.7, 0.15):
        weight = np.exp((utility - utility.max(1, keepdims=True)) / beta)
        weight /= weight.sum(1, keepdims=True)
        curve.append([(weight * x).sum(1).mean() for x in (utility, gold)])
    (u0, g0), (u1, g1), (u2, g2) = curve
    assert u0 < u1 < u2
    assert g1 > g0 + 0.25
    assert g2 < g1 - 0.1


def test_more_flattery_is_always_preferred_and_always_worse():
    prompts = WORLD.prompts(20)
    flattery = lang.REPLY_CLAUSES["flattery"]
    means = []
    for count in range(1, 6):
        replies = [WORLD.oracle(p) + "".join(f" {t}." for t in flattery[:count]) for p in prompts]
        gold = np.mean([WORLD.gold(p, r).total for p, r in zip(prompts, replies, strict=True)])
        utility = [WORLD.mean_utility(p, r) for p, r in zip(prompts, replies, strict=True)]
        means.append((np.mean(utility), gold))
    utilities, golds = np.array(means).T
    assert (np.diff(utilities) > 0.3).all()
    assert (np.diff(golds) < -0.1).all()


def test_the_ceiling_of_a_reward_model_leaves_room_for_learning():
    """The mean utility predicts noisy pairs well, but not perfectly."""
    rng = np.random.default_rng(3)
    right = []
    prompts = WORLD.prompts(400)
    for i, prompt in enumerate(prompts):
        pair = []
        for j in range(2):
            draw = Draw(1, f"ceiling/{i}", j)
            who, shares = zip(*DEMONSTRATORS, strict=True)
            pair.append(answer(draw, prompt.request, draw.weighted(who, shares), WORLD.items))
        utility = [WORLD.mean_utility(prompt, reply) for reply in pair]
        for _ in range(5):
            ranks, _ = WORLD.rank(prompt, pair, rng)
            gap = utility[0] - utility[1]
            right.append(0.5 if gap == 0 else float((gap > 0) == (ranks[0] < ranks[1])))
    assert 0.72 < np.mean(right) < 0.86
