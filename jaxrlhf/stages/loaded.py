# SPDX-License-Identifier: Apache-2.0
"""A model that stays open, and others that are adapters of the same base, in one process.

The base's arrays are shared, and so are the compiled programs: a program takes parameters as an
argument, so an adapter of the same shapes runs what another one compiled.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxrlhf.config.stages import GenerateConfig, ScoreConfig
from jaxrlhf.data.tokenizer import ids_digest
from jaxrlhf.errors import ModelError
from jaxrlhf.models.weights import KIND_NAMES
from jaxrlhf.parallel.rules import use_mesh
from jaxrlhf.stages.completions import make_completer
from jaxrlhf.stages.generate import prompts_of
from jaxrlhf.stages.models import Model, another_adapter, open_model
from jaxrlhf.stages.score import make_scorer, score_rows, scored_rows
from jaxrlhf.stages.talking import talking
from jaxrlhf.stages.training import stage_key


class LoadedModel:
    """A model to talk to: `generate`, `score`, and `with_adapter` for another one on its base.

    Attributes:
        model: parameters, architecture and tokenizer.
    """

    def __init__(
        self,
        model: Model,
        config: GenerateConfig,
        mesh: Mesh,
        programs: dict[Any, Any] | None = None,
    ):
        self.model = model
        self._config, self._mesh = config, mesh
        self._programs = {} if programs is None else programs
        self._tokenizer = ids_digest(model.tokenizer)

    def with_adapter(self, source: str) -> "LoadedModel":
        """The base of this model with the adapter of a finished run or a PEFT folder on it. This
        one stays as it is; both read one copy of the base.

        Raises:
            ModelError: it is no adapter, or was trained on other weights.
        """
        with use_mesh(self._mesh):
            model = another_adapter(self._config.model, self._mesh, source, self.model)
        return LoadedModel(model, self._config, self._mesh, self._programs)

    def generate(self, config: GenerateConfig) -> list[str]:
        """Completions of the configuration's prompts.

        Raises:
            ModelError: it is a reward model.
        """
        if self.model.kind != "lm":
            raise ModelError(f"{self.model.source} is {KIND_NAMES['reward']}: score with it")
        sampling = config.sampling
        with use_mesh(self._mesh):
            prompts = prompts_of(config, self.model)
            model = talking(self.model, prompts.templates)
            key = ("sample", self._tokenizer, model.stop_ids, sampling.model_dump_json())
            if key not in self._programs:
                self._programs[key] = make_completer(model, sampling, self._mesh)
            random = stage_key(config.seed, "generate")
            return self._programs[key](model.params, prompts, config.n, random).texts

    def score(
        self, config: ScoreConfig, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[float]:
        """Summed log-probs of completions, nats, or a reward model's rewards."""
        key = ("score", self.model.kind)
        with use_mesh(self._mesh), tempfile.TemporaryDirectory() as folder:
            if key not in self._programs:
                self._programs[key] = make_scorer(self.model)
            file = Path(folder) / "rows.jsonl"
            pairs = zip(prompts, completions, strict=True)
            lines = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs]
            file.write_text("".join(lines), encoding="utf-8")
            rows = scored_rows([{"source": str(file)}], config, self.model)
            found = score_rows(self._programs[key], self.model, rows, config, self._mesh)
        name = "reward" if self.model.kind == "reward" else "logprob"
        return [row[name] for row in found]


def load(config: GenerateConfig, mesh: Mesh) -> LoadedModel:
    """The model of a configuration, opened once."""
    with use_mesh(mesh):
        model = open_model(config.model, mesh, frozen=True)
    return LoadedModel(model, config, mesh)
