# SPDX-License-Identifier: Apache-2.0
"""Files and overrides to one configuration; everything wrong is said at once, with its place."""

import contextlib
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.config.load import load, merge, settle, to_yaml
from jaxrlhf.config.places import Value, expand, parse, plain
from jaxrlhf.config.schema import leaves
from jaxrlhf.config.stages import STAGES, TRAINING
from jaxrlhf.errors import ConfigError

SFT = ["model=./m", "data=rows.jsonl"]
PPO = ["model=./m", "data=p.jsonl", "reward=pkg.mod:score", "train.steps=2"]


def write(folder, text, name="train.yaml"):
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def errors_of(command, files=(), overrides=(), second_pass=None):
    with pytest.raises(ConfigError) as caught:
        load(command, files, overrides, second_pass)
    return str(caught.value)


def test_later_files_override_earlier_ones_and_overrides_override_both(tmp_path):
    first = write(tmp_path, "optim: {learning_rate: 1, b1: 0.5}\ntrain.steps: 1\n", "a.yaml")
    second = write(tmp_path, "optim.learning_rate: 2\ntrain: {steps: 2}\n", "b.yaml")
    config = load("sft", [first, second], [*SFT, "train.steps=3"])
    assert (config.optim.learning_rate, config.optim.b1, config.train.steps) == (2.0, 0.5, 3)


def test_all_errors_at_once_with_place_accepted_values_and_nearest_name(tmp_path):
    file = write(
        tmp_path,
        "model: ./m\ndata: {train: x.jsonl, templte: no}\noptim:\n  lr: 3\n  schedule: linaer\n"
        "train: {steps: 5, epochs: 3}\nrl: {epochs: true}\nsampling: {top_p: 0.5}\nbs: 3\n",
    )
    text = errors_of("ppo", [file], ["train.batch_size=many", "foo"])
    for expected in (
        f"optim.lr ({file}:4): unknown key; did you mean optim.learning_rate?",
        f"optim.schedule ({file}:5): expected one of constant, linear, cosine; got 'linaer'; "
        "did you mean linear?",
        f"data.templte ({file}:2): unknown key; did you mean data.template?",
        f"rl.epochs ({file}:7): expected a whole number >= 1; got 'true'",
        "train.batch_size (train.batch_size=many): expected a whole number >= 1 or null; "
        "got 'many'",
        "sampling.top_p = 0.5: reinforcement learning samples with temperature only",
        f"bs ({file}:9): unknown key; did you mean train.batch_size?",
        "foo: a setting is given as key=value",
        "reward: is needed",
    ):
        assert expected in text, text


def test_a_contradiction_names_both_places(tmp_path):
    file = write(tmp_path, "train:\n  steps: 5\n")
    text = errors_of("sft", [file], [*SFT, "train.epochs=3"])
    assert text == (
        f"train.steps = 5 and epochs = 3.0: give one of them ({file}:2, train.epochs=3)"
    )


def test_a_wrong_value_does_not_also_count_as_missing():
    text = errors_of("ppo", [], [*PPO, "train.steps=soon"])
    assert "train.steps (train.steps=soon)" in text
    assert "is needed" not in text


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("true", True),
        ("12:30:45", "12:30:45"),
        ("2026-01-01", "2026-01-01"),
        ("0o17", "0o17"),
        ("~", None),
        ("null", None),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
        ("1_", "1_"),
        ("1__0", "1__0"),
        ("1_.5", "1_.5"),
        ("1_0.5", 10.5),
    ],
)
def test_unquoted_scalars_have_yaml_1_2_types(written, value):
    assert plain(written) == value
    assert type(plain(written)) is type(value)


def test_what_was_written_counts_where_a_text_is_wanted(tmp_path):
    file = write(tmp_path, "data: {train: {source: 007.jsonl, split: no}}\ntrain.keep_best: 1e-5\n")
    config = load("sft", [file], ["model=./m", "data.eval=e.jsonl"])
    assert config.data.train[0].split == "no"
    assert config.data.train[0].source == str(tmp_path / "007.jsonl")
    assert config.train.keep_best == "1e-5"


