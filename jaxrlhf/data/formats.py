# SPDX-License-Identifier: Apache-2.0
"""Layouts of rows, read into examples of a few kinds.

A format is one function `(row, origin) -> Example` and one line of FORMATS at the end of the file,
which names its columns. TRL's columns come first in spirit; well-known sets are recognised by their
shape. To add one, write its function and its line, and name it in `config.data.Format`.

Kinds:  text | messages | prompt | prompt_completion | preference | unpaired | stepwise | ranked |
tokenized.  A *turn* (prompt, completion, chosen...) is either text, or a list of messages
`{"role", "content"}` that a chat template will render.
"""

import dataclasses
import json
import re
import string
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxrlhf.data.order import permutation
from jaxrlhf.data.sources import SKIPPING, Origin, RowError, Rows, nearest
from jaxrlhf.errors import DataError

Row = Mapping[str, Any]
Message = dict[str, Any]  # role, content, and what else a template may use (tool_calls, name)
Turn = str | list[Message]


@dataclasses.dataclass(frozen=True)
class Example:
    """One example of any kind; the fields of its kind are set."""

    kind: str
    origin: Origin
    prompt: Turn = ""
    completion: Turn = ""  # of text: the text; of messages: the whole chat
    chosen: Turn = ""
    rejected: Turn = ""
    completions: tuple[Turn, ...] = ()
    ranks: tuple[float, ...] = ()  # of ranked, smaller is better; one of ranks and ratings
    ratings: tuple[float, ...] = ()  # of ranked, larger is better
    labels: tuple[bool, ...] = ()  # of stepwise, one a step; of unpaired, one
    input_ids: tuple[int, ...] = ()
    completion_mask: tuple[bool, ...] | None = None
    margin: float | None = None
    ref_logprobs: tuple[float, float] | None = None  # of preference: chosen, rejected
    tools: Any = None
    # Examples that share a name here never straddle a split; none = by prompt.
    groups: tuple[str, ...] = ()
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the original row


@dataclasses.dataclass(frozen=True)
class Format:
    """How one layout is recognised and read.

    columns: those every row must have, for recognition and errors.
    read: one row to one example. gather (instead): all rows to examples, where several rows make
        one, as when statements are paired.
    matches: what else must hold of a row, beyond its columns.
    template: the template used for its chats where neither config nor tokenizer names one.
    """

    about: str
    columns: tuple[str, ...]
    read: Callable[[Row, Origin], Example] | None = None
    gather: Callable[[Sequence[tuple[Row, Origin]], int], Iterator[Example]] | None = None
    matches: Callable[[Row], bool] = lambda row: True
    template: str | None = None


# --- reading columns -------------------------------------------------------------------------


def _text(row: Row, column: str, origin: Origin) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise RowError(
            f"{origin}: column {column!r} must be text, found {type(value).__name__} "
            f"{_short(value)}"
        )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}


