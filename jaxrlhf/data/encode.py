# SPDX-License-Identifier: Apache-2.0
"""Examples to token rows, each with the mask of what is trained.

A row is [BOS] + prompt ids + completion ids + [EOS]: BOS as the tokenizer adds it, exactly once;
EOS exactly once, trained. Prompt and completion are encoded apart and laid end to end, so the ids
of a prompt are the same here, when it is scored, and when it is sampled from. Rows are kept in flat
arrays: everything is tokenized once, before the first step.
"""

import dataclasses
import functools
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxrlhf.data import formats, pairs, sources, templates
from jaxrlhf.data.formats import Example, Turn
from jaxrlhf.data.sources import OnBadRow, Source
from jaxrlhf.data.templates import Piece, Template
from jaxrlhf.data.tokenizer import check_ids, codec, tokenizer_digest
from jaxrlhf.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Row(NamedTuple):
    """One encoded row."""

    tokens: np.ndarray  # int32 [n]
    completion_mask: np.ndarray  # bool [n], True where trained or scored
    prompt_length: int  # tokens before the first trained one


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the data; `str()` is the summary a run prints."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)  # reason -> rows
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)  # min, p50 ... max
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # observation -> rows
    examples: tuple[str, ...] = ()  # of rows dropped: place and reason

    def __str__(self) -> str:
        share = self.trained_tokens / self.tokens if self.tokens else 0.0
        lines = [
            f"{self.rows:,} rows, {self.tokens:,} tokens, {self.trained_tokens:,} trained "
            f"({share:.0%})"
        ]
        if self.lengths:
            lines.append("lengths: " + ", ".join(f"{k} {v:,}" for k, v in self.lengths.items()))
        if self.truncated:
            lines.append(f"truncated: {self.truncated:,} rows")
        if self.dropped:
            total = sum(self.dropped.values())
            parts = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items())
            lines.append(f"dropped: {total:,} rows ({parts})")
        lines += [f"note: {n:,} {what}" for what, n in self.notes.items()]
        lines += [f"  {text}" for text in self.examples]
        return "\n".join(lines)


class Part(NamedTuple):
    """A stretch [start, stop) of a set that came from one source."""

    name: str
    start: int
    stop: int
    weight: float | None


