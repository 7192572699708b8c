# SPDX-License-Identifier: Apache-2.0
"""`export`: a model as an HF folder, or an adapter as a PEFT folder, checked in two ways.

Read back it is the same, bit for bit. And where PyTorch is installed, transformers (and PEFT) load
the folder and must say of random tokens what we do.
"""

import importlib.util
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrlhf.config.stages import ExportConfig
from jaxrlhf.errors import ConfigError, ModelError
from jaxrlhf.models.quantization import is_quantized
from jaxrlhf.models.rows import row_logprobs, row_scores
from jaxrlhf.models.weights import load_hf, save_hf
from jaxrlhf.parallel.distributed import from_primary, is_primary
from jaxrlhf.stages.adapted import merged, write_adapter
from jaxrlhf.stages.card import export_card, merged_note
from jaxrlhf.stages.models import Model, open_model, quantized_base
from jaxrlhf.stages.outputs import check_output
from jaxrlhf.stages.reward import unused_token
from jaxrlhf.stages.rundir import whole_folder, write_tokenizer
from jaxrlhf.train.digest import content_digest
from jaxrlhf.types import LMBatch, Params

ROWS, LENGTH = 4, 64  # of the random tokens that are compared


def export(config: ExportConfig, output: Path, mesh: Mesh) -> tuple[dict[str, float], list[str]]:
    """A model as an HF folder (an adapter merged into it) or an adapter as a PEFT folder."""
    folder = Path(config.output) if config.output else output / "export"
    check_output(folder, folder=True)
    if from_primary(folder.exists() and any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: nothing there is overwritten; name another -o")
    model = _to_export(config, mesh)
    if config.format != "hf" and model.adapted is None:
        raise ConfigError(
            f"format = {config.format}: {model.source} is no adapter but a whole model; say hf"
        )
    pad = unused_token(model) if model.kind == "reward" else None
    with whole_folder(folder) as partial:
        checks = _write(config, model, partial, pad)
    if is_primary():
        for check in checks:
            print(f"export: {check}", flush=True)
        print(f"export: {model.source} is in {folder}", flush=True)
    return {}, []


def _write(config: ExportConfig, model: Model, folder: Path, pad: int | None) -> list[str]:
    """The files of the folder; returns what was found when they were read back."""
    checks, note, whole = [], None, model
    if config.format == "peft":
        assert model.adapted is not None
        write_adapter(
            folder, model.params, model.adapted, model.config, model.kind, model.hf_config
        )
    else:
        if model.adapted is not None or is_quantized(model.params):
            whole, note = merged(model, config.model.param_dtype), merged_note(model)
            checks.append(merging_error(model, whole))
        save_hf(
            folder,
            whole.params,
            model.config,
            kind=model.kind,
            pad_token_id=pad,
            hf_config=model.hf_config,
        )
    if jax.process_count() > 1:
        checks.append(f"written by {jax.process_count()} processes together: not read back")
    else:
        checks += _read_back(config, whole, folder, pad)
    if is_primary():
        write_tokenizer(model.tokenizer, folder)
        card = export_card(whole, pad, checks, note)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return checks


def _read_back(config: ExportConfig, model: Model, folder: Path, pad: int | None) -> list[str]:
    if config.format != "peft":
        back = load_hf(folder, kind=model.kind)
        if content_digest(back.params) != content_digest(model.params):
            raise ModelError(f"{folder}: the exported weights differ when read back")
    found = ["read back, it is the same bit for bit"]
    if config.check:
        found.append(compared_with_transformers(folder, model, pad))
    return found


def _to_export(config: ExportConfig, mesh: Mesh) -> Model:
    """The model as it is to be exported: an adapter of a quantized base on that very base, unless
    `onto` says the original or `model.quantize` something else."""
    section = config.model
    if section.quantize is None and config.onto == "trained" and config.format != "peft":
        assert section.path is not None
        section = section.model_copy(update={"quantize": quantized_base(section.path)})
    return open_model(section, mesh)


def random_rows(model: Model, without: int | None = None) -> LMBatch:
    """Rows of random tokens, of which none is `without`."""
    size = (ROWS, min(LENGTH, model.config.max_positions))
    ids = np.setdiff1d(np.arange(model.config.vocab_size), [] if without is None else [without])
    tokens = np.random.default_rng(0).choice(ids, size)
    return LMBatch(
        jnp.asarray(tokens, jnp.int32),
        jnp.broadcast_to(jnp.arange(size[1]), size),
        jnp.ones(size, jnp.int32),
        jnp.ones(size, bool),
    )


def outputs_of(model: Model):
    """(what a model says of rows, its name): log-probs of tokens, or scores."""
    if model.kind == "reward":
        return row_scores, "scores"
    return row_logprobs, "log-probs"


def allowed(model: Model, largest: float) -> float:
    """How far outputs may be apart: rounding to float32, or to bfloat16 with its 8 bits."""
    return (1e-3 if model.runtime.dtype == "float32" else 0.1) * max(1.0, largest)


def merging_error(model: Model, whole: Model) -> str:
    """How far a merged model's outputs are from those of base and adapter, on random tokens.

    Raises:
        ModelError: by more than rounding explains.
    """
    rows = random_rows(model)
    outputs, what = outputs_of(model)

    @jax.jit
    def difference(a: Params, b: Params) -> tuple[jax.Array, jax.Array]:
        x, y = (outputs(params, model.config, model.runtime, rows) for params in (a, b))
        return jnp.abs(x - y).max(), jnp.abs(x).max()

    off, largest = map(float, difference(model.params, whole.params))
    bound = allowed(model, largest)
    if not off <= bound:
        raise ModelError(f"{model.source}: merged, its {what} are off by {off:.2g} ({bound:.2g})")
    if model.adapted is None:
        return f"multiplied out, its {what} are within {off:.2g} of those of the quantized model"
    return f"merged, its {what} are within {off:.2g} of those of base and adapter"


def compared_with_transformers(folder: Path, model: Model, pad: int | None) -> str:
    """How far what transformers makes of a folder is from what we do, on random tokens.

    Raises:
        ModelError: by more than rounding explains, or it cannot be loaded there.
    """
    needed = ["torch"] if model.adapted is None else ["torch", "peft"]
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return f"not compared with transformers: {' and '.join(absent)} not installed"
    if model.adapted is not None:
        if model.adapted.adapter.kind == "bottleneck":
            return "not compared with PEFT, which has no bottleneck adapters"
        if model.adapted.home is None:
            return "not compared with PEFT: its base is in no folder here"
    rows = random_rows(model, without=pad)
    outputs, what = outputs_of(model)
    ours = np.asarray(
        jax.jit(lambda params: outputs(params, model.config, model.runtime, rows))(model.params)
    )
    theirs = _theirs(folder, model, np.asarray(rows.tokens), pad)
    if model.kind != "reward":
        ours = ours[:, 1:]  # nothing says the first token
    off, largest = np.abs(ours.reshape(theirs.shape) - theirs).max(), np.abs(theirs).max()
    bound = allowed(model, float(largest))
    who = "transformers" if model.adapted is None else "PEFT"
    if not off <= bound:
        raise ModelError(f"{folder}: {who} computes {what} that are off by {off:.2g} ({bound:.2g})")
    return f"{who} computes the same {what} within {off:.2g}"


def _theirs(folder: Path, model: Model, tokens: np.ndarray, pad: int | None) -> np.ndarray:
    """Scores [B, R], or log-probs [B, T - 1] of the tokens, as transformers has them."""
    import transformers

    torch = import_module("torch")
    transformers.utils.logging.disable_progress_bar()
    reward = model.kind == "reward"
    auto = "AutoModelForSequenceClassification" if reward else "AutoModelForCausalLM"
    keys = {"num_labels": model.params["score"]["kernel"].shape[-1]} if reward else {}
    adapted = model.adapted
    place = folder if adapted is None else adapted.home
    try:
        loaded = getattr(transformers, auto).from_pretrained(
            str(place), dtype=torch.float32, local_files_only=True, **keys
        )
        if adapted is not None:
            loaded = import_module("peft").PeftModel.from_pretrained(loaded, str(folder))
    except Exception as error:  # whatever a library raises about a folder
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{folder} cannot be loaded by transformers: {reason}") from error
    if reward:
        loaded.config.pad_token_id = pad
    loaded.eval()
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor(tokens, dtype=torch.long)).logits
        if reward:
            return logits.numpy()
        own = logits[:, -tokens.shape[1] : -1]  # virtual tokens stand before
        logs = torch.log_softmax(own.float(), -1)
        following = torch.tensor(tokens[:, 1:, None], dtype=torch.long)
        return logs.gather(-1, following)[..., 0].numpy()