def messages_of(value: Any, column: str, origin: Origin) -> list[Message]:
    """Messages with role and content, from either spelling (role/content or from/value)."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(
            f"{origin}: column {column!r} must be a non-empty list of messages, found "
            f"{type(value).__name__} {_short(value)}"
        )
    messages = []
    for number, message in enumerate(value):
        place = f"{origin}: {column}[{number}]"
        if not isinstance(message, Mapping):
            raise RowError(
                f"{place}: a message is an object with role and content, found {_short(message)}"
            )
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise RowError(
                f"{place}: role {role!r} is not known{nearest(str(role), ROLES)}; expected one of "
                f"{', '.join(sorted(set(ROLES.values())))} under 'role' (or 'from')"
            )
        content = message.get("content", message.get("value"))
        if content is None and message.get("tool_calls"):
            content = ""
        if isinstance(content, Sequence) and not isinstance(content, str):
            parts = []
            for part in content:
                if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
                    raise RowError(f"{place}: content of type {kind!r} is not text")
                parts.append(part["text"])
            content = "".join(parts)
        if not isinstance(content, str):
            raise RowError(
                f"{place}: 'content' (or 'value') must be text, found {_short(content)}; "
                f"the message's keys are {', '.join(map(str, message))}"
            )
        other = {
            k: v
            for k, v in message.items()
            if k not in ("role", "from", "content", "value") and v is not None
        }
        messages.append({"role": ROLES[role], "content": content, **other})
    return messages


def _turn(row: Row, column: str, origin: Origin, role: str | None = None) -> Turn:
    """Text, or messages; a text stays text unless `role` makes it a message."""
    value = row[column]
    if isinstance(value, (str, int, float)) or value is None:
        text = _text(row, column, origin)
        return [{"role": role, "content": text}] if role else text
    return messages_of(value, column, origin)


def _tools(row: Row, origin: Origin) -> Any:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            return json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise RowError(f"{origin}: column 'tools' is text but not JSON") from None
    return tools or None


def _number(row: Row, column: str, origin: Origin) -> float:
    value = row[column]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise RowError(f"{origin}: column {column!r} must be a number, found {_short(value)}")
    return number


def _bool(value: Any, column: str, origin: Origin) -> bool:
    table = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    known = table.get(str(value).strip().lower())
    if known is None:
        raise RowError(f"{origin}: {column!r} must be true or false, found {_short(value)}")
    return known


def _list(row: Row, column: str, origin: Origin, length: int | None = None) -> list[Any]:
    value = row[column]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowError(f"{origin}: column {column!r} must be a list, found {_short(value)}")
    if length is not None and len(value) != length:
        raise RowError(
            f"{origin}: column {column!r} has {len(value)} entries for {length} completions"
        )
    return list(value)


# --- TRL's layouts ---------------------------------------------------------------------------


def text(row: Row, origin: Origin) -> Example:
    """`text`: plain text, all of it trained."""
    return Example("text", origin, completion=_text(row, "text", origin))


def messages(row: Row, origin: Origin) -> Example:
    """`messages`: a chat; the assistant's turns are trained, and without one it is a prompt."""
    column = next(c for c in ("messages", "conversations") if c in row)
    chat = messages_of(row[column], column, origin)
    if isinstance(row.get("system"), str) and row["system"] and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": row["system"]})
    return Example("messages", origin, completion=chat, tools=_tools(row, origin))


def prompt(row: Row, origin: Origin) -> Example:
    """`prompt`: text or messages; other columns are handed to reward functions."""
    turn = _turn(row, "prompt", origin)
    return Example("prompt", origin, prompt=turn, tools=_tools(row, origin))


def _same_form(origin: Origin, prompt: Turn, *completions: Turn) -> None:
    if any(isinstance(c, str) != isinstance(prompt, str) for c in completions):
        raise RowError(
            f"{origin}: prompt and completion must both be text or both lists of messages"
        )


def _prompt_and_reply(row: Row, origin: Origin) -> tuple[Turn, Turn]:
    turn = _turn(row, "prompt", origin)
    role = None if isinstance(turn, str) else "assistant"
    reply = _turn(row, "completion", origin, role)
    _same_form(origin, turn, reply)
    return turn, reply


def prompt_completion(row: Row, origin: Origin) -> Example:
    """`prompt` + `completion`: the completion is trained. Text after a chat is the assistant's."""
    turn, reply = _prompt_and_reply(row, origin)
    return Example("prompt_completion", origin, turn, reply, tools=_tools(row, origin))


def _preference(row: Row, origin: Origin, prompt: Turn, chosen: Turn, rejected: Turn) -> Example:
    _same_form(origin, prompt, chosen, rejected)
    margin = _number(row, "margin", origin) if row.get("margin") is not None else None
    names = ("ref_chosen_logps", "ref_rejected_logps")
    ref = None
    if all(row.get(name) is not None for name in names):
        ref = (_number(row, names[0], origin), _number(row, names[1], origin))
    return Example(
        "preference",
        origin,
        prompt,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        ref_logprobs=ref,
        tools=_tools(row, origin),
    )


