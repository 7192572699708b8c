# SPDX-License-Identifier: Apache-2.0
"""Completions of prompts and what is said of them: texts, scores of rewards, KL to a reference."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.model import ModelSection
from jaxrlhf.config.reward import RewardTerm
from jaxrlhf.config.sampling import SamplingSection
from jaxrlhf.data.batches import bucket
from jaxrlhf.data.encode import PromptSet
from jaxrlhf.data.formats import Turn
from jaxrlhf.data.tokenizer import decode_continuation, encode_text, ids_digest
from jaxrlhf.errors import ConfigError
from jaxrlhf.models.rows import row_logprobs, row_scores
from jaxrlhf.ops.masking import masked_sum
from jaxrlhf.parallel.compiling import jit
from jaxrlhf.parallel.distributed import array_from_primary, is_primary, to_host
from jaxrlhf.parallel.mesh import row_shards
from jaxrlhf.parallel.rules import put_batch
from jaxrlhf.sampling import make_sampler
from jaxrlhf.stages.functions import call_reward, check_scores, load_function
from jaxrlhf.stages.models import Model, open_model
from jaxrlhf.stages.room import check_sampling
from jaxrlhf.stages.training import check_fits
from jaxrlhf.types import LMBatch, Params, Rollout


@dataclasses.dataclass(frozen=True)
class Completions:
    """Sampled completions, n for each of several prompts, those of a prompt side by side."""

    prompts: list[Turn]  # as in the data: text or messages
    prompt_ids: list[list[int]]
    columns: dict[str, list[Any]]  # the other columns of the prompts' rows
    texts: list[str]
    token_ids: list[list[int]]  # the stop token included
    logprobs: list[list[float]]  # of the distribution sampled from
    finish_reasons: list[str]
    groups: np.ndarray  # int [n], which prompt each belongs to

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n], tokens of each completion."""
        return np.asarray([len(ids) for ids in self.token_ids], np.int64)

    def rows(self, indices: Sequence[int], length: int) -> LMBatch:
        """Prompt + completion rows of these completions, right-padded to `length`; -1 = filler."""
        shape = (len(indices), length)
        tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        positions, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for b, i in enumerate(indices):
            if i < 0:
                continue
            start = len(self.prompt_ids[i])
            end = start + len(self.token_ids[i])
            tokens[b, :start], tokens[b, start:end] = self.prompt_ids[i], self.token_ids[i]
            segments[b, :end], positions[b, :end] = 1, np.arange(end)
            mask[b, start:end] = True
        return LMBatch(tokens, positions, segments, mask)


def stop_ids(sampling: SamplingSection, model: Model) -> tuple[int, ...]:
    """Ids that end a completion: those of the settings, else the model's own (see `talking`).

    Raises:
        ConfigError: a stop text that is not a single token.
    """
    if sampling.stop is None:
        return model.stop_ids
    found = []
    for stop in sampling.stop:
        if isinstance(stop, int):
            found.append(stop)
            continue
        special = model.tokenizer.convert_tokens_to_ids(stop)
        known = special is not None and special != model.tokenizer.unk_token_id
        ids = [special] if known else encode_text(model.tokenizer, stop, continued=True)
        if len(ids) != 1:
            raise ConfigError(
                f"sampling.stop: {stop!r} is {len(ids)} tokens for this tokenizer; completions end "
                "at single tokens: name one token or its id"
            )
        found.append(ids[0])
    return tuple(found)


