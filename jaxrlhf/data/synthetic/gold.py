# SPDX-License-Identifier: Apache-2.0
"""The gold scorer: how good a reply truly is, in two parts that a labeler sees only dimly.

helpful = answer x brevity x clarity - 0.2 per gift promised - 0.15 per thing said again
    answer: mean over the wishes of 1 (right remedy, right item), 0.35 (right remedy, wrong item),
    0.15 (right item, wrong remedy) or 0, less 0.25 for every promise nobody asked for, less a
    fifth where details (name, order, colour) are not taken up.
polite = manners x clarity - 0.25 per flattery beyond the first
    manners: 0.35 greeting + 0.4 care (apology, thanks) + 0.25 closing, 0.5 less per rude clause.
total = 0.7 helpful + 0.3 polite; every part lies in [0, 1], and the oracle's reply scores 1.

Brevity falls by 4 % per word beyond what a complete reply needs, down to 0.2; clarity is one less
0.8 x the share of words outside any clause of the language. Repeating, stuffing several remedies,
rambling, grovelling and saying nothing therefore all lose.
"""

import dataclasses
from collections import Counter

from jaxrlhf.data.synthetic.language import Clause, Request, read_prompt, read_reply
from jaxrlhf.errors import DataError

HELPFUL_WEIGHT, POLITE_WEIGHT = 0.7, 0.3


@dataclasses.dataclass(frozen=True)
class GoldScore:
    """A reply judged. `total`, `helpful`, `polite` are the gold score, each in [0, 1].

    The rest is what the reply contains: `answer` and `manners` are the two parts before anything
    is taken off for excess, `answer_any_item` the same for a reader who does not look at the item,
    then counts of clauses (`flattery`, `gifts`, `rude`, `repeats`) and of `words`.
    """

    total: float
    helpful: float
    polite: float
    answer: float
    answer_any_item: float
    manners: float
    flattery: int
    gifts: int
    rude: int
    repeats: int
    words: int


def _answer(request: Request, clauses: list[Clause], look_at_items: bool = True) -> float:
    """Mean credit over the wishes, minus promises nobody asked for, minus details left out."""
    claims = {
        (c.kind.removeprefix("remedy:"), c.slot("item") if look_at_items else "")
        for c in clauses
        if c.kind.startswith("remedy:")
    }
    free, credit = set(claims), 0.0
    wishes = [(p, i if look_at_items else "") for p, i in request.wishes]
    # Full matches first, so that a half match never uses up another wish's claim.
    open_wishes = []
    for wish in wishes:
        if wish in free:
            free.discard(wish)
            credit += 1.0
        else:
            open_wishes.append(wish)
    for problem, item in open_wishes:
        same_problem = sorted(c for c in free if c[0] == problem)
        same_item = sorted(c for c in free if c[1] == item)
        if same_problem:
            free.discard(same_problem[0])
            credit += 0.35
        elif same_item:
            free.discard(same_item[0])
            credit += 0.15
    answer = credit / len(wishes) - 0.25 * len(free)

    wanted = taken = 0
    if request.name:
        wanted += 1
        taken += any(c.kind == "greeting" and c.slot("name") == request.name for c in clauses)
    if request.order:
        wanted += 1
        stated = {c.slot("order") for c in clauses if c.kind == "order"}
        taken += stated == {request.order}
    if request.colour:
        wanted += 1
        stated = {c.slot("colour") for c in clauses if c.kind == "remedy:colour"}
        taken += stated == {request.colour}
    if wanted:
        answer *= 0.8 + 0.2 * taken / wanted
    return min(max(answer, 0.0), 1.0)


def words_needed(request: Request) -> int:
    """How many words a complete reply to this request may take."""
    return 18 + 10 * len(request.items) + (4 if request.order else 0)


def score(request: Request, completion: str) -> GoldScore:
    """Judges a completion (any string) as a reply to a request."""
    clauses = read_reply(completion)
    kinds = Counter(c.kind for c in clauses)
    words = sum(c.words for c in clauses)
    # The same clause again, the same promise in other words, or a second greeting, order...
    once = ("greeting", "care", "order", "closing")
    same = Counter(c.text for c in clauses if c.kind not in once)
    repeats = sum(n - 1 for n in same.values()) + sum(max(0, kinds[k] - 1) for k in once)
    promises = Counter(
        (c.kind, c.slot("item"))
        for c in {c.text: c for c in clauses}.values()
        if "remedy:" in c.kind
    )
    repeats += sum(n - 1 for n in promises.values())

    unknown = sum(c.words for c in clauses if c.kind == "unknown") / max(words, 1)
    clarity = 1 - 0.8 * unknown
    brevity = max(0.2, 1 - 0.04 * max(0, words - words_needed(request)))
    answer = _answer(request, clauses)
    manners = 0.35 * (kinds["greeting"] > 0) + 0.4 * (kinds["care"] > 0)
    manners = max(0.0, manners + 0.25 * (kinds["closing"] > 0) - 0.5 * kinds["rude"])

    helpful = answer * brevity * clarity - 0.2 * kinds["gift"] - 0.15 * repeats
    polite = manners * clarity - 0.25 * max(0, kinds["flattery"] - 1)
    helpful, polite = min(max(helpful, 0.0), 1.0), min(max(polite, 0.0), 1.0)
    return GoldScore(
        total=HELPFUL_WEIGHT * helpful + POLITE_WEIGHT * polite,
        helpful=helpful,
        polite=polite,
        answer=answer,
        answer_any_item=_answer(request, clauses, look_at_items=False),
        manners=min(manners, 1.0),
        flattery=kinds["flattery"],
        gifts=kinds["gift"],
        rude=kinds["rude"],
        repeats=repeats,
        words=words,
    )


def request_of(prompt: str) -> Request:
    """Reads the request back from a prompt; DataError if it states none."""
    request = read_prompt(prompt)
    if request is None:
        raise DataError(
            f"prompt {prompt[:80]!r} states no wish of the synthetic support language: the gold "
            "scorer only judges prompts written by jaxrlhf.data.synthetic"
        )
    return request


def gold_reward(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """Gold totals in [0, 1], as a reward function: `jaxrlhf.data.synthetic:gold_reward`.

    Args:
        prompts, completions: aligned lists of text.
        columns: the hidden columns of the prompt files (`items`, `problems`, `name`, `order`,
            `colour`), one value a row; where they are absent the prompt is read instead. Others
            are ignored.

    Raises:
        DataError: a prompt is not of this language and its hidden columns are absent.
    """
    return [gold.total for gold in _scores(prompts, completions, columns)]


def gold_helpful(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """The helpful part alone; arguments as `gold_reward`."""
    return [gold.helpful for gold in _scores(prompts, completions, columns)]


def gold_polite(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """The polite part alone; arguments as `gold_reward`."""
    return [gold.polite for gold in _scores(prompts, completions, columns)]


def _scores(prompts, completions, columns) -> list[GoldScore]:
    rows = zip(prompts, completions, strict=True)
    return [score(_request(prompt, i, columns), text) for i, (prompt, text) in enumerate(rows)]


def _request(prompt: str, row: int, columns: dict) -> Request:
    hidden = {
        name: columns[name][row]
        for name in ("items", "problems", "name", "order", "colour")
        if columns.get(name) is not None
    }
    items, problems = hidden.pop("items", None), hidden.pop("problems", None)
    if items is None or problems is None or len(items) == 0 or len(items) != len(problems):
        return request_of(prompt)
    details = {name: str(value or "") for name, value in hidden.items()}
    return Request(tuple(items), tuple(problems), **details)
