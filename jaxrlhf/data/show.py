# SPDX-License-Identifier: Apache-2.0
"""Data as the model will see it: decoded rows coloured by loss mask, ids, lengths, what is dropped.

On a terminal trained text is green and the rest dim; elsewhere trained text stands in [[...]].
Whatever the data holds, nothing of it is interpreted by the terminal.
"""

import dataclasses
import itertools
import sys
import unicodedata
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from jaxrlhf.data import encode, formats, sources
from jaxrlhf.data.encode import PairSet, PromptSet, RowSet
from jaxrlhf.data.sources import OnBadRow, Source
from jaxrlhf.data.tokenizer import codec, decode
from jaxrlhf.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[str, bool]  # decoded text, trained


def escape(text: str) -> str:
    """`text` with everything a terminal could obey (escapes, bidi overrides...) spelled out.

    Line feeds and tabs stay; printable text is untouched.
    """
    if text.isprintable():
        return text

    def safe(char: str) -> str:
        if char in "\n\t" or char.isprintable():
            return char
        category = unicodedata.category(char)
        if category in ("Zs", "Cn") or char in "\u200c\u200d":  # odd spaces, joiners of scripts
            return char if category == "Zs" or char in "\u200c\u200d" else ascii(char)[1:-1]
        return ascii(char)[1:-1]

    return "".join(map(safe, text))


def spans(tokenizer: "PreTrainedTokenizerBase", tokens: np.ndarray, mask: np.ndarray) -> list[Span]:
    """Decoded stretches of equal mask; special tokens are visible.

    Stretches are differences of decoded beginnings, so their texts joined are the decoded row.
    """
    ids = [int(i) for i in tokens]
    cuts = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1).tolist(), len(ids)]
    found: list[Span] = []
    done = ""
    for start, stop in itertools.pairwise(cuts):
        text = decode(tokenizer, ids[:stop], skip_special_tokens=False)
        if text.startswith(done):
            found.append((text[len(done) :], bool(mask[start])))
            done = text
        else:  # a letter whose bytes are cut in two by the mask
            part = decode(tokenizer, ids[start:stop], skip_special_tokens=False)
            found.append((part, bool(mask[start])))
            done = text
    return [span for span in found if span[0]]


def show(
    source: Source | Sequence[Source],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    stage: str | None = None,
    rows: int = 3,
    ids: bool = True,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    template: str | None = None,
    truncation: str = "left",
    completion_only: bool | None = None,
    append_eos: bool = True,
    on_bad_row: OnBadRow = "skip",
    seed: int = 0,
    file: IO[str] | None = None,
) -> RowSet | PairSet | PromptSet:
    """Prints what a stage would train on, and returns the encoded set.

    Args:
        stage: "lm", "pairs" or "prompts"; None = what the first source's format is for.
        rows: how many rows to print.
        ids: print token ids below each row.
        max_prompt_length: of prompts, instead of max_length.
        file: where to; None = standard output. Colours only if it is a terminal.
        others: as in `encode`.
    """
    stage = stage or stage_of(source, on_bad_row)
    shared: dict[str, Any] = {
        "max_length": max_length,
        "template": template,
        "truncation": truncation,
        "on_bad_row": on_bad_row,
        "seed": seed,
    }
    data: RowSet | PairSet | PromptSet
    if stage == "lm":
        data = encode.encode_lm(
            source, tokenizer, completion_only=completion_only, append_eos=append_eos, **shared
        )
    elif stage == "pairs":
        data = encode.encode_pairs(source, tokenizer, append_eos=append_eos, **shared)
    elif stage == "prompts":
        shared["max_length"] = max_prompt_length or max_length
        data = encode.encode_prompts(source, tokenizer, **shared)
    else:
        raise DataError(f"stage {stage!r} is not known; it is lm, pairs or prompts")
    write(data, tokenizer, rows=rows, ids=ids, file=file)
    return data


def stage_of(source: Source | Sequence[Source], on_bad_row: OnBadRow) -> str:
    """What the first source's rows are for: "lm", "pairs" or "prompts"."""
    spec = sources.as_specs(source)[0]
    peek = dataclasses.replace(spec, limit=100 if spec.limit is None else min(100, spec.limit))
    rows = sources.load_rows(peek, on_bad_row=on_bad_row)
    name = spec.format or formats.detect(rows.rows, rows.origins)
    form = formats.FORMATS.get(name)
    if form is None:
        return "lm"  # encoding will say what is wrong with the name
    if {"chosen", "ranks", "ratings"} & set(form.columns) or name in (
        "persona",
        "labelled_sentence",
        "pandalm",
        "llmbar",
        "ultrafeedback",
        "tldr_comparison",
    ):
        return "pairs"
    return "prompts" if name in ("prompt", "unpaired", "unpaired_messages", "stepwise") else "lm"


def write(
    data: RowSet | PairSet | PromptSet,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    rows: int = 3,
    ids: bool = True,
    file: IO[str] | None = None,
) -> None:
    """Prints the first rows of an encoded set and its counts."""
    from rich.console import Console
    from rich.text import Text

    out = file or sys.stdout
    colour = bool(getattr(out, "isatty", lambda: False)())
    console = Console(file=out, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def row(label: str, tokens: np.ndarray, mask: np.ndarray) -> None:
        text = Text()
        for part, trained in spans(tokenizer, tokens, mask):
            part = escape(part)
            if colour:
                text.append(part, style="bold green" if trained else "dim")
            else:
                text.append(f"[[{part}]]" if trained else part)
        trained = int(mask.sum())
        heading = f"{label}: {len(tokens)} tokens, {trained} trained"
        console.print(Text(heading, style="cyan"))
        console.print(text)
        if ids:
            console.print(Text("ids " + _ids(tokens, mask), style="dim"))

    for i in range(min(rows, len(data))):
        if isinstance(data, PairSet):
            place = escape(data.chosen.origins[i])
            for label, side in (("chosen", data.chosen), ("rejected", data.rejected)):
                row(f"--- {place} {label}", side.row(i).tokens, side.row(i).completion_mask)
            if data.margin[i]:
                console.print(Text(f"margin {data.margin[i]:g}"))
        elif isinstance(data, PromptSet):
            tokens = data.prompt_ids(i)
            row(f"--- {escape(data.origins[i])}", tokens, np.zeros(len(tokens), bool))
        else:
            row(f"--- {escape(data.origins[i])}", data.row(i).tokens, data.row(i).completion_mask)
        console.print()
    kit = codec(tokenizer)
    console.print(
        Text(
            f"BOS ids {list(kit.prefix) or 'none'}, EOS id {kit.eos_id}, "
            f"{len(kit.control)} control tokens; trained text is "
            + ("green" if colour else "in [[...]]")
        )
    )
    if len(data.parts) > 1:
        for part in data.parts:
            weight = "" if part.weight is None else f", weight {part.weight:g}"
            console.print(Text(f"source {escape(part.name)}: {part.stop - part.start:,}{weight}"))
    console.print(Text(escape(str(data.counts))))


def _ids(tokens: np.ndarray, mask: np.ndarray, width: int = 64) -> str:
    shown = [f"{i}{'*' if m else ''}" for i, m in zip(tokens[:width], mask[:width], strict=True)]
    more = len(tokens) - len(shown)
    return " ".join(shown) + (f" ... {more} more" if more > 0 else "")
