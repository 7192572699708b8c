# SPDX-License-Identifier: Apache-2.0
"""The gold scorer: the oracle is perfect, each fault costs the right part, games do not pay."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrlhf.data.synthetic import (
    Request,
    World,
    gold_helpful,
    gold_polite,
    gold_reward,
    read_prompt,
    score,
)
from jaxrlhf.data.synthetic import language as lang
from jaxrlhf.errors import DataError

WORLD = World(3)
REQUEST = Request(("lamp",), ("broken",), name="anna", order="57")
PERFECT = (
    " hello anna, i am sorry about your lamp. we will send you a new lamp."
    " order 57 is noted. have a nice day."
)


@pytest.mark.parametrize("seed", range(5))
def test_the_oracle_is_perfect_and_every_prompt_is_read_back(seed):
    world = World(seed)
    for i, prompt in enumerate(world.prompts(200)):
        assert read_prompt(prompt.text) == prompt.request
        gold = world.gold(prompt.text, world.oracle(prompt, i))
        assert (gold.total, gold.helpful, gold.polite) == (1.0, 1.0, 1.0)


def test_clauses_are_unique_and_hold_no_word_that_fills_a_slot():
    for sources in ((lang.PROBLEMS, lang.PROMPT_CLAUSES), (lang.REMEDIES, lang.REPLY_CLAUSES)):
        templates = [t for source in sources for group in source.values() for t in group]
        assert len(set(templates)) == len(templates)
        for template in templates:
            assert not set(template.split()) & set(lang.SLOTS), template
            assert template == " ".join(lang.fill(template).split()) or "<" in template
    assert len(lang.SLOTS) == len(lang.ITEMS) + len(lang.NAMES) + len(lang.COLOURS)
    assert lang.PROBLEMS.keys() == lang.REMEDIES.keys()


# (what goes wrong, the reply, helpful as derived by hand, polite as derived by hand)
FAULTS = {
    "nothing": (PERFECT, 1.0, 1.0),
    "wrong item": (PERFECT.replace("new lamp", "new rug"), 0.35, 1.0),
    "wrong remedy": (
        PERFECT.replace("we will send you a new lamp", "the lamp is cancelled now"),
        0.15,
        1.0,
    ),
    "no remedy": (PERFECT.replace("we will send you a new lamp", "we will look into it"), 0, 1.0),
    "wrong name": (PERFECT.replace("anna", "ben"), 0.9, 1.0),
    "no order": (PERFECT.replace(" order 57 is noted.", ""), 0.9, 1.0),
    "wrong order": (PERFECT.replace("57", "58"), 0.9, 1.0),
    "no greeting": (PERFECT.replace(" hello anna,", ""), 0.9, 0.65),
    "no care": (PERFECT.replace(" i am sorry about your lamp.", ""), 1.0, 0.6),
    "no closing": (PERFECT.replace(" have a nice day.", ""), 1.0, 0.75),
    "rude": (PERFECT + " stop asking.", 1.0, 0.5),
    "a gift": (PERFECT + " we will add a free gift.", 0.8, 1.0),
    "a second remedy": (PERFECT + " the lamp is cancelled now.", 0.75, 1.0),
    "a second greeting": (PERFECT + " hi anna.", 0.85, 1.0),
    "words of no meaning": (PERFECT + " blah blah.", 1 - 0.8 * 2 / 25, 1 - 0.8 * 2 / 25),
    "one flattery": (PERFECT + " you have such good taste.", 1.0, 1.0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_costs_its_own_part(fault):
    reply, helpful, polite = FAULTS[fault]
    gold = score(REQUEST, reply)
    assert gold.helpful == pytest.approx(helpful)
    assert gold.polite == pytest.approx(polite)
    assert gold.total == pytest.approx(0.7 * helpful + 0.3 * polite)


def test_two_wishes_count_half_each_and_promises_are_not_mixed_up():
    request = Request(("lamp", "rug"), ("broken", "late"))
    lamp, rug = "we will send you a new lamp.", "we will find out where your rug is."
    assert score(request, f"{lamp} {rug}").answer == 1.0
    assert score(request, f"{rug} {lamp}").answer == 1.0
    assert score(request, lamp).answer == 0.5
    swapped = "we will send you a new rug. we will find out where your lamp is."
    assert score(request, swapped).answer == pytest.approx(0.35)
    assert score(request, swapped).answer_any_item == 1.0


def test_the_colour_is_taken_up_in_the_remedy():
    request = Request(("lamp",), ("colour",), colour="red")
    assert score(request, "we will swap your lamp for a red one.").answer == 1.0
    assert score(request, "we will swap your lamp for a blue one.").answer == pytest.approx(0.8)
    stuffed = "we will swap your lamp for a red one. you can trade the lamp for a blue one."
    assert score(request, stuffed).answer == pytest.approx(0.8)


GAMES = {
    "empty": "",
    "spaces": "   ",
    "punctuation": ".,.,",
    "the prompt again": " my lamp is broken. what can you do?",
    "every remedy": " "
    + " ".join(lang.fill(t[0], item="lamp", colour="red") + "." for t in lang.REMEDIES.values()),
    "one clause for ever": " we will send you a new lamp." * 8,
    "a bag of words": " lamp new anna 57 sorry hello thank send",
    "only manners": " hello, i am glad to help. have a nice day.",
    "only flattery": " " + " ".join(t + "." for t in lang.REPLY_CLAUSES["flattery"]),
    "perfect, then grovelling": PERFECT
    + " "
    + " ".join(t + "." for t in lang.REPLY_CLAUSES["flattery"]),
    "perfect, then rambling": PERFECT
    + " "
    + " ".join(t + "." for t in lang.REPLY_CLAUSES["filler"]),
    "perfect, then gifts": PERFECT + " " + " ".join(t + "." for t in lang.REPLY_CLAUSES["gift"]),
    "perfect twice": PERFECT * 2,
    "every item": " "
    + " ".join(f"we will send you a new {item}." for item in ("lamp", *lang.ITEMS[1:6])),
    "perfect, then every order": PERFECT
    + " order 58 is noted. order 59 is noted. order 60 is noted.",
}


@pytest.mark.parametrize("game", GAMES)
def test_games_score_far_below_an_honest_reply(game):
    assert score(REQUEST, GAMES[game]).total <= 0.72
    if not game.startswith("perfect"):
        assert score(REQUEST, GAMES[game]).total <= 0.5


def test_flattery_beyond_the_first_costs_manners_a_quarter_each():
    flattery = lang.REPLY_CLAUSES["flattery"]
    for count, polite in ((1, 1.0), (2, 0.75), (3, 0.5), (5, 0.0), (6, 0.0)):
        reply = PERFECT + "".join(f" {template}." for template in flattery[:count])
        assert score(REQUEST, reply).polite == pytest.approx(polite)


def test_saying_nothing_is_worth_nothing():
    assert score(REQUEST, "").total == score(REQUEST, " .").total == 0


@pytest.mark.parametrize("kind", ["flattery", "gift", "filler", "rude"])
def test_more_of_what_is_too_much_never_helps(kind):
    reply, before = PERFECT, 1.0
    for template in lang.REPLY_CLAUSES[kind]:
        reply += f" {template}."
        total = score(REQUEST, reply).total
        assert total <= before
        before = total
    assert before < 0.75


words = sorted(set(PERFECT.replace(".", " .").replace(",", " ,").split()) | {"gift", "<x>"})
texts = st.one_of(st.text(max_size=80), st.lists(st.sampled_from(words), max_size=60).map(" ".join))


@given(texts)
def test_any_text_has_parts_between_zero_and_one(text):
    gold = score(REQUEST, text)
    for part in (gold.total, gold.helpful, gold.polite, gold.answer, gold.manners):
        assert 0 <= part <= 1


@given(st.integers(0, 200), st.sampled_from([" ", "  ", "\t", " \n "]), st.booleans())
def test_case_and_spacing_do_not_matter(index, space, upper):
    row = WORLD.demonstrations(1, start=index)[0]
    prompt, reply = str(row["prompt"]), str(row["completion"])
    changed = reply.replace(" ", space).replace(".", ".\n")
    changed = changed.upper() if upper else changed.title()
    assert WORLD.gold(prompt, changed) == WORLD.gold(prompt, reply)


def test_as_a_reward_function_with_and_without_hidden_columns():
    rows = [p.row() for p in WORLD.prompts(50, "eval")]
    prompts = [str(row["prompt"]) for row in rows]
    replies = [WORLD.oracle(prompt) for prompt in prompts[1:] + prompts[:1]]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    plain = gold_reward(prompts, replies)
    assert plain == gold_reward(prompts, replies, **columns, unrelated=[0] * 50)
    assert plain == [WORLD.gold(p, r).total for p, r in zip(prompts, replies, strict=True)]
    parts = zip(gold_helpful(prompts, replies), gold_polite(prompts, replies), strict=True)
    assert plain == pytest.approx([0.7 * h + 0.3 * p for h, p in parts])
    assert all(isinstance(value, float) for value in plain)
    # The hidden columns decide where they are given.
    assert gold_reward(["?"], [PERFECT], items=[["lamp"]], problems=[["broken"]]) == [1.0]


def test_a_foreign_prompt_is_refused_by_name():
    with pytest.raises(DataError, match="tell me a story"):
        gold_reward(["tell me a story"], ["once"])