def preference(row: Row, origin: Origin) -> Example:
    """`chosen` + `rejected`, and `prompt` unless it is their common beginning.

    Messages: the prompt is the longest common run of whole messages. Texts without a prompt column
    have the empty prompt (a common run of letters or tokens is no prompt: answers that begin alike
    would be cut in the middle). A prompt text beside whole chats is already inside them; beside
    replies alone it is the user's turn before them.
    """
    if "prompt" in row:
        chosen, rejected = _turn(row, "chosen", origin), _turn(row, "rejected", origin)
        turn = _turn(row, "prompt", origin)
        if not isinstance(turn, str) and isinstance(row["chosen"], str):
            chosen = _turn(row, "chosen", origin, role="assistant")
            rejected = _turn(row, "rejected", origin, role="assistant")
        elif isinstance(turn, str) and not isinstance(chosen, str):
            _same_form(origin, chosen, rejected)
            assert not isinstance(rejected, str)
            if not turn.strip() or any(m["role"] == "user" for m in [*chosen, *rejected]):
                return _implicit(row, origin)
            begin, chosen, rejected = split_common(chosen, rejected)
            turn = [*begin, {"role": "user", "content": turn}]  # after a common system message
        elif chosen[: len(turn)] == turn == rejected[: len(turn)] and not isinstance(turn, str):
            chosen, rejected = chosen[len(turn) :], rejected[len(turn) :]
        return _preference(row, origin, turn, chosen, rejected)
    return _implicit(row, origin)


def _implicit(row: Row, origin: Origin) -> Example:
    chosen, rejected = _turn(row, "chosen", origin), _turn(row, "rejected", origin)
    if isinstance(chosen, str) or isinstance(rejected, str):
        return _preference(row, origin, "", chosen, rejected)
    return _preference(row, origin, *split_common(chosen, rejected))


def split_common(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected): the common messages, never the last one of either chat."""
    n = 0
    while n < min(len(chosen), len(rejected)) - 1 and chosen[n] == rejected[n]:
        n += 1
    # identical chats differ nowhere; the last assistant turn is then the completion
    return chosen[:n], chosen[n:], rejected[n:]


def chat_preference(row: Row, origin: Origin) -> Example:
    """llama-factory: `conversations` is the prompt, `chosen` and `rejected` one message each."""
    column = "conversations" if "conversations" in row else "messages"
    turn = messages_of(row[column], column, origin)
    chosen = _turn(row, "chosen", origin, role="assistant")
    rejected = _turn(row, "rejected", origin, role="assistant")
    return _preference(row, origin, turn, chosen, rejected)


def unpaired(row: Row, origin: Origin) -> Example:
    """`prompt` + `completion` + `label`, or `messages` + `label`: good or bad on its own."""
    if "prompt" in row:
        turn, reply = _prompt_and_reply(row, origin)
    else:
        chat = messages_of(row["messages"], "messages", origin)
        if chat[-1]["role"] != "assistant":
            raise RowError(
                f"{origin}: the last message must be the assistant's: it is what is rated"
            )
        turn, reply = chat[:-1], chat[-1:]
    label = _bool(row["label"], "label", origin)
    return Example("unpaired", origin, turn, reply, labels=(label,), tools=_tools(row, origin))


def stepwise(row: Row, origin: Origin) -> Example:
    """`prompt` + `completions` (steps) + `labels` (one a step)."""
    steps = _list(row, "completions", origin)
    labels = _list(row, "labels", origin, len(steps))
    return Example(
        "stepwise",
        origin,
        _turn(row, "prompt", origin),
        completions=tuple(_text({"completions": s}, "completions", origin) for s in steps),
        labels=tuple(_bool(label, "labels", origin) for label in labels),
    )


def ranked(row: Row, origin: Origin) -> Example:
    """`prompt` + `completions` + `ranks` (1 = best) or `ratings` (larger = better)."""
    turn = _turn(row, "prompt", origin)
    value = _list(row, "completions", origin)
    role = None if isinstance(turn, str) else "assistant"
    replies = tuple(_turn({"completions": v}, "completions", origin, role) for v in value)
    _same_form(origin, turn, *replies)
    if len(replies) < 2:
        raise RowError(f"{origin}: 'completions' has {len(replies)} entries; ranking needs two")
    column = "ranks" if row.get("ranks") is not None else "ratings"
    numbers = tuple(
        _number({column: n}, column, origin) for n in _list(row, column, origin, len(replies))
    )
    if column == "ranks":
        return Example("ranked", origin, turn, completions=replies, ranks=numbers)
    return Example("ranked", origin, turn, completions=replies, ratings=numbers)


def tokenized(row: Row, origin: Origin) -> Example:
    """`input_ids`, with `completion_mask`, `assistant_masks` or `labels` (-100 = not trained)."""
    ids = _list(row, "input_ids", origin)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise RowError(f"{origin}: column 'input_ids' must be a list of whole numbers")
    if wrong := [i for i in ids if not 0 <= i < 2**31]:
        raise RowError(f"{origin}: column 'input_ids' holds {wrong[0]}, which is no token id")
    mask = None
    for column in ("completion_mask", "assistant_masks"):
        if row.get(column) is not None:
            mask = [_bool(m, column, origin) for m in _list(row, column, origin)]
            break
    else:
        if row.get("labels") is not None:
            mask = [label != -100 for label in _list(row, "labels", origin)]
    if mask is not None and len(mask) != len(ids):
        raise RowError(f"{origin}: {len(ids)} input_ids but {len(mask)} mask entries")
    return Example(
        "tokenized",
        origin,
        input_ids=tuple(ids),
        completion_mask=None if mask is None else tuple(mask),
    )


# --- known sets ------------------------------------------------------------------------------


def dialogue(value: str, origin: Origin, column: str = "text") -> list[Message]:
    """Messages of Anthropic's text: "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    headings = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}
    starts = sorted(
        (at, heading)
        for heading in headings
        for at in _occurrences(value if value.startswith("\n\n") else "\n\n" + value, heading)
    )
    text = value if value.startswith("\n\n") else "\n\n" + value
    if not starts or text[: starts[0][0]].strip():
        raise RowError(
            f"{origin}: column {column!r} must begin with '\\n\\nHuman:' or '\\n\\nAssistant:'"
        )
    found = []
    for number, (at, heading) in enumerate(starts):
        end = starts[number + 1][0] if number + 1 < len(starts) else len(text)
        content = text[at + len(heading) : end]
        found.append({"role": headings[heading], "content": content.removeprefix(" ")})
    return found