def test_numbers_are_not_truth_values():
    assert "got 'true'" in errors_of("sft", [], [*SFT, "train.batch_size=true"])
    assert "got 'nan'" not in errors_of("sft", [], [*SFT, "optim.b1=.nan", "seed=-1"])
    assert load("sft", [], [*SFT, "train.steps=1e3"]).train.steps == 1000
    assert "2.5" in errors_of("sft", [], [*SFT, "train.steps=2.5"])


def test_environment_variables_are_expanded_before_the_type_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPS", "7")
    monkeypatch.delenv("NOWHERE", raising=False)
    file = write(
        tmp_path,
        'model: "${NOWHERE:-./m}"\ntrain.steps: ${STEPS}\ndata: $${x}\nseed: ${NOWHERE:-3}',
    )
    config = load("sft", [file])
    assert (config.train.steps, config.seed) == (7, 3)
    assert config.model.path == str(tmp_path / "m")
    assert config.data.train[0].source == "${x}"
    text = errors_of("sft", [write(tmp_path, "model: ${NOWHERE}\ndata: x.jsonl")])
    assert "train.yaml:1: ${NOWHERE} is not set in the environment" in text
    assert expand("a${B:-}c", "", [], {}) == "ac"


def test_paths_are_relative_to_the_file_that_holds_them(tmp_path, monkeypatch):
    inside = tmp_path / "configs"
    (inside / "local").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    file = write(
        inside,
        "model: local/model\noutput_dir: out\nreference: org/name\n"
        "data: {train: [../rows.jsonl, org/set, 'tfds:imdb', ~/r.csv]}\n",
    )
    config = load("dpo", [file], ["data.eval=here.jsonl"])
    assert config.model.path == str(inside / "local/model")  # its first part exists
    assert config.reference == "org/name"  # a hub name
    assert config.output_dir == str(inside / "out")
    sources = [source.source for source in config.data.train]
    assert sources[:3] == [str(tmp_path / "rows.jsonl"), "org/set", "tfds:imdb"]
    assert sources[3].startswith("/")
    assert "~" not in sources[3]
    assert config.data.eval[0].source == str(tmp_path / "here.jsonl")


