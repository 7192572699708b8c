# SPDX-License-Identifier: Apache-2.0
"""The embedded world: everything a small RLHF run needs, generated from a seed."""

import dataclasses
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from jaxrlhf.data.synthetic import language as lang
from jaxrlhf.data.synthetic import people
from jaxrlhf.data.synthetic.gold import GoldScore, request_of, score
from jaxrlhf.data.synthetic.language import Request
from jaxrlhf.data.synthetic.people import DEMONSTRATORS, ORACLE, Draw, Labeler
from jaxrlhf.data.synthetic.tokenizer import build_tokenizer, save_tokenizer
from jaxrlhf.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Split = Literal["train", "eval"]
EVAL_SHARE = 8  # one text in so many belongs to the eval split


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A customer's message (`text`, ready to be continued) and what it asks for."""

    text: str
    request: Request

    def row(self) -> dict[str, object]:
        """As a row of a prompt file: `prompt` and the hidden columns gold needs."""
        return {"prompt": self.text, **self.request.columns()}


class World:
    """A customer-support world of its own: the same seed gives the same world, to the byte.

    Args:
        seed: of everything. It picks the items and names that exist and how strongly each labeler
            is biased.
        items, names: how many exist, at most `len(language.ITEMS)` and `len(language.NAMES)`.
        vocab_size: upper bound on the tokenizer's pieces.

    Attributes:
        labelers: those who rank, each with a declared bias.
    """

    def __init__(
        self, seed: int = 0, *, items: int = 18, names: int = 14, vocab_size: int = 448
    ) -> None:
        for field, value, limit in (
            ("items", items, len(lang.ITEMS)),
            ("names", names, len(lang.NAMES)),
        ):
            if not 2 <= value <= limit:
                raise DataError(f"World {field} = {value} must lie between 2 and {limit}")
        if seed < 0:
            raise DataError(f"World seed = {seed} must not be negative")
        self.seed = seed
        self.vocab_size = vocab_size
        draw = Draw(seed, "world", 0)
        self.items = tuple(draw.sample(lang.ITEMS, items))
        self.names = tuple(draw.sample(lang.NAMES, names))
        self.labelers: tuple[Labeler, ...] = tuple(
            _vary(labeler, Draw(seed, "labeler", i)) for i, labeler in enumerate(people.LABELERS)
        )

    # -- what is said --------------------------------------------------------------------------

    def prompt(self, index: int, split: Split = "train") -> Prompt:
        """Prompt number `index` of a split. No text is in both splits."""
        if split not in ("train", "eval"):
            raise DataError(f"split = {split!r} must be 'train' or 'eval'")
        draw = Draw(self.seed, f"prompt/{split}", index)
        while True:
            text, request = people.ask(draw, self.items, self.names)
            held_out = zlib.crc32(text.encode()) % EVAL_SHARE == 0
            if held_out == (split == "eval"):
                return Prompt(text, request)

    def prompts(self, count: int, split: Split = "train", *, start: int = 0) -> list[Prompt]:
        """Prompts `start` .. `start + count` of a split."""
        return [self.prompt(i, split) for i in range(start, start + count)]

    def oracle(self, prompt: Prompt | str, index: int = 0) -> str:
        """A perfect reply (gold 1); `index` varies its wording."""
        request = self._request(prompt)
        return people.answer(Draw(self.seed, "oracle", index), request, ORACLE, self.items)

    def demonstrations(self, count: int, *, start: int = 0) -> list[dict[str, object]]:
        """Rows `{prompt, completion, demonstrator}`: replies as good as their demonstrator."""
        who, shares = zip(*DEMONSTRATORS, strict=True)
        rows = []
        for i in range(start, start + count):
            # Its own stream of prompts, from the train side of the split.
            prompt = self.prompt(10_000_000 + i)
            draw = Draw(self.seed, "demonstration", i)
            author = draw.weighted(who, shares)
            completion = people.answer(draw, prompt.request, author, self.items)
            rows.append(
                {"prompt": prompt.text, "completion": completion, "demonstrator": author.name}
            )
        return rows

    def pretraining(self, count: int, *, start: int = 0) -> list[dict[str, object]]:
        """Rows `{text}`: support talk as one overhears it.

        Two fifths are agents talking among themselves (`people.talk`), the rest conversations, of
        which a third are answered as if another message had come. A model of these texts knows
        the words, who speaks when and how to take up a word said before, but answers badly.
        """
        who, shares = zip(*DEMONSTRATORS, strict=True)
        rows = []
        for i in range(start, start + count):
            draw = Draw(self.seed, "pretraining", i)
            if draw.chance(0.4):
                rows.append({"text": people.talk(draw, self.items, self.names)})
                continue
            prompt = self.prompt(20_000_000 + i)
            about = prompt.request
            if draw.chance(1 / 3):
                about = people.ask(draw, self.items, self.names)[1]
            author = draw.weighted(who, shares)
            reply = people.answer(draw, about, author, self.items)
            rows.append({"text": prompt.text + reply})
        return rows

    # -- what it is worth ----------------------------------------------------------------------

    def gold(self, prompt: Prompt | str, completion: str) -> GoldScore:
        """The true worth of a completion; prompts given as text are read back."""
        return score(self._request(prompt), completion)

    def mean_utility(self, prompt: Prompt | str, completion: str) -> float:
        """What the labelers think of it on average, in nats: the best possible reward model.

        Its accuracy on noisy pairs is the ceiling of any reward model's.
        """
        gold = self.gold(prompt, completion)
        return sum(labeler.utility(gold) for labeler in self.labelers) / len(self.labelers)

    def rank(
        self, prompt: Prompt | str, completions: Sequence[str], rng: np.random.Generator
    ) -> tuple[list[int], int]:
        """Ranks (1 is best) that one labeler, drawn at random, gives to the completions.

        Returns (ranks, index into `labelers`). Noise is Plackett-Luce; equal completions still
        get different ranks, as from somebody who must decide.
        """
        who = int(rng.integers(len(self.labelers)))
        labeler = self.labelers[who]
        utilities = np.array([labeler.utility(self.gold(prompt, c)) for c in completions])
        return people.rank(utilities, rng).tolist(), who

    # -- on disk -------------------------------------------------------------------------------

    def build_tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer trained on this world's own texts."""
        texts = [str(row["text"]) for row in self.pretraining(3000, start=1_000_000)]
        return build_tokenizer(texts, self.vocab_size)

    def write(
        self,
        folder: str | Path,
        *,
        pretraining: int = 8000,
        demonstrations: int = 4000,
        prompts_train: int = 4000,
        prompts_eval: int = 512,
    ) -> Path:
        """Writes the world's files; returns the folder. The arguments are numbers of rows.

        pretrain.jsonl {text}; demonstrations.jsonl {prompt, completion, demonstrator};
        prompts_train.jsonl and prompts_eval.jsonl {prompt, items, problems, name, order, colour};
        tokenizer/ (Hugging Face files).
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files: dict[str, Iterable[Mapping[str, object]]] = {
            "pretrain.jsonl": self.pretraining(pretraining),
            "demonstrations.jsonl": self.demonstrations(demonstrations),
            "prompts_train.jsonl": (p.row() for p in self.prompts(prompts_train, "train")),
            "prompts_eval.jsonl": (p.row() for p in self.prompts(prompts_eval, "eval")),
        }
        for name, rows in files.items():
            with open(folder / name, "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        save_tokenizer(self.build_tokenizer(), folder / "tokenizer")
        return folder

    def _request(self, prompt: Prompt | str) -> Request:
        return prompt.request if isinstance(prompt, Prompt) else request_of(prompt)


def label_rankings(
    rows: Iterable[Mapping[str, Any]], world: World, seed: int = 0
) -> list[dict[str, Any]]:
    """Has simulated labelers rank the completions of each row.

    Args:
        rows: each with `prompt` (text) and `completions` (K >= 2 texts); other columns are kept.
        world: whose labelers rank.
        seed: of labelers and noise; row i uses the stream of (seed, i).

    Returns:
        The rows with `ranks` (1 is best), `labeler` (name) and `utilities` (the labelers' mean
        utility, for ceilings and calibration; no model sees it).

    Raises:
        DataError: a row lacks `prompt` or `completions`, or has fewer than two.
    """
    labelled = []
    for i, row in enumerate(rows):
        completions = row.get("completions")
        if "prompt" not in row or not isinstance(completions, list | tuple) or len(completions) < 2:
            raise DataError(
                f"row {i}: to be ranked it needs `prompt` and `completions` (two or more); "
                f"it has {sorted(row)}"
            )
        rng = np.random.default_rng([world.seed, zlib.crc32(b"ranking"), seed, i])
        ranks, who = world.rank(row["prompt"], completions, rng)
        utilities = [world.mean_utility(row["prompt"], c) for c in completions]
        labelled.append(
            {
                **row,
                "ranks": ranks,
                "labeler": world.labelers[who].name,
                "utilities": [round(u, 4) for u in utilities],
            }
        )
    return labelled


def _vary(labeler: Labeler, draw: Draw) -> Labeler:
    """The labeler with every number up to 10 % stronger or weaker."""
    numbers = ("answer_weight", "manners_weight", "per_flattery", "per_gift", "per_word")
    return dataclasses.replace(
        labeler,
        **{name: getattr(labeler, name) * (0.9 + 0.2 * draw.uniform()) for name in numbers},
    )
