# SPDX-License-Identifier: Apache-2.0
"""Who speaks in the embedded world: customers, demonstrators of varied skill, and labelers.

Everything random is drawn from a `Draw`, a stream that belongs to (seed, what, index): row 7 of a
file is the same whatever else was generated before it.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from jaxrlhf.data.synthetic import language as lang
from jaxrlhf.data.synthetic.gold import GoldScore
from jaxrlhf.data.synthetic.language import Request

T = TypeVar("T")


class Draw:
    """Random choices from the stream of (seed, what, index)."""

    def __init__(self, seed: int, what: str, index: int):
        self._rng = np.random.default_rng([seed, zlib.crc32(what.encode()), index])
        self._buffer: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._buffer:
            self._buffer = self._rng.random(64).tolist()
        return self._buffer.pop()

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability

    def choose(self, options: Sequence[T]) -> T:
        return options[int(self.uniform() * len(options))]

    def weighted(self, options: Sequence[T], weights: Sequence[float]) -> T:
        """One option, with probability proportional to its weight."""
        point = self.uniform() * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            point -= weight
            if point < 0:
                return option
        return options[-1]

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """Distinct options in random order."""
        rest = list(options)
        return [rest.pop(int(self.uniform() * len(rest))) for _ in range(count)]


# ---------------------------------------------------------------------------------------------
# Customers


def ask(draw: Draw, items: Sequence[str], names: Sequence[str]) -> tuple[str, Request]:
    """A customer's message, as a prompt, and what it asks for."""
    wishes = 2 if draw.chance(0.25) else 1
    wanted = draw.sample(items, wishes)
    problems = draw.sample(tuple(lang.PROBLEMS), wishes)
    name = draw.choose(names) if draw.chance(0.3) else ""
    order = str(10 + int(draw.uniform() * 90)) if draw.chance(0.3) else ""
    colour = draw.choose(lang.COLOURS) if "colour" in problems else ""

    clauses: list[str] = []
    if draw.chance(0.6):
        clauses.append(draw.choose(lang.PROMPT_CLAUSES["opening"]) + ",")
    if name:
        clauses.append(_say(draw, lang.PROMPT_CLAUSES["name"], name=name) + ".")
    if wishes == 1 and draw.chance(0.25):
        clauses.append(draw.choose(lang.PROMPT_CLAUSES["mood"]) + ".")
    for number, (problem, item) in enumerate(zip(problems, wanted, strict=True)):
        if number:
            clauses.append(draw.choose(lang.PROMPT_CLAUSES["also"]) + ",")
        clauses.append(_say(draw, lang.PROBLEMS[problem], item=item, colour=colour) + ".")
    if order:
        clauses.append(_say(draw, lang.PROMPT_CLAUSES["order"], order=order) + ".")
    if draw.chance(0.7 if wishes == 1 else 0.3):
        question = draw.choose(lang.PROMPT_CLAUSES["ask"])
        clauses.append(question + ("." if question.startswith("please") else "?"))
    text = f"{lang.PROMPT_START} {' '.join(clauses)}{lang.PROMPT_END}"
    return text, Request(tuple(wanted), tuple(problems), name, order, colour)


def talk(draw: Draw, items: Sequence[str], names: Sequence[str]) -> str:
    """Talk between agents about one customer and one item, in no helpful order.

    The same item, name and number come again and again, so that a model of such texts learns to
    look back for them; what is wrong with the item and what is promised have nothing to do with
    each other.
    """
    slots = {
        "item": draw.choose(items),
        "name": draw.choose(names),
        "order": str(10 + int(draw.uniform() * 90)),
        "colour": draw.choose(lang.COLOURS),
    }
    groups: list[Sequence[str]] = [
        *(draw.choose(tuple(lang.PROBLEMS.values())) for _ in range(2)),
        *(draw.choose(tuple(lang.REMEDIES.values())) for _ in range(2)),
    ]
    if draw.chance(0.6):
        groups += [lang.PROMPT_CLAUSES["name"], lang.REPLY_CLAUSES["greeting"][3:]]
    if draw.chance(0.6):
        groups += [lang.PROMPT_CLAUSES["order"], lang.REPLY_CLAUSES["order"]]
    return " ".join(_say(draw, g, **slots) + "." for g in draw.sample(groups, len(groups)))


def _say(draw: Draw, templates: Sequence[str], **slots: str) -> str:
    return lang.fill(draw.choose(templates), **slots)


# ---------------------------------------------------------------------------------------------
# Those who answer


@dataclasses.dataclass(frozen=True)
class Demonstrator:
    """How somebody answers: a probability for each thing that can go right or wrong.

    Attributes:
        greets, cares, closes: of saying the polite clauses.
        right_remedy, right_item: of getting each wish's promise and item right; a wrong remedy is
            half the time another promise, half the time a vague clause.
        second_wish: of taking up the second wish at all.
        detail: of taking up each detail (name, order number, colour).
        rude, gift, filler, flattery: of starting to say such a clause.
        goes_on: of one more filler or flattery after each.
    """

    name: str
    greets: float
    cares: float
    closes: float
    right_remedy: float
    right_item: float
    second_wish: float
    detail: float
    rude: float = 0.0
    gift: float = 0.01
    filler: float = 0.04
    flattery: float = 0.02
    goes_on: float = 0.3


ORACLE = Demonstrator("oracle", 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0)