def test_reward_functions_in_files_are_located_and_modules_are_not(tmp_path):
    file = write(tmp_path, "reward: [f/r.py:score, {source: pkg.mod:f, weight: 2}, ./rm]\n")
    config = load("ppo", [file], ["model=./m", "data=p.jsonl", "train.steps=1"])
    assert [term.source for term in config.reward] == [
        f"{tmp_path}/f/r.py:score",
        "pkg.mod:f",
        f"{tmp_path}/rm",
    ]
    assert [term.kind for term in config.reward] == ["function", "function", "model"]
    assert [term.label for term in config.reward] == ["score", "f", "rm"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2\n", "seed (train.yaml:2): given twice, first at train.yaml:1"),
        ("train.steps: 1\ntrain: {steps: 2}\n", "train.steps (train.yaml:2): given twice"),
        ("- a\n", "train.yaml:1: settings are `key: value` lines, this is a list"),
        ("a: [1\n", "not YAML"),
        ("a: \t- b: c: d", "not YAML"),
        ("seed: !!python/object:os.system 1\n", "the tag"),
        ("a: &x [*x]\n", "nested or repeated too often"),
        ("? [1, 2]\n: 3\n", "a key is a word"),
        ("seed: 1\n---\nseed: 2\n", "not YAML"),
        ("\x00", "not YAML"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_bad_yaml_is_an_error_with_a_line(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, text)
    assert expected in errors_of("sft", ["train.yaml"], SFT)


def test_a_bomb_of_anchors_is_refused_quickly(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "too often" in errors_of("sft", [write(tmp_path, "\n".join(lines))])


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"seed: 1\nmodel: \xff\n")
    text = errors_of("sft", [tmp_path / "missing.yaml", tmp_path / "bad.yaml", tmp_path], SFT)
    assert "missing.yaml: cannot be read (No such file or directory)" in text
    assert "bad.yaml:2: byte 15 is not UTF-8" in text
    assert f"{tmp_path}: cannot be read (Is a directory)" in text
    assert "~nobody-here/a.yaml: cannot be read" in errors_of("sft", ["~nobody-here/a.yaml"])


def test_trl_names_are_accepted_and_said_under_ours():
    notes: list[str] = []
    config = load(
        "dpo",
        [],
        ["model_name_or_path=./m", "dataset_name=x.jsonl", "beta=0.2", "learning_rate=5e-6"],
        note=notes.append,
    )
    assert (config.optim.learning_rate, config.loss.model_extra) == (5e-6, {"beta": 0.2})
    assert "beta (beta=0.2) is loss.beta" in notes
    ppo = load("ppo", [], [*PPO, "beta=0.3", "max_completion_length=9", "num_generations=4"])
    assert (ppo.rl.kl_coef, ppo.sampling.max_new_tokens) == (0.3, 9)
    assert ppo.rl.samples_per_prompt == 4


def test_trl_batches_are_rows_a_device_times_passes():
    config = load("sft", [], [*SFT, "per_device_train_batch_size=4"])
    assert str(config.train.batch_plan(8)).startswith("batch_size 32 = 4 rows")
    config = load(
        "sft", [], [*SFT, "per_device_train_batch_size=4", "gradient_accumulation_steps=3"]
    )
    assert config.train.batch_plan(2).batch_size == 24
    config = load("sft", [], [*SFT, "train.batch_size=64", "train.microbatch_size=4"])
    assert config.train.batch_plan(4).accumulation == 4
    with pytest.raises(ConfigError, match="make batch_size a multiple of 12"):
        config.train.batch_plan(3)


def test_a_name_given_in_both_languages_is_given_twice(tmp_path):
    file = write(tmp_path, "learning_rate: 1\noptim.learning_rate: 2\n")
    assert "optim.learning_rate" in errors_of("sft", [file], SFT)
    assert "given twice" in errors_of("sft", [file], SFT)


def test_an_adapter_by_three_names_is_one():
    for words in (["lora_r=8"], ["model.lora.rank=8"], ["model.adapter.rank=8"]):
        section = load("sft", [], [*SFT, *words]).model.adapter
        assert (section.kind, section.rank) == ("lora", 8)
    assert load("sft", [], SFT).model.adapter is None
    assert "model.lora.rank" in errors_of("sft", [], [*SFT, "use_peft=true"])


def test_settings_of_another_adapter_are_refused():
    words = [*SFT, "model.adapter.kind=ia3", "model.adapter.rank=4"]
    assert "rank is of lora and dora" in errors_of("sft", [], words)
    found = errors_of("sft", [], [*SFT, "model.lora.target=q"])
    assert "did you mean model.adapter.targets" in found


def test_generating_reads_no_adapter_settings():
    words = ["model=m", "prompt=x", "model.adapter.rank=4"]
    assert "unknown key" in errors_of("generate", [], words)


def test_items_of_lists_can_be_overridden(tmp_path):
    file = write(tmp_path, "data: {train: [a.jsonl, b.jsonl]}\nmodel: ./m\n")
    config = load("sft", [file], ["data.train.1.weight=3", "data.train.0.limit=5"])
    assert [s.weight for s in config.data.train] == [None, 3.0]
    assert config.data.train[0].limit == 5


def test_items_of_one_list_join_within_a_file_and_over_files(tmp_path):
    first = write(tmp_path, "data: {train: [a.jsonl, b.jsonl]}\nmodel: ./m\n")
    both = "data.train.0.limit: 1\ndata.train.1.limit: 2\n"
    config = load("sft", [first, write(tmp_path, both, "second.yaml")])
    assert [s.limit for s in config.data.train] == [1, 2]
    words = ["data.train.0.source=a.jsonl", "data.train.0.limit=3", "data.train.1.source=b.jsonl"]
    config = load("sft", [], ["model=./m", *words])
    assert [s.limit for s in config.data.train] == [3, None]
    twice = write(tmp_path, "data.train.0.limit: 1\ndata: {train: {0.limit: 2}}\n", "twice.yaml")
    assert "data.train.0.limit" in (text := errors_of("sft", [first, twice]))
    assert "given twice" in text


def test_a_change_to_a_list_without_an_index_is_to_all_its_items(tmp_path):
    file = write(tmp_path, "data: {train: [a.jsonl, b.jsonl]}\nmodel: ./m\n")
    config = load("sft", [file], ["data.train.limit=5", "data.train.1.limit=6"])
    assert [s.limit for s in config.data.train] == [5, 6]
    other = write(tmp_path, "data: {train: {source: c.jsonl}}\n", "other.yaml")
    assert [Path(s.source).name for s in load("sft", [file, other]).data.train] == ["c.jsonl"]
    text = errors_of("sft", [file], ["data.train.on_bad_row=skip"])
    assert "data.train.0.on_bad_row (data.train.on_bad_row=skip): unknown key" in text


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("sft", ["max_prompt_length=2"], "data.max_prompt_length = 2 changes nothing here"),
        ("dpo", ["max_prompt_length=2"], "data.max_prompt_length = 2 changes nothing here"),
        ("eval", ["data.max_prompt_length=2", "data.eval=a"], "changes nothing without prompts"),
        ("reward", ["data.completion_only=false"], "data.completion_only = false changes nothing"),
        ("sft", ["data.fold=3"], "fold = 3 is held out of none"),
        ("sft", ["data.shuffle=false", "data.train.0.weight=2"], "a mixture by weight is drawn"),
        ("sft", ["data.template=chatlm"], "did you mean chatml?"),
        ("sft", ["data.train.0.format=promt_completion"], "did you mean prompt_completion?"),
        ("sft", ["seed=9223372036854775808"], "expected a whole number >= 0 and < 9.22337e+18"),
        ("sft", ["seed=1_"], "got '1_'"),
    ],
)
def test_what_would_be_read_by_nobody_is_refused(command, words, said):
    assert said in errors_of(command, [], [*SFT[: 1 if command == "eval" else 2], *words])


