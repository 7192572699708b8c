# SPDX-License-Identifier: Apache-2.0
"""Every stage's real programs on a mesh of virtual devices and on one device: what each computes.

Runs in a child process with 8 devices (tests/devices.py).
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config.stages import STAGES
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.rows import row_logprobs, row_scores
from jaxrlhf.models.transformer import init_params
from jaxrlhf.parallel.distributed import to_host
from jaxrlhf.parallel.mesh import make_mesh
from jaxrlhf.parallel.rules import put_batch, use_mesh
from jaxrlhf.sampling.decode import sample
from jaxrlhf.stages.programs import stage_programs
from jaxrlhf.types import LMBatch, PairBatch

MESHES = {
    "fsdp 8": {"fsdp": 8},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "tensor 4, data 2": {"tensor": 4, "data": 2},
}
DIVIDES = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=64,
    qkv_bias=True,
    max_positions=64,
)
# Nothing of it divides by 4: seven heads, 61 tokens, 30 features.
RAGGED = ModelConfig(
    vocab_size=61,
    hidden_size=30,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=10,
    mlp_dim=42,
    tie_embeddings=False,
    max_positions=64,
)
LENGTH, ROWS, NEW = 24, 16, 10
RATE = np.float32(1e-3)
LARGE = 512  # numbers; every matrix of the models above has more, every vector of a layer fewer


def settings(stage, adapter=None):
    """The stage's configuration: the same two passes an optimizer step on any mesh."""
    model = {"path": "none", "remat": True, "unroll": 1, "logprob_chunk": 7, "adapter": adapter}
    given = {
        "model": model,
        "data": {"train": ["none"], "max_length": LENGTH},
        "train": {"steps": 20, "batch_size": ROWS, "accumulation": 2},
        "optim": {"learning_rate": float(RATE), "clip_norm": None, "schedule": "constant"},
    }
    if stage == "ppo":
        given["train"]["batch_size"] = 2 * ROWS
        given |= {
            "reward": ["none"],
            "sampling": {"max_new_tokens": NEW},
            "rl": {"minibatches": 2, "samples_per_prompt": 2, "entropy_coef": 0.01},
        }
    return STAGES[stage].model_validate(given)


def token_rows(seed, vocab, *lead):
    """Ragged rows [*lead, LENGTH]."""
    rng = np.random.default_rng(seed)
    size = (*lead, LENGTH)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, lead)[..., None]
    starts = rng.integers(1, LENGTH // 2, lead)[..., None]
    columns = np.broadcast_to(np.arange(LENGTH), size)
    real = columns < lengths
    return {
        "tokens": np.where(real, rng.integers(0, vocab, size), 0).astype(np.int32),
        "positions": np.where(real, columns, 0).astype(np.int32),
        "segment_ids": real.astype(np.int32),
        "completion_mask": real & (columns >= starts),
    }


def batch_of(stage, seed, vocab):
    """A batch of the offline stages, host arrays."""
    if stage == "sft":
        return LMBatch(**token_rows(seed, vocab, ROWS))
    rng = np.random.default_rng(seed)
    reference = rng.normal(-40, 3, (ROWS, 2)).astype(np.float32)
    return PairBatch(
        **token_rows(seed, vocab, ROWS, 2),
        weights=np.full(ROWS, 1 / ROWS, np.float32),
        margin=np.zeros(ROWS, np.float32),
        ref_logprobs=reference if stage == "dpo" else None,
    )


def fresh(abstract, architecture, seed=0):
    """Parameters for abstract ones, where those live: the same numbers on any mesh."""

    def one(seed, shapes):
        heads = tuple(h for h in ("score", "value") if h in shapes)
        if "lm_head" in shapes or not heads:
            heads = ("lm", *heads)
        made = init_params(jax.random.key(seed), architecture, heads=heads)
        if "value" in heads:  # starts at zero, which would hide its trunk's gradients
            made["value"]["kernel"] = made["final_norm"]["scale"][:, None] * 0.1
        return made

    def all_of():
        if "embed" in abstract:
            return one(seed, abstract)
        return {name: one(seed + i, abstract[name]) for i, name in enumerate(sorted(abstract))}

    # One program for all leaves; made in one place, for random bits may depend on the sharding.
    made = jax.jit(all_of)()
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), made, abstract)