def _occurrences(text: str, part: str) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def hh_rlhf(row: Row, origin: Origin) -> Example:
    """HH-RLHF: two dialogues as text; the prompt is their common turns."""
    chosen = dialogue(_text(row, "chosen", origin), origin, "chosen")
    rejected = dialogue(_text(row, "rejected", origin), origin, "rejected")
    return _preference(row, origin, *split_common(chosen, rejected))


def ultrafeedback(row: Row, origin: Origin) -> Example:
    """UltraFeedback: `instruction` + `completions` with `response` and `overall_score`."""
    replies, ratings = [], []
    for number, reply in enumerate(_list(row, "completions", origin)):
        if not isinstance(reply, Mapping) or "response" not in reply:
            raise RowError(f"{origin}: completions[{number}] has no 'response'")
        column = "overall_score" if reply.get("overall_score") is not None else "score"
        replies.append([{"role": "assistant", "content": _text(reply, "response", origin)}])
        if column not in reply:
            raise RowError(f"{origin}: completions[{number}] has no 'overall_score'")
        ratings.append(_number(reply, column, origin))
    if len(replies) < 2:
        raise RowError(f"{origin}: 'completions' has {len(replies)} entries; ranking needs two")
    turn: Turn = [{"role": "user", "content": _text(row, "instruction", origin)}]
    return Example("ranked", origin, turn, completions=tuple(replies), ratings=tuple(ratings))


def tldr_comparison(row: Row, origin: Origin) -> Example:
    """OpenAI's TL;DR comparisons: a post, two summaries, the index of the better one."""
    info, summaries, choice = row["info"], _list(row, "summaries", origin), row["choice"]
    if len(summaries) != 2 or choice not in (0, 1) or not isinstance(info, Mapping):
        raise RowError(f"{origin}: expected info, two summaries and choice 0 or 1")
    if not all(isinstance(summary, Mapping) and "text" in summary for summary in summaries):
        raise RowError(
            f"{origin}: 'summaries' must hold objects with 'text', found {_short(summaries)}"
        )
    body = info.get("post") or info.get("article")
    if not isinstance(body, str):
        raise RowError(f"{origin}: info has neither 'post' nor 'article'")
    lines = [
        f"SUBREDDIT: r/{info['subreddit']}" if info.get("subreddit") else "",
        f"TITLE: {info['title']}" if info.get("title") else "",
        f"POST: {body}",
        "TL;DR:",
    ]
    texts = [" " + _text(s, "text", origin).strip() for s in summaries]
    better = int(choice)  # 1.0 where a table holds it as a float
    return _preference(
        row, origin, "\n\n".join(filter(None, lines)), texts[better], texts[1 - better]
    )


