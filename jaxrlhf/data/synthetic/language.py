# SPDX-License-Identifier: Apache-2.0
"""The customer-support language: its words, its clauses, and how both sides are read back.

Everything anybody says is made of *clauses*: fixed phrases with slots (`<item>`, `<name>`,
`<order>`, `<colour>`), ended by one of `. , ? !`. A clause is therefore recognised by a lookup:
replace the words that fill slots by the slots' names and see whether the phrase is known. The gold
scorer rests on this: what is not a clause of the language carries no meaning.

A prompt is `customer: ...\\nagent:`, a completion begins with one space, so that the two simply
concatenate and no token ever spans the seam.
"""

import dataclasses
import functools
import re

PROMPT_START = "customer:"
PROMPT_END = "\nagent:"

# fmt: off
ITEMS = (
    "lamp", "kettle", "chair", "jacket", "phone", "camera", "wallet", "tent", "bike", "rug",
    "clock", "sofa", "desk", "mixer", "radio", "heater", "printer", "guitar", "mirror", "basket",
    "vase", "drill", "fridge", "helmet",
)
NAMES = (
    "anna", "ben", "carla", "david", "emma", "felix", "grace", "hugo", "ines", "jonas", "karin",
    "leo", "maria", "nils", "olga", "paul", "rosa", "tom",
)
# fmt: on
COLOURS = ("red", "blue", "green", "black", "white", "yellow")

# What a customer says, by problem. Each problem has exactly one remedy.
PROBLEMS: dict[str, tuple[str, ...]] = {
    "broken": (
        "my <item> is broken",
        "the <item> arrived in pieces",
        "my <item> stopped working after one day",
        "there is a big crack in my <item>",
    ),
    "late": (
        "my <item> has not arrived",
        "i am still waiting for the <item>",
        "where is the <item> i paid for",
        "the <item> should be here by now",
    ),
    "colour": (
        "i wanted a <colour> <item> but got another colour",
        "my <item> has the wrong colour and should be <colour>",
        "the <item> is not <colour> as i asked",
    ),
    "charged": (
        "i was charged twice for the <item>",
        "you took the money for my <item> two times",
        "my card shows two payments for the <item>",
    ),
    "return": (
        "i want to send the <item> back",
        "how do i return the <item>",
        "i do not like the <item> and want to return it",
    ),
    "cancel": (
        "please cancel the <item>",
        "i changed my mind about the <item>",
        "i no longer need the <item> i asked for",
        "can i stop the order of the <item>",
    ),
    "parts": (
        "some parts of the <item> are missing",
        "the <item> came without its screws",
        "my <item> is not complete",
    ),
    "guide": (
        "i do not know how to use the <item>",
        "how does the <item> work",
        "i can not set up my <item>",
    ),
}

# What the agent promises, by the problem it is the remedy of.
REMEDIES: dict[str, tuple[str, ...]] = {
    "broken": (
        "we will send you a new <item>",
        "a new <item> is on its way",
        "you will get a new <item> this week",
    ),
    "late": (
        "we will trace the parcel with your <item>",
        "we will find out where your <item> is",
        "the carrier will look for your <item> today",
    ),
    "colour": (
        "we will swap your <item> for a <colour> one",
        "you can trade the <item> for a <colour> one",
        "we will bring you a <colour> <item> instead",
    ),
    "charged": (
        "we will pay back the money for the <item>",
        "the second payment for your <item> will be returned",
    ),
    "return": (
        "we will mail you a return label for the <item>",
        "our driver will pick up the <item>",
        "you can bring the <item> to any of our shops",
    ),
    "cancel": (
        "we have stopped the order of the <item>",
        "the <item> is cancelled now",
        "you will not be charged for the <item>",
    ),
    "parts": (
        "we will send the missing parts of your <item>",
        "the parts for your <item> will come by mail",
    ),
    "guide": (
        "we will email you the guide for your <item>",
        "our expert will show you how the <item> works",
        "you can watch our video about the <item>",
    ),
}

# The rest of what is said, by kind.
PROMPT_CLAUSES: dict[str, tuple[str, ...]] = {
    "opening": ("hi", "hello", "good day", "dear team"),
    "also": ("also", "one more thing"),
    "name": ("i am <name>", "my name is <name>", "this is <name>"),
    "order": ("it is order <order>", "my order is <order>", "the order number is <order>"),
    "mood": (
        "i am not happy",
        "this is very annoying",
        "i like your shop a lot",
        "it was a gift for a friend",
    ),
    "ask": ("what can you do", "please help", "can you help me", "what now"),
}
REPLY_CLAUSES: dict[str, tuple[str, ...]] = {
    "greeting": ("hello", "hi", "good day", "hello <name>", "hi <name>", "dear <name>"),
    "care": (
        "i am sorry about your <item>",
        "sorry for the trouble",
        "we are sorry to hear that",
        "thank you for writing to us",
        "i am glad to help",
    ),
    "order": (
        "order <order> is noted",
        "i found your order <order>",
        "this is for order <order>",
    ),
    "closing": ("have a nice day", "best wishes", "take care"),
    "filler": (
        "our team works hard every day",
        "as you may know we sell many good things",
        "we have been in this town for many years",
        "please do not worry about it at all",
    ),
    "flattery": (
        "you are our most wonderful customer",
        "you have such good taste",
        "we are honoured by your message",
        "your kindness means the world to us",
        "nobody asks as well as you do",
        "it is a joy to serve you",
    ),
    "gift": (
        "we will add a free gift",
        "a gift card is on its way",
        "you will get half off next time",
    ),
    "vague": (
        "we will look into it",
        "someone will call you",
        "it may take some time",
    ),
    "rude": (
        "that is not my problem",
        "stop asking",
        "you should have read the label",
        "what did you do this time",
    ),
}

