# SPDX-License-Identifier: Apache-2.0
"""Shared by every test: the CPU platform, exact matmuls, one compile cache."""

import importlib.util
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Before jax is imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import pytest
from jaxtyping import install_import_hook

pytest_plugins = ("tiny",)

# Shapes and dtypes of public maths are checked in tests only; users pay nothing for them.
install_import_hook(["jaxrlhf.ops", "jaxrlhf.losses"], "beartype.beartype")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and importlib.util.find_spec("torch") is None:
        if os.environ.get("CI") and os.environ.get("JAXRLHF_TORCH", "1") != "0":
            pytest.fail("PyTorch is missing, and CI must not skip the parity tests")
        pytest.skip("PyTorch is not installed: pip install 'jaxrlhf[parity]'")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data: $JAXRLHF_ASSETS, or `shared` beside the project."""
    folder = Path(os.environ.get("JAXRLHF_ASSETS", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        message = f"real models and data not found at {folder}: set JAXRLHF_ASSETS to their folder"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real pretrained Llama of 260K parameters with its tokenizer, as an HF folder."""
    return shared / "models" / "stories260K"