def test_the_names_of_formats_and_templates_are_those_there_are():
    from jaxrlhf.config.data import Format, Template
    from jaxrlhf.data.formats import FORMATS
    from jaxrlhf.data.templates import TEMPLATES

    assert get_args(Format) == tuple(FORMATS)
    assert get_args(Template) == (*TEMPLATES, "tokenizer", "own")


def test_no_tracker_has_a_name(tmp_path):
    assert load("sft", [], [*SFT, "report_to=none"]).track == []
    assert load("sft", [write(tmp_path, "track: none\n")], SFT).track == []
    assert load("sft", [], [*SFT, "track=tensorboard"]).track == ["tensorboard"]


def test_only_pretraining_splits_long_texts():
    words = ["data=t.txt", "model=./m", "data.truncation=split"]
    assert load("pretrain", [], words).data.truncation == "split"
    assert "expected one of error, drop, left, right" in errors_of("sft", [], words)


def test_keys_of_column_maps_may_hold_dots(tmp_path):
    file = write(tmp_path, "model: ./m\ndata: {train: {source: a.jsonl, column_map: {a.b: c.d}}}\n")
    assert load("sft", [file]).data.train[0].column_map == {"a.b": "c.d"}


def test_an_empty_block_or_file_has_no_settings(tmp_path):
    file = write(tmp_path, "train:\n  # steps: 5\n")
    empty = write(tmp_path, "", "empty.yaml")
    assert load("sft", [file, empty], SFT).train.batch_size == 64


def test_a_second_pass_joins_with_its_place(tmp_path):
    file = write(tmp_path, "optim: {lr: 1}\nloss: {gamma: 3}\n")

    def second(config):
        assert config.loss.model_extra == {"gamma": 3}
        return ["loss.gamma: unknown key"]

    text = errors_of("dpo", [file], SFT, second)
    assert "optim.lr" in text
    assert f"loss.gamma ({file}:2): unknown key" in text


@pytest.mark.parametrize("command", sorted(STAGES))
def test_every_key_is_described_and_has_a_default(command):
    for key, (_, info) in leaves(STAGES[command]).items():
        assert info.description, f"{command}: {key} says nothing"
        assert not info.is_required(), f"{command}: {key} has no default"