def make_completer(
    model: Model, sampling: SamplingSection, mesh: Mesh, *, batch_size: int = 64
) -> Callable[[Params, PromptSet, int, jax.Array], Completions]:
    """Returns `complete(params, prompts, n, key)`: n completions of each prompt."""
    shards = row_shards(mesh)
    size = -(-(sampling.batch_size or batch_size) // shards) * shards
    sampler = make_sampler(
        model.config,
        model.runtime,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        stop_ids=stop_ids(sampling, model),
        batch_size=size,
        row_multiple=shards,
        put=lambda x: put_batch(x, mesh),
    )

    def complete(params: Params, prompts: PromptSet, n: int, key: jax.Array) -> Completions:
        index = np.repeat(np.arange(len(prompts)), n)
        ids = [prompts.prompt_ids(int(i)).tolist() for i in index]
        check_sampling(model, int(prompts.lengths.max()), sampling.max_new_tokens)
        found = sampler(params, ids, key)
        texts = [
            decode_continuation(model.tokenizer, prompt, without_stop(sample, model.tokenizer))
            for prompt, sample in zip(ids, found, strict=True)
        ]
        names = dict.fromkeys(name for row in prompts.columns for name in row)
        return Completions(
            prompts=[prompts.prompts[i] for i in index],
            prompt_ids=ids,
            columns={name: [prompts.columns[i].get(name) for i in index] for name in names},
            texts=texts,
            token_ids=[sample.token_ids for sample in found],
            logprobs=[sample.logprobs for sample in found],
            finish_reasons=[sample.finish_reason for sample in found],
            groups=index,
        )

    return complete


def without_stop(sample: Any, tokenizer: Any) -> list[int]:
    """The ids that are text: a stop token is not part of what was said."""
    stopped = sample.finish_reason == "stop"
    return sample.token_ids[:-1] if stopped else sample.token_ids


# Scores a set of completions: (prompts, completions as text, columns, rows) -> float32 [n]
Scorer = Callable[
    [Sequence[Turn], Sequence[str], Mapping[str, Sequence], LMBatch | Rollout], np.ndarray
]


@dataclasses.dataclass(frozen=True)
class Judge:
    """The weighted list of rewards of a configuration, ready to be asked."""

    scorers: dict[str, Scorer]
    weights: dict[str, float]

    def __call__(
        self,
        prompts: Sequence[Turn],
        texts: Sequence[str],
        columns: Mapping[str, Sequence],
        rows: LMBatch | Rollout,
    ) -> dict[str, np.ndarray]:
        """Scores by name, each float32 [n], before weighting."""
        return {
            name: scorer(prompts, texts, columns, rows) for name, scorer in self.scorers.items()
        }

    def total(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """The weighted sum, float32 [n]: what is optimised."""
        parts = [self.weights[name] * scores[name] for name in self.weights]
        return np.asarray(np.sum(parts, axis=0, dtype=np.float64), np.float32)


def make_judge(
    terms: Sequence[RewardTerm], section: ModelSection, model: Model, mesh: Mesh
) -> Judge:
    """Loads the models and functions of a reward list.

    Raises:
        ConfigError: two of one name, a function that is not there, another tokenizer.
        ModelError: a model that is no reward model.
    """
    scorers: dict[str, Scorer] = {}
    for term in terms:
        if term.label in scorers:
            raise ConfigError(
                f"reward {term.source}: a second one named {term.label!r}; give it a `name`"
            )
        if term.kind == "function":
            scorers[term.label] = _function_scorer(term)
        else:
            scorers[term.label] = _model_scorer(term.source, section, model, mesh)
    return Judge(scorers, {term.label: term.weight for term in terms})


def _function_scorer(term: RewardTerm) -> Scorer:
    function = load_function(term.source)

    def score(prompts, texts, columns, rows):
        # As TRL: a chat's completion is a list of one assistant message.
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        # Once for all processes: one that draws random numbers or asks a service would give each
        # of them other scores.
        if is_primary():
            scores = call_reward(function, term.label, prompts, completions, columns)
        else:
            scores = np.zeros(len(texts), np.float32)
        return array_from_primary(scores)

    return score


def _model_scorer(source: str, section: ModelSection, model: Model, mesh: Mesh) -> Scorer:
    judge = open_model(section, mesh, path=source, kind="reward", frozen=True, share=model)
    check_fits(
        "the policy",
        ids_digest(model.tokenizer),
        f"reward {source}",
        ids_digest(judge.tokenizer),
    )
    program = jit(lambda params, rows: row_scores(params, judge.config, judge.runtime, rows), mesh)

    def score(prompts, texts, columns, rows):
        scores = to_host(program(judge.params, rows))
        check_scores(f"reward model {source}", scores[: len(texts)], prompts, texts)
        return scores

    return score


def judge_completions(
    judge: Judge, found: Completions, mesh: Mesh, *, batch_size: int = 64
) -> dict[str, np.ndarray]:
    """Scores of all completions by name, float32 [n]."""
    parts: list[dict[str, np.ndarray]] = []
    for indices, rows in _batches(found, mesh, batch_size):
        real = [i for i in indices if i >= 0]
        # Functions see the real ones; models the whole, filled-up batch.
        columns = {name: [values[i] for i in real] for name, values in found.columns.items()}
        prompts, texts = [found.prompts[i] for i in real], [found.texts[i] for i in real]
        scores = judge(prompts, texts, columns, rows)
        parts.append({name: values[: len(real)] for name, values in scores.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in judge.scorers}


def _batches(found: Completions, mesh: Mesh, batch_size: int):
    """(indices, rows on the mesh) of fixed size; one padded length for all."""
    shards = row_shards(mesh)
    size = -(-batch_size // shards) * shards
    longest = max(len(p) + len(c) for p, c in zip(found.prompt_ids, found.token_ids, strict=True))
    for start in range(0, len(found), size):
        indices = list(range(start, min(start + size, len(found))))
        indices += [-1] * (size - len(indices))
        yield indices, put_batch(found.rows(indices, bucket(longest)), mesh)


def make_kl(model: Model, reference: Model, mesh: Mesh, *, temperature: float = 1.0) -> Any:
    """Returns `kl(params, completions)`: float64 [n], sum over tokens of log pi - log pi_ref."""

    def program(params: Params, ref_params: Params, rows: LMBatch) -> jax.Array:
        new = row_logprobs(params, model.config, model.runtime, rows, temperature=temperature)
        old = row_logprobs(
            ref_params, reference.config, reference.runtime, rows, temperature=temperature
        )
        return masked_sum(new - old, rows.completion_mask, axis=1)

    compiled = jit(program, mesh)

    def kl(params: Params, found: Completions, batch_size: int = 64) -> np.ndarray:
        parts = [
            to_host(compiled(params, reference.params, rows))[: sum(i >= 0 for i in indices)]
            for indices, rows in _batches(found, mesh, batch_size)
        ]
        return np.concatenate(parts).astype(np.float64)

    return kl
