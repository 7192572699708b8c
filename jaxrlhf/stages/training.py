# SPDX-License-Identifier: Apache-2.0
"""The one runner of every stage that trains: recipe in, run directory out."""

import dataclasses
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxrlhf.config.optim import OptimSection
from jaxrlhf.config.stages import TrainingConfig
from jaxrlhf.errors import CheckpointError, ConfigError
from jaxrlhf.models.adapters.peft import adapter_config
from jaxrlhf.models.adapters.trees import join
from jaxrlhf.models.transformer import count_params
from jaxrlhf.models.weights import load_hf, save_hf
from jaxrlhf.parallel import distributed
from jaxrlhf.parallel.mesh import make_mesh, row_shards
from jaxrlhf.parallel.rules import put_batch, use_mesh
from jaxrlhf.stages import lineage
from jaxrlhf.stages.adapted import count_trained, on_halves, write_adapter
from jaxrlhf.stages.best import criterion
from jaxrlhf.stages.card import model_card
from jaxrlhf.stages.recipe import Advance, Recipe
from jaxrlhf.stages.resuming import check_planned, origin
from jaxrlhf.stages.rundir import (
    peak_memory_bytes,
    read_summary,
    run_directory,
    save_tokenizer,
    whole_folder,
    write_json,
    write_tokenizer,
)
from jaxrlhf.train.checkpoint import Checkpoints
from jaxrlhf.train.digest import content_digest
from jaxrlhf.train.loop import Outcome, train
from jaxrlhf.train.metrics import MetricWriter, last_values
from jaxrlhf.train.optim import make_optimizer
from jaxrlhf.train.state import TrainState, abstract_state, place_state
from jaxrlhf.train.step import TrainStep, at_scheduled_rate, jit_train_step, make_train_step
from jaxrlhf.types import Params

Build = Callable[[Any, Mesh, jax.Array], Recipe]


@dataclasses.dataclass(frozen=True)
class StageResult:
    """How a stage ended: its directory, exit code (0 = everything planned was done), figures."""

    path: Path
    exit_code: int
    metrics: dict[str, float]
    message: str = ""