def _instruction(row: Row, origin: Origin) -> str:
    task = _text(row, "instruction", origin)
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"{origin}: column 'input' must be text, found {_short(extra)}")
    return f"{task}\n\n{extra}" if extra else task


def alpaca(row: Row, origin: Origin) -> Example:
    """Alpaca: `instruction`, `input` (may be empty), `output`."""
    turn: Turn = [{"role": "user", "content": _instruction(row, origin)}]
    reply: Turn = [{"role": "assistant", "content": _text(row, "output", origin)}]
    return Example("prompt_completion", origin, turn, reply)


def seed_task(row: Row, origin: Origin) -> Example:
    """Self-Instruct: `instruction` + `instances`, of which the first is taken."""
    instances = _list(row, "instances", origin)
    if not instances or not isinstance(instances[0], Mapping) or "output" not in instances[0]:
        raise RowError(f"{origin}: 'instances' holds no output")
    return alpaca({**instances[0], "instruction": row["instruction"]}, origin)


def question_answer(row: Row, origin: Origin) -> Example:
    """`question` + `answer` (GSM8K): the answer is trained."""
    turn = f"Question: {_text(row, 'question', origin)}\nAnswer:"
    return Example("prompt_completion", origin, turn, " " + _text(row, "answer", origin))


def pandalm(row: Row, origin: Origin) -> Example:
    """PandaLM: two responses and three votes (0 = tie); the rating is the number of votes."""
    votes = [v for k, v in row.items() if k.startswith("annotator")]
    if not votes or any(v not in (0, 1, 2) for v in votes):
        raise RowError(f"{origin}: the annotators' votes must be 0, 1 or 2, found {_short(votes)}")
    count = Counter(votes)
    # a majority decides; a split vote, like a majority of zeros, is a tie
    best, size = count.most_common(1)[0]
    winner = best if 2 * size > len(votes) else 0
    replies = tuple(
        [{"role": "assistant", "content": _text(row, c, origin)}]
        for c in ("response1", "response2")
    )
    turn: Turn = [{"role": "user", "content": _instruction(row, origin)}]
    ratings = (float(winner == 1), float(winner == 2))
    return Example("ranked", origin, turn, completions=replies, ratings=ratings)


def llmbar(row: Row, origin: Origin) -> Example:
    """LLMBar: `input`, `output_1`, `output_2` and the number of the better one in `label`."""
    if str(row["label"]) not in ("1", "2"):
        raise RowError(f"{origin}: column 'label' must be 1 or 2, found {_short(row['label'])}")
    replies: list[Turn] = [
        [{"role": "assistant", "content": _text(row, c, origin)}] for c in ("output_1", "output_2")
    ]
    if str(row["label"]) == "2":
        replies.reverse()
    turn: Turn = [{"role": "user", "content": _text(row, "input", origin)}]
    return _preference(row, origin, turn, *replies)


def persona(rows: Sequence[tuple[Row, Origin]], seed: int) -> Iterator[Example]:
    """Anthropic's personas: the k-th statement that matches a behaviour (answer Yes) with the k-th
    that does not, after a seeded shuffle of each; a behaviour is a file."""
    behaviours: dict[str, tuple[list, list]] = {}
    for row, origin in rows:
        statement = _text(row, "statement", origin)
        answer = _text(row, "answer_matching_behavior", origin).strip().lower()
        if answer not in ("yes", "no"):
            raise RowError(f"{origin}: answer_matching_behavior must be Yes or No")
        name = origin.file.replace("\\", "/").rsplit("/", 1)[-1].split(".")[0]
        behaviours.setdefault(name, ([], []))[answer == "no"].append((row, origin, statement))
    for name, (yes, no) in sorted(behaviours.items()):
        yield from _paired(yes, no, seed, f"A person with the trait {name} says:", " ", name)