@pytest.mark.parametrize("command", TRAINING)
def test_the_printed_configuration_reads_back_equal(command, tmp_path):
    given = {"model": "./m", "data": "d.jsonl", "seed": 5, "optim.learning_rate": 1e-5}
    given |= {"train.keep_best": "1e-3", "data.eval": [{"source": "e.jsonl", "split": "${x}"}]}
    if command == "pretrain":
        given |= {"model": {"init": {"hidden_size": 64}, "tokenizer": "./t"}}
    if command == "ppo":
        given |= {"reward": ["a:b", {"source": "./rm", "weight": -1}], "train.steps": 3}
    config = load(command, keywords=given)
    file = write(tmp_path, to_yaml(config))
    assert load(command, [file]) == config
    assert to_yaml(load(command, [file])) == to_yaml(config)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["1e-5", "no", "${X}", "stage:a", "../x", "cosine", "-1"]),
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "train",
                    "steps",
                    "optim",
                    "model",
                    "path",
                    "data",
                    "source",
                    "x.y",
                    "0",
                    "rl",
                    "lr",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    command=st.sampled_from(["ppo", "sft", "eval", "generate"]),
    tree=st.dictionaries(
        st.sampled_from([*leaves(STAGES["ppo"]), "train", "model", "data", "reward", "beta", "zz"]),
        trees,
        max_size=5,
    ),
)
def test_whatever_a_file_holds_is_a_configuration_or_a_config_error(command, tree):
    text = yaml.safe_dump(tree, allow_unicode=False)
    errors: list[str] = []
    read = parse(text, "fuzz.yaml", Path("/base"), errors)
    if read is None:
        assert errors
        return
    settle(merge(Value({}, ""), read), STAGES[command], [])
    with contextlib.suppress(ConfigError):
        load(command, [], [], keywords=tree)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_whatever_an_override_holds_is_a_configuration_or_a_config_error(key, value):
    for text in (f"{key}={value}", f"optim.{key}={value}", f"data.train={value}", key):
        with contextlib.suppress(ConfigError):
            load("sft", [], [*SFT, text])


def test_reading_settings_imports_no_jax():
    code = (
        "import sys; from jaxrlhf.config.load import load; "
        "load('ppo', [], ['model=./m', 'data=p.jsonl', 'reward=a:b', 'train.steps=1']); "
        "from jaxrlhf.config import pipeline, resume, signatures; "
        "bad = {'jax', 'numpy', 'flax', 'transformers'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_setting_is_found_at_the_line_of_its_key(tmp_path):
    file = write(tmp_path, "optim:\n  schedule:\n    linaer\n")
    assert f"optim.schedule ({file}:2)" in errors_of("sft", [file], SFT)


def test_grpo_by_its_names_in_trl_is_told_its_estimator():
    notes: list[str] = []
    words = ["reward_funcs=a.b:f", "num_generations=4"]
    load("ppo", [], ["model=m", "data=p.jsonl", "train.steps=1", *words], note=notes.append)
    assert all("the estimator of GRPO is rl.advantage=group" in note for note in notes)
    assert len(notes) == 2


def test_sigmoid_is_trls_name_of_plain_dpo():
    notes: list[str] = []
    words = ["model=./m", "data=x.jsonl", "loss_type=sigmoid"]
    assert load("dpo", [], words, note=notes.append).loss.name == "dpo"
    assert notes == ["loss_type (loss_type=sigmoid) is loss.name=dpo"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def f(): ...\n", "name a function in it: r.py:f; it has f"),
        ("def f(): ...\ndef g(): ...\n", "name a function in it: r.py:FUNCTION; it has f, g"),
        (None, "name a function in it: r.py:FUNCTION"),
    ],
)
def test_a_file_given_as_reward_is_asked_for_its_function(tmp_path, text, said):
    file = tmp_path / "r.py"
    if text is not None:
        file.write_text(text)
    found = errors_of("ppo", [], [*PPO, f"reward={file}"])
    assert found == f"reward.0.source = {file}: {said} (reward={file})"


def test_a_key_is_looked_for_in_its_own_section_first():
    found = errors_of("ppo", [], [*PPO, "reward={function: a.b:f}"])
    assert "unknown key; did you mean reward.0.source?" in found
    found = errors_of("ppo", [], [*PPO, "reward={source: a.b:f, functional: 1}"])
    assert "unknown key; keys of reward.0: source, weight, name" in found
    found = errors_of("sft", [], [*SFT, "train.learning_rate=1"])
    assert "did you mean optim.learning_rate?" in found


@pytest.mark.parametrize(
    ("command", "word", "key"),
    [
        ("sft", "column_map=x", "data.train"),
        ("sft", "data.column_map=x", "data.train"),
        ("generate", "column_map=x", "prompts"),
        ("score", "limit=3", "data"),
    ],
)
def test_a_key_of_an_entry_says_where_it_stands(command, word, key):
    name = word.partition("=")[0].rpartition(".")[2]
    found = errors_of(command, [], ["model=./m", word])
    assert f"it is one of an entry of {key}, write '{key}={{source: ..., {name}: ...}}'" in found