def fresh_state(program, architecture):
    """The first argument of a train step, made of fresh parameters and zeros."""
    abstract = program.args[0]
    zeros = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), abstract),
        out_shardings=jax.tree.map(lambda s: s.sharding, abstract),
    )()
    return zeros.replace(params=fresh(abstract.params, architecture))


def filled(abstract):
    """Arrays for abstract ones, where those live: random numbers told by the leaf's path."""

    def leaf(path, s):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        start = 1.0 if name.endswith("scale") else 0.0
        values = start + 0.2 * rng.standard_normal(s.shape)
        return jax.device_put(values.astype(s.dtype), s.sharding)

    return jax.tree_util.tree_map_with_path(leaf, abstract)


def host(tree):
    return jax.tree.map(to_host, tree)


def named(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def flops(compiled):
    found = compiled.cost_analysis()
    return (found[0] if isinstance(found, list) else found)["flops"]


def first_moments(state):
    """(1 - b1) times the first gradient, of a state after its first step."""
    [moments] = [
        part.mu
        for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    ]
    return named(host(moments))


def run(stage, architecture, mesh, steps, whole, adapter=None):
    """All that is compared: gradients, what the trained model says, FLOPs, placements."""
    config = settings(stage, adapter)
    key = jax.random.key(5)
    out = {}
    with use_mesh(mesh):
        programs = stage_programs(config, architecture, mesh)
        lowered = programs["train_step"].function.lower(*programs["train_step"].args)
        out["constraints"] = lowered.as_text().count("sharding_constraint")
        step = lowered.compile()
        compiled = {"train_step": step}
        frozen = {}
        if adapter is None:
            state = fresh_state(programs["train_step"], architecture)
        else:
            abstract, shapes = programs["train_step"].args[:2]
            frozen = filled(shapes)
            state = jax.tree.map(
                lambda s: jax.device_put(jnp.zeros(s.shape, s.dtype), s.sharding), abstract
            ).replace(params=filled(abstract.params))
        out["whole leaves"] = [
            name
            for name, x in named((state.params, state.opt_state, frozen)).items()
            if x.size > LARGE and x.sharding.is_fully_replicated
        ]
        if stage == "ppo":
            batches, compiled["sampler"], compiled["scorer"], out["rollout"] = experience(
                programs, state, architecture, mesh
            )
        else:
            batches = [
                put_batch(batch_of(stage, seed, architecture.vocab_size), mesh) for seed in (1, 2)
            ]
            if whole:
                scorer = programs["scorer"]
                compiled["scorer"] = scorer.function.lower(*scorer.args).compile()
        for i in range(steps):
            state, metrics = step(state, frozen, batches[i % len(batches)], key, RATE)
            if i == 0:
                out["gradients"] = first_moments(state)
                out["metrics"] = {k: (float(s), float(c)) for k, (s, c) in metrics.items()}
        out["placed"] = all(
            x.sharding.is_equivalent_to(s.sharding, x.ndim)
            for x, s in zip(
                jax.tree.leaves(state), jax.tree.leaves(programs["train_step"].args[0]), strict=True
            )
        )
        params = join(state.params, frozen)
        params = params.get("actor", params)
        said = row_scores if stage == "reward" else row_logprobs
        runtime = out_runtime(config, architecture, mesh)
        rows = put_batch(LMBatch(**token_rows(9, architecture.vocab_size, ROWS)), mesh)
        out["said"] = host(jax.jit(lambda p, b: said(p, architecture, runtime, b))(params, rows))
        if whole and stage != "reward":
            out["greedy"] = greedy(params, architecture, runtime, mesh)
        out["flops"] = {name: flops(c) * mesh.size for name, c in compiled.items()}
    return out


def out_runtime(config, architecture, mesh):
    from jaxrlhf.stages.models import make_runtime

    return make_runtime(config.model, architecture, mesh)


def prompts(vocab, rows):
    rng = np.random.default_rng(3)
    width = LENGTH - NEW
    lengths = rng.integers(1, width + 1, rows).astype(np.int32)
    return rng.integers(0, vocab, (rows, width)).astype(np.int32), lengths


def experience(programs, state, architecture, mesh):
    """The dataflow of an iteration up to its minibatches, on the stage's own programs."""
    tokens, lengths = prompts(architecture.vocab_size, ROWS)
    sampler, scorer = programs["sampler"], programs["scorer"]
    sample_rows = sampler.function.lower(*sampler.args, **sampler.kwargs).compile()
    rollout = sample_rows(
        state.params["actor"],
        prompt_tokens=put_batch(tokens, mesh),
        prompt_lengths=put_batch(lengths, mesh),
        key=jax.random.key(1),
        policy_step=put_batch(np.int32(0), mesh),
    )
    score = scorer.function.lower(*scorer.args).compile()
    scores = put_batch(np.random.default_rng(4).normal(size=2 * ROWS).astype(np.float32), mesh)
    reference = fresh(scorer.args[1], architecture, seed=7)
    kl_coef = put_batch(np.float32(0.05), mesh)
    exp, metrics = score(state.params, reference, rollout, scores, kl_coef)
    shuffled = programs["minibatches"].function(exp, jax.random.key(2))
    found = {
        "tokens": to_host(rollout.tokens),
        "lengths": to_host(rollout.lengths),
        "advantages": to_host(exp.advantages),
        "old_logprobs": to_host(exp.old_logprobs),
        "values": to_host(exp.values),
        "kl": float(metrics["kl"][0]),
        "cut": [len(x.sharding.device_set) for x in jax.tree.leaves(rollout)],
    }
    return shuffled, sample_rows, score, found


def greedy(params, architecture, runtime, mesh):
    """Token ids of greedy completions."""
    tokens, lengths = prompts(architecture.vocab_size, ROWS)

    def complete(params, tokens, lengths):
        return sample(
            params,
            architecture,
            runtime,
            tokens,
            lengths,
            jax.random.key(0),
            jnp.arange(ROWS),
            max_new_tokens=NEW,
            temperature=0.0,
        ).tokens

    return host(jax.jit(complete)(params, put_batch(tokens, mesh), put_batch(lengths, mesh)))


def relative(a, b):
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def compare(stage, meshes, model="divides", steps=20, whole=True, adapter=None):
    """What a mesh does against one device, for each of `meshes` (names); training alone, or all."""
    architecture = {"divides": DIVIDES, "ragged": RAGGED}[model]
    jax.config.update("jax_default_matmul_precision", "highest")
    one = make_mesh(devices=jax.devices()[:1], fsdp=1)
    alone = run(stage, architecture, one, steps, whole, adapter)
    out = {}
    for name in meshes:
        mesh = make_mesh(**MESHES[name])
        found = run(stage, architecture, mesh, steps, whole, adapter)
        out[name] = {
            "gradients": {
                leaf: relative(found["gradients"][leaf], g)
                for leaf, g in alone["gradients"].items()
            },
            "zero": [k for k, g in alone["gradients"].items() if np.linalg.norm(g) < 1e-9],
            "metrics": max(
                abs(s - alone["metrics"][k][0]) / max(abs(alone["metrics"][k][0]), 1e-3)
                for k, (s, _) in found["metrics"].items()
            ),
            "said": float(np.abs(found["said"] - alone["said"]).max()),
            "moved": float(np.abs(alone["said"]).max()),
            "flops": {k: f / alone["flops"][k] for k, f in found["flops"].items()},
            "whole leaves": found["whole leaves"],
            "constraints": found["constraints"],
            "placed": found["placed"],
        }
        if "greedy" in alone:
            out[name]["greedy"] = bool((found["greedy"] == alone["greedy"]).all())
        if "rollout" in alone:
            a, b = found["rollout"], alone["rollout"]
            out[name]["rollout"] = {
                k: float(np.abs(np.asarray(a[k], np.float64) - b[k]).max()) for k in b if k != "cut"
            }
            out[name]["rollout"]["devices"] = min(a["cut"])
    return out
