# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: loading, and text to ids without surprises.

Two rules that the ordinary call `tokenizer(text)` breaks:

1. A *control token* (BOS, EOS, the turn markers of a chat template) enters a row only because we
   put it there. The string "</s>" or "<|im_end|>" inside somebody's text is text.
2. A row is the ids of its pieces laid end to end: prompt ids + completion ids. So a completion is
   encoded as a *continuation*: without the space that sentencepiece-like tokenizers put before
   the first word of a text. `decode(prompt_ids + completion_ids) == prompt + completion`.

Both are done by a `Codec`: the tokenizer's own fast backend, copied twice. In the copies the
control tokens go by another, unguessable spelling, which is what our templates write; in the second
copy the leading space is off.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import secrets
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxrlhf.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerBase

# Turn markers that some tokenizers do not declare as special; text must not reach them either.
TURN_MARKERS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|end|>",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def is_path(name: str) -> bool:
    """Whether `name` is read as a path: it begins with . / ~, or its first part exists."""
    if name.startswith((".", "/", "~")):
        return True
    first = Path(name).parts[0] if name else ""
    return bool(first) and Path(first).exists()


def load_tokenizer(path_or_name: str | os.PathLike[str]) -> "PreTrainedTokenizerBase":
    """A fast Hugging Face tokenizer from a folder, a `tokenizer.json`, or a hub name.

    Nothing touches the network for a path, nor for a name while HF_HUB_OFFLINE=1. Code from a
    repository is never run.

    Raises:
        DataError: no tokenizer there, not reachable, damaged, or only a slow (Python) one.
    """
    name = os.fspath(path_or_name)
    if is_path(name):
        path = Path(name).expanduser()
        if not path.exists():
            raise DataError(f"tokenizer {name}: no such file or folder")
        if path.is_dir() and not any((path / file).exists() for file in TOKENIZER_FILES):
            found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise DataError(
                f"tokenizer {name}: the folder holds no tokenizer.json (it holds {found})"
            )
    else:
        path = None
    try:
        if path is not None and path.is_file():
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
        elif path is not None and (path / "tokenizer.json").exists():
            # The file as it stands. AutoTokenizer would look up a class by model family (and import
            # torch where that is installed: seconds) only to wrap the same file.
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path))
            _fill_in_from_family(tokenizer, path)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                str(path or name), use_fast=True, trust_remote_code=False
            )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if path is not None:
            raise DataError(f"tokenizer {name}: cannot be read: {reason}") from error
        raise DataError(
            f"tokenizer {name}: neither a path here ({Path(name).absolute()} does not exist) nor "
            f"reachable as a hub name: {reason}"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(
            f"tokenizer {name}: only a slow tokenizer is there; a tokenizer.json is needed"
        )
    return tokenizer


GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def _fill_in_from_family(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Special tokens that a folder leaves to the class of its family, as that of gpt2 does.

    tokenizer.json alone says which ids a text has; the class is asked for nothing else.
    """
    said: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            said |= json.loads((folder / name).read_text(encoding="utf-8"))
    missing = [name for name in SPECIAL if name not in said and getattr(tokenizer, name) is None]
    known = said.get("tokenizer_class") not in (None, *GENERIC)
    if not {"bos_token", "eos_token"} & set(missing):
        return
    if not known and not (folder / "config.json").is_file():
        return
    from transformers import AutoTokenizer

    try:
        family = AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False, local_files_only=True
        )
    except Exception:  # a class that is not known leaves the file as it is
        return
    vocabulary = tokenizer.get_vocab()
    for name in missing:
        token = getattr(family, name, None)
        if isinstance(token, str) and token in vocabulary:
            setattr(tokenizer, name, token)


def add_control_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> list[str]:
    """Adds the tokens it lacks, as control tokens, in place; returns those that were added.

    Raises:
        DataError: a token that is empty or begins or ends in white space.
    """
    for token in tokens:
        if not token.strip() or token != token.strip():
            raise DataError(
                f"model.add_tokens: {token!r} is empty or has white space around it, which a "
                "token cannot keep; write it without"
            )
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    # A piece that is in the vocabulary already is declared too: text never gives it from now on.
    declared = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(declared, special_tokens=True)
    return new


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Refuses a tokenizer that can produce an id the model has no embedding for.

    An array lookup past the end is clamped silently on an accelerator, so this is checked when
    data is loaded, never later.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= vocab_size or i < 0)
    if beyond:
        shown = ", ".join(f"{token!r} = {i}" for i, token in beyond[:3])
        raise DataError(
            f"the tokenizer has {len(beyond)} token(s) past the model's vocabulary of "
            f"{vocab_size}: {shown}; use the tokenizer saved with the model, or say "
            "model.resize_embeddings=true, which gives the model rows for them"
        )


def check_ids(ids: Iterable[int], vocab_size: int, where: object = "tokens") -> None:
    """Refuses ids outside [0, vocab_size), for rows that arrive already tokenized."""
    for position, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise DataError(
                f"{where}: id {i} at position {position} is outside the vocabulary of {vocab_size}"
            )


def ids_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of what decides which ids a text becomes, and back: backend, special tokens."""
    return _digest(_said(tokenizer))


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 of all that decides which ids a row becomes: as `ids_digest`, and the template."""
    return _digest({**_said(tokenizer), "template": tokenizer.chat_template})


def _said(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    special = {k: str(v) for k, v in tokenizer.special_tokens_map.items()}
    return {**_state(tokenizer), "special": special}


def _digest(state: dict[str, Any]) -> str:
    text = json.dumps(state, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def encode_text(
    tokenizer: "PreTrainedTokenizerBase", text: str, *, continued: bool = False
) -> list[int]:
    """Ids of `text` as ordinary text: no BOS, no EOS, and no control token whatever it contains.

    `continued=True` encodes the continuation of an earlier text: no space is put before the first
    word (for "▁"-style tokenizers; others do not differ).
    """
    return codec(tokenizer).encode([text], continued=continued)[0]


def decode(
    tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """Text of `ids`, without the clean-up that drops spaces before punctuation."""
    text = tokenizer.decode(
        list(map(int, ids)),
        skip_special_tokens=skip_special_tokens,
        clean_up_tokenization_spaces=False,
    )
    assert isinstance(text, str)
    return text


def decode_continuation(
    tokenizer: "PreTrainedTokenizerBase", prompt_ids: Sequence[int], ids: Sequence[int]
) -> str:
    """Text that `ids` add after `prompt_ids`: its leading space is kept where it was sampled.

    Decoding a completion by itself loses the space in front of its first word in "▁"-style
    tokenizers, and a letter whose bytes were shared between prompt and completion.
    """
    context = [int(i) for i in prompt_ids]
    before = decode(tokenizer, context)
    after = decode(tokenizer, [*context, *map(int, ids)])
    if before and after.startswith(before):
        return after[len(before) :]
    return decode(tokenizer, ids)


@dataclasses.dataclass(frozen=True)
class Codec:
    """How one tokenizer encodes pieces of rows; made by `codec`."""

    first: "Backend"  # texts that begin a row
    rest: "Backend"  # continuations
    prefix: tuple[int, ...]  # ids the tokenizer puts before every text: BOS, or none
    eos_id: int | None
    control: Mapping[str, int]  # spelling -> id of special tokens: never reached by text
    soft: Mapping[str, int]  # other added tokens (<think>, <tool_call>): text may reach them
    aliases: Mapping[str, str]  # control spelling -> the spelling the copies understand
    inverse: Mapping[str, str]
    hidden: Mapping[str, str]  # control spelling -> what stands for it while a template runs
    shown: Mapping[str, str]

    def encode(self, texts: Sequence[str], *, continued: bool = False) -> list[list[int]]:
        """Ids of each text; control tokens arise from aliases only (see `alias`)."""
        backend = self.rest if continued else self.first
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def alias(self, text: str) -> str:
        """`text` with every control token in it spelled so that `encode` makes it a token."""
        return _replace(text, self.aliases)

    def unalias(self, text: str) -> str:
        """The inverse of `alias`."""
        return _replace(text, self.inverse)

    def hide(self, text: str) -> str:
        """`text` with control tokens that are only spelled in it made unrecognisable to `alias`."""
        return _replace(text, self.hidden)

    def show(self, text: str) -> str:
        """The inverse of `hide`."""
        return _replace(text, self.shown)

    def ends_in_control(self, text: str) -> bool:
        """Whether an aliased text ends in a control token."""
        return text.endswith(tuple(self.inverse))

    def contains_control(self, text: str) -> bool:
        """Whether ordinary `text` spells a control token (it stays text)."""
        pattern = _pattern(tuple(self.aliases))
        return bool(pattern and pattern.search(text))

    @property
    def control_ids(self) -> frozenset[int]:
        return frozenset(self.control.values())


_CODECS: "weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple, Codec]]" = (
    weakref.WeakKeyDictionary()
)


def codec(tokenizer: "PreTrainedTokenizerBase") -> Codec:
    """The codec of a tokenizer; built once, and again after tokens were added to it."""
    version = (len(tokenizer), tuple(tokenizer.all_special_ids), tokenizer.bos_token)
    known = _CODECS.get(tokenizer)
    if known is None or known[0] != version:
        known = (version, _make_codec(tokenizer))
        _CODECS[tokenizer] = known
    return known[1]


def _make_codec(tokenizer: "PreTrainedTokenizerBase") -> Codec:
    from tokenizers import Tokenizer as Backend

    special = set(tokenizer.all_special_tokens)
    control, soft = {}, {}
    for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special or token.content in special or token.content in TURN_MARKERS:
            control[token.content] = token_id
        elif token.content.strip():
            soft[token.content] = token_id
    vocabulary = tokenizer.get_vocab()
    for spelling in sorted(special.union(TURN_MARKERS)):  # in the vocabulary, not declared as added
        if spelling in vocabulary:
            control.setdefault(spelling, vocabulary[spelling])
    # Lower-case letters and digits survive every normalizer; nobody can write what is drawn here.
    nonce = secrets.token_hex(8)
    aliases = {spelling: f"zx{nonce}x{i}xz" for i, spelling in enumerate(control)}
    state = _rename(_state(tokenizer), control, aliases)
    first = Backend.from_str(json.dumps(state))
    rest = Backend.from_str(json.dumps(_without_leading_space(state)))
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    dressed = tokenizer("a")["input_ids"]
    prefix = ()
    for start in range(len(dressed) - len(plain) + 1):
        if dressed[start : start + len(plain)] == plain:
            prefix = tuple(dressed[:start])
            break
    eos_id = tokenizer.eos_token_id
    assert eos_id is None or isinstance(eos_id, int)
    hidden = {spelling: f"zh{nonce}h{i}hz" for i, spelling in enumerate(control)}
    return Codec(
        first,
        rest,
        prefix,
        eos_id,
        control,
        soft,
        aliases,
        {alias: spelling for spelling, alias in aliases.items()},
        hidden,
        {mark: spelling for spelling, mark in hidden.items()},
    )


def _state(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{type(tokenizer).__name__} is a slow tokenizer; a tokenizer.json is needed"
        )
    return json.loads(backend.to_str()) | {"truncation": None, "padding": None}


def _rename(
    state: dict[str, Any], control: Mapping[str, int], aliases: Mapping[str, str]
) -> dict[str, Any]:
    """The backend's state with every control token under its alias."""
    new = dict(state, post_processor=None)
    new["added_tokens"] = [
        dict(token, content=aliases.get(token["content"], token["content"]))
        for token in state["added_tokens"]
    ]
    declared = {token["content"] for token in state["added_tokens"]}
    for spelling in control.keys() - declared:
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        entry = {"id": control[spelling], "content": aliases[spelling], "special": True, **flags}
        new["added_tokens"].append(entry)
    new["added_tokens"].sort(key=lambda token: token["id"])
    model = new["model"] = dict(state["model"])
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {aliases.get(token, token): i for token, i in vocabulary.items()}
    elif isinstance(vocabulary, list):  # unigram: [[piece, score], ...]
        model["vocab"] = [[aliases.get(piece, piece), *score] for piece, *score in vocabulary]
    if model.get("unk_token") in aliases:
        model["unk_token"] = aliases[model["unk_token"]]
    if model.get("merges"):
        pairs = (m if isinstance(m, list) else m.split(" ") for m in model["merges"])
        touched = set(control)
        model["merges"] = [
            list(pair) for pair in pairs if "".join(pair) not in touched and not touched & set(pair)
        ]
    return new


def _without_leading_space(state: dict[str, Any]) -> dict[str, Any]:
    """The backend's state, not putting a space before the first word of a text."""

    def edit(part):
        if part is None:
            return None
        if part["type"] == "Prepend":
            return None
        if part["type"] == "Sequence":
            key = "normalizers" if "normalizers" in part else "pretokenizers"
            kept = [e for e in map(edit, part[key]) if e is not None]
            return dict(part, **{key: kept})
        if part["type"] == "Metaspace":
            return {k: v for k, v in part.items() if k != "add_prefix_space"} | {
                "prepend_scheme": "never"
            }
        if part["type"] == "ByteLevel":
            return dict(part, add_prefix_space=False)
        return part

    return dict(
        state, normalizer=edit(state["normalizer"]), pre_tokenizer=edit(state["pre_tokenizer"])
    )


@functools.lru_cache(maxsize=64)
def _pattern(spellings: tuple[str, ...]) -> re.Pattern[str] | None:
    longest_first = sorted(spellings, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if spellings else None


def _replace(text: str, table: Mapping[str, str]) -> str:
    pattern = _pattern(tuple(table))
    return pattern.sub(lambda match: table[match.group()], text) if pattern else text
