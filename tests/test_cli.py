# SPDX-License-Identifier: Apache-2.0
"""The command line: words in, exit code and one screen out."""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

from jaxrlhf import cli, environment
from jaxrlhf.config.load import load
from jaxrlhf.config.stages import STAGES
from jaxrlhf.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def stages(monkeypatch):
    """Stands in for the stages: records what would have run."""
    calls: list[tuple] = []
    module = types.ModuleType("jaxrlhf.stages")

    def run_stage(command, config, output=None, **extra):
        calls.append((command, config, output, extra))
        return types.SimpleNamespace(exit_code=0)

    module.run_stage = run_stage  # type: ignore[attr-defined]
    module.check_algorithms = lambda config: []  # type: ignore[attr-defined]
    pipeline = types.ModuleType("jaxrlhf.pipeline")

    def run_pipeline(plan, output=None, **extra):
        calls.append(("run", plan, output, extra))
        return types.SimpleNamespace(exit_code=143)

    pipeline.run_pipeline = run_pipeline  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jaxrlhf.stages", module)
    monkeypatch.setitem(sys.modules, "jaxrlhf.pipeline", pipeline)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return calls


def test_a_stage_gets_its_checked_configuration(stages, tmp_path, capsys):
    file = tmp_path / "a.yaml"
    file.write_text("model: ./m\ndata: d.jsonl\nlearning_rate: 1e-3\n")
    words = ["sft", "seed=3", "-c", str(file), "--output", str(tmp_path / "o"), "train.steps=2"]
    assert cli.main([*words, "--resume", "never", "--allow-change", "seed"]) == 0
    ((command, config, output, extra),) = stages
    assert command == "sft"
    assert (config.seed, config.train.steps, config.optim.learning_rate) == (3, 2, 1e-3)
    assert output == str(tmp_path / "o")
    assert extra == {"resume": "never", "allow_change": ("seed",), "dry_run": False}
    assert "learning_rate" in capsys.readouterr().err


def test_generate_takes_prompts_as_they_are(stages):
    words = ["generate", "-m", "./m", "--prompt", "a: b=c", "--prompt", "{x", "-n", "2"]
    assert cli.main([*words, "-o", "out.jsonl", "sampling.temperature=0"]) == 0
    config = stages[0][1]
    assert config.prompt == ["a: b=c", "{x"]
    assert (config.n, config.sampling.temperature) == (2, 0.0)
    assert config.output == str(Path.cwd() / "out.jsonl")


@pytest.mark.parametrize(
    ("words", "read"),
    [
        (["score", "-m", "./m", "d.jsonl"], lambda c: c.data[0].source),
        (["data", "show", "d.jsonl", "-m", "./m"], lambda c: c.data.train[0].source),
        (["data", "pairs", "d.jsonl", "pairs=adjacent"], lambda c: c.data[0].source),
    ],
)
def test_bare_words_are_what_the_command_is_about(stages, words, read):
    assert cli.main(words) == 0
    assert read(stages[0][1]) == str(Path.cwd() / "d.jsonl")


def test_a_pipeline_is_planned_then_run(stages, tmp_path):
    file = tmp_path / "p.yaml"
    file.write_text("stages: [{stage: world}]")
    code = cli.main(["run", str(file), "--output", str(tmp_path / "o"), "world.seed=4"])
    command, plan, output, extra = stages[0]
    assert (code, command, output) == (143, "run", str(tmp_path / "o"))
    assert plan.stages[0].config.seed == 4
    assert extra == {"resume": "auto"}


def test_print_config_runs_nothing_and_reads_back(stages, tmp_path, capsys):
    words = ["dpo", "-m", "./m", "data=d.jsonl", "beta=0.2", "--print-config"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert stages == []
    assert yaml.safe_load(text)["loss"] == {"name": "dpo", "beta": 0.2}
    assert load("dpo", [file]).loss.beta == 0.2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stf"], "stf: unknown command; did you mean sft?"),
        (["sft", "a.yaml"], "did you mean -c a.yaml?"),
        (["sft", "-m", "./m", "optim.lr=1"], "optim.lr (optim.lr=1): unknown key"),
        (["run"], "run: name a pipeline"),
        (["data", "shwo"], "data shwo: unknown command; did you mean data show?"),
        (["report"], "runs: is needed; give run directories"),
        (["env", "x"], "env: takes only --json or --models"),
        (["sft", "-m", "./m", "--learning_rate", "1e-4"], "dashes: write learning_rate=1e-4"),
        (["sft", "--per-device-train-batch-size=4"], "write per_device_train_batch_size=4"),
        (["sft", "--bf16", "--output", "o"], "--bf16: unknown option of sft; settings are given"),
        (["sft", "--ouput", "o"], "--ouput: unknown option of sft; did you mean --output?"),
        (["generate", "-n", "two"], "jaxrlhf generate: argument -n: invalid int value"),
    ],
)
def test_wrong_words_end_with_2_and_no_traceback(stages, capsys, words, expected):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) <= cli.MAX_LINES