def stage_key(seed: int, stage: str) -> jax.Array:
    """The key from which everything random in a stage is folded."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(stage.encode()))


def offline(
    batch_at: Callable[[int], Any], frozen: Params, key: jax.Array, mesh: Mesh
) -> Callable[[TrainStep], Advance]:
    """A unit of the loop where batches come from a data set: one optimizer step on batch `step`."""

    def make(train_step: TrainStep) -> Advance:
        def advance(state: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
            batch = put_batch(batch_at(step), mesh)
            state, metrics = train_step(state, frozen, batch, jax.random.fold_in(key, step))
            return state, dict(metrics)

        return advance

    return make


def optimizer(section: OptimSection, steps: int) -> tuple[Any, Any]:
    """(transformation, learning rate as a function of the step) for a run of so many updates."""
    return make_optimizer(
        section.name,
        section.learning_rate,
        schedule=section.schedule,
        warmup=section.warmup,
        steps=steps,
        final_ratio=section.final_ratio,
        weight_decay=section.weight_decay,
        clip_norm=section.clip_norm,
        rate_factors=section.rate_factors,
        **section.settings(),
    )


def run_training(
    command: str,
    config: TrainingConfig,
    build: Build,
    output: Path,
    *,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    dry_run: bool = False,
    stop_requested: Callable[[], bool] | None = None,
    named: bool = True,
) -> StageResult:
    """Runs one training stage to its end, from wherever it stands.

    Args:
        build: makes the recipe: (config, mesh, key) -> Recipe.
        output: the run directory.
        resume: "auto" (the newest good checkpoint there, if any), "never" (refused where there are
            any), or another run to continue from.
        allow_change: settings that may differ from those the run began with.
        dry_run: stop before anything is computed or written.
        named: somebody said where; otherwise the same call again would begin anew elsewhere.
    """
    with distributed.together(), use_mesh(make_mesh(**config.mesh.sizes)) as mesh:
        key = stage_key(config.seed, command)
        criterion(command, config.train)  # what it refuses need not wait for the model
        if dry_run:
            recipe = build(config, mesh, key)
            _describe(command, config, recipe, mesh)
            return StageResult(output, 0, {}, "dry run: nothing was computed")
        resumed = origin(command, config, output, resume, allow_change)
        again = "call it again" if named else f"the same command with --output {output}"
        with run_directory(output, config):
            if distributed.is_primary():
                print(f"{command}: in {output}", flush=True)
            lineage.record(output, config)
            recipe = build(config, mesh, key)
            _describe(command, config, recipe, mesh)
            return _run(command, config, recipe, mesh, output, resumed, stop_requested, again)


def _describe(command: str, config: TrainingConfig, recipe: Recipe, mesh: Mesh) -> None:
    """What is about to happen, in numbers."""
    if not distributed.is_primary():
        return
    plan = config.train.batch_plan(row_shards(mesh))
    parameters = count_trained(recipe.params, recipe.adapted)
    moments = jax.eval_shape(
        optimizer(config.optim, recipe.steps * recipe.updates)[0].init, recipe.params
    )
    weights, gradients = size_of(recipe.params), 4 * count_params(recipe.params)
    named = jax.tree_util.tree_leaves_with_path(recipe.frozen)
    frozen = {str(id(x)): {path[-1].key: x} for path, x in named}  # what is shared counts once
    base = f" of {parameters + count_params(frozen):,}" if frozen else ""
    kept = f"; frozen {size_of(frozen) / 1e6:,.1f} MB" if frozen else ""
    shape = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    lines = [
        *recipe.notes,
        f"{plan}; {recipe.steps} steps, {recipe.epoch:.4g} an epoch"
        + (f", each of {recipe.updates} optimizer steps" if recipe.updates > 1 else ""),
        f"{parameters:,}{base} parameters train; weights {weights / 1e6:,.1f} MB, optimizer "
        f"{size_of(moments):,} bytes, gradients {gradients / 1e6:,.1f} MB{kept}; mesh: "
        f"{shape or 'one device'}",
    ]
    for line in lines:
        print(f"{command}: {line}", flush=True)


def size_of(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _run(
    command: str,
    config: TrainingConfig,
    recipe: Recipe,
    mesh: Mesh,
    output: Path,
    resumed: Path | None,
    stop_requested: Callable[[], bool] | None,
    again: str,
) -> StageResult:
    """From the checkpoints of the run `resumed`, or from the start, to the result."""
    began = time.perf_counter()
    updates = recipe.steps * recipe.updates
    tx, schedule = optimizer(config.optim, updates)
    accumulation = passes(config, recipe.rows, mesh)
    ema = config.train.ema_decay
    shapes, where, replicated = abstract_state(
        recipe.params, tx, mesh, recipe.axes, ema=ema is not None
    )
    for line in replicated:
        print(f"{command}: replicated, its axis does not divide it: {line}", flush=True)

    meta = {
        "stage": command,
        "kind": recipe.kind,
        "model": recipe.architecture.to_dict(),
        "exported": list(recipe.exported),
        "hf_config": recipe.hf_config,
        "parents": lineage.contents(config),
    }
    if recipe.frozen:
        meta["frozen"] = content_digest(recipe.frozen)
    if recipe.adapted is not None:
        meta["adapter"] = adapter_config(
            recipe.adapted.adapter,
            recipe.architecture,
            kind=recipe.kind,
            base=recipe.adapted.named(),
        )
        meta["quantized"] = recipe.adapted.quantized
    best, best_mode = criterion(command, config.train)
    checkpoints = Checkpoints(
        output, meta=meta, keep_last=config.train.keep_last, best=best, best_mode=best_mode
    )
    source = checkpoints if resumed in (None, output) else Checkpoints(resumed)
    start = source.latest() if resumed is not None else None
    told: dict[str, Any] = {}
    if start is None:
        if source is not checkpoints:
            raise CheckpointError(f"--resume {resumed}: no good checkpoint there")
        start, state = 0, place_state(recipe.params, tx, mesh, recipe.axes, ema=ema is not None)[0]
        recipe.params = None  # the state's are its own
    else:
        check_planned(source.folder.parent, start, recipe.steps)
        recipe.params = None  # the checkpoint's take their place: never both at once
        state = _restore(command, shapes, source, start, meta.get("frozen"))
        told = source.read_meta(start)
        before = told.get("continues") if source is checkpoints else str(source.folder.parent)
        if before is not None:
            checkpoints.meta["continues"] = before
    if distributed.is_primary():
        save_tokenizer(recipe.tokenizer, output / "tokenizer")

    train_step = make_train_step(
        on_halves(recipe.loss_fn, recipe.adapted.adapter.dropout if recipe.adapted else 0.0),
        tx,
        accum=accumulation,
        prepare=recipe.prepare,
        ema_decay=ema,
    )
    train_step = at_scheduled_rate(jit_train_step(train_step, where, mesh), schedule, mesh)

    def weights_of(state: TrainState) -> Params:
        """What is evaluated and exported: the average of the weights where one is kept, and
        what is frozen with it."""
        trained = state.params
        if ema is not None:
            trained = jax.tree.map(lambda e, p: e.astype(p.dtype), state.extra["ema"], trained)
        return join(trained, recipe.frozen)

    evaluate, sample = recipe.evaluate, recipe.sample
    every = config.train.eval_every or recipe.steps
    with MetricWriter(
        output,
        track=config.track,
        start=start,
        name=output.name,
        config=config.model_dump(mode="json"),
    ) as writer:
        outcome = train(
            recipe.advance(train_step),
            state,
            start=start,
            steps=recipe.steps,
            writer=writer,
            checkpoints=checkpoints,
            evaluate=None
            if evaluate is None
            else lambda state, done: evaluate(weights_of(state), done),
            eval_every=every,
            save_every=config.train.save_every or max(1, -(-recipe.steps // 10)),
            log_every=config.train.log_every,
            so_far=told.get("record"),
            sample=None if sample is None else lambda state, done: sample(weights_of(state), done),
            sample_every=config.train.sample_every,
            stop_requested=stop_requested,
            stop_after_nonfinite=config.train.max_nonfinite,
            name=command,
            again=again,
            show=recipe.show,
        )
    del state
    chosen = checkpoints.best() if outcome.exit_code == 0 else None
    if chosen is not None and chosen != outcome.step:
        outcome = dataclasses.replace(outcome, state=None)  # never both at once
        outcome = dataclasses.replace(outcome, state=checkpoints.restore(shapes, chosen)[0])
        print(f"{command}: the best checkpoint, step {chosen}, is the result", flush=True)
    return _finish(command, config, recipe, outcome, weights_of, output, began)


def passes(config: TrainingConfig, rows: int, mesh: Mesh) -> int:
    """Microbatches per optimizer step: those of the plan, for the rows that one step really has."""
    plan = config.train.batch_plan(row_shards(mesh))
    return max(1, -(-rows // (plan.microbatch_size * plan.shards)))


def _restore(
    command: str,
    shapes: TrainState,
    source: Checkpoints,
    step: int,
    frozen: str | None,
) -> TrainState:
    """The state of a checkpoint."""
    if (before := source.read_meta(step).get("frozen")) != frozen:
        raise CheckpointError(
            f"{source.path(step)} was trained on frozen weights with the digest {before}, those "
            f"here have {frozen}: restore the base that the run began with"
        )
    restored, step = source.restore(shapes, step)
    print(f"{command}: resuming at step {step} from {source.folder}", flush=True)
    return restored


def _finish(
    command: str,
    config: TrainingConfig,
    recipe: Recipe,
    outcome: Outcome,
    weights_of: Callable[[TrainState], Params],
    output: Path,
    began: float,
) -> StageResult:
    """Export and summary."""
    content = None
    # A run that was killed after its last step has nothing left to do, but has its figures.
    metrics = {**last_values(output), **outcome.metrics}
    if outcome.exit_code == 0:
        params = weights_of(outcome.state)
        for name in recipe.exported:
            params = params[name]
        content = content_digest({k: v for k, v in params.items() if k != "value"})
        export(output / "export", params, recipe, command, config, metrics)
    earlier = read_summary(output) or {}
    seconds = time.perf_counter() - began
    if distributed.is_primary():
        summary = {
            "stage": command,
            "steps_done": outcome.step,
            "steps_planned": recipe.steps,
            "exit_reason": outcome.reason,
            "metrics": {k: v for k, v in metrics.items() if v == v},
            "content": content,
            "files": exported_files(output) if content is not None else None,
            "parents": lineage.contents(config),
            "tokens": outcome.tokens,
            "wall_seconds": round(seconds + earlier.get("wall_seconds", 0.0), 3),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        write_json(output / "summary.json", {k: v for k, v in summary.items() if v is not None})
        print(f"{command}: peak memory {summary['peak_memory_bytes'] / 1e6:,.1f} MB", flush=True)
        if outcome.exit_code == 0:
            print(f"{command}: results in {output}", flush=True)
    distributed.barrier("summary")
    return StageResult(output, outcome.exit_code, metrics, outcome.message)


def exported_files(output: Path) -> dict[str, Any]:
    """The files of the result and their digests, by which damage is noticed later."""
    names = sorted(p.relative_to(output).as_posix() for p in (output / "export").iterdir())
    each = {name: lineage.file_digest(output / name) for name in names}
    return {"names": names, "digest": lineage.files_digest(output, names), "each": each}


def export(
    folder: Path,
    params: Params,
    recipe: Recipe,
    command: str,
    config: TrainingConfig,
    metrics: dict[str, float],
) -> None:
    """Writes the HF folder (an adapter's: the PEFT folder) and reads it back: the same bits, or an
    error."""
    card = model_card(command, config, recipe, metrics)
    with whole_folder(folder) as partial:
        if recipe.adapted is not None:
            write_adapter(
                partial,
                params,
                recipe.adapted,
                recipe.architecture,
                recipe.kind,
                recipe.hf_config,
                card,
            )
        else:
            save_hf(
                partial,
                params,
                recipe.architecture,
                kind=recipe.kind,
                pad_token_id=recipe.pad_token_id,
                hf_config=recipe.hf_config,
                model_card=card,
            )
        if distributed.is_primary():
            write_tokenizer(recipe.tokenizer, partial)
        if jax.process_count() == 1 and recipe.adapted is None:
            kept = {k: params[k] for k in params if k not in ("value", _other_head(recipe.kind))}
            back = load_hf(partial, kind=recipe.kind)
            if content_digest(back.params) != content_digest(kept):
                raise CheckpointError(f"{folder}: the exported weights differ when read back")


def _other_head(kind: str) -> str:
    return "score" if kind == "lm" else "lm_head"


def check_fits(name: str, model_digest: str, other: str, other_digest: str) -> None:
    """Two models that read the same token ids must share one tokenizer."""
    if model_digest != other_digest:
        raise ConfigError(
            f"{name} and {other} have different tokenizers, but token ids go from one to the "
            "other; use models of one family, or score text with a reward function"
        )
