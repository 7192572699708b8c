# SPDX-License-Identifier: Apache-2.0
"""Every example once an epoch, whatever the sizes; batches that depend on the step alone."""

import dataclasses
import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from jaxrlhf.data.batches import Batches, bucket, folds, leaks, split_by_fraction
from jaxrlhf.data.encode import encode_lm, encode_pairs, encode_prompts, join_groups
from jaxrlhf.data.order import Order, interleave, permutation
from jaxrlhf.data.tokenizer import decode
from jaxrlhf.errors import DataError

from .conftest import build


@pytest.fixture(scope="module")
def tokenizer():
    return build("byte-level with BOS")


@pytest.fixture(scope="module")
def seventeen(tokenizer, tmp_path_factory):
    import json

    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"p{i}", "completion": " x" * (i + 1)} for i in range(17)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return encode_lm(str(path), tokenizer)


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_example_once_an_epoch_for_all_small_sizes(seventeen, shuffle):
    for n, batch_size, epochs in itertools.product(range(1, 18), range(1, 19), (1, 2, 3)):
        rows = seventeen.take(range(n))
        batches = Batches(rows, batch_size, seed=3, shuffle=shuffle, epochs=epochs)
        found = np.concatenate([batches.indices_at(s) for s in range(len(batches))])
        assert len(found) == batch_size * -(-n * epochs // batch_size)
        real = found[: n * epochs]
        assert (found[n * epochs :] == -1).all(), "fillers stand at the very end only"
        for epoch in np.split(real, epochs):
            assert sorted(epoch) == list(range(n))
        if not shuffle:
            assert real.tolist() == list(range(n)) * epochs
        assert batches.steps_per_epoch == -(-n // batch_size)
        with pytest.raises(IndexError):
            batches.indices_at(len(batches))


def test_order_depends_on_seed_and_epoch(seventeen):
    order = [Order((100,), None, seed).at(i) for seed in (0, 1) for i in range(200)]
    first, second, other, _ = np.split(np.asarray(order), 4)
    assert (first != second).any()
    assert (first != other).any()
    late = Batches(seventeen, 4, seed=9).batch_at(12345)
    again = Batches(seventeen, 4, seed=9).batch_at(12345)
    for a, b in zip(late.tokens, again.tokens, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_permutation_is_the_same_in_every_process_and_release():
    # pinned: a changed order would make a resumed run differ from the one it resumes
    assert permutation(10, 7, 3).tolist() == PINNED
    code = "from jaxrlhf.data.order import permutation; print(permutation(10, 7, 3).tolist())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(PINNED)


PINNED: list[int] = [2, 8, 9, 4, 0, 6, 7, 5, 1, 3]


def test_permutations_are_uniform():
    counts = Counter(tuple(permutation(3, 0, epoch).tolist()) for epoch in range(6000))
    assert len(counts) == 6
    assert all(abs(n - 1000) < 150 for n in counts.values())  # 5 sigma


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.7, 0.2, 0.1), (1e-3, 1), (2, 3, 5, 7, 0.5)])
def test_mixing_keeps_its_shares_at_every_point(weights):
    n = 4000
    places = [interleave(p, weights) for p in range(n)]
    shares = np.asarray(weights) / sum(weights)
    parts = np.asarray([part for part, _ in places])
    for k, share in enumerate(shares):
        drawn = np.cumsum(parts == k)
        assert np.abs(drawn - share * np.arange(1, n + 1)).max() <= len(weights)
        inner = [i for part, i in places if part == k]
        assert inner == list(range(len(inner))), "a part's own positions are consecutive"


def test_each_part_of_a_mixture_is_passed_through_evenly():
    order = Order((3, 50), (1, 1), seed=1)
    found = Counter(order.at(p) for p in range(300))
    assert all(found[i] == 50 for i in range(3))
    assert all(found[i] == 3 for i in range(3, 53))
    with pytest.raises(ValueError, match="at least one example"):
        Order((3, 0), (1, 1))
    with pytest.raises(ValueError, match="do not suit"):
        Order((3, 1), (1, -1))


def test_weighted_sources_make_weighted_batches(tokenizer, write):
    small = write(*({"text": f"a {i}"} for i in range(4)), name="a.jsonl")
    large = write(*({"text": f"b {i}"} for i in range(40)), name="b.jsonl")
    both = [{"source": small, "weight": 1}, {"source": large, "weight": 3}]
    batches = Batches(encode_lm(both, tokenizer), 8)
    for step in range(20):
        assert (batches.indices_at(step) < 4).sum() == 2
    plain = Batches(encode_lm([small, large], tokenizer), 44, epochs=1)
    assert sorted(plain.indices_at(0)) == list(range(44))


