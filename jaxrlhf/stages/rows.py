# SPDX-License-Identifier: Apache-2.0
"""`data.*` to encoded rows: the one place where settings become arguments of the data functions."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from jaxrlhf.config.data import DataSection, Source
from jaxrlhf.config.train import TrainSection
from jaxrlhf.data.batches import Batches, folds, leaks, split_by_fraction
from jaxrlhf.data.encode import PairSet, PromptSet, RowSet, encode_lm, encode_pairs, encode_prompts
from jaxrlhf.errors import DataError
from jaxrlhf.stages.models import Model
from jaxrlhf.stages.room import check_rows, check_sampling

Rows = TypeVar("Rows", RowSet, PairSet, PromptSet)


@contextlib.contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of the data functions speak of `data.*`: here they do under a stage's own names.

    Args:
        names: {what they say: what the stage says, or nothing where it has no such setting}.
    """
    try:
        yield
    except DataError as error:
        text = str(error)
        for theirs, ours in names.items():
            text = text.replace(theirs, ours)
        raise type(error)(text) from error


def source_specs(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Sources as the data functions take them."""
    return [{k: v for k, v in s.model_dump().items() if v not in (None, {})} for s in sources]


def _both(
    data: DataSection,
    encode: Callable[[list[dict[str, Any]], int], Rows],
    check: Callable[[Rows], None],
    seed: int,
) -> tuple[Rows, Rows | None, list[str]]:
    """(train, eval or None, lines about both). `encode` gets sources and the seed of pairings;
    `check` refuses what the model cannot read."""
    seed = seed if data.seed is None else data.seed
    train = encode(source_specs(data.train), seed)
    check(train)
    held_out: Rows | None = None
    lines = []
    if data.eval:
        held_out = encode(source_specs(data.eval), seed)
        check(held_out)
        if shared := leaks(train, held_out):
            lines.append(
                f"warning: {shared} of {len(held_out)} held-out rows have a prompt of data.train"
            )
    elif data.eval_fraction is not None:
        train, held_out = split_by_fraction(train, data.eval_fraction, seed=seed)
    elif data.folds is not None:
        parts = folds(train, data.folds, seed=data.seed or 0)  # whatever the run's seed
        train, held_out = next(itertools.islice(parts, data.fold, None))
    lines += [f"data.train: {line}" for line in str(train.counts).splitlines()]
    if held_out is not None:
        lines += [f"data.eval: {line}" for line in str(held_out.counts).splitlines()]
    return train, held_out, lines


def lm_rows(data: DataSection, model: Model, seed: int) -> tuple[RowSet, RowSet | None, list[str]]:
    """Rows for next-token training."""
    return _both(
        data,
        lambda sources, seed: encode_lm(
            sources,
            model.tokenizer,
            max_length=data.max_length,
            template=data.template,
            completion_only=data.completion_only,
            truncation=data.truncation,
            append_eos=data.append_eos,
            on_bad_row=data.on_bad_row,
            vocab_size=model.config.vocab_size,
            seed=seed,
        ),
        lambda rows: check_rows(rows, model),
        seed,
    )


def pair_rows(
    data: DataSection, model: Model, seed: int
) -> tuple[PairSet, PairSet | None, list[str]]:
    """Compared completions."""
    return _both(
        data,
        lambda sources, seed: encode_pairs(
            sources,
            model.tokenizer,
            max_length=data.max_length,
            template=data.template,
            truncation=data.truncation,
            append_eos=data.append_eos,
            on_bad_row=data.on_bad_row,
            vocab_size=model.config.vocab_size,
            seed=seed,
        ),
        lambda rows: check_rows(rows, model),
        seed,
    )


def prompt_rows(
    data: DataSection, model: Model, seed: int, *, max_new_tokens: int
) -> tuple[PromptSet, PromptSet | None, list[str]]:
    """Prompts to sample from, leaving room for the completion."""
    limit = min(data.max_prompt_length or data.max_length, max(2, data.max_length - max_new_tokens))
    return _both(
        data,
        lambda sources, seed: encode_prompts(
            sources,
            model.tokenizer,
            max_length=limit,
            template=data.template,
            truncation=data.truncation,
            on_bad_row=data.on_bad_row,
            vocab_size=model.config.vocab_size,
            seed=seed,
        ),
        lambda prompts: check_sampling(model, int(prompts.lengths.max()), max_new_tokens),
        seed,
    )


def training_batches(
    rows: Rows, data: DataSection, train: TrainSection, batch_size: int, seed: int
) -> tuple[Batches[Rows], int]:
    """(batches, optimizer steps): `train.steps`, or as many as `train.epochs` passes take."""
    epochs = train.epochs if train.epochs is not None or train.steps is not None else 1.0
    whole = int(epochs) if epochs is not None and float(epochs).is_integer() else None
    batches = Batches(
        rows,
        batch_size,
        seed=seed,
        shuffle=data.shuffle,
        epochs=whole,
        smallest=data.pad_to_multiple_of,
        largest=data.max_length,
        by_length=data.group_by_length,
    )
    if train.steps is not None:
        return batches, train.steps
    assert epochs is not None
    return batches, batches.steps or max(1, math.ceil(epochs * len(rows) / batch_size))


def evaluation_batches(rows: Rows, data: DataSection, batch_size: int) -> Batches[Rows]:
    """Every row once, those of like length together (`in_row_order` puts what comes of them right);
    the last batch is filled up with rows that weigh nothing."""
    return Batches(
        rows,
        batch_size,
        shuffle=False,
        epochs=1,
        smallest=data.pad_to_multiple_of,
        largest=data.max_length,
        by_length=True,
    )