def labelled_sentence(rows: Sequence[tuple[Row, Origin]], seed: int) -> Iterator[Example]:
    """`label` + `sentence` (SST): the k-th positive with the k-th negative, seeded shuffle."""
    sides: tuple[list, list] = ([], [])
    for row, origin in rows:
        entry = (row, origin, _text(row, "sentence", origin))
        sides[not _bool(row["label"], "label", origin)].append(entry)
    yield from _paired(*sides, seed, "", "", "")


def _statement(text: str) -> str:
    """What makes two statements one: their words, whatever the case, spaces and last full stop."""
    return " ".join(text.casefold().split()).strip(string.punctuation)


def _paired(
    good: Sequence, bad: Sequence, seed: int, prompt: str, space: str, name: str
) -> Iterator[Example]:
    salt = zlib.crc32(name.encode())
    orders = (permutation(len(side), seed, salt, stream) for stream, side in enumerate((good, bad)))
    for i, j in zip(*orders, strict=False):
        (row, origin, chosen), (_, other, rejected) = good[i], bad[j]
        yield Example(
            "preference",
            origin,
            prompt,
            chosen=space + chosen,
            rejected=space + rejected,
            # every pair has the same prompt: a statement is what must not be on both sides
            groups=(_statement(chosen), _statement(rejected)),
            columns={**row, "rejected_from": str(other)},
        )


# --- the table -------------------------------------------------------------------------------


def _is_dialogue(row: Row) -> bool:
    return all(
        isinstance(row[c], str) and row[c].lstrip().startswith(("Human:", "Assistant:"))
        for c in ("chosen", "rejected")
    )


def _list_of_objects(column: str) -> Callable[[Row], bool]:
    return lambda row: (
        isinstance(row[column], Sequence)
        and bool(row[column])
        and isinstance(row[column][0], Mapping)
    )


# First match wins, so the more particular stand first.
FORMATS: dict[str, Format] = {
    "tokenized": Format("rows of token ids", ("input_ids",), tokenized),
    "tldr_comparison": Format(
        "OpenAI's summary comparisons", ("info", "summaries", "choice"), tldr_comparison
    ),
    "ultrafeedback": Format(
        "UltraFeedback, rated completions",
        ("instruction", "completions"),
        ultrafeedback,
        matches=_list_of_objects("completions"),
        template="plain",
    ),
    "pandalm": Format(
        "two responses and human votes",
        ("instruction", "response1", "response2", "annotator1"),
        pandalm,
        template="plain",
    ),
    "llmbar": Format(
        "two outputs and the better one",
        ("input", "output_1", "output_2", "label"),
        llmbar,
        template="plain",
    ),
    "persona": Format(
        "statements that do or do not match a trait",
        ("statement", "answer_matching_behavior"),
        gather=persona,
    ),
    "labelled_sentence": Format(
        "sentences with a label 0 or 1", ("sentence", "label"), gather=labelled_sentence
    ),
    "chat_preference": Format(
        "a chat and two next turns", ("conversations", "chosen", "rejected"), chat_preference
    ),
    "chat_preference_messages": Format(
        "a chat and two next turns",
        ("messages", "chosen", "rejected"),
        chat_preference,
        matches=lambda row: "prompt" not in row and isinstance(row["chosen"], (str, Mapping)),
    ),
    "hh_rlhf": Format(
        "two dialogues as 'Human: ... Assistant: ...' text",
        ("chosen", "rejected"),
        hh_rlhf,
        matches=lambda row: "prompt" not in row and _is_dialogue(row),
        template="hh",
    ),
    "preference": Format(
        "a better and a worse completion (prompt explicit or their common messages)",
        ("chosen", "rejected"),
        preference,
    ),
    "ranked": Format(
        "completions with ranks, 1 = best", ("prompt", "completions", "ranks"), ranked
    ),
    "rated": Format(
        "completions with ratings, larger = better", ("prompt", "completions", "ratings"), ranked
    ),
    "stepwise": Format("steps, each right or wrong", ("prompt", "completions", "labels"), stepwise),
    "unpaired": Format(
        "a completion that is good or bad", ("prompt", "completion", "label"), unpaired
    ),
    "unpaired_messages": Format(
        "a chat whose last turn is good or bad", ("messages", "label"), unpaired
    ),
    "prompt_completion": Format(
        "a prompt and what should follow", ("prompt", "completion"), prompt_completion
    ),
    "messages": Format("a chat, role and content", ("messages",), messages),
    "sharegpt": Format("a chat, from and value", ("conversations",), messages),
    "alpaca": Format(
        "instruction, input, output", ("instruction", "output"), alpaca, template="plain"
    ),
    "seed_task": Format(
        "Self-Instruct seed tasks", ("instruction", "instances"), seed_task, template="plain"
    ),
    "question_answer": Format("a question and its answer", ("question", "answer"), question_answer),
    "prompt": Format("prompts alone", ("prompt",), prompt),
    "text": Format("plain text", ("text",), text),
}


