# SPDX-License-Identifier: Apache-2.0
"""Hugging Face folders: the same bits out as in, and every kind of damage refused by name."""

import json
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_rows import CONFIGS, assert_same_bits, params
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxrlhf.errors import ModelError
from jaxrlhf.models.families import config_from_hf, config_to_hf
from jaxrlhf.models.weights import load_hf, save_hf

ORACLES = Path(__file__).resolve().parents[1] / "oracles" / "models"
NAMES = sorted(path.name for path in ORACLES.iterdir())


def tensors(folder: Path) -> dict[str, np.ndarray]:
    merged: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        merged |= load_file(path)
    return merged


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a good folder, to be spoilt."""
    return Path(shutil.copytree(ORACLES / "llama", tmp_path / "model"))


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


@pytest.mark.parametrize("name", NAMES)
def test_export_of_an_import_has_the_same_bits_and_the_same_config(name, tmp_path):
    model = load_hf(ORACLES / name)
    save_hf(
        tmp_path / "out", model.params, model.config, kind=model.kind, hf_config=model.hf_config
    )
    before, after = tensors(ORACLES / name), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert_same_bits(value, after[key])
    again = load_hf(tmp_path / "out", kind=model.kind)
    assert again.config == model.config
    assert_same_bits(model.params, again.params)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert again.hf_config[key] == model.hf_config[key]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype_in_shards_and_whole(name, dtype, tmp_path):
    tree = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), params(name))
    save_hf(tmp_path / "one", tree, CONFIGS[name])
    save_hf(tmp_path / "many", tree, CONFIGS[name], max_shard_bytes=3000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert_same_bits(tensors(tmp_path / "one"), tensors(tmp_path / "many"))
    for folder in ("one", "many"):
        model = load_hf(tmp_path / folder)
        assert_same_bits(model.params, {k: tree[k] for k in model.params})
        assert model.hf_config["dtype"] == model.hf_config["torch_dtype"] == dtype
    save_hf(tmp_path / "many", tree, CONFIGS[name])  # over an older export: no shard is left
    assert_same_bits(load_hf(tmp_path / "many").params, load_hf(tmp_path / "one").params)
    assert [p.name for p in (tmp_path / "many").glob("model*")] == ["model.safetensors"]


def test_the_files_are_those_of_safetensors_itself(tmp_path):
    save_hf(tmp_path, params("gpt2"), CONFIGS["gpt2"], dtype="bfloat16")
    with safe_open(str(tmp_path / "model.safetensors"), framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        stored = file.get_tensor("transformer.h.1.mlp.c_fc.weight")
    want = params("gpt2")["layers"]["mlp"]["up"]["kernel"][1].astype(jnp.bfloat16)
    assert_same_bits(stored, np.asarray(want))


def test_shards_of_a_leaf_are_read_alone():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for name in ("llama", "gpt2"):
        placed = load_hf(ORACLES / name, shardings=sharding).params
        assert_same_bits(placed, load_hf(ORACLES / name).params)
        assert jax.tree.leaves(placed)[0].sharding == sharding


def test_a_bare_model_with_buffers_and_a_copy_of_its_tied_head_is_read(tmp_path):
    folder = Path(shutil.copytree(ORACLES / "gpt2", tmp_path / "bare"))
    old = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): value for name, value in old.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    bare["lm_head.weight"] = old["transformer.wte.weight"]
    save_file(bare, folder / "model.safetensors")
    assert_same_bits(load_hf(folder).params, load_hf(ORACLES / "gpt2").params)
    bare["lm_head.weight"] = bare["lm_head.weight"] + 1
    save_file(bare, folder / "model.safetensors")
    with pytest.raises(ModelError, match="tie_word_embeddings to false"):
        load_hf(folder)


def test_kinds_are_not_confused(tmp_path):
    with pytest.raises(ModelError, match="is a language model; a reward model"):
        load_hf(ORACLES / "llama", kind="reward")
    with pytest.raises(ModelError, match=r"is a reward model.*a language model is needed"):
        load_hf(ORACLES / "llama-reward", kind="lm")
    model = load_hf(ORACLES / "llama")
    with pytest.raises(ModelError, match="no score head"):
        save_hf(tmp_path, model.params, model.config, kind="reward", pad_token_id=0)


def test_a_reward_model_needs_a_padding_token_that_is_never_real(tmp_path):
    model = load_hf(ORACLES / "llama-reward")

    def save(pad, hf):
        save_hf(tmp_path, model.params, model.config, kind="reward", pad_token_id=pad, hf_config=hf)

    with pytest.raises(ModelError, match="needs a pad_token_id"):
        save(None, {"eos_token_id": 2})
    with pytest.raises(ModelError, match="pad_token_id = 2 is the end-of-text token"):
        save(2, {"eos_token_id": 2})
    with pytest.raises(ModelError, match="pad_token_id = 3 is the end-of-text token"):
        save(3, {"eos_token_id": [2, 3]})
    with pytest.raises(ModelError, match="outside the vocabulary of 37"):
        save(37, {"eos_token_id": 2})
    save(0, {"eos_token_id": 2, "pad_token_id": 2})
    assert load_hf(tmp_path).hf_config["pad_token_id"] == 0


def respell(folder, change):
    path = folder / "model.safetensors"
    held = {name: value.copy() for name, value in load_file(path).items()}
    change(held)
    save_file(held, path)


Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGE = {
    "missing tensor": (lambda t: t.pop(Q), rf"missing: {Q} \[16, 16\]"),
    "extra tensor": (
        lambda t: t.update({"model.layers.2.extra": np.ones(3, np.float32)}),
        r"not part of this model: model.layers.2.extra \[3\]",
    ),
    "wrong shape": (
        lambda t: t.update({Q: np.ones((16, 8), np.float32)}),
        rf"wrong shape: {Q} is \[16, 8\], expected \[16, 16\]",
    ),
    "one NaN": (lambda t: t[Q].__setitem__((3, 4), np.nan), rf"{Q} holds 1 values that are NaN"),
    "one inf": (lambda t: t[Q].__setitem__((3, 4), -np.inf), rf"{Q} holds 1 values"),
    "integers": (lambda t: t.update({Q: np.ones((16, 16), np.int8)}), f"{Q} is stored as I8"),
}


@pytest.mark.parametrize("what", sorted(DAMAGE))
def test_wrong_tensors_are_named(what, folder):
    change, message = DAMAGE[what]
    respell(folder, change)
    with pytest.raises(ModelError, match=message):
        load_hf(folder)


def test_cut_and_overwritten_files_are_named(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    twice = whole[8 : 8 + size].rstrip().replace(b"{", b'{"__metadata__":{"a":"b"},', 1)
    for data in (
        b"",
        whole[:5],
        whole[:200],
        whole[:-1],
        whole + b"\0",
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"x" + whole[9:],
        len(twice).to_bytes(8, "little") + twice + whole[8 + size :],
    ):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"model\.safetensors \(\d+ bytes\) is damaged"):
            load_hf(folder)


def test_pickles_are_never_opened(folder, tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (folder / name).write_bytes(pickle.dumps(Canary()))
        with pytest.raises(ModelError, match=r"a pickle.*never opened"):
            load_hf(folder)
        (folder / name).unlink()
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match=r"neither model\.safetensors nor"):
        load_hf(folder)


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    save_hf(tmp_path, params("llama"), CONFIGS["llama"], max_shard_bytes=4000)
    path = tmp_path / "model.safetensors.index.json"
    good = json.loads(path.read_text())
    name, file = next(iter(good["weight_map"].items()))
    other = next(f for f in good["weight_map"].values() if f != file)

    def refused(weight_map, match):
        path.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ModelError, match=match):
            load_hf(tmp_path)

    names = good["weight_map"]
    refused(names | {name: other}, f"{name}: the index says {other}, it is in {file}")
    refused(names | {"made.up": file}, r"made\.up: .*none of the files")
    refused({k: v for k, v in names.items() if k != name}, f"{name}: in {file}, not in the index")
    refused(names | {name: "../" + file}, "is not the name of a safetensors file")
    refused(names | {name: "gone.safetensors"}, r"names gone\.safetensors, which is missing")
    refused(["a"], "weight_map is missing or not an object")


def test_folders_that_are_no_models_say_what_they_are(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        load_hf(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ModelError, match=r"no config\.json \(it holds: notes\.txt\)"):
        load_hf(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="PEFT adapter"):
        load_hf(tmp_path)
    for text, match in (("{", "cannot be read"), ("[]", "holds a list"), ("{}", "model_type")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=match):
            load_hf(tmp_path)


def test_saving_refuses_what_does_not_fit(tmp_path):
    tree = load_hf(ORACLES / "llama").params
    config = load_hf(ORACLES / "llama").config
    with pytest.raises(ModelError, match=r"missing: final_norm/scale \[16\]"):
        save_hf(tmp_path, {k: v for k, v in tree.items() if k != "final_norm"}, config)
    with pytest.raises(ModelError, match="not part of this model: adapters"):
        save_hf(tmp_path, tree | {"adapters": {}}, config)
    bad = tree | {"final_norm": {"scale": jnp.full(16, jnp.nan)}}
    with pytest.raises(ModelError, match=r"model\.norm\.weight holds values that are NaN"):
        save_hf(tmp_path, bad, config)
    assert not (tmp_path / "config.json").exists()
    assert not list(tmp_path.glob("*.partial"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        save_hf(tmp_path / "file" / "under", tree, config)


# config.json alone


def hf(name: str = "llama", **changes) -> dict:
    config = json.loads((ORACLES / name / "config.json").read_text()) | changes
    return {key: value for key, value in config.items() if value != "absent"}


def test_both_spellings_of_rope_mean_the_same():
    scaling = {"rope_type": "linear", "factor": 2.0}
    new = config_from_hf(hf(rope_parameters={"rope_theta": 5e5, **scaling}))
    old = config_from_hf(hf(rope_parameters="absent", rope_theta=5e5, rope_scaling=scaling))
    older = {"type": "linear", "factor": 2.0}
    oldest = config_from_hf(hf(rope_parameters="absent", rope_theta=5e5, rope_scaling=older))
    assert new == old == oldest
    assert (new.rope_theta, dict(new.rope_scaling)) == (5e5, scaling)
    bare = config_from_hf(hf(rope_parameters="absent"))
    assert (bare.rope_theta, bare.rope_scaling) == (10000.0, ())
    written = config_to_hf(new)
    assert written["rope_scaling"] == scaling
    assert written["rope_parameters"] == {"rope_theta": 5e5, **scaling}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"model_type": "mamba"},
            r"'mamba' is not supported; supported: gemma, gemma2, gemma3_text",
        ),
        ({"model_type": "absent"}, "model_type = None"),
        (
            {"rope_parameters": {"rope_type": "ntk", "factor": 2.0}},
            "default, dynamic, linear, llama3",
        ),
        ({"rope_parameters": {"rope_type": "longrope"}}, "lacks short_factor, long_factor"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor = -1: a positive"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not read"),
        ({"rope_theta": 500.0}, "disagree"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "disagree"),
        ({"hidden_act": "quick_gelu"}, "hidden_act = 'quick_gelu': supported are"),
        ({"sliding_window": 8}, "sliding_window = 8 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"residual_multiplier": 0.5}, "residual_multiplier = 0.5 is not read"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers is missing"),
        ({"num_hidden_layers": "2"}, "num_layers = '2'"),
        ({"num_key_value_heads": 3}, "does not divide"),
        ({"intermediate_size": -3, "hidden_act": 1}, "hidden_act = 1"),
    ],
)
def test_a_config_that_means_other_maths_is_refused(changes, match):
    with pytest.raises(ModelError, match=match):
        config_from_hf(hf(**changes))


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("gemma2", {"layer_types": ["full_attention"]}, "1 entries for 2 layers"),
        ("gemma2", {"layer_types": ["chunked_attention"] * 2}, "a list of 'sliding_attention'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gemma2", {"sliding_window": None}, "no sliding_window is in use"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ("gemma3", {"rope_local_base_freq": 7.0, "rope_theta": 3.0}, "disagree"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "no sliding_window is in use"),
        (
            "phi3-longrope",
            {"rope_parameters": {"rope_type": "su", "short_factor": [1.0], "long_factor": [2.0]}},
            "short_factor has 1 numbers, a head has 2 rotated pairs",
        ),
        ("qwen3-moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
        ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
        ("mixtral", {"num_experts_per_tok": 9}, "experts_per_token = 9"),
        ("gpt-neox", {"use_parallel_residual": "yes"}, "use_parallel_residual = 'yes'"),
        ("smollm3", {"no_rope_layers": [1]}, "a list of 4 numbers"),
    ],
)
def test_switches_of_families_are_read_or_refused(name, changes, match):
    with pytest.raises(ModelError, match=match):
        config_from_hf(hf(name, **changes))


def test_switches_of_gpt2():
    old = {"n_ctx": 64, "n_inner": None, "attn_pdrop": 0.1}
    assert config_from_hf(hf("gpt2", **old)).mlp_dim == 64
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx = True"):
        config_from_hf(hf("gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(ModelError, match="name the same thing"):
        config_from_hf(hf("gpt2", n_ctx=32))


def test_what_a_family_cannot_say_is_not_written():
    import dataclasses

    config = dataclasses.replace(CONFIGS["llama"], qkv_bias=True)
    with pytest.raises(ModelError, match="cannot express"):
        config_to_hf(config)