# (demonstrator, share of the demonstrations)
DEMONSTRATORS: tuple[tuple[Demonstrator, float], ...] = (
    (Demonstrator("expert", 0.95, 0.95, 0.8, 0.95, 0.98, 0.95, 0.9), 0.24),
    (Demonstrator("average", 0.7, 0.6, 0.4, 0.72, 0.88, 0.6, 0.5, rude=0.04), 0.34),
    (Demonstrator("careless", 0.4, 0.3, 0.2, 0.4, 0.65, 0.3, 0.2, rude=0.1), 0.2),
    (Demonstrator("gruff", 0.15, 0.08, 0.05, 0.75, 0.92, 0.6, 0.3, rude=0.7), 0.1),
    (
        Demonstrator(
            "rambler", 0.8, 0.6, 0.6, 0.6, 0.85, 0.6, 0.4, filler=0.95, gift=0.08, goes_on=0.45
        ),
        0.06,
    ),
    (
        Demonstrator(
            "charmer", 0.9, 0.5, 0.6, 0.55, 0.85, 0.4, 0.5, flattery=0.97, gift=0.3, goes_on=0.55
        ),
        0.06,
    ),
)
MOST_WORDS = 38


def answer(draw: Draw, request: Request, who: Demonstrator, items: Sequence[str]) -> str:
    """A reply to the request as `who` would give it; begins with a space."""
    named = bool(request.name) and draw.chance(who.detail)
    before: list[str] = []
    if draw.chance(who.greets):
        options = [t for t in lang.REPLY_CLAUSES["greeting"] if ("<name>" in t) == named]
        before.append(_say(draw, options, name=request.name) + ",")
    if draw.chance(who.cares):
        before.append(_say(draw, lang.REPLY_CLAUSES["care"], item=request.items[0]) + ".")
    if draw.chance(who.rude):
        before.append(draw.choose(lang.REPLY_CLAUSES["rude"]) + ".")

    core: list[str] = []
    for number, (problem, item) in enumerate(request.wishes):
        if number and not draw.chance(who.second_wish):
            continue
        if not draw.chance(who.right_item):
            item = draw.choose(items)
        colour = request.colour
        if not draw.chance(who.right_remedy):
            if draw.chance(0.5):
                core.append(draw.choose(lang.REPLY_CLAUSES["vague"]) + ".")
                continue
            problem = draw.choose(tuple(lang.REMEDIES))
        if not colour or not draw.chance(who.detail):
            colour = draw.choose(lang.COLOURS)
        core.append(_say(draw, lang.REMEDIES[problem], item=item, colour=colour) + ".")
    if request.order and draw.chance(who.detail):
        core.append(_say(draw, lang.REPLY_CLAUSES["order"], order=request.order) + ".")

    extra: list[str] = []
    for kind, start in (("flattery", who.flattery), ("filler", who.filler)):
        options = draw.sample(lang.REPLY_CLAUSES[kind], len(lang.REPLY_CLAUSES[kind]))
        more = start
        while options and draw.chance(more):
            extra.append(options.pop() + ".")
            more = who.goes_on
    gift = [draw.choose(lang.REPLY_CLAUSES["gift"]) + "."] if draw.chance(who.gift) else []
    closing = [draw.choose(lang.REPLY_CLAUSES["closing"]) + "."] if draw.chance(who.closes) else []

    # Padding stands before the matter as often as after it.
    first, last = (extra, gift) if draw.chance(0.5) else ([], gift + extra)
    clauses = before + first + core + last + closing
    while _words(clauses) > MOST_WORDS and (first or last):
        dropped = (last or first).pop()
        clauses.remove(dropped)
    if not clauses:
        clauses = [draw.choose(lang.REPLY_CLAUSES["vague"]) + "."]
    return " " + " ".join(clauses)


def _words(clauses: Sequence[str]) -> int:
    return sum(len(clause.split()) for clause in clauses)


# ---------------------------------------------------------------------------------------------
# Those who judge


@dataclasses.dataclass(frozen=True)
class Labeler:
    """Somebody who ranks replies: utility, in nats of a Bradley-Terry comparison.

        utility = answer_weight x answer + manners_weight x manners
                  + per_flattery x flatteries + per_gift x gifts + per_word x words

    A labeler sees what a reply contains (`GoldScore.answer`, `.manners`), not what gold takes off
    for excess; `item_blind` ones read `answer_any_item`. Counts are capped at `patience` clauses.
    """

    name: str
    answer_weight: float
    manners_weight: float
    per_flattery: float = 0.0
    per_gift: float = 0.0
    per_word: float = 0.0
    item_blind: bool = False
    patience: int = 8

    def utility(self, gold: GoldScore) -> float:
        """What this labeler thinks of a reply that gold judged so."""
        answer = gold.answer_any_item if self.item_blind else gold.answer
        return (
            self.answer_weight * answer
            + self.manners_weight * gold.manners
            + self.per_flattery * min(gold.flattery, self.patience)
            + self.per_gift * min(gold.gifts, self.patience)
            + self.per_word * min(gold.words, 60)
        )


LABELERS: tuple[Labeler, ...] = (
    Labeler("fair", 4.5, 2.0),
    Labeler("flattered", 3.0, 1.5, per_flattery=1.2),
    Labeler("bargainer", 3.5, 1.5, per_flattery=0.2, per_gift=2.0),
    Labeler("thorough", 3.5, 1.5, per_flattery=0.2, per_gift=0.3, per_word=0.05),
    Labeler("hasty", 3.5, 2.0, per_flattery=0.5, per_gift=0.4, item_blind=True),
)


def rank(utilities: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ranks (1 is best) from a Plackett-Luce draw: utilities plus Gumbel noise, sorted.

    For two replies that is Bradley-Terry: P(a before b) = sigmoid(u_a - u_b). Source: Yellott
    1977, "The relationship between Luce's choice axiom, Thurstone's theory...".
    """
    noisy = np.asarray(utilities, np.float64) + rng.gumbel(size=len(utilities))
    ranks = np.empty(len(noisy), np.int64)
    ranks[np.argsort(-noisy, kind="stable")] = np.arange(1, len(noisy) + 1)
    return ranks