@dataclasses.dataclass(frozen=True)
class RowSet:
    """Token rows laid end to end.

    tokens, completion_mask: [total]; row i is offsets[i]:offsets[i + 1].
    groups: rows with the same number (same prompt) never straddle a train/eval split.
    origins: `file:line` of each row, for `show` and errors.
    templates: those that rendered its chats; none where there are only texts.
    """

    tokens: np.ndarray  # int32 [total]
    completion_mask: np.ndarray  # bool [total]
    offsets: np.ndarray  # int64 [n + 1]
    prompt_lengths: np.ndarray  # int32 [n]
    groups: np.ndarray  # uint64 [n]
    origins: tuple[str, ...]
    parts: tuple[Part, ...]
    counts: Counts
    digest: str
    templates: tuple[Template, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens of each row."""
        return np.diff(self.offsets)

    def row(self, i: int) -> Row:
        """The i-th row; its arrays are views."""
        cut = slice(self.offsets[i], self.offsets[i + 1])
        return Row(self.tokens[cut], self.completion_mask[cut], int(self.prompt_lengths[i]))

    def __iter__(self) -> Iterator[Row]:
        return (self.row(i) for i in range(len(self)))

    def take(self, indices: Sequence[int] | np.ndarray) -> "RowSet":
        """The rows of these indices (ascending keeps the parts apart), with counts of their own."""
        indices = np.asarray(indices, np.int64)
        rows = [self.row(int(i)) for i in indices]
        kept = dataclasses.replace(
            self,
            **_flat(rows),
            groups=self.groups[indices],
            origins=tuple(self.origins[i] for i in indices),
            parts=_take_parts(self.parts, indices),
            digest=_digest(self.digest, indices),
        )
        return dataclasses.replace(kept, counts=_count(rows))


@dataclasses.dataclass(frozen=True)
class PairSet:
    """Pairs of rows with a common prompt."""

    chosen: RowSet
    rejected: RowSet
    margin: np.ndarray  # float32 [n], 0 where unknown
    ref_logprobs: np.ndarray | None  # float32 [n, 2] where every row of the data had them
    counts: Counts
    digest: str

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens of the longer row of each pair."""
        return np.maximum(self.chosen.lengths, self.rejected.lengths)

    @property
    def groups(self) -> np.ndarray:
        return self.chosen.groups

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.chosen.parts

    @property
    def templates(self) -> tuple[Template, ...]:
        return self.chosen.templates

    def take(self, indices: Sequence[int] | np.ndarray) -> "PairSet":
        """The pairs of these indices."""
        indices = np.asarray(indices, np.int64)
        chosen, rejected = self.chosen.take(indices), self.rejected.take(indices)
        return PairSet(
            chosen,
            rejected,
            self.margin[indices],
            None if self.ref_logprobs is None else self.ref_logprobs[indices],
            _count([*chosen, *rejected], number=len(indices)),
            _digest(self.digest, indices),
        )


@dataclasses.dataclass(frozen=True)
class PromptSet:
    """Prompts to sample from, with the row each came from (for reward functions)."""

    tokens: np.ndarray  # int32 [total]
    offsets: np.ndarray  # int64 [n + 1]
    prompts: tuple[Turn, ...]  # as in the data: text or messages
    columns: tuple[Mapping[str, Any], ...]  # the other columns of the row
    groups: np.ndarray  # uint64 [n]
    origins: tuple[str, ...]
    parts: tuple[Part, ...]
    counts: Counts
    digest: str
    templates: tuple[Template, ...]  # those that rendered its chats

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens of each prompt."""
        return np.diff(self.offsets)

    def prompt_ids(self, i: int) -> np.ndarray:
        """int32 ids of the i-th prompt, BOS included."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def take(self, indices: Sequence[int] | np.ndarray) -> "PromptSet":
        """The prompts of these indices."""
        indices = np.asarray(indices, np.int64)
        rows = [_prompt_row(self.prompt_ids(int(i))) for i in indices]
        flat = _flat(rows)
        return PromptSet(
            flat["tokens"],
            flat["offsets"],
            tuple(self.prompts[i] for i in indices),
            tuple(self.columns[i] for i in indices),
            self.groups[indices],
            tuple(self.origins[i] for i in indices),
            _take_parts(self.parts, indices),
            _count(rows),
            _digest(self.digest, indices),
            self.templates,
        )


# --- truncation ------------------------------------------------------------------------------


def _keep_all(ids: list[int], mask: list[bool], limit: int, bos: int):
    return None


def _truncate_left(ids: list[int], mask: list[bool], limit: int, bos: int):
    """BOS + the last tokens."""
    keep = limit - bos
    if keep < 1:
        return None
    return ids[:bos] + ids[-keep:], mask[:bos] + mask[-keep:]


def _truncate_right(ids: list[int], mask: list[bool], limit: int, bos: int):
    """The first tokens; the row then has no EOS."""
    return ids[:limit], mask[:limit]


SHORTENING = ", or set data.truncation to drop, left or right"
# What happens to a row longer than max_length: None = it is not kept.
TRUNCATIONS: dict[str, Callable] = {
    "error": _keep_all,
    "drop": _keep_all,
    "left": _truncate_left,
    "right": _truncate_right,
    "split": _keep_all,  # text only: consecutive rows of max_length
}


def _check_truncation(name: str, max_length: int | None, allowed: Iterable[str]) -> str:
    name = name.replace("_", "-").removeprefix("truncate-")
    if name not in allowed:
        raise DataError(
            f"truncation {name!r} is not known here{sources.nearest(name, allowed)}; "
            f"it is one of {', '.join(allowed)}"
        )
    if max_length is not None and max_length < 2:
        raise DataError(f"data.max_length = {max_length}: a row needs at least 2 tokens")
    return name


# --- examples to pieces ----------------------------------------------------------------------


class _Pieces(NamedTuple):
    """A row before it is tokenized; the first piece begins the text."""

    pieces: list[Piece]
    eos: bool  # whether EOS may be added at its end


class _Dropped(Exception):
    """The row is left out, for this reason."""


def _blank(turn: Turn) -> bool:
    if isinstance(turn, str):
        return not turn.strip()
    return not any(str(m["content"]).strip() or m.get("tool_calls") for m in turn)


def _continuation(
    prompt: Turn,
    completion: Turn,
    *,
    template: Callable[[], Template],
    tokenizer: "PreTrainedTokenizerBase",
    tools: Any = None,
    empty: bool = False,
) -> _Pieces:
    """The row of a prompt and what follows it; a blank completion only where `empty` allows it."""
    if _blank(completion) and not empty:
        raise _Dropped("empty completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _Pieces([(prompt, False), (completion, True)], eos=True)
    assert not isinstance(prompt, str)
    assert not isinstance(completion, str)
    if not any(m["role"] == "assistant" for m in completion):
        raise _Dropped("no assistant turn in the completion")
    pieces = templates.render(
        template(),
        [*prompt, *completion],
        tokenizer,
        completion_from=len(prompt),
        tools=tools,
    )
    return _Pieces(pieces, eos=True)


class _Encoder:
    """Shared by the encode_* functions: tokenizer, template and what is counted."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        template: str | None,
        max_length: int | None,
        truncation: str,
        append_eos: bool,
        vocab_size: int | None,
    ):
        self.tokenizer, self.kit = tokenizer, codec(tokenizer)
        self.template_name = template
        self.max_length, self.truncation, self.append_eos = max_length, truncation, append_eos
        self.vocab_size = vocab_size
        self.templates: tuple[Template, ...] = ()  # those that chats asked for
        self.truncated = 0
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.examples: list[str] = []
        if append_eos and self.kit.eos_id is None:
            raise DataError(
                "the tokenizer has no EOS token, so completions could never end; set "
                "tokenizer.eos_token, or append_eos=False"
            )

    def template(self, default: str | None) -> Callable[[], Template]:
        """Chosen when the first chat asks for it: plain text needs none."""

        def choose() -> Template:
            found = templates.choose_template(self.tokenizer, self.template_name, default=default)
            self.templates = tuple(dict.fromkeys((*self.templates, found)))
            return found

        return functools.cache(choose)

    def drop(self, reason: str, origin: object) -> None:
        self.dropped[reason] += 1
        if len(self.examples) < sources.SHOWN:
            self.examples.append(f"{origin}: {reason}")

    def ids(self, rows: Sequence[_Pieces]) -> list[tuple[list[int], list[bool]]]:
        """Ids and mask of each row; the tokenizer sees all of them in two calls."""
        texts: tuple[list[str], list[str]] = ([], [])
        plan: list[list[tuple[int, int, bool]]] = []
        for pieces, _ in rows:
            entries, begun = [], 0
            for text, trained in pieces:
                if text:
                    entries.append((begun, len(texts[begun]), trained))
                    texts[begun].append(text)
                    begun = 1
            plan.append(entries)
        encoded = (self.kit.encode(texts[0]), self.kit.encode(texts[1], continued=True))
        found = []
        prefix = list(self.kit.prefix)
        for entries, row in zip(plan, rows, strict=True):
            ids: list[int] = []
            mask: list[bool] = []
            for which, index, trained in entries:
                piece = encoded[which][index]
                ids += piece
                mask += [trained] * len(piece)
            if ids[: len(prefix)] != prefix:
                ids, mask = prefix + ids, [False] * len(prefix) + mask
            trained = [text for text, flag in row.pieces if flag]
            wanted = row.eos and self.append_eos and bool(trained)
            if wanted and not self.kit.ends_in_control(trained[-1]):
                self._end(ids, mask)
            found.append((ids, mask))
        return found

    def _end(self, ids: list[int], mask: list[bool]) -> None:
        """EOS, trained, after the last trained token (at the end, if the completion is empty)."""
        assert self.kit.eos_id is not None
        end = next((i + 1 for i in range(len(mask) - 1, -1, -1) if mask[i]), len(mask))
        if end < len(ids) and ids[end] == self.kit.eos_id:  # the template wrote it, untrained
            mask[end] = True
        else:
            ids.insert(end, self.kit.eos_id)
            mask.insert(end, True)

    def fit(self, ids: list[int], mask: list[bool], origin: object) -> tuple[list, list]:
        """The row within max_length, by the truncation policy. Whatever token comes first in it is
        given, never predicted: it is not trained."""
        if self.vocab_size is not None and ids and (max(ids) >= self.vocab_size or min(ids) < 0):
            check_ids(ids, self.vocab_size, origin)
        mask[:1] = [False] * len(mask[:1])
        if self.max_length is None or len(ids) <= self.max_length:
            return ids, mask
        if self.truncation == "error":
            raise DataError(
                f"{origin}: {len(ids)} tokens, more than data.max_length = {self.max_length}; "
                f"raise it{SHORTENING}"
            )
        kit = self.kit
        bos = len(kit.prefix) if tuple(ids[: len(kit.prefix)]) == kit.prefix else 0
        kept = TRUNCATIONS[self.truncation](ids, mask, self.max_length, bos)
        if kept is None:
            raise _Dropped("longer than max_length")
        kept[1][:1] = [False] * len(kept[1][:1])  # cut on the left, another token is the first
        if any(mask) and not any(kept[1]):
            raise _Dropped("truncation left no trained token")
        self.truncated += 1
        return kept

    def summary(self) -> dict[str, Any]:
        """The fields of Counts that are counted on the way."""
        return {
            "truncated": self.truncated,
            "dropped": dict(self.dropped),
            "notes": dict(self.notes),
            "examples": tuple(self.examples),
        }

    def note_controls(self, example: Example) -> None:
        for turn in (example.prompt, example.completion, example.chosen, example.rejected):
            texts = [turn] if isinstance(turn, str) else [str(m["content"]) for m in turn]
            if any(map(self.kit.contains_control, texts)):
                self.notes["rows spell a control token; it is kept as ordinary text"] += 1
                return


def _rows_of(
    source: Source | Sequence[Source], on_bad_row: OnBadRow, seed: int, first: Sequence[str] = ()
) -> list[formats.Examples]:
    return [
        formats.read(
            sources.load_rows(spec, on_bad_row=on_bad_row),
            on_bad_row=on_bad_row,
            seed=seed,
            first=first,
        )
        for spec in sources.as_specs(source)
    ]


def _names(example: Example, fallback: Turn = "") -> tuple[int, ...]:
    """64 bits for each thing an example must share with no other across a split: what its format
    says, or its prompt (the text itself where there is none)."""
    return tuple(map(_hashed, example.groups)) or (_prompt_name(example.prompt, fallback),)


def _prompt_name(prompt: Turn, fallback: Turn) -> int:
    turn = fallback if _blank(prompt) else prompt
    return _hashed(
        turn if isinstance(turn, str) else "\0".join(f"{m['role']}:{m['content']}" for m in turn)
    )


def _hashed(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def join_groups(names: Sequence[Sequence[int]]) -> list[int]:
    """One group for each row of several names: rows that share a name, directly or through other
    rows, are one group. It is called by the smallest name in it."""
    parent: dict[int, int] = {}

    def root(name: int) -> int:
        while (above := parent.setdefault(name, name)) != name:
            parent[name] = parent.setdefault(above, above)
            name = parent[name]
        return name

    for row in names:
        roots = {root(name) for name in row}
        lowest = min(roots)
        parent |= dict.fromkeys(roots, lowest)
    return [root(row[0]) for row in names]


# --- the three stages' functions -------------------------------------------------------------


def encode_lm(
    source: Source | Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    template: str | None = None,
    completion_only: bool | None = None,
    truncation: str = "left",
    append_eos: bool = True,
    on_bad_row: OnBadRow = "error",
    vocab_size: int | None = None,
    seed: int = 0,
    every_row: bool = False,
) -> RowSet:
    """Rows for next-token training or scoring.

    What is trained: of text, everything after BOS; of prompt + completion, the completion; of
    chats, the assistant's turns; of pairs, `chosen`. completion_only=False trains prompts as well.

    Args:
        max_length: tokens a row may have, BOS and EOS included; None = any.
        truncation: error | drop | left (BOS + the last tokens are kept) | right (the first) |
            split (text only: consecutive rows). truncate-left and truncate-right mean the same.
        append_eos: end every row with EOS, trained (False when scoring given text).
        vocab_size: refuse ids outside the model's vocabulary.
        seed: of formats that pair rows.
        every_row: for scoring: each row of the data is one here, in order. An empty completion is
            kept, and a row that would be left out is an error. prompt + completion is what counts
            where a row has them beside other columns, as `generate` writes it.

    Raises:
        DataError: unusable rows (see `sources` and `formats`), or nothing left to train on.
    """
    truncation = _check_truncation(truncation, max_length, TRUNCATIONS)
    encoder = _Encoder(
        tokenizer,
        template=template,
        max_length=max_length,
        truncation=truncation,
        append_eos=append_eos,
        vocab_size=vocab_size,
    )
    collected = _Collected()
    first = ("prompt_completion",) if every_row else ()
    for part in _rows_of(source, on_bad_row, seed, first):
        form = formats.FORMATS[part.format]
        if every_row and form.gather is not None:
            raise DataError(
                f"{part[0].origin}: format {part.format!r} makes one example of several rows, so "
                "they cannot be scored one by one; give rows of prompt and completion"
            )
        choose = encoder.template(form.template)
        ready: list[tuple[Example, _Pieces]] = []
        start = len(collected.rows)
        for example in part:
            try:
                ready.append((example, _lm_pieces(example, choose, tokenizer, empty=every_row)))
                encoder.note_controls(example)
            except _Dropped as reason:
                encoder.drop(str(reason), example.origin)
            except DataError as error:
                _refuse(error, example, encoder, on_bad_row)
        encoded = encoder.ids([pieces for _, pieces in ready])
        for (example, _), (ids, mask) in zip(ready, encoded, strict=True):
            if example.kind == "tokenized":
                ids, mask = list(example.input_ids), list(example.completion_mask or ())
                mask = mask or [True] * len(ids)
            elif completion_only is False or (completion_only is None and example.kind == "text"):
                mask = [True] * len(ids)
            names = _names(example, example.completion)
            try:
                cuts: Iterable = [(ids, mask)]
                if truncation == "split" and max_length and len(ids) > max_length:
                    cuts = _split(ids, mask, max_length, list(encoder.kit.prefix), example)
                for ids, mask in cuts:
                    if not ids:
                        raise _Dropped("no tokens")
                    ids, mask = encoder.fit(ids, mask, example.origin)
                    collected.add(ids, mask, names, example.origin)
            except _Dropped as reason:
                encoder.drop(str(reason), example.origin)
        _bad(encoder, part)
        if every_row and encoder.dropped:
            raise DataError(f"{encoder.examples[0]}: it cannot be scored")
        collected.close(part, start)
    return collected.rowset(encoder, tokenizer, untrained=every_row)


def _lm_pieces(
    example: Example,
    template: Callable[[], Template],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    empty: bool,
) -> _Pieces:
    """The row of an example; what is blank only where `empty` allows it."""
    if example.kind == "text":
        if _blank(example.completion) and not empty:
            raise _Dropped("empty text")
        return _Pieces([(str(example.completion), True)], eos=True)
    if example.kind == "tokenized":
        return _Pieces([], eos=False)
    if example.kind == "messages":
        chat = example.completion
        assert not isinstance(chat, str)
        replies = [m for m in chat if m["role"] == "assistant"]
        if not replies:
            raise sources.RowError(f"{example.origin}: no assistant turn: nothing to train on")
        if not empty and not any(str(m["content"]).strip() for m in replies):
            raise _Dropped("empty completion")
        return _Pieces(templates.render(template(), chat, tokenizer, tools=example.tools), eos=True)
    if example.kind in ("prompt_completion", "preference"):
        reply = example.completion if example.kind == "prompt_completion" else example.chosen
        return _continuation(
            example.prompt,
            reply,
            template=template,
            tokenizer=tokenizer,
            tools=example.tools,
            empty=empty,
        )
    raise DataError(
        f"{example.origin}: rows of kind {example.kind!r} are no demonstrations to imitate; "
        "language-model training takes text, messages, prompt + completion, or pairs (chosen)\n  "
        + formats.other_kind(example, ("prompt", "completion"))
    )


def _split(ids: list[int], mask: list[bool], limit: int, prefix: list[int], example: Example):
    if example.kind != "text":
        raise DataError(
            f"{example.origin}: truncation 'split' is for plain text; this row is {example.kind}"
        )
    size = limit - len(prefix)
    body, trained = ids[len(prefix) :], mask[len(prefix) :]
    for at in range(0, len(body), size):
        if not prefix and at + 1 == len(body):
            return  # a single token has nothing before it to be predicted from
        yield prefix + body[at : at + size], [False] * len(prefix) + trained[at : at + size]


def encode_pairs(
    source: Source | Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    template: str | None = None,
    truncation: str = "left",
    append_eos: bool = True,
    ranking: str = "all",
    on_bad_row: OnBadRow = "error",
    vocab_size: int | None = None,
    seed: int = 0,
) -> PairSet:
    """Pairs for reward models and preference losses; rankings and ratings become pairs.

    Each row is truncated by itself. A pair whose rows are (or have become) identical is dropped and
    counted, so that no pair is a silent ln 2. One empty completion of two is kept: its EOS is what
    is judged.

    Args:
        ranking: which pairs of a ranking: all | adjacent | best-worst.
        others: as in `encode_lm`.
    """
    truncation = _check_truncation(truncation, max_length, [t for t in TRUNCATIONS if t != "split"])
    encoder = _Encoder(
        tokenizer,
        template=template,
        max_length=max_length,
        truncation=truncation,
        append_eos=append_eos,
        vocab_size=vocab_size,
    )
    sides = (_Collected(), _Collected())
    margins: list[float] = []
    references: list[tuple[float, float] | None] = []
    seen: Counter[tuple[int, int, int]] = Counter()
    for part in _rows_of(source, on_bad_row, seed):
        choose = encoder.template(formats.FORMATS[part.format].template)
        ready: list[tuple[Example, _Pieces, _Pieces]] = []
        start = len(sides[0].rows)
        for example in _paired(part, ranking, encoder):
            try:
                if example.chosen == example.rejected:
                    raise _Dropped("chosen equals rejected")
                # one empty reply is a judgement (of its EOS); two are none
                empty = [_blank(c) for c in (example.chosen, example.rejected)]
                if all(empty) or (any(empty) and not append_eos):
                    raise _Dropped("empty completion")
                both = [
                    _continuation(
                        example.prompt,
                        c,
                        template=choose,
                        tokenizer=tokenizer,
                        tools=example.tools,
                        empty=True,
                    )
                    for c in (example.chosen, example.rejected)
                ]
                if any(empty):
                    encoder.notes["pairs have one empty completion: its EOS is all there is"] += 1
                ready.append((example, both[0], both[1]))
                encoder.note_controls(example)
            except _Dropped as reason:
                encoder.drop(str(reason), example.origin)
            except DataError as error:
                _refuse(error, example, encoder, on_bad_row)
        chosen = encoder.ids([entry[1] for entry in ready])
        rejected = encoder.ids([entry[2] for entry in ready])
        for (example, *_), a, b in zip(ready, chosen, rejected, strict=True):
            before = encoder.truncated
            try:
                better, worse = (encoder.fit(*row, example.origin) for row in (a, b))
                if better[0] == worse[0]:
                    raise _Dropped("chosen equals rejected after truncation")
                if not any(better[1]) or not any(worse[1]):
                    raise _Dropped("no completion tokens")
            except _Dropped as reason:
                encoder.truncated = before
                encoder.drop(str(reason), example.origin)
                continue
            encoder.truncated = before + (encoder.truncated > before)
            names = _names(example, example.chosen)
            a_key, b_key = (zlib.crc32(np.asarray(r[0], "<i4").tobytes()) for r in (better, worse))
            seen[(min(names), a_key, b_key)] += 1
            for side, row in zip(sides, (better, worse), strict=True):
                side.add(*row, names, example.origin)
            margins.append(example.margin or 0.0)
            references.append(example.ref_logprobs)
        _bad(encoder, part)
        for side in sides:
            side.close(part, start)
    if copies := sum(n - 1 for n in seen.values()):
        encoder.notes["pairs are copies of an earlier pair"] = copies
    if swapped := sum(n for (g, a, b), n in seen.items() if (g, b, a) in seen) // 2:
        encoder.notes["pairs also occur with chosen and rejected swapped"] = swapped
    if sides[0].rows and sum(r is not None for r in references) not in (0, len(references)):
        encoder.notes["pairs have reference log-probs; others lack them, so none are used"] = sum(
            r is not None for r in references
        )
    first = sides[0].rowset(encoder, tokenizer)
    second = sides[1].rowset(encoder, tokenizer)
    counts = dataclasses.replace(_count([*first, *second], number=len(first)), **encoder.summary())
    ref = None
    if all(r is not None for r in references):
        ref = np.asarray(references, np.float32)
    digest = hashlib.sha256((first.digest + second.digest).encode())
    digest.update(np.asarray(margins, np.float32).tobytes())
    if ref is not None:
        digest.update(ref.tobytes())
    return PairSet(first, second, np.asarray(margins, np.float32), ref, counts, digest.hexdigest())


def _paired(part: formats.Examples, ranking: str, encoder: _Encoder) -> Iterator[Example]:
    """Preference examples of a source; rankings are taken apart."""
    for example in part:
        if example.kind == "preference":
            yield example
        elif example.kind == "ranked":
            found = list(pairs.of_example(example, how=ranking))
            if not found:
                encoder.drop("all completions tie", example.origin)
            yield from found
        else:
            raise DataError(
                f"{example.origin}: rows of kind {example.kind!r} are no comparisons; pairs need "
                "chosen + rejected, or prompt + completions + ranks or ratings\n  "
                + formats.other_kind(example, ("chosen", "rejected"))
            )


def encode_prompts(
    source: Source | Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None = None,
    template: str | None = None,
    truncation: str = "left",
    on_bad_row: OnBadRow = "error",
    vocab_size: int | None = None,
    seed: int = 0,
) -> PromptSet:
    """Prompts to sample from: of any format that has a prompt; of chats, all before the reply that
    ends them, which need not be there.

    An empty prompt is the bare BOS (dropped where the tokenizer has none). `columns` keeps the
    other columns of the row for reward functions. Arguments as in `encode_lm`; max_length counts
    the prompt's tokens alone.
    """
    truncation = _check_truncation(truncation, max_length, ("error", "drop", "left", "right"))
    encoder = _Encoder(
        tokenizer,
        template=template,
        max_length=max_length,
        truncation=truncation,
        append_eos=False,
        vocab_size=vocab_size,
    )
    collected = _Collected()
    kept: list[tuple[Turn, Mapping[str, Any]]] = []
    for part in _rows_of(source, on_bad_row, seed):
        choose = encoder.template(formats.FORMATS[part.format].template)
        ready = []
        start = len(collected.rows)
        for example in part:
            try:
                turn = prompt_of(example)
                pieces = prompt_pieces(turn, choose, tokenizer, tools=example.tools)
                ready.append((example, turn, _Pieces(pieces, eos=False)))
                encoder.note_controls(dataclasses.replace(example, prompt=turn))
            except DataError as error:
                _refuse(error, example, encoder, on_bad_row)
        encoded = encoder.ids([entry[2] for entry in ready])
        for (example, turn, _), (ids, mask) in zip(ready, encoded, strict=True):
            try:
                if not ids:
                    raise _Dropped("empty prompt, and the tokenizer has no BOS to start from")
                ids, _ = encoder.fit(ids, [False] * len(mask), example.origin)
            except _Dropped as reason:
                encoder.drop(str(reason), example.origin)
                continue
            names = (_prompt_name(turn, ""),)
            collected.add(ids, [False] * len(ids), names, example.origin)
            other = {k: v for k, v in example.columns.items() if k != "prompt"}
            kept.append((turn, other))
        _bad(encoder, part)
        collected.close(part, start)
    rows = collected.rowset(encoder, tokenizer, untrained=True)
    return PromptSet(
        rows.tokens,
        rows.offsets,
        tuple(turn for turn, _ in kept),
        tuple(columns for _, columns in kept),
        rows.groups,
        rows.origins,
        rows.parts,
        rows.counts,
        rows.digest,
        rows.templates,
    )


def prompt_of(example: Example) -> Turn:
    """What comes before the reply, of any kind of example that has one."""
    if example.kind == "messages":
        chat = example.completion
        assert not isinstance(chat, str)
        if chat[-1]["role"] != "assistant":
            return chat
        last = max(i for i, m in enumerate(chat) if m["role"] == "assistant")
        if last == 0:
            raise sources.RowError(f"{example.origin}: nothing comes before the assistant's turn")
        return chat[:last]
    if example.kind in ("text", "tokenized"):
        raise DataError(
            f"{example.origin}: rows of kind {example.kind!r} have no prompt to sample from\n  "
            + formats.other_kind(example, ("prompt",))
        )
    return example.prompt


def prompt_pieces(
    turn: Turn,
    template: Callable[[], Template],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    tools: Any = None,
) -> list[Piece]:
    """Pieces of a prompt, up to where the reply begins."""
    if isinstance(turn, str):
        return [(turn, False)]
    return templates.render(template(), turn, tokenizer, reply=True, tools=tools)


def encode_prompt(
    turn: Turn, tokenizer: "PreTrainedTokenizerBase", *, template: str | None = None
) -> list[int]:
    """Ids of one prompt (text or messages), BOS included: what `generate` and `chat` start from."""
    pieces = prompt_pieces(turn, lambda: templates.choose_template(tokenizer, template), tokenizer)
    encoder = _Encoder(
        tokenizer,
        template=template,
        max_length=None,
        truncation="error",
        append_eos=False,
        vocab_size=None,
    )
    return encoder.ids([_Pieces(pieces, eos=False)])[0][0]


# --- collecting ------------------------------------------------------------------------------


def _refuse(error: DataError, example: Example, encoder: _Encoder, on_bad_row: str) -> None:
    """A row its template cannot render: an error, or counted."""
    message = str(error)
    if str(example.origin) not in message:
        message = f"{example.origin}: {message}"
    if on_bad_row == "error" or not isinstance(error, sources.RowError):
        raise type(error)(message) from error
    encoder.dropped["bad rows"] += 1
    if len(encoder.examples) < sources.SHOWN:
        encoder.examples.append(message)


def _bad(encoder: _Encoder, part: formats.Examples) -> None:
    if part.spare:
        encoder.dropped["without a row of the other side to pair with"] += part.spare
    if part.bad:
        encoder.dropped["bad rows"] += part.bad
        encoder.examples += part.bad_examples[: max(0, sources.SHOWN - len(encoder.examples))]


def _prompt_row(ids: np.ndarray) -> Row:
    return Row(ids, np.zeros(len(ids), bool), len(ids))


class _Collected:
    """Rows as they come, with their groups, places and sources."""

    def __init__(self):
        self.rows: list[Row] = []
        self.names: list[tuple[int, ...]] = []
        self.origins: list[str] = []
        self.parts: list[Part] = []
        self.sha = hashlib.sha256()

    def add(self, ids: list[int], mask: list[bool], names: tuple[int, ...], origin: object) -> None:
        trained = np.asarray(mask, bool)
        first = int(trained.argmax()) if trained.any() else len(ids)
        self.rows.append(Row(np.asarray(ids, np.int32), trained, first))
        self.names.append(names)
        self.origins.append(str(origin))

    def close(self, part: formats.Examples, start: int) -> None:
        spec = part.rows.spec
        self.sha.update(f"{part.rows.digest} {part.format} {spec.weight}".encode())
        if len(self.rows) > start:
            self.parts.append(Part(spec.source, start, len(self.rows), spec.weight))
        elif spec.weight is not None:
            raise DataError(f"data source {spec.source}: none of its rows could be used")

    def rowset(
        self, encoder: _Encoder, tokenizer: "PreTrainedTokenizerBase", *, untrained: bool = False
    ) -> RowSet:
        counts = dataclasses.replace(_count(self.rows), **encoder.summary())
        if not self.rows:
            raise DataError(f"no rows are left to train on\n{counts}")
        if not untrained and counts.trained_tokens == 0:
            raise DataError(
                f"0 of {counts.tokens} tokens are trained: every row's mask is empty. Does the "
                "data hold completions or assistant turns, and does the template mark them?"
            )
        flat = _flat(self.rows)
        self.sha.update(tokenizer_digest(tokenizer).encode())
        for name in sorted(flat):
            self.sha.update(flat[name].tobytes())
        return RowSet(
            **flat,
            groups=np.asarray(join_groups(self.names), np.uint64),
            origins=tuple(self.origins),
            parts=tuple(self.parts),
            counts=counts,
            digest=self.sha.hexdigest(),
            templates=encoder.templates,
        )


def _flat(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    lengths = np.asarray([0, *(len(row.tokens) for row in rows)], np.int64)
    none = np.zeros(0)
    return {
        "tokens": np.concatenate([none, *(r.tokens for r in rows)]).astype(np.int32),
        "completion_mask": np.concatenate([none, *(r.completion_mask for r in rows)]).astype(bool),
        "offsets": np.cumsum(lengths),
        "prompt_lengths": np.asarray([r.prompt_length for r in rows], np.int32),
    }


def _count(rows: Sequence[Row], *, number: int | None = None) -> Counts:
    lengths = np.asarray([len(row.tokens) for row in rows], np.int64)
    at = {"min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}
    return Counts(
        rows=len(rows) if number is None else number,
        tokens=int(lengths.sum()),
        trained_tokens=int(sum(int(row.completion_mask.sum()) for row in rows)),
        lengths={name: int(np.percentile(lengths, p, method="higher")) for name, p in at.items()}
        if len(rows)
        else {},
    )


def _take_parts(parts: tuple[Part, ...], indices: np.ndarray) -> tuple[Part, ...]:
    if len(parts) == 1 or (np.diff(indices) < 0).any():
        names = "+".join(p.name for p in parts)
        return (Part(names, 0, len(indices), None),)
    found, start = [], 0
    for part in parts:
        n = int(((indices >= part.start) & (indices < part.stop)).sum())
        if n:
            found.append(Part(part.name, start, start + n, part.weight))
        start += n
    return tuple(found)


def _digest(parent: str, indices: np.ndarray) -> str:
    return hashlib.sha256(parent.encode() + indices.astype(np.int64).tobytes()).hexdigest()