# --- choosing and reading --------------------------------------------------------------------


def _without_nulls(row: Row) -> Row:
    """A column that is null is absent: files with mixed rows fill the others with null."""
    return {k: v for k, v in row.items() if v is not None} if None in row.values() else row


def _suits(form: Format, row: Row) -> bool:
    return all(c in row for c in form.columns) and form.matches(row)


_PLAIN = re.compile(r"(?!(?i:null|true|false)$)[A-Za-z_./~][\w./~-]*")


def with_column_map(source: str, mapping: Mapping[str, str]) -> str:
    """The setting that reads a source under our names, {ours: theirs}, as a word of the shell."""

    def written(text: str) -> str:
        return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)

    pairs = ", ".join(f"{written(ours)}: {written(theirs)}" for ours, theirs in mapping.items())
    return f"'data.train={{source: {written(source)}, column_map: {{{pairs}}}}}'"


def detect(
    rows: Sequence[Row],
    origins: Sequence[Origin] | None = None,
    *,
    first: Sequence[str] = (),
) -> str:
    """The format most of the first 100 rows have.

    Args:
        first: formats that are tried before the others.

    Raises:
        DataError: no format suits; names the place, the columns found, those expected, the nearest
            match and the column_map line that would mend it.
    """
    votes: Counter[str] = Counter()
    order = dict.fromkeys((*first, *FORMATS))
    for row in map(_without_nulls, rows[:100]):
        name = next((name for name in order if _suits(FORMATS[name], row)), None)
        if name:
            votes[name] += 1
    if votes:
        return votes.most_common(1)[0][0]
    origin = origins[0] if origins else Origin("rows", row=0)
    raise DataError(f"{origin}: {_no_format(_without_nulls(rows[0]), origin)}")


def _no_format(row: Row, origin: Origin) -> str:
    found = list(map(str, row))
    lines = [f"no known format has the columns found: {', '.join(found) or 'none'}"]
    mends = []
    for name, form in FORMATS.items():
        missing = [c for c in form.columns if c not in row]
        spare = [c for c in found if c not in form.columns]
        mapping = _guess(missing, spare)
        if missing and len(mapping) == len(missing):
            mends.append((len(form.columns), name, mapping))
    if mends:
        _, name, mapping = max(mends, key=lambda m: m[0])
        lines.append(f"nearest is {name}: say  {with_column_map(origin.file, mapping)}")
    else:
        names = {"prompt": "YOUR_COLUMN", "completion": "YOUR_COLUMN"}
        lines.append(f"name them with  {with_column_map(origin.file, names)}")
    expected = dict.fromkeys("+".join(form.columns) for form in FORMATS.values())
    lines.append(f"expected one of: {'; '.join(expected)}")
    return "\n  ".join(lines)


SYNONYMS = {
    "prompt": ("query", "question", "instruction", "input", "context", "source"),
    "completion": ("response", "answer", "output", "target", "reply", "summary"),
    "chosen": ("preferred", "better", "winner", "positive", "response_chosen", "good", "win"),
    "rejected": ("dispreferred", "worse", "loser", "negative", "response_rejected", "bad", "lose"),
    "text": ("content", "document", "body", "story", "sentence"),
    "messages": ("chat", "conversation", "dialogue", "dialog", "turns"),
    "ranks": ("rank", "ranking"),
    "ratings": ("rating", "scores", "score"),
    "completions": ("responses", "answers", "outputs", "candidates"),
    "label": ("labels", "is_good"),
}