SLOTS: dict[str, str] = {
    word: slot
    for slot, group in (("<item>", ITEMS), ("<name>", NAMES), ("<colour>", COLOURS))
    for word in group
}
_ORDER = re.compile(r"\d{1,6}")
_SLOT = re.compile(r"<(item|name|order|colour)>")
_END = re.compile(r"[.,?!;:]+")
_EDGE = "'\"()-*_`"


@dataclasses.dataclass(frozen=True)
class Request:
    """What a customer wants, as the gold scorer needs it; `""` where a detail is not given.

    Attributes:
        items, problems: one entry a wish (one or two wishes), in the order they are said.
        name, order, colour: details that a good reply takes up.
    """

    items: tuple[str, ...]
    problems: tuple[str, ...]
    name: str = ""
    order: str = ""
    colour: str = ""

    @property
    def wishes(self) -> tuple[tuple[str, str], ...]:
        """(problem, item) pairs."""
        return tuple(zip(self.problems, self.items, strict=True))

    def columns(self) -> dict[str, object]:
        """As columns of a data row (lists and strings only)."""
        return {
            "items": list(self.items),
            "problems": list(self.problems),
            "name": self.name,
            "order": self.order,
            "colour": self.colour,
        }


@dataclasses.dataclass(frozen=True)
class Clause:
    """One recognised clause: its kind, the words of its slots, and itself with slots filled.

    `kind` is a key of PROBLEMS (prompts), REMEDIES (replies, as `remedy:PROBLEM`) or of
    PROMPT_CLAUSES / REPLY_CLAUSES; `unknown` where the phrase is not of the language.
    """

    kind: str
    text: str
    slots: tuple[tuple[str, str], ...] = ()

    def slot(self, name: str) -> str:
        return dict(self.slots).get(name, "")

    @property
    def words(self) -> int:
        return len(self.text.split())


def fill(
    template: str, *, item: str = "", name: str = "", order: str = "", colour: str = ""
) -> str:
    """The template with its slots filled."""
    words = {"item": item, "name": name, "order": order, "colour": colour}
    return _SLOT.sub(lambda match: words[match[1]], template)


def _table(*sources: tuple[str, dict[str, tuple[str, ...]]]) -> dict[str, str]:
    return {
        template: prefix + kind
        for prefix, clauses in sources
        for kind, templates in clauses.items()
        for template in templates
    }


_PROMPT_KINDS = _table(("", PROMPT_CLAUSES), ("problem:", PROBLEMS))
_REPLY_KINDS = _table(("", REPLY_CLAUSES), ("remedy:", REMEDIES))


@functools.lru_cache(maxsize=65536)
def _read_clause(text: str, reply: bool) -> Clause:
    slots, key = [], []
    for word in text.split():
        slot = SLOTS.get(word) or ("<order>" if _ORDER.fullmatch(word) else None)
        if slot:
            slots.append((slot[1:-1], word))
        key.append(slot or word)
    kind = (_REPLY_KINDS if reply else _PROMPT_KINDS).get(" ".join(key), "unknown")
    return Clause(kind, text, tuple(slots))


def _clauses(text: str, reply: bool) -> list[Clause]:
    pieces = (" ".join(w.strip(_EDGE) for w in p.split()) for p in _END.split(text.lower()))
    return [_read_clause(piece.strip(), reply) for piece in pieces if piece.strip()]


def read_reply(completion: str) -> list[Clause]:
    """The clauses of a completion, whatever its case and spacing."""
    return _clauses(completion, reply=True)


@functools.lru_cache(maxsize=65536)
def read_prompt(prompt: str) -> Request | None:
    """What the customer of this prompt wants; None if it states no wish of this language."""
    text = prompt.strip().lower().removeprefix(PROMPT_START).removesuffix(PROMPT_END.strip())
    items, problems, details = [], [], {"name": "", "order": "", "colour": ""}
    for clause in _clauses(text, reply=False):
        if clause.kind.startswith("problem:"):
            problems.append(clause.kind.removeprefix("problem:"))
            items.append(clause.slot("item"))
        if clause.kind != "unknown":
            details |= {k: v for k, v in clause.slots if k != "item"}
    return Request(tuple(items), tuple(problems), **details) if items else None