def test_rows_are_right_padded_with_explicit_positions_and_segments(seventeen):
    batches = Batches(seventeen, 5, epochs=1)
    for step, batch in enumerate(batches):
        assert batch.weights is None
        assert batch.tokens.dtype == batch.positions.dtype == batch.segment_ids.dtype == np.int32
        for b, i in enumerate(batches.indices_at(step)):
            n = 0 if i < 0 else len(seventeen.row(i).tokens)
            assert batch.segment_ids[b].tolist() == [1] * n + [0] * (batch.tokens.shape[1] - n)
            assert batch.positions[b, :n].tolist() == list(range(n))
            assert not batch.completion_mask[b, n:].any()
            if i >= 0:
                np.testing.assert_array_equal(batch.tokens[b, :n], seventeen.row(i).tokens)
                np.testing.assert_array_equal(
                    batch.completion_mask[b, :n], seventeen.row(i).completion_mask
                )


def test_a_pad_token_changes_nothing(write):
    """pad == eos, another pad, none: the same rows, masks and batches."""
    tokenizers = ("gpt2: no BOS, EOS", "gpt2: pad == eos")
    path = write(*({"prompt": "Once upon", "completion": " a time" * i} for i in range(1, 7)))
    plain, padded = (Batches(encode_lm(path, build(n)), 4, epochs=1) for n in tokenizers)
    assert build(tokenizers[1]).pad_token_id == build(tokenizers[1]).eos_token_id
    for a, b in zip(plain, padded, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_array_equal(a.completion_mask, b.completion_mask)
        assert a.completion_mask[a.tokens == build(tokenizers[0]).eos_token_id].sum() > 0


def test_few_shapes_and_little_padding(seventeen):
    sizes = sorted({bucket(n) for n in range(1, 4097)})
    assert len(sizes) == 14
    assert all(bucket(n) >= n and bucket(n) <= max(32, 1.5 * n + 32) for n in range(1, 4097))
    assert bucket(100, largest=100) == 100
    with pytest.raises(ValueError, match="over the largest"):
        bucket(101, largest=100)
    batches = Batches(seventeen, 3, smallest=8)
    found = {batches.batch_at(s).tokens.shape[1] for s in range(20)}
    assert found <= set(batches.lengths)
    assert Batches(seventeen, 3, length=64).batch_at(0).tokens.shape == (3, 64)
    with pytest.raises(ValueError, match="longest row has"):
        Batches(seventeen, 3, length=5)


@pytest.mark.parametrize("epochs", [1, 3, None])
def test_batches_of_like_length_hold_the_same_rows(tokenizer, write, epochs):
    rng = np.random.default_rng(0)
    rows = [{"text": f"{i} " + "dog " * int(n)} for i, n in enumerate(rng.integers(1, 60, 150))]
    data = encode_lm(write(*rows), tokenizer)
    plain = Batches(data, 4, seed=5, epochs=epochs, smallest=8)
    grouped = dataclasses.replace(plain, by_length=True)
    steps = range(plain.steps or 96)  # 96 = three whole windows
    before = np.stack([plain.indices_at(s) for s in steps])
    after = np.stack([grouped.indices_at(s) for s in reversed(steps)])[::-1]
    for start in range(0, len(before), 32):  # window by window the same rows
        cut = slice(start, start + 32)
        assert sorted(before[cut].ravel()) == sorted(after[cut].ravel())
    assert ((after < 0).sum(1)[:-1] == 0).all(), "fillers only in the last batch"

    def padded(batches):
        return sum(batches.batch_at(s).tokens.shape[1] for s in steps)

    real = data.lengths[before[before >= 0]].sum() / 4
    assert padded(grouped) < 1.25 * real < padded(plain)
    longest = [data.lengths[row[row >= 0]].max() for row in after[:32]]
    assert abs(np.corrcoef(np.arange(32), longest)[0, 1]) < 0.6, "short ones do not come first"


def test_what_comes_of_batches_is_put_back_in_row_order(seventeen):
    batches = Batches(seventeen, 4, shuffle=False, epochs=1, smallest=4, by_length=True)
    lengths = [(batch.segment_ids > 0).sum(1) for batch in batches]
    assert np.concatenate(lengths).tolist() != [*seventeen.lengths, 0, 0, 0]
    assert (batches.in_row_order(lengths) == seventeen.lengths).all()
    assert (batches.in_row_order([np.stack([n, -n], 1) for n in lengths])[:, 1] < 0).all()
    with pytest.raises(ValueError, match="not one pass"):
        batches.in_row_order(lengths[:-1])


def test_pairs_weigh_one_over_the_real_pairs(tokenizer, write):
    rows = [
        {"prompt": "p", "chosen": f" good {i}", "rejected": " bad", "margin": i} for i in range(5)
    ]
    batches = Batches(encode_pairs(write(*rows), tokenizer), 4, epochs=1, shuffle=False)
    first, last = batches
    np.testing.assert_allclose(first.weights, [0.25] * 4)
    np.testing.assert_allclose(last.weights, [1, 0, 0, 0])
    assert first.tokens.shape == first.completion_mask.shape == (4, 2, 32)
    assert first.margin.tolist() == [0, 1, 2, 3]
    assert last.segment_ids[1:].sum() == 0
    assert last.ref_logprobs is None


def test_reference_logprobs_of_the_data_come_along(tokenizer, write):
    rows = [
        {"chosen": f" {i} yes", "rejected": " no", "ref_chosen_logps": -i, "ref_rejected_logps": -9}
        for i in range(3)
    ]
    data = encode_pairs(write(*rows), tokenizer)
    assert data.ref_logprobs.tolist() == [[0, -9], [-1, -9], [-2, -9]]
    batch = Batches(data, 4, epochs=1, shuffle=False).batch_at(0)
    assert batch.ref_logprobs.tolist() == [[0, -9], [-1, -9], [-2, -9], [0, 0]]


def test_prompts_carry_their_columns(tokenizer, write):
    path = write({"prompt": "2 + 3", "answer": "5"}, {"prompt": "4", "other": 1})
    data = encode_prompts(path, tokenizer)
    batch = Batches(data, 3, epochs=1, shuffle=False).batch_at(0)
    assert batch.prompts == ("2 + 3", "4", "")
    assert batch.columns == {"answer": ("5", None, None), "other": (None, 1, None)}
    assert batch.real.tolist() == [True, True, False]
    assert batch.lengths[2] == 1
    assert batch.indices.tolist() == [0, 1, -1]


def _statements(rows, tokenizer):
    """The statements of a set of pairs, whatever their case and last full stop."""
    sides = ((side, row) for side in (rows.chosen, rows.rejected) for row in side)
    texts = (decode(tokenizer, row.tokens[row.completion_mask]) for _, row in sides)
    return {text.strip().casefold().strip(".") for text in texts}


def test_a_statement_never_straddles_though_it_stands_in_many_pairs(tokenizer, write):
    def row(text, answer):
        return {"statement": text, "answer_matching_behavior": answer}

    words = ["sun", "moon", "star", "sea", "hill", "tree", "rain", "wind"]
    first = [row(f"I like the {w}.", " Yes") for w in words]
    first += [row(f"I hate the {w}", " No") for w in words] + [row("I LIKE the moon", " Yes")] * 2
    first += [row(f"I fear the {w}", " No") for w in words[:2]]
    second = [row(f"I hate the {w}.", " Yes") for w in words[:3]]  # the other trait's own
    second += [row(f"I miss the {w}", " No") for w in words]
    sources = [write(*first, name="trait.jsonl"), write(*second, name="contrary.jsonl")]
    seen = set()
    for seed in range(12):
        pairs = encode_pairs(sources, tokenizer, seed=seed)
        assert len(pairs) == 13
        splits = [split_by_fraction(pairs, 0.3, seed=seed), *folds(pairs, 3, seed=seed)]
        for train, held in splits:
            assert len(train) + len(held) == 13
            assert not _statements(train, tokenizer) & _statements(held, tokenizer)
        seen.add(len(np.unique(pairs.groups)))
    assert max(seen) > 4, "not all in one"


def test_groups_are_joined_by_any_name_they_share():
    assert join_groups([(5,), (3, 4), (7,), (4, 9), (9, 7), (5,)]) == [5, 3, 3, 3, 3, 5]
    chain = [(i, i + 1) for i in range(5000, 0, -1)]
    assert set(join_groups(chain)) == {1}


def test_a_prompt_never_straddles_train_and_eval(tokenizer, write):
    rows = [{"prompt": f"p{i % 23}", "chosen": f" {i}", "rejected": " no"} for i in range(200)]
    data = encode_pairs(write(*rows), tokenizer)
    for fraction in (0.01, 0.1, 0.5, 0.99):
        train, held = split_by_fraction(data, fraction, seed=2)
        assert len(train) + len(held) == 200
        assert leaks(train, held) == 0
        assert len(train) > 0 < len(held)
        assert abs(len(held) - max(fraction * 200, 8)) <= 9
        assert held.counts.rows == len(held)
    other = split_by_fraction(data, 0.1, seed=3)[1]
    assert other.digest != split_by_fraction(data, 0.1, seed=2)[1].digest
    assert leaks(data, held) == len(held)
    parts = list(folds(data, 5, seed=1))
    assert sum(len(held) for _, held in parts) == 200
    assert all(leaks(train, held) == 0 for train, held in parts)
    with pytest.raises(DataError, match="between 0 and 1"):
        split_by_fraction(data, 1.0)
    one = encode_pairs(write(*rows[:1]), tokenizer)
    with pytest.raises(DataError, match="share one prompt"):
        split_by_fraction(one, 0.5)
