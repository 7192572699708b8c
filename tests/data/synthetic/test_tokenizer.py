# SPDX-License-Identifier: Apache-2.0
"""The tokenizer: whole words, exact round trips, no token across the seam."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrlhf.data.synthetic import World, build_tokenizer, save_tokenizer
from jaxrlhf.errors import DataError

WORLD = World(2)
TOKENIZER = WORLD.build_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


def everything():
    rows = WORLD.demonstrations(400)
    pairs = [(str(row["prompt"]), str(row["completion"])) for row in rows]
    return pairs + [(p.text, WORLD.oracle(p)) for p in WORLD.prompts(200, "eval")]


def test_everything_generated_comes_back_in_whole_words():
    digits = set(TOKENIZER.convert_tokens_to_ids(list(string.digits)))
    marks = set(TOKENIZER.convert_tokens_to_ids(list(".,?")))
    letters = set(TOKENIZER.convert_tokens_to_ids(list(string.ascii_letters + "▁")))
    assert TOKENIZER.unk_token_id not in digits | marks | letters
    for prompt, completion in everything():
        tokens = ids(prompt + completion)
        assert tokens == ids(prompt) + ids(completion)
        assert TOKENIZER.decode(tokens) == prompt + completion
        assert not letters & set(tokens), "a word of the language has no piece of its own"
        assert not set(tokens) & set(TOKENIZER.all_special_ids)
        assert len(ids(prompt)) <= 46
        assert len(ids(completion)) <= 48
        assert len(tokens) + 2 <= 96


@given(st.text(string.digits + string.ascii_letters + string.punctuation + " \n", max_size=60))
def test_any_ascii_text_comes_back(text):
    tokens = ids(text)
    if not any(token in text for token in TOKENIZER.all_special_tokens):
        assert TOKENIZER.unk_token_id not in tokens
        assert TOKENIZER.decode(tokens) == text


def test_special_tokens_are_distinct_and_never_added():
    special = [TOKENIZER.pad_token_id, TOKENIZER.unk_token_id, TOKENIZER.bos_token_id]
    assert [*special, TOKENIZER.eos_token_id] == [0, 1, 2, 3]
    assert not {2, 3} & set(ids("hello"))
    assert TOKENIZER.chat_template is None
    assert 256 <= len(TOKENIZER) <= 448


def test_the_folder_loads_and_encodes_alike(tmp_path):
    from transformers import AutoTokenizer

    save_tokenizer(TOKENIZER, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    for prompt, completion in everything()[:50]:
        tokens = loaded(prompt + completion)["input_ids"]
        assert tokens == ids(prompt + completion)
        assert loaded.decode([2, *tokens, 3, 0], skip_special_tokens=True) == prompt + completion
    assert (loaded.pad_token, loaded.eos_token) == ("<pad>", "<eos>")


def test_rare_words_fall_back_to_characters():
    small = build_tokenizer(["hello hello hello world"], vocab_size=4 + 96 + 2 + 1)
    assert "▁world" not in small.get_vocab()
    assert small.decode(small(" world")["input_ids"]) == " world"
    with pytest.raises(DataError, match="vocab_size = 10"):
        build_tokenizer(["hello"], vocab_size=10)
