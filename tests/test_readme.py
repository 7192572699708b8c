# SPDX-License-Identifier: Apache-2.0
"""What the README says of the project's files, commands and stages is so."""

import ast
import re
from pathlib import Path

from jaxrlhf.config.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines_of_files():
    """One line a file, in order: its path below jaxrlhf/, and the first line it says of itself."""
    package = ROOT / "jaxrlhf"
    found = []
    for path in sorted(package.rglob("*.py"), key=lambda p: (p.parent.parts, p.name)):
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text, f"{path} says nothing of itself"
        if path.name != "__init__.py":
            found.append(f"{path.relative_to(package).as_posix():<30} {text.splitlines()[0]}")
    return found


def test_every_file_has_its_line_and_no_other():
    block = re.search(r"<summary>Every file</summary>\s+```\n(.*?)```", README, re.S)
    assert block, "the README has lost its list of files"
    assert block[1].splitlines() == lines_of_files(), "\n" + "\n".join(lines_of_files())


def test_every_command_of_a_stage_is_named():
    names = re.findall(r"`([a-z]+(?: [a-z]+)?)`", README)
    missing = [name for name in STAGES if name not in names and name not in ("world", "label")]
    assert not missing


def test_every_path_named_exists():
    places = re.findall(
        r"`((?:configs|scripts|jaxrlhf|tests|benchmarks|models|ops|losses|data|parallel|stages)/[\w./-]+)`",
        README,
    )
    assert len(places) > 5
    for place in places:
        assert (ROOT / place).exists() or (ROOT / "jaxrlhf" / place).exists(), place
