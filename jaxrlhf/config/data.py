# SPDX-License-Identifier: Apache-2.0
"""`data.*`: which rows, and how they become tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from pydantic import BeforeValidator, Field

from jaxrlhf.config.base import (
    Int,
    Natural,
    OpenShare,
    Positive,
    PositiveFloat,
    Section,
    Seed,
    SourceName,
    as_list,
)

Format = Literal[  # keys of data.formats.FORMATS
    "tokenized",
    "tldr_comparison",
    "ultrafeedback",
    "pandalm",
    "llmbar",
    "persona",
    "labelled_sentence",
    "chat_preference",
    "chat_preference_messages",
    "hh_rlhf",
    "preference",
    "ranked",
    "rated",
    "stepwise",
    "unpaired",
    "unpaired_messages",
    "prompt_completion",
    "messages",
    "sharegpt",
    "alpaca",
    "seed_task",
    "question_answer",
    "prompt",
    "text",
]
# Keys of data.templates.TEMPLATES, and the tokenizer's own by name.
Template = Literal["chatml", "llama3", "gemma", "plain", "hh", "tokenizer", "own"]


class Source(Section):
    """One set of rows; a bare value is its `source`."""

    shorthand: ClassVar[str | None] = "source"

    source: SourceName = Field(
        description="a file (jsonl, json, csv, parquet, txt, each also .gz), a folder, a saved HF "
        "dataset, a hub name or tfds:NAME"
    )
    split: str | None = Field(
        default=None, description="which split; null = train, or the only one"
    )
    weight: PositiveFloat | None = Field(
        default=None,
        description="share of the mixture, relative to the others; null everywhere = all rows of "
        "all sources, once an epoch",
    )
    format: Format | None = Field(
        default=None, description="how rows are read; null = told by their columns"
    )
    column_map: dict[str, str] = Field(
        default_factory=dict, description="{column we know: column in the file}"
    )
    limit: Positive | None = Field(default=None, description="only the first so many rows")


Sources = Annotated[list[Source], BeforeValidator(as_list)]


class DataSection(Section):
    """`data: SOURCE` is short for `data.train: SOURCE`."""

    shorthand: ClassVar[str | None] = "train"

    train: Sources = Field(default_factory=list, description="what is learnt from; a list is mixed")
    eval: Sources = Field(default_factory=list, description="held-out rows")
    eval_fraction: OpenShare | None = Field(
        default=None, description="without eval: this share of train, split by prompt, is held out"
    )
    max_length: Positive = Field(default=512, description="longest row, tokens")
    max_prompt_length: Positive | None = Field(
        default=None, description="longest prompt, tokens; null = what max_length leaves"
    )
    truncation: Literal["error", "drop", "left", "right"] = Field(
        default="left",
        description="a row that is too long: stop, leave it out, keep its end (after BOS) or its "
        "start; counted and printed",
    )
    template: Template | None = Field(
        default=None, description="chat template; null = the tokenizer's own"
    )
    completion_only: bool = Field(
        default=True, description="train on completions and assistant turns only, not on prompts"
    )
    append_eos: bool = Field(default=True, description="end every completion with EOS")
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="a row that cannot be used: stop, or skip, count and report"
    )
    shuffle: bool = Field(
        default=True, description="a new order each epoch, a function of (seed, epoch)"
    )
    group_by_length: bool = Field(
        default=False,
        description="rows of a batch are of like length: less padding, faster on varied lengths",
    )
    pad_to_multiple_of: Positive = Field(
        default=32,
        description="batches are padded to this many tokens, or to a few multiples of it; every "
        "length that occurs is compiled once",
    )
    folds: Annotated[Int, Ge(2)] | None = Field(
        default=None, description="cross-validation: train is cut, by prompt, into so many parts"
    )
    fold: Natural = Field(default=0, description="which of the folds is held out, from 0")

    seed: Seed | None = Field(
        default=None,
        description="of what eval_fraction or folds hold out and of how statements are paired; "
        "null = the run's seed (folds: 0)",
    )

    def contradictions(self) -> Iterator[str]:
        ways = {
            "eval": self.eval or None,
            "eval_fraction": self.eval_fraction,
            "folds": self.folds,
        }
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > 1:
            yield f"{' and '.join(given)} are given together: rows are held out by one of them"
        if self.folds is not None and self.fold >= self.folds:
            yield f"fold = {self.fold} must be below folds = {self.folds}"
        if self.folds is None and self.fold:
            yield f"fold = {self.fold} is held out of none: give folds, the number of parts"
        if not self.shuffle and any(source.weight is not None for source in self.train):
            yield (
                "shuffle = false takes rows as they stand in the files; a mixture by weight is "
                "drawn: leave out train.weight or shuffle"
            )

    @property
    def holds_out(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.eval) or self.eval_fraction is not None or self.folds is not None


class TextDataSection(DataSection):
    """As above, trained from the first token on."""

    truncation: Literal["error", "drop", "left", "right", "split"] = Field(
        default="left",
        description="a row that is too long: stop, leave it out, keep its end (after BOS) or its "
        "start, or cut it into rows; counted and printed",
    )
    completion_only: bool = Field(
        default=False, description="train on completions and assistant turns only, not on prompts"
    )
