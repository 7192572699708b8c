# SPDX-License-Identifier: Apache-2.0
"""A tokenizer of whole words with single characters to fall back on, trained on given texts.

A unigram model: the pieces are the most frequent words (with the space before them), the words
that begin a text or a line, and every printable ASCII character; a word's score is its log
frequency, a character's is far lower, so that the most probable split uses whole words wherever
there are any. Text comes back exactly, any ASCII text can be written in it, and since no piece
crosses a space, encode(prompt) + encode(completion) = encode(prompt + completion).
"""

import json
import math
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jaxrlhf.data.synthetic.language import PROMPT_END, PROMPT_START
from jaxrlhf.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>"}
# Frequent enough to be worth a place of their own, whatever the texts.
_FIXED = (PROMPT_START, PROMPT_END)
_CHARACTERS = "\n\u2581" + string.digits + string.ascii_letters + string.punctuation
_PIECE = re.compile(
    "|".join(re.escape(piece) for piece in _FIXED) + r"|\u2581?[A-Za-z]+|\u2581[0-9]|."
)
_CHARACTER_SCORE = -25.0


def build_tokenizer(texts: Iterable[str], vocab_size: int = 384) -> "PreTrainedTokenizerFast":
    """Trains the tokenizer on texts; the same texts give the same tokenizer.

    Returns a PreTrainedTokenizerFast with distinct pad (0), unk (1), bos (2) and eos (3), which
    adds none of them by itself. At most `vocab_size` pieces: the rarest words are left to
    characters.

    Raises:
        DataError: `vocab_size` leaves no room for the special tokens and characters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    floor = len(SPECIAL) + len(_CHARACTERS) + len(_FIXED)
    if vocab_size < floor:
        raise DataError(f"vocab_size = {vocab_size} is too small: at least {floor} pieces needed")
    counts = Counter(
        piece
        for text in texts
        for piece in _PIECE.findall(text.replace(" ", "\u2581"))
        if len(piece) > 1
    )
    for piece in _FIXED:
        counts.setdefault(piece, 1)
    fixed = [(piece, counts.pop(piece)) for piece in _FIXED]
    words = fixed + sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    words = words[: vocab_size - len(SPECIAL) - len(_CHARACTERS)]
    total = sum(count for _, count in words)
    vocabulary = (
        [(token, 0.0) for token in SPECIAL.values()]
        + [(piece, math.log(count / total)) for piece, count in words]
        + [(character, _CHARACTER_SCORE) for character in _CHARACTERS]
    )
    inner = Tokenizer(models.Unigram(vocabulary, unk_id=1, byte_fallback=False))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    inner.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **SPECIAL
    )


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: str | Path) -> None:
    """Writes the tokenizer's folder; its files depend on the tokenizer alone."""
    tokenizer.save_pretrained(str(folder))
    # A fresh name per machine or time would break "same seed, same bytes".
    path = Path(folder) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2, sort_keys=True) + "\n")
