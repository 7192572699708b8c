# SPDX-License-Identifier: Apache-2.0
"""Small tokenizers of every construction, and helpers to write data files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxrlhf.data.tokenizer import load_tokenizer

CORPUS = [
    "Once upon a time there was a little girl named Lily who loved to play outside.",
    "The big dog saw a red ball in the park, and wanted to play with it!",
    "What is 2 + 3? It is 5. I am sorry; your order number 1048 was lost - please wait.",
    "Human says: hello. Assistant says: good-bye </s> <s> [SEP] <|im_end|>",
] * 4
CHATML = ("<|im_start|>", "<|im_end|>")


def _wrap(backend, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _byte_level(specials: list[str], *, prefix_space=False, extra=()):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[*specials, *extra],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _dress(backend, before: str | None, after: str | None):
    """Makes the tokenizer add special tokens of its own."""
    ends = [t for t in (before, after) if t]
    single = " ".join(filter(None, [before, "$A", after]))
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(t, backend.token_to_id(t)) for t in dict.fromkeys(ends)]
    )
    return backend


def _metaspace(scheme: str):
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if scheme != "never" else []),
        ]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials)
    backend.train_from_iterator(CORPUS, trainer)
    state = json.loads(backend.to_str())  # bytes are no special tokens
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return _dress(Tokenizer.from_str(json.dumps(state)), "<s>", None)


def _unigram():
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _wordpiece():
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _dress(backend, "[CLS]", "[SEP]")


def _wordlevel():
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    backend.train_from_iterator(CORPUS, trainer)
    return _dress(backend, "<s>", None)


END, BOS = "<|endoftext|>", "<|begin|>"
TOKENIZERS: dict[str, Callable] = {
    "gpt2: no BOS, EOS": lambda: _wrap(_byte_level([END]), eos_token=END, unk_token=END),
    "gpt2: pad == eos": lambda: _wrap(_byte_level([END]), eos_token=END, pad_token=END),
    "gpt2: bos == eos, added": lambda: _wrap(
        _dress(_byte_level([END]), END, None), bos_token=END, eos_token=END
    ),
    "byte-level with BOS": lambda: _wrap(
        _dress(_byte_level([BOS, END]), BOS, None), bos_token=BOS, eos_token=END
    ),
    "byte-level with BOS and EOS": lambda: _wrap(
        _dress(_byte_level([BOS, END]), BOS, END), bos_token=BOS, eos_token=END
    ),
    "byte-level, space in front": lambda: _wrap(
        _byte_level([END], prefix_space=True), eos_token=END
    ),
    "chatml: eos ends a turn": lambda: _wrap(
        _byte_level([END], extra=CHATML), eos_token=CHATML[1], pad_token=END
    ),
    "metaspace first": lambda: _wrap(
        _metaspace("first"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ),
    "metaspace always": lambda: _wrap(
        _metaspace("always"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ),
    "metaspace never": lambda: _wrap(
        _metaspace("never"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ),
    "unigram, undeclared EOS": lambda: _wrap(_unigram(), eos_token="</s>", unk_token="<unk>"),
    "wordpiece CLS SEP": lambda: _wrap(
        _wordpiece(), cls_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]"
    ),
    "wordlevel": lambda: _wrap(_wordlevel(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
}
LOSSLESS = [name for name in TOKENIZERS if name.startswith(("gpt2", "byte", "chatml", "meta"))]
_BUILT: dict[str, object] = {}


def build(name: str):
    """One of TOKENIZERS; built once."""
    if name not in _BUILT:
        _BUILT[name] = TOKENIZERS[name]()
    return _BUILT[name]


@pytest.fixture(scope="session")
def chatml():
    """A tokenizer that has the tokens of the chatml template."""
    return build("chatml: eos ends a turn")


@pytest.fixture(scope="session")
def story_tokenizer(stories: Path):
    return load_tokenizer(stories)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSONL and returns the path."""

    def write(*rows, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