def _guess(missing: Sequence[str], spare: Sequence[str]) -> dict[str, str]:
    """{expected: found} for the missing columns that have a likely counterpart."""
    import difflib

    mapping: dict[str, str] = {}
    for column in missing:
        left = [c for c in spare if c not in mapping.values()]
        lowered = {c.lower().strip(): c for c in left}
        names = difflib.get_close_matches(column, lowered, n=1, cutoff=0.6)
        names += [s for s in SYNONYMS.get(column, ()) if s in lowered]
        names += [n for n in lowered for s in (column, *SYNONYMS.get(column, ())) if s in n]
        if names:
            mapping[column] = lowered[names[0]]
    return mapping


def other_kind(example: Example, needed: Sequence[str]) -> str:
    """What an example has instead of the columns `needed`, and the line that would mend it."""
    found = list(map(str, example.columns))
    missing = [c for c in needed if example.columns.get(c) is None]
    mapping = _guess(missing, [c for c in found if example.columns[c] is not None])
    mend = {ours: mapping.get(ours, "YOUR_COLUMN") for ours in missing}
    said = f"columns found: {', '.join(found) or 'none'}"
    line = with_column_map(example.origin.file, mend)
    return said + (f"\n  say  {line}" if missing else "")


def _missing_columns(name: str, form: Format, row: Row, origin: Origin) -> str:
    missing = [c for c in form.columns if c not in row]
    if not missing:
        return f"the row's values do not have the form of format {name!r} ({form.about})"
    found = list(map(str, row))
    mapping = _guess(missing, [c for c in found if c not in form.columns])
    mend = with_column_map(origin.file, mapping or {missing[0]: "YOUR_COLUMN"})
    return (
        f"column {', '.join(map(repr, missing))} is missing\n"
        f"  found: {', '.join(found) or 'none'}\n"
        f"  expected by format {name!r}: {', '.join(form.columns)}\n  say  {mend}"
    )


@dataclasses.dataclass(frozen=True)
class Examples(Sequence):
    """Examples of one source, and what was left out on the way."""

    rows: Rows
    format: str
    examples: list[Example]
    bad: int = 0
    bad_examples: tuple[str, ...] = ()
    spare: int = 0  # rows without a partner, where two make one example

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


def read(
    rows: Rows, *, on_bad_row: str = "error", seed: int = 0, first: Sequence[str] = ()
) -> Examples:
    """Rows of a source to examples, by the source's format or the one its columns suit.

    seed: of the shuffle in formats that pair rows (persona, labelled_sentence).
    first: formats that its columns are held against before the others.

    Raises:
        DataError: unknown format, or (on_bad_row="error") a row that does not suit it.
    """
    name = rows.spec.format or detect(rows.rows, rows.origins, first=first)
    form = FORMATS.get(name)
    if form is None:
        raise DataError(
            f"data source {rows.spec.source}: unknown format {name!r}{nearest(name, FORMATS)}; "
            f"formats are {', '.join(FORMATS)}"
        )
    bad, shown = rows.bad, list(rows.bad_examples)

    def reject(error: RowError) -> None:
        nonlocal bad
        if on_bad_row == "error":
            raise RowError(f"{error}{SKIPPING}") from None
        bad += 1
        if len(shown) < 5:
            shown.append(str(error))

    examples: list[Example] = []
    spare = 0
    suited: list[tuple[Row, Origin]] = []
    for row, origin in zip(rows.rows, rows.origins, strict=True):
        row = _without_nulls(row)
        try:
            if not all(c in row for c in form.columns):
                raise RowError(f"{origin}: {_missing_columns(name, form, row, origin)}")
            if form.read is not None:
                example = form.read(row, origin)
                examples.append(dataclasses.replace(example, columns=row))
            elif form.gather is not None:
                list(form.gather([(row, origin)], seed))  # a bad row shows itself alone
                suited.append((row, origin))
        except RowError as error:
            reject(error)
    if form.gather is not None:
        examples = list(form.gather(suited, seed))
        spare = len(suited) - 2 * len(examples)
    if not examples:
        why = f"; first of {bad} bad rows: {shown[0]}" if shown else ""
        raise DataError(
            f"data source {rows.spec.source}: no examples of format {name!r} ({form.about}){why}"
        )
    return Examples(rows, name, examples, bad, tuple(shown), spare)
