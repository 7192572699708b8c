# SPDX-License-Identifier: Apache-2.0
"""What holds for the house as a whole: layers, light imports, and what no file may do."""

import ast
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "jaxrlhf").rglob("*.py"))
TEXT = {".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", ".cfg", ".ipynb", ".lock"}
# A pickle, a template or a name from outside must never become code. `safe` names of numpy and
# yaml are told apart by their arguments below.
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "parse_expr", "literal_eval_unsafe"}


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the files of the project are not known")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def violations(tree: ast.AST) -> list[str]:
    """What a syntax tree does that no file may do, as `line: what`."""
    found = []
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.split(".")[0] in FORBIDDEN_MODULES:
                found.append(f"{node.lineno}: imports {name}")
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: calls {called.id}")
            owner = ast.unparse(called.value) if isinstance(called, ast.Attribute) else ""
            whole = ast.unparse(called)
            if whole == "yaml.load" or whole.endswith((".unsafe_load", ".full_load")):
                found.append(f"{node.lineno}: {whole} makes objects from YAML")
            if whole in ("os.system", "os.popen") or (owner == "torch" and whole.endswith("load")):
                found.append(f"{node.lineno}: calls {whole}")
            for keyword in node.keywords:
                literal = keyword.value
                on = isinstance(literal, ast.Constant) and literal.value is True
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and (
                    on or not isinstance(literal, ast.Constant)
                ):
                    found.append(f"{node.lineno}: {keyword.arg} is on")
        if isinstance(node, ast.With | ast.AsyncWith):
            for item in node.items:
                # `with mesh:` silently drops sharding constraints; parallel.use_mesh keeps them
                if isinstance(item.context_expr, ast.Name) and "mesh" in item.context_expr.id:
                    found.append(f"{node.lineno}: `with {item.context_expr.id}:`")
    return found


def test_layers():
    """Imports go down only; the contracts are in pyproject.toml."""
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(tool), "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_runs_what_it_read(file):
    assert violations(ast.parse(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "exec(code)",
        "yaml.load(text, Loader)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "np.load(file, allow_pickle=True)",
        "with mesh:\n    pass",
        "with the_mesh as m:\n    pass",
        "torch.load(file)",
        "subprocess.run(words, shell=True)",
    ],
)
def test_the_check_sees_it(code):
    assert violations(ast.parse(code))


@pytest.mark.parametrize(
    "code",
    ["re.compile('x')", "f(trust_remote_code=False)", "with use_mesh(mesh):\n    pass", "m.eval()"],
)
def test_the_check_sees_no_more(code):
    assert violations(ast.parse(code)) == []


def test_every_source_opens_with_its_licence():
    files = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
    wrong = [
        str(file.relative_to(ROOT))
        for file in files
        if file.read_text(encoding="utf-8").strip()
        and not file.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0")
    ]
    assert wrong == []


def test_files_speak_of_the_project_only():
    """No machine's folders, no home directories, no keys."""
    secret = re.compile(
        r"hf_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|ghp_[A-Za-z0-9]{30,}"
    )
    place = re.compile(r"(?<![\w.])/(?:home|Users|root|work)/\w+")
    wrong = []
    for file in tracked():
        if file.suffix not in TEXT and file.parent.name != ".ci":
            continue
        if not file.is_file() or file.name == "requirements.lock":
            continue
        for number, line in enumerate(
            file.read_text(encoding="utf-8", errors="replace").splitlines(), 1
        ):
            if secret.search(line) or (place.search(line) and file != Path(__file__)):
                wrong.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:80]}")
    assert wrong == []


def test_the_lock_names_versions_only():
    text = (ROOT / "requirements.lock").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(
        re.fullmatch(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[^ ]+( ; .+)?", line) for line in lines
    )
    assert not re.search(r"^(torch|nvidia|triton)", text, re.MULTILINE)
    assert "http" not in text.replace("httpx", "").replace("httpcore", "").replace("aiohttp", "")


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import jaxrlhf", {"jax", "numpy", "pydantic", "yaml", "transformers"}),
        ("import jaxrlhf.cli", {"jax", "numpy", "pydantic", "yaml", "transformers"}),
        ("import jaxrlhf.stages", {"jax", "numpy", "transformers"}),
        ("from jaxrlhf.config import load, pipeline, resume", {"jax", "numpy", "transformers"}),
    ],
)
def test_light_modules_import_nothing_heavy(code, heavy):
    code += f"; import sys; bad = {heavy!r} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_help_costs_less_than_half_a_second_of_cpu():
    times = []
    for _ in range(3):  # the machine may be busy with other things
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "jaxrlhf", "--help"],
            check=True,
            capture_output=True,
            cwd=ROOT,
            env={**os.environ, "COVERAGE_PROCESS_START": ""},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    assert min(times) < 0.5, times
