# SPDX-License-Identifier: Apache-2.0
"""Every kind of file and layout; every way to be wrong, with its place and its mend."""

import contextlib
import gzip
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxrlhf.config.load import load
from jaxrlhf.data.formats import FORMATS, dialogue, read, split_common
from jaxrlhf.data.sources import Origin, RowError, as_specs, load_rows
from jaxrlhf.errors import DataError

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": 'ü\n"x",', "completion": "d"}]


def written(tmp_path, kind: str, rows=ROWS):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "csv":
        import csv

        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind, zipped):
    path = written(tmp_path, kind)
    if zipped:
        packed = tmp_path / f"rows.{kind}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        path = packed
    rows = load_rows(str(path))
    assert rows.rows == ROWS
    assert load_rows(str(path)).digest == rows.digest
    assert rows.origins[1].file == str(path)
    assert load_rows({"source": str(path), "limit": 1}).rows == ROWS[:1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with contextlib.suppress(DataError):
        assert load_rows(str(path)).digest != rows.digest


def test_bom_crlf_blank_lines_and_other_json_shapes(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    rows = load_rows(str(path))
    assert [r["text"] for r in rows] == ["one", "two"]
    assert [o.line for o in rows.origins] == [1, 3]
    for text in (
        '{"version": 1, "data": [{"text": "one"}]}',
        '{"text": "one"}',
        ' [{"text":"one"}]',
    ):
        (tmp_path / "b.json").write_text(text)
        assert load_rows(str(tmp_path / "b.json")).rows == [{"text": "one"}]
    (tmp_path / "b.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert [o.line for o in load_rows(str(tmp_path / "b.json")).origins] == [1, 2]
    (tmp_path / "c.txt").write_text("first\nsame\n\n \nsecond\n")
    rows = load_rows(str(tmp_path / "c.txt"))
    assert [r["text"] for r in rows] == ["first\nsame", "second"]


BAD_LINES = {
    b'{"text": "cut': "not JSON: column 10: Unterminated.*cut short",
    b'{"text": 1} {"text": 2}': "Extra data",
    b'{"text": NaN}': "NaN is not a JSON value",
    b'{"text": "a", "text": "b"}': "the key 'text' occurs twice",
    b'{"text": "\xff"}': r"byte 27 \(0xff\) is not valid UTF-8",
    b'{"text": "\\ud800"}': "half a surrogate pair",
    b'{"a\\udc00": [{"b": "x"}]}': "half a surrogate pair",
    b'["text"]': "expected an object of columns, found \\['text'\\]",
    b"[" * 100_000: "nested too deeply|Expecting",
    b'{"text": "\x00"}': "Invalid control character",
    b'{"text": ' + b"1" * 5000 + b"}": "4300 digits",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_named_or_counted(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}' + b"\n" + line)
    with pytest.raises(RowError, match=f"rows.jsonl:2: .*({BAD_LINES[line]})"):
        load_rows(str(path))
    rows = load_rows(str(path), on_bad_row="skip")
    assert (len(rows), rows.bad) == (1, 1)
    assert "rows.jsonl:2" in rows.bad_examples[0]
    path.write_bytes(line)
    with pytest.raises(DataError, match="holds no rows; 1 bad row"):
        load_rows(str(path), on_bad_row="skip")


def test_damaged_files_of_other_kinds(tmp_path):
    cases = {
        "a.json": (b'[{"text": "x"}', r"a.json:1: column 15: .*cut short"),
        "b.json": (b'[{"text": "x"},\n {"text" "y"}]', "b.json:2: column 10"),
        "c.csv": (b"text,label\nx,1\ny\n", "c.csv:3: 1 fields where the header has 2"),
        "d.csv": (b'text\n"open\n', "d.csv:2: not CSV"),
        "e.csv": (b"text,text\nx,y\n", "a column name occurs twice"),
        "f.parquet": (b"PAR1 no", "not a readable parquet"),
        "g.jsonl.gz": (gzip.compress(b'{"text": "x"}\n' * 99)[:-9], "damaged gzip"),
        "h.jsonl.gz": (b"not gzip", "damaged gzip"),
        "i.csv": (b"text\nab\xc3\x28\n", r"i.csv:2: byte 7 \(0xc3\)"),
        "j.jsonl": (b"", "holds no rows"),
        "k.json": (b"", "holds no rows"),
        "l.xml": (b"<a/>", "unknown kind of file"),
        "m.csv": (b"text\n", "holds no rows"),
    }
    for name, (raw, message) in cases.items():
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(DataError, match=message):
            load_rows(str(tmp_path / name))


def test_a_very_long_line_is_refused_with_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxrlhf.data.sources.MAX_LINE", 1 << 20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (3 << 20) + b'"}\n')
    with pytest.raises(DataError, match=r"rows.jsonl:1: the line is longer than 1 MiB"):
        load_rows(str(path))


GOOD = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "d", "chosen": "e"}\n'


@settings(max_examples=120, deadline=None)
@example(b"\n", [])
@given(
    st.one_of(st.binary(max_size=80), st.text('{}[]":,0123nulltrue\\ud8 e-\n', max_size=80)),
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
)
def test_no_bytes_give_anything_but_a_data_error(tmp_path_factory, noise, edits):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    mutated = bytearray(GOOD)
    for at, byte in edits:
        mutated[at] = byte
    noise = noise if isinstance(noise, bytes) else noise.encode()
    for raw in (noise, bytes(mutated), bytes(mutated[:37]) + noise):
        for name in ("x.jsonl", "x.json", "x.csv"):
            (folder / name).write_bytes(raw)
            for policy in ("error", "skip"):
                with contextlib.suppress(DataError):  # anything else is a failure
                    read(load_rows(str(folder / name), on_bad_row=policy), on_bad_row=policy)


def test_folders_splits_and_patterns(tmp_path):
    for name, value in {"train-0": 1, "train-1": 2, "test-0": 3}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": str(value)}) + "\n")
    (tmp_path / "README.md").write_text("no data")
    texts = lambda spec: [r["text"] for r in load_rows(spec)]  # noqa: E731
    folder = str(tmp_path)
    assert texts(folder) == ["1", "2"]
    assert texts({"source": folder, "split": "test"}) == ["3"]
    assert texts(f"{folder}/t*-0.jsonl") == ["3", "1"]
    with pytest.raises(DataError, match="no split 'dev'; splits found: test, train"):
        load_rows({"source": folder, "split": "dev"})
    with pytest.raises(DataError, match="no file matches"):
        load_rows(f"{folder}/*.csv")
    with pytest.raises(DataError, match=r"no such file.*did you mean 'train-0.jsonl'"):
        load_rows(f"{folder}/train_0.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        load_rows(f"{folder}/empty")
    with pytest.raises(DataError, match="neither a path here"):
        load_rows("nobody/no-such-dataset")


def test_a_saved_dataset_reads_back(tmp_path):
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    assert load_rows(str(tmp_path / "one")).rows == ROWS
    both = datasets.DatasetDict({"train": table, "test": table.select([1])})
    both.save_to_disk(tmp_path / "two")
    assert load_rows(str(tmp_path / "two")).rows == ROWS
    assert load_rows({"source": str(tmp_path / "two"), "split": "test"}).rows == ROWS[1:]
    with pytest.raises(DataError, match=r"no split 'tests' \(did you mean 'test'\?\)"):
        load_rows({"source": str(tmp_path / "two"), "split": "tests"})


def test_a_tfds_set_is_read_without_tensorflow(tmp_path):
    import subprocess
    import sys

    script = f"""
import sys
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(
            {{"text": tfds.features.Text(), "label": tfds.features.ClassLabel(num_classes=2)}}))
    def _split_generators(self, dl_manager):
        return {{"train": self._generate_examples()}}
    def _generate_examples(self):
        for i, text in enumerate(["uno", "dós"]):
            yield i, {{"text": text, "label": i}}

builder = Tiny(data_dir={str(tmp_path)!r}, file_format="array_record")
builder.download_and_prepare()
from jaxrlhf.data.sources import load_rows
rows = load_rows("tfds:" + str(builder.data_dir))
found = sorted((r["text"], r["label"]) for r in rows)
assert found == [("dós", 1), ("uno", 0)], found
assert "tensorflow" not in sys.modules
from jaxrlhf.errors import DataError
try:
    load_rows("tfds:no_such_set_here")
except DataError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert "cannot be read without TensorFlow" in out.stdout


def test_source_specs_are_checked():
    assert as_specs(["a.jsonl", {"source": "b", "weight": 2}])[1].weight == 2
    bad_specs = (
        ({"sorce": "a"}, r"unknown key 'sorce' \(did you mean 'source'\?\)"),
        ({"split": "a"}, "`source` must name"),
        ({"source": "a", "weight": 0}, "weight 0 must be positive"),
        ({"source": "a", "limit": 0}, "limit 0 must be positive"),
        ([], "no data source"),
    )
    for spec, message in bad_specs:
        with pytest.raises(DataError, match=message):
            as_specs(spec)


def test_column_map_renames_and_says_when_it_cannot(write):
    path = write({"query": "q", "response": "r"})
    source = {"source": path, "column_map": {"prompt": "query", "completion": "response"}}
    assert load_rows(source).rows == [{"prompt": "q", "completion": "r"}]
    with pytest.raises(DataError, match=r"no column 'querry' \(did you mean 'query'\?\)"):
        load_rows({"source": path, "column_map": {"prompt": "querry"}})
    with pytest.raises(DataError, match=r"reads \{ours: theirs\}: column_map: \{prompt: query\}"):
        load_rows({"source": path, "column_map": {"query": "prompt"}})


# --- formats ---------------------------------------------------------------------------------

U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
B = {"role": "assistant", "content": "b"}
LAYOUTS = {
    "text": {"text": "t"},
    "prompt": {"prompt": [U]},
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "messages": {"messages": [U, A]},
    "sharegpt": {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
    "preference": {"prompt": "p", "chosen": "c", "rejected": "r"},
    "unpaired": {"prompt": "p", "completion": "c", "label": True},
    "unpaired_messages": {"messages": [U, A], "label": False},
    "stepwise": {"prompt": "p", "completions": ["s", "t"], "labels": [True, False]},
    "ranked": {"prompt": "p", "completions": ["s", "t"], "ranks": [2, 1]},
    "rated": {"prompt": "p", "completions": ["s", "t"], "ratings": [2, 1.5]},
    "tokenized": {"input_ids": [1, 2], "labels": [-100, 2]},
    "alpaca": {"instruction": "i", "input": "", "output": "o"},
    "question_answer": {"question": "q", "answer": "a"},
    "chat_preference": {"conversations": [U], "chosen": A, "rejected": B},
    "hh_rlhf": {
        "chosen": "\n\nHuman: hi\n\nAssistant: yes",
        "rejected": "\n\nHuman: hi\n\nAssistant: no",
    },
    "tldr_comparison": {
        "info": {"post": "long", "title": "t", "subreddit": "s"},
        "summaries": [{"text": "good"}, {"text": "bad"}],
        "choice": 0,
    },
    "ultrafeedback": {
        "instruction": "i",
        "completions": [
            {"response": "x", "overall_score": 7.5},
            {"response": "y", "overall_score": 3},
        ],
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_recognised(name, write):
    found = read(load_rows(write(LAYOUTS[name], LAYOUTS[name])))
    assert found.format == name
    assert len(found) == 2
    assert found[0].columns == LAYOUTS[name]
    nulls = dict(LAYOUTS[name], tools=None, margin=None, images=None)
    assert read(load_rows(write(nulls))).format == name


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_damaged_column_is_named(name, write):
    row = LAYOUTS[name]
    for column in FORMATS[name].columns:
        for broken in (
            {k: v for k, v in row.items() if k != column},
            {**row, column: None},
            {**row, column: {"what": "is this"}},
            {**row, column: []},
        ):
            source = {"source": write(row, broken), "format": name}
            if name == "tokenized" and broken.get(column) == []:  # dropped later, as empty
                continue
            with pytest.raises(DataError, match=r"rows.jsonl:2"):
                read(load_rows(source))
            assert read(load_rows(source), on_bad_row="skip")[0].origin.line == 1


def test_the_error_names_found_expected_nearest_and_the_mend(write):
    with pytest.raises(DataError) as caught:
        read(load_rows(write({"query": "q", "choosen": "c", "rejected": "r"})))
    text = str(caught.value)
    for part in ("rows.jsonl:1", "query, choosen, rejected", "column_map: {chosen: choosen}"):
        assert part in text
    with pytest.raises(DataError) as caught:
        read(
            load_rows(
                write({"prompt": "q", "completion": "c"}, {"prompt": "q", "complection": "c"})
            )
        )
    text = str(caught.value)
    for part in (
        *("rows.jsonl:2", "'completion' is missing", "found: prompt, complection"),
        *("expected by format 'prompt_completion'", "column_map: {completion: complection}"),
    ):
        assert part in text
    with pytest.raises(DataError, match=r"unknown format 'mesages' \(did you mean 'messages'\?\)"):
        read(load_rows({"source": write({"text": "t"}), "format": "mesages"}))


def test_the_common_prompt_is_whole_messages(write):
    assert split_common([U, A, U, A], [U, A, U, B]) == ([U, A, U], [A], [B])
    assert split_common([U, A], [U, A]) == ([U], [A], [A])
    same_start = {"chosen": [U, {**A, "content": "ab"}], "rejected": [U, {**A, "content": "ac"}]}
    example = read(load_rows(write(same_start)))[0]
    assert example.prompt == [U]
    assert example.chosen[0]["content"] == "ab"
    texts = read(load_rows(write({"chosen": "same start a", "rejected": "same start b"})))[0]
    assert (texts.prompt, texts.chosen) == ("", "same start a")
    zephyr = read(load_rows(write({"prompt": "u", "chosen": [U, A], "rejected": [U, B]})))[0]
    assert (zephyr.prompt, zephyr.chosen, zephyr.rejected) == ([U], [A], [B])


def test_dialogues_split_at_turns(shared):
    text = "\n\nHuman: hi\n\nAssistant: a \n\nb\n\nHuman: more"
    found = dialogue(text, Origin("x"))
    assert [m["content"] for m in found] == ["hi", "a \n\nb", "more"]
    with pytest.raises(RowError, match="must begin with"):
        dialogue("no turns here", Origin("x"))


REAL = {  # file: (format, examples, bad rows)
    "hh-rlhf/harmless_train.jsonl.gz": ("hh_rlhf", 1845, 0),
    "persona": ("persona", 7130, 0),
    "sst-binary/train_binary_sent.csv": ("labelled_sentence", 3310, 0),
    "pandalm/testset-v1.json": ("pandalm", 993, 6),
    "llmbar/Natural.json": ("llmbar", 100, 0),
    "llama-factory/dpo_en_demo.json": ("chat_preference", 300, 0),
    "llama-factory/kto_en_demo.json": ("unpaired_messages", 300, 0),
    "llama-factory/glaive_toolcall_en_demo.json": ("sharegpt", 300, 0),
    "t0-sft/train.jsonl.gz": ("prompt_completion", 20311, 0),
    "gsm8k/train.jsonl": ("question_answer", 7473, 0),
    "gpteacher/roleplay.json": ("alpaca", 3146, 0),
    "self-instruct/seed_tasks.jsonl": ("seed_task", 175, 0),
    "stories260K/openings.jsonl": ("prompt", 16, 0),
    "tinyshakespeare/input.txt": ("text", 7222, 0),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_read_whole(shared, name):
    found = read(load_rows(str(shared / "data" / name)), on_bad_row="skip")
    assert (found.format, len(found), found.bad) == REAL[name]


def test_persona_pairs_match_with_not_matching(shared):
    source = str(shared / "data/persona/openness.jsonl")
    rows = {r["statement"]: r["answer_matching_behavior"] for r in load_rows(source)}
    first, again, other = (read(load_rows(source), seed=s).examples for s in (0, 0, 1))
    assert [e.chosen for e in first] == [e.chosen for e in again] != [e.chosen for e in other]
    assert len({e.chosen for e in first}) == len(first)
    for e in first:
        assert e.prompt == "A person with the trait openness says:"
        assert (rows[e.chosen[1:]], rows[e.rejected[1:]]) == (" Yes", " No")


def test_hh_dialogues_are_cut_where_they_part(shared):
    from jaxrlhf.data.templates import TEMPLATES

    rows = load_rows(str(shared / "data/hh-rlhf/harmless_train.jsonl.gz"))
    assert TEMPLATES["hh"].markers == ("\n\nHuman:", "\n\nAssistant:")
    for found, row in zip(read(rows), rows, strict=True):
        for name, rest in (("chosen", found.chosen), ("rejected", found.rejected)):
            heads = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
            text = "".join(heads[m["role"]] + m["content"] for m in [*found.prompt, *rest])
            assert text.replace(": ", ":") == row[name].replace(": ", ":")


@pytest.mark.parametrize("name", ["q.jsonl", "true.jsonl", "a b: {c}.jsonl"])
def test_the_line_that_would_mend_columns_does(write, name):
    path = write({"q: x": "Say hello.", "answer": "Hello."}, name=name)
    with pytest.raises(DataError) as error:
        read(load_rows(path))
    found = re.search(r"'(data\.train=.*YOUR_COLUMN.*)'", str(error.value))
    assert found, error.value
    line = found[1].replace("YOUR_COLUMN", '"q: x"', 1).replace("YOUR_COLUMN", "answer")
    [source] = load("sft", [], ["model=./m", line]).data.train
    [example] = read(load_rows(source.model_dump())).examples
    assert (example.prompt, example.completion) == ("Say hello.", "Hello.")


def test_a_prompt_beside_replies_alone_comes_before_them(write):
    user, system = ({"role": role, "content": role} for role in ("user", "system"))
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))

    def prompt(chosen, rejected):
        row = {"prompt": "user", "chosen": chosen, "rejected": rejected}
        [found] = read(load_rows(write(row)))
        assert (found.chosen, found.rejected) == ([good], [bad])
        return found.prompt

    assert prompt([good], [bad]) == [user]
    assert prompt([system, good], [system, bad]) == [system, user]
    assert prompt([user, good], [user, bad]) == [user]
    assert prompt([system, user, good], [system, user, bad]) == [system, user]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"info": {"post": "p"}, "summaries": [{"txt": "a"}] * 2, "choice": 0}, "'summaries' must"),
        ({"info": {"post": "p"}, "summaries": ["a", "b"], "choice": 0}, "'summaries' must"),
        ({"messages": {"role": ["user"], "content": ["a"]}}, r"role \['user'\] is not known"),
        ({"chosen": "a", "rejected": "b", "margin": 10**400}, "'margin' must be a number"),
        ({"input_ids": [1, -5]}, "'input_ids' holds -5"),
        ({"input_ids": [1, 2**31]}, "'input_ids' holds 2147483648"),
    ],
)
def test_odd_values_are_bad_rows(write, row, said):
    with pytest.raises(RowError, match=f"rows.jsonl:1.*{said}"):
        read(load_rows(write(row)))


def test_a_choice_may_be_written_as_a_float(write):
    summaries = [{"text": "a"}, {"text": "b"}]
    [found] = read(load_rows(write({"info": {"post": "p"}, "summaries": summaries, "choice": 1.0})))
    assert (found.chosen, found.rejected) == (" b", " a")


def test_a_text_after_a_chat_is_the_assistants(write):
    chat = [{"role": "user", "content": "a"}]
    for more in ({}, {"label": True}):
        [found] = read(load_rows(write({"prompt": chat, "completion": "b", **more})))
        assert found.prompt == chat
        assert found.completion == [{"role": "assistant", "content": "b"}]


def test_a_split_of_one_file_is_refused(tmp_path):
    written(tmp_path, "jsonl")
    for source, what in (("rows.jsonl", "a file"), ("*.jsonl", "a pattern of files")):
        with pytest.raises(DataError, match=f"split = 'test', but {what} has no splits"):
            load_rows({"source": str(tmp_path / source), "split": "test"})


def test_one_chat_in_a_json_file_is_one_row(tmp_path):
    chat = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "one.json").write_text(json.dumps(chat))
    assert load_rows(str(tmp_path / "one.json")).rows == [chat]


def test_statements_without_a_partner_are_counted(write):
    rows = [{"sentence": f"s{i}", "label": int(i < 3)} for i in range(8)]
    found = read(load_rows(write(*rows)))
    assert (len(found), found.spare) == (3, 2)
