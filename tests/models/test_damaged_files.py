# SPDX-License-Identifier: Apache-2.0
"""Flipped bits, and damaged folders of adapters: refused by name, or nothing has changed."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_rows import assert_same_bits
from safetensors.numpy import load_file, save_file

from jaxrlhf.errors import ModelError
from jaxrlhf.models.adapters.peft import load_adapter
from jaxrlhf.models.tensor_files import weights_digest
from jaxrlhf.models.weights import load_hf

ORACLES = Path(__file__).resolve().parents[1] / "oracles" / "models"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(ORACLES / "llama", tmp_path / "model"))


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_flipped_bit_of_the_header_is_refused_or_means_nothing(folder, data):
    path = folder / "model.safetensors"
    good = (ORACLES / "llama" / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    bit = data.draw(st.integers(0, 8 * end - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bad)
    try:
        found = load_hf(folder).params
    except ModelError:
        return
    assert_same_bits(found, load_hf(ORACLES / "llama").params)
    assert good[bit // 8 : bit // 8 + 1] not in b'{}[]",:0123456789'


def test_a_flipped_bit_of_the_weights_changes_their_digest_and_an_exponent_of_ones_is_found(folder):
    path = folder / "model.safetensors"
    before = weights_digest(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 0x40  # the highest bit of a float32's exponent
    data[-2] |= 0x80
    data[-1] |= 0x3F
    path.write_bytes(data)
    assert weights_digest(folder) != before
    with pytest.raises(ModelError, match=r"holds 1 values that are NaN or infinite"):
        load_hf(folder)
    data[-1] ^= 0x41  # finite again: from the file alone nobody can see it, but the digest changed
    path.write_bytes(data)
    load_hf(folder)
    assert weights_digest(folder) != before


def test_shards_in_a_folder_of_their_own_are_checked_like_one_file(folder):
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    for file, half in zip(files, halves, strict=True):
        save_file({name: held[name] for name in half}, folder / file)
    where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert_same_bits(load_hf(folder).params, load_hf(ORACLES / "llama").params)
    second = folder / files[1]
    good = second.read_bytes()
    second.write_bytes(good[:-1])
    with pytest.raises(ModelError, match=r"00002-of-00002\.safetensors \(\d+ bytes\) is damaged"):
        load_hf(folder)
    bad = {name: held[name].copy() for name in halves[1]}
    bad[names[-1]].reshape(-1)[0] = np.nan
    save_file(bad, second)
    with pytest.raises(ModelError, match=f"00002-of-00002.safetensors: {names[-1]} holds 1 values"):
        load_hf(folder)
    save_file({name: held[name] for name in names[1:]}, second)
    with pytest.raises(ModelError, match=f"{names[1]} is both in {files[0]} and {files[1]}"):
        load_hf(folder)


# ---------------------------------------------------------------------------------------- adapters

NAME = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.fixture
def adapter(tmp_path):
    """(an adapter's folder, its model)"""
    model = load_hf(ORACLES / "llama")
    width = model.config.hidden_size
    tensors = {}
    for layer in range(model.config.num_layers):
        tensors[NAME.format(layer, "A")] = np.full((2, width), 0.5, np.float32)
        tensors[NAME.format(layer, "B")] = np.full((width, 2), 0.25, np.float32)
    place = tmp_path / "adapter"
    place.mkdir()
    save_file(tensors, place / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (place / "adapter_config.json").write_text(json.dumps(said))
    return place, model


def test_damaged_adapters_are_refused_by_name(adapter):
    place, model = adapter

    def load():
        return load_adapter(place, model.config, model.params)

    leaves = load().leaves
    assert {float(leaf.reshape(-1)[0]) for leaf in jax.tree.leaves(leaves)} >= {0.5, 0.25}
    path = place / "adapter_model.safetensors"
    good = path.read_bytes()
    for bad in (b"", good[:100], good[:-1], good + b"\0", good[:8] + b"x" + good[9:]):
        path.write_bytes(bad)
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors \(\d+ bytes\) is damage"):
            load()
    tensors = load_file(ORACLES / "llama" / "model.safetensors")
    save_file(tensors, path)  # a model's file in the place of an adapter's
    with pytest.raises(ModelError, match=r"missing: .*q_proj.lora_A.weight \[2, 16\]"):
        load()
    path.unlink()
    index = place / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NAME.format(0, "A"): "gone.safetensors"}}))
    with pytest.raises(ModelError, match=r"names gone\.safetensors, which is missing"):
        load()
    (place / "there.safetensors").write_bytes(good)
    index.write_text(json.dumps({"weight_map": {NAME.format(0, "A"): "there.safetensors"}}))
    with pytest.raises(ModelError, match=r"lora_B.weight: in there\.safetensors, not in the index"):
        load()
    index.unlink()
    with pytest.raises(ModelError, match=r"neither adapter_model\.safetensors nor"):
        load()