ASKING = """
import sys
from jaxrlhf import cli
from jaxrlhf.config.load import load
words = [[f"mesh.cpu_devices={n}", "model=./m", "prompt=x"] for n in sys.argv[1:]]
configs = [load("generate", [], each) for each in words]
import jax
for config in configs:
    cli.prepare(config)
    print(jax.local_device_count())
"""


@pytest.mark.parametrize(
    ("asked", "environment", "counts", "error"),
    [
        (["3", "3"], {}, ["3", "3"], ""),
        (["3"], {"JAX_NUM_CPU_DEVICES": "2"}, ["2"], "note: mesh.cpu_devices = 3 is left out"),
        (["3"], {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, ["2"], "XLA_FLAGS"),
        (["3", "2"], {}, ["3"], "mesh.cpu_devices = 2: in this process jax has already started"),
    ],
)
def test_the_cores_appear_as_several_devices(asked, environment, counts, error):
    """In a process of its own: jax counts its devices once."""
    plain = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")}
    done = subprocess.run(
        [sys.executable, "-c", ASKING, *asked],
        env={**plain, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout.split() == counts
    assert error in done.stderr
    assert bool(done.returncode) == (len(counts) < len(asked))


def test_stages_of_one_process_agree_on_its_devices():
    words = [[f"mesh.cpu_devices={n}", "model=./m", "prompt=x"] for n in (2, 4)]
    with pytest.raises(ConfigError, match="ask for 2 and 4"):
        cli.prepare(*(load("generate", [], each) for each in words))
    with pytest.raises(ConfigError, match=r"cpu_devices = 0: a number of devices is positive"):
        load("generate", [], ["mesh.cpu_devices=0", "model=./m", "prompt=x"])


def test_errors_for_the_user_fit_a_screen_and_hold_no_escapes(stages, monkeypatch, capsys):
    def fail(*_, **__):
        raise DataError("\x1b[31mrow\x07\n" + "\n".join(map(str, range(500))))

    monkeypatch.setattr(sys.modules["jaxrlhf.stages"], "run_stage", fail)
    assert cli.main(["score", "-m", "./m", "d.jsonl"]) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: \\x1b[31mrow\\x07\n")
    assert len(text.splitlines()) == cli.MAX_LINES
    assert "lines more" in text


def test_a_bug_keeps_its_traceback_and_an_interrupt_is_clean(stages, monkeypatch, capsys):
    def fail(error):
        def run(*_, **__):
            raise error

        monkeypatch.setattr(sys.modules["jaxrlhf.stages"], "run_stage", run)

    fail(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["score", "-m", "./m", "d.jsonl"])
    fail(KeyboardInterrupt())
    assert cli.main(["score", "-m", "./m", "d.jsonl"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("command", [*STAGES, "run"])
def test_help_lists_every_key_with_its_default(capsys, command):
    if command in ("world", "label"):
        return  # stages of a pipeline only
    assert cli.main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: jaxrlhf " + command)
    assert max(map(len, text.splitlines())) <= 100
    if command == "ppo":
        assert "rl.kl_coef = 0.05" in text
        assert "rl.*" in text
        assert "(gae, group, rloo, rloo_to_go)" in " ".join(text.split())
        assert "an entry of data.train, data.eval is {source: ..., key: value}" in text
        assert "  column_map = {}" in text
    if command == "run":
        assert "ppo.for_each.rl.kl_coef=[0.2]" in text


def test_help_names_the_chat_templates_there_are(capsys):
    from jaxrlhf.data.templates import TEMPLATES

    for command in ("sft", "generate", "chat"):
        cli.main([command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"({', '.join(TEMPLATES)}, tokenizer, " in " ".join(text.split())


def test_a_missing_pytorch_is_not_advertised(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    for spec, silent in ((object(), False), (None, True)):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, spec=spec: spec)
        cli.prepare()
        assert ("TRANSFORMERS_NO_ADVISORY_WARNINGS" in os.environ) == silent


def test_every_option_that_is_none_is_named_and_their_values_are_not(capsys):
    assert cli.main(["sft", "--data", "m.jsonl", "seed=1", "--learning_rate", "1e-4"]) == 2
    assert capsys.readouterr().err == (
        "error: --data: unknown option of sft; settings are given without dashes: write "
        "data=m.jsonl\n--learning_rate: unknown option of sft; settings are given without dashes: "
        "write learning_rate=1e-4\n"
    )


def test_the_first_help_is_short(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 30
    assert all(command.split()[0] in text for command in cli.COMMANDS)
    assert cli.main([]) == 0


def test_the_network_is_off_unless_a_hub_name_is_given(stages):
    os.environ.pop("HF_HUB_OFFLINE", None)
    local = load("sft", [], ["model=./m", "data=d.jsonl"])
    hub = load("sft", [], ["model=Qwen/Qwen2.5-0.5B", "data=d.jsonl"])
    assert (cli.uses_hub(local), cli.uses_hub(hub)) == (False, True)
    cli.prepare(local, hub)
    assert "HF_HUB_OFFLINE" not in os.environ
    cli.prepare(local)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"]


def test_secrets_are_hidden_by_name_and_by_value(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-123456")
    monkeypatch.setenv("JAXRLHF_NOTE", "see canary-123456 and http://me:pw@host/")
    monkeypatch.setattr(environment, "devices", dict)
    text = environment.text(environment.describe())
    assert "canary" not in text
    assert "me:pw" not in text
    assert "HF_TOKEN" in text


def test_env_says_where_we_are():
    done = subprocess.run(
        [sys.executable, "-m", "jaxrlhf", "env", "--json"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    found = json.loads(done.stdout)
    assert found["devices"]["count"] >= 1
    assert {"jax", "flax", "optax", "numpy"} <= set(found["versions"])


def test_huge_pages_start_the_process_anew_once(monkeypatch):
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.36", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "environ", {"GLIBC_TUNABLES": "glibc.malloc.check=1"})
    cli.use_huge_pages(["sft", "--help"])
    assert started == []
    cli.use_huge_pages(["sft", "seed=1"])
    assert len(started) == 1
    assert os.environ["GLIBC_TUNABLES"].startswith(
        "glibc.malloc.check=1:glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1:"
    )
    cli.use_huge_pages(["sft", "seed=1"])
    monkeypatch.setattr(os, "environ", {"JAXRLHF_HUGE_PAGES": "0"})
    cli.use_huge_pages(["sft", "seed=1"])
    assert len(started) == 1


def test_python_api_raises_and_never_exits(stages):
    import jaxrlhf

    jaxrlhf.dpo(model="./m", data="pairs.jsonl", learning_rate=5e-6, beta=0.1, output="o")
    command, config, output, extra = stages[0]
    assert (command, config.optim.learning_rate, config.loss.beta) == ("dpo", 5e-6, 0.1)
    assert output == str(Path.cwd() / "o")
    assert extra == {"resume": "auto", "allow_change": (), "dry_run": False}
    with pytest.raises(jaxrlhf.ConfigError, match=r"did you mean optim\.learning_rate\?"):
        jaxrlhf.sft(model="./m", data="d.jsonl", lr=1)
    with pytest.raises(AttributeError):
        jaxrlhf.nothing  # noqa: B018


def test_compiled_programs_are_kept_also_where_jax_was_imported_first(tmp_path):
    code = (
        "import jax; from jaxrlhf.cli import prepare; prepare(); "
        "print(jax.config.jax_compilation_cache_dir); "
        "print(jax.config.jax_persistent_cache_min_compile_time_secs)"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    for more, expected in (
        ({}, f"{tmp_path}/jaxrlhf/xla\n0.2\n"),
        ({"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}, "/elsewhere\n0.2\n"),
    ):
        env = {**clean, "XDG_CACHE_HOME": str(tmp_path), **more}
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout == expected


def test_settings_of_sources_named_by_words_are_theirs(stages, capsys):
    words = ["score", "-m", "./m", "a.jsonl", "b.jsonl"]
    assert cli.main([*words, "data.format=text", "data.1.limit=3"]) == 0
    data = stages[0][1].data
    assert [(s.format, s.limit) for s in data] == [("text", None), ("text", 3)]
    assert cli.main([*words, "data.on_bad_row=skip"]) == 2
    assert "data.0.on_bad_row (data.on_bad_row=skip): unknown key" in capsys.readouterr().err


def test_a_report_goes_where_it_is_told(stages, monkeypatch, tmp_path):
    from jaxrlhf import report

    places = []
    monkeypatch.setattr(report, "write_report", lambda runs, place: places.append(place))
    run = str(tmp_path / "run")
    for words in ([], ["--output", "x"], ["--output", "x.html"], ["-o", "y"]):
        assert cli.main(["report", run, *words]) == 0
    here = Path.cwd()
    [first, *others] = places
    assert first == tmp_path / "run" / "report.html"
    assert others == [here / "x" / "report.html", here / "x.html", here / "y"]


def test_a_place_that_cannot_be_used_is_one_line(stages, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run = tmp_path / "run"
    run.mkdir()
    for place in ("/proc/x.html", str(tmp_path / "file" / "x.html")):
        assert cli.main(["report", str(run), "-o", place]) == 1
        text = capsys.readouterr().err
        assert text.startswith(f"error: the report {place} cannot be written: ")
        assert len(text.splitlines()) == 1


def test_a_place_that_nobody_caught_is_one_line_too(stages, monkeypatch, capsys):
    def run_stage(*args, **kwargs):
        Path("/proc/no/such/place").write_text("")

    monkeypatch.setattr(sys.modules["jaxrlhf.stages"], "run_stage", run_stage)
    assert cli.main(["score", "-m", "./m", "a.jsonl"]) == 1
    assert capsys.readouterr().err == "error: /proc/no/such/place: No such file or directory\n"


def test_the_maths_is_there_by_name_and_costs_nothing_before():
    code = (
        "import sys, jaxrlhf; bad = {'jax', 'numpy'} & set(sys.modules); assert not bad, bad; "
        "jaxrlhf.losses.preference.dpo, jaxrlhf.ops.advantages.gae, jaxrlhf.sampling.sample"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
