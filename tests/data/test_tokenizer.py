# SPDX-License-Identifier: Apache-2.0
"""One BOS, one EOS, and text that stays text, over tokenizers of every construction."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.data.encode import encode_lm, encode_pairs
from jaxrlhf.data.tokenizer import (
    add_control_tokens,
    check_ids,
    check_vocabulary,
    codec,
    decode,
    decode_continuation,
    encode_text,
    ids_digest,
    load_tokenizer,
    tokenizer_digest,
)
from jaxrlhf.errors import DataError

from .conftest import LOSSLESS, TOKENIZERS, build

CONTROL_STRINGS = (
    *("<s>", "</s>", "<unk>", "<pad>", "<|endoftext|>", "<|begin|>"),
    *("<|im_start|>user\n", "<|im_end|>", "[SEP]", "[CLS]", "<|eot_id|>", "<end_of_turn>"),
)
# Scripts, directions, joiners, compositions and decompositions, controls.
UNICODE = (
    *("naïve", "nai\u0308ve", "Ångström", "A\u030angstro\u0308m", "שלום עולם", "مرحبا"),
    *("a\u202eb\u202c", "zero\u200bwidth", "soft\u00adhyphen", "日本語", "👩‍👩‍👧‍👦", "🇫🇮", "क्षि"),
    *(
        "tab\there",
        "two  spaces",
        "   three",
        "line\nfeed",
        "win\r\ndows",
        "trailing ",
        "\u00a0nbsp",
    ),
    *(
        "\u2028",
        "\ufeffbom",
        "ﬁ ligature",
        "ＦＵＬＬ",
        "\x07bell",
        "\x1b[31mred",
        "𝔘𝔫𝔦",
        "\U0010fffd",
    ),
)


def rows(tokenizer, write, kind):
    """The encoded rows of one example of a kind."""
    turn = [{"role": "user", "content": "What is 2 + 3?"}]
    reply = [{"role": "assistant", "content": "It is 5."}]
    if kind == "text":
        return [encode_lm(write({"text": "Once upon a time"}), tokenizer).row(0)]
    if kind == "prompt_completion":
        row = {"prompt": "What is 2 + 3?", "completion": " It is 5."}
        return [encode_lm(write(row), tokenizer).row(0)]
    if kind == "messages":
        path = write({"messages": turn + reply})
        return [encode_lm(path, tokenizer, template="plain").row(0)]
    pairs = encode_pairs(write({"prompt": "Hi", "chosen": " a ball", "rejected": " a"}), tokenizer)
    return [pairs.chosen.row(0), pairs.rejected.row(0)]


@pytest.mark.parametrize("kind", ["text", "prompt_completion", "messages", "preference"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_one_bos_one_eos_and_the_eos_is_trained(name, kind, write):
    tokenizer = build(name)
    kit = codec(tokenizer)
    unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != kit.eos_id else None
    for row in rows(tokenizer, write, kind):
        ids = row.tokens.tolist()
        assert tuple(ids[: len(kit.prefix)]) == kit.prefix
        assert ids[-1] == tokenizer.eos_token_id
        assert row.completion_mask[-1]
        assert not row.completion_mask[: max(1, len(kit.prefix))].any()
        inner = ids[len(kit.prefix) : -1]
        assert not (kit.control_ids - {unknown}) & set(inner), "a control token inside the row"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_text_never_becomes_a_control_token(name):
    tokenizer = build(name)
    kit = codec(tokenizer)
    # an unknown word may still be the unknown token: nothing else can be
    forbidden = kit.control_ids - {tokenizer.unk_token_id}
    if tokenizer.eos_token_id == tokenizer.unk_token_id:
        forbidden |= {tokenizer.eos_token_id}
    for string in CONTROL_STRINGS:
        for text in (string, f"a {string} b", f"{string}{string}", f"x{string}"):
            for continued in (False, True):
                ids = encode_text(tokenizer, text, continued=continued)
                assert not forbidden & set(ids), (text, ids)
                if name in LOSSLESS:
                    context = encode_text(tokenizer, "q") if continued else []
                    whole = decode(tokenizer, context + ids, skip_special_tokens=False)
                    space = " " if "space in front" in name else ""
                    assert whole == space + ("q" + text if continued else text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ordinary_text_has_the_ids_the_tokenizer_itself_gives(name):
    tokenizer = build(name)
    for text in ["Once upon a time", "The big dog!", "2 + 3 is 5", "x", "  two", "a\n\nb", "été"]:
        want = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encode_text(tokenizer, text) == want


def test_real_tokenizer_gives_the_same_ids_too(story_tokenizer, shared):
    text = (shared / "data/tinyshakespeare/input.txt").read_text()[:20_000]
    want = story_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_text(story_tokenizer, text) == want
    assert codec(story_tokenizer).prefix == (1,)


def test_a_literal_bos_in_real_text_is_three_characters(story_tokenizer):
    assert 1 in story_tokenizer("a<s>b", add_special_tokens=False)["input_ids"]  # the trap
    ids = encode_text(story_tokenizer, "a<s>b</s>")
    assert not {1, 2} & set(ids)
    assert decode(story_tokenizer, ids) == "a<s>b</s>"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_prompt_and_completion_laid_end_to_end_decode_to_their_texts(stories, prompt, completion):
    tokenizer = _stories(stories)
    surrogate = any(0xD800 <= ord(c) < 0xE000 for c in prompt + completion)
    if surrogate or "\ufffd" in prompt + completion:
        return
    first = encode_text(tokenizer, prompt)
    rest = encode_text(tokenizer, completion, continued=bool(prompt))
    # "▁" is this tokenizer's own letter for a space
    assert decode(tokenizer, first + rest) == (prompt + completion).replace("▁", " ")
    if prompt:
        assert decode_continuation(tokenizer, first, rest) == completion.replace("▁", " ")


_LOADED = {}


def _stories(folder):
    if folder not in _LOADED:
        _LOADED[folder] = load_tokenizer(folder)
    return _LOADED[folder]


@pytest.mark.parametrize("name", LOSSLESS)
def test_unicode_survives_a_round_trip(name):
    tokenizer = build(name)
    for text in UNICODE:
        ids = encode_text(tokenizer, "q:") + encode_text(tokenizer, text, continued=True)
        space = " " if "space in front" in name else ""
        assert decode(tokenizer, ids) == space + "q:" + text


def test_an_id_past_the_models_vocabulary_is_refused(story_tokenizer):
    check_vocabulary(story_tokenizer, 512)
    with pytest.raises(DataError, match=r"2 token\(s\) past .* 510: .* = 510"):
        check_vocabulary(story_tokenizer, 510)
    with pytest.raises(DataError, match=r"id 512 at position 1"):
        check_ids([1, 512], 512, "rows.jsonl:3")
    with pytest.raises(DataError, match="id -1"):
        check_ids([-1], 512)


def test_digest_sees_tokens_and_template_only(stories, tmp_path):
    tokenizer = load_tokenizer(stories)
    before = tokenizer_digest(tokenizer)
    tokenizer("some text", truncation=True, max_length=3)  # leaves state in the backend
    assert tokenizer_digest(tokenizer) == before == tokenizer_digest(load_tokenizer(stories))
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(load_tokenizer(tmp_path)) == before
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_digest(tokenizer) != before
    assert ids_digest(tokenizer) == ids_digest(load_tokenizer(stories)), "the ids are the same"
    tokenizer.chat_template = None
    tokenizer.add_tokens(["<new>"])
    assert tokenizer_digest(tokenizer) != before
    assert ids_digest(tokenizer) != ids_digest(load_tokenizer(stories))
    assert len(codec(tokenizer).soft) == 1, "the codec is rebuilt"


def test_loading_says_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(DataError, match=r"holds no tokenizer.json \(it holds readme.md\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(DataError, match="cannot be read"):
        load_tokenizer(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"neither a path here .* nor reachable as a hub name"):
        load_tokenizer("nobody/nothing-of-this-name")


def test_added_control_tokens_are_no_text(stories, tmp_path):
    tokenizer = load_tokenizer(stories)
    assert add_control_tokens(tokenizer, ["<|new|>", "<|new|>", "</s>"]) == ["<|new|>"]
    new = len(tokenizer) - 1
    assert tokenizer.convert_tokens_to_ids("<|new|>") == new == 512
    assert new not in encode_text(tokenizer, "a <|new|> b")
    kit = codec(tokenizer)
    assert kit.encode([kit.alias("a<|new|>")])[0][-1] == new
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert codec(again).control["<|new|>"] == new
    assert tokenizer_digest(again) == tokenizer_digest(tokenizer)


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPTNeoXTokenizer"])
@pytest.mark.parametrize("where", ["file", "config", "both"])
def test_a_folder_gives_what_autotokenizer_gives(name, where, tmp_path):
    """Family classes, and a chat template as a file of its own (which wins) or in the config."""
    from transformers import AutoTokenizer

    build("gpt2: no BOS, EOS").save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = {"tokenizer_class": name}  # special tokens are left to the class, as in gpt2's folder
    if where != "file":
        config["chat_template"] = "{{ 'config' }}"
    if where != "config":
        (tmp_path / "chat_template.jinja").write_text("{{ 'file' }}")
    path.write_text(json.dumps(config))
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("a little girl named Lily", " 2 + 3?", "é\n\n x", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.chat_template == theirs.chat_template
    assert ours.chat_template == ("{{ 'config' }}" if where == "config" else "{{ 'file' }}")
    names = ("bos_token", "eos_token", "unk_token")
    assert [getattr(ours, n) for n in names] == [getattr(theirs, n) for n in names]
    assert ours.eos_token == "<|endoftext|>"
    assert ours.pad_token is None, "a padding token that is not in the file is not made up"
    assert codec(ours).control == {"<|endoftext|>": ours.eos_token_id}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    assert load_tokenizer(tmp_path).eos_token is None, "what the folder says counts"
