# SPDX-License-Identifier: Apache-2.0
"""One configuration per stage, put together from the sections; `STAGES` names them all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from jaxrlhf.config.base import (
    CONTENT,
    FREE,
    ModelName,
    OpenShare,
    PathName,
    Positive,
    Section,
    Seed,
    SourceName,
    Where,
    as_list,
)
from jaxrlhf.config.data import DataSection, Source, Sources, Template, TextDataSection
from jaxrlhf.config.evaluation import EvaluationSection
from jaxrlhf.config.loss import LMLossSection, PreferenceLossSection, RewardLossSection
from jaxrlhf.config.mesh import Mesh
from jaxrlhf.config.model import (
    Architecture,
    FreshModelSection,
    ModelSection,
    TrainedModelSection,
)
from jaxrlhf.config.optim import OptimSection
from jaxrlhf.config.reward import Rewards
from jaxrlhf.config.rl import RLSection
from jaxrlhf.config.sampling import ChatSamplingSection, RLSamplingSection, SamplingSection
from jaxrlhf.config.train import TrainSection
from jaxrlhf.config.world import WorldSizes


def _trackers(value: Any) -> Any:
    return [] if value == "none" or value == ["none"] else as_list(value)


Trackers = Annotated[list[Literal["tensorboard", "wandb"]], BeforeValidator(_trackers), FREE]
Comparisons = Literal["all", "adjacent", "best_worst", "apart"]  # keys of data.pairs.RANKINGS
Models = Annotated[list[ModelName], BeforeValidator(as_list)]
# Run directories that are read: what lies in them is an input, unlike a path that is written to.
Runs = Annotated[list[Annotated[str, Where("path"), CONTENT]], BeforeValidator(as_list)]
Texts = Annotated[list[str], BeforeValidator(as_list)]


class StageConfig(Section):
    """What every stage has. `summary` is the line of its help."""

    summary: ClassVar[str] = ""
    # Dotted fields without which the stage cannot start, and how each is usually given.
    needs: ClassVar[dict[str, str]] = {}

    seed: Seed = Field(default=0, description="everything random is a function of it")
    output_dir: PathName | None = Field(
        default=None, description="the run directory; null = runs/<stage>-<time>"
    )

    def contradictions(self) -> Iterator[str]:
        for path, how in self.needs.items():
            value = self
            for key in path.split("."):
                value = getattr(value, key)
            if value is None or value == []:
                yield f"{path}: is needed; {how}"


MODEL = "give a run directory, an HF folder or a hub name, e.g. model=PATH (or -m PATH)"
TRAIN_ROWS = "give rows to learn from, e.g. data.train=rows.jsonl"
WHOLE_ROWS = "prompts are cut by themselves in ppo only; data.max_length bounds the whole row"


class TrainingConfig(StageConfig):
    """What every stage that trains has."""

    needs: ClassVar[dict[str, str]] = {"model.path": MODEL, "data.train": TRAIN_ROWS}
    # Keys of data that this stage has no use for, and why.
    unread: ClassVar[dict[str, str]] = {"max_prompt_length": WHOLE_ROWS}

    model: TrainedModelSection = TrainedModelSection()
    data: DataSection = DataSection()
    mesh: Mesh = Mesh()
    train: TrainSection = TrainSection()
    optim: OptimSection = OptimSection()
    track: Trackers = Field(
        default=["tensorboard"],
        description="where metrics go besides metrics.jsonl: tensorboard, wandb; none",
    )

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.train.only and self.model.adapter is not None:
            yield (
                f"train.only = {self.train.only} trains parameters of the model, model.adapter "
                "others beside them: give one (model.adapter.modules_to_save trains both)"
            )
        if self.model.quantize is not None and self.model.adapter is None:
            only = self.train.only
            trains = f"with train.only = {only}" if only else "without model.adapter"
            yield (
                f"model.quantize = {self.model.quantize} is of weights that stay as they are, and "
                f"{trains} they would train: rounded to a few values, they cannot move by small "
                "steps. Train an adapter on them (model.lora.rank=16), or leave quantize out"
            )
        for key, why in self.unread.items():
            value = getattr(self.data, key)
            if value != type(self.data).model_fields[key].default:
                yield f"data.{key} = {str(value).lower()} changes nothing here: {why}"
        watched = self.train.eval_every is not None or self.train.keep_best is not None
        if watched and not self.data.holds_out:
            key = "keep_best" if self.train.keep_best is not None else "eval_every"
            yield (
                f"train.{key} = {getattr(self.train, key)} has nothing to evaluate on: give "
                "data.eval, data.eval_fraction or data.folds"
            )


class PretrainConfig(TrainingConfig):
    """A language model from fresh weights (model.init), or training of one continued."""

    summary: ClassVar[str] = "a language model on plain text, from fresh weights or continued"
    needs: ClassVar[dict[str, str]] = {"data.train": TRAIN_ROWS}

    model: FreshModelSection = FreshModelSection()
    data: TextDataSection = TextDataSection()
    loss: LMLossSection = LMLossSection()

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.model.path is None and self.model.init is None:
            yield ("model: give model.init (a fresh model's shape) or model.path")
        if self.model.init is not None and self.model.tokenizer is None:
            yield ("model.tokenizer: is needed with model.init; give a tokenizer folder")


class SFTConfig(TrainingConfig):
    """Supervised fine-tuning on demonstrations."""

    summary: ClassVar[str] = "supervised fine-tuning on demonstrations"
    loss: LMLossSection = LMLossSection()


COMPARED = {
    "max_prompt_length": WHOLE_ROWS,
    "completion_only": "what is compared are completions, after the same prompt",
}


class RewardConfig(TrainingConfig):
    """A reward model from comparisons; data.train holds prompt, chosen, rejected."""

    summary: ClassVar[str] = "a reward model from comparisons"
    unread: ClassVar[dict[str, str]] = COMPARED
    loss: RewardLossSection = RewardLossSection()


class DPOConfig(TrainingConfig):
    """Every offline preference loss (loss.name)."""

    summary: ClassVar[str] = "a policy straight from comparisons (DPO; loss.name picks the loss)"
    unread: ClassVar[dict[str, str]] = COMPARED
    reference: ModelName | None = Field(
        default=None, description="the frozen model stayed close to; null = the model as it starts"
    )
    loss: PreferenceLossSection = PreferenceLossSection()


class PPOConfig(TrainingConfig):
    """Every online estimator (rl.advantage); train.batch_size counts episodes an iteration."""

    summary: ClassVar[str] = "a policy by reinforcement learning against rewards"
    unread: ClassVar[dict[str, str]] = {
        "completion_only": "completions are sampled, and they alone are trained",
        "append_eos": "completions are sampled, and end where the policy ends them",
    }
    needs: ClassVar[dict[str, str]] = {
        "model.path": MODEL,
        "data.train": "give prompts, e.g. data.train=prompts.jsonl",
        "reward": "give a reward model, module:function or file.py:function, e.g. reward=PATH",
        "train.steps": "give the number of iterations, e.g. train.steps=100",
    }
    reference: ModelName | None = Field(
        default=None, description="the frozen model stayed close to; null = the policy as it starts"
    )
    reward: Rewards = Field(default_factory=list, description="what is maximised")
    gold: Rewards = Field(
        default_factory=list, description="held-out judges: scored at evaluations, never trained on"
    )
    sampling: RLSamplingSection = RLSamplingSection()
    rl: RLSection = RLSection()

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        episodes, parts, group = (
            self.train.batch_size,
            self.rl.minibatches,
            self.rl.samples_per_prompt,
        )
        if self.model.adapter is not None and self.model.adapter.dropout:
            yield (
                f"model.adapter.dropout = {self.model.adapter.dropout}: ppo compares the log-probs "
                "of the policy it updates with those of the same policy that sampled, which "
                "dropout would make another one; leave it out"
            )
        if self.train.epochs is not None:
            yield (f"train.epochs = {self.train.epochs}: ppo counts iterations, train.steps")
        if episodes is not None and episodes % parts:
            yield (f"train.batch_size = {episodes} must be a multiple of rl.minibatches = {parts}")
        if episodes is not None and episodes % group:
            yield (
                f"train.batch_size = {episodes} episodes must be a multiple of "
                f"rl.samples_per_prompt = {group}"
            )
        if self.rl.critic == "reward":
            models = [term for term in self.reward if term.kind == "model"]
            if self.reward and len(models) != 1:
                yield (
                    "rl.critic = reward starts values from the reward model, but reward holds "
                    f"{len(models)} models; use critic: policy or shared"
                )
        if self.sampling.max_new_tokens >= self.data.max_length:
            yield (
                f"sampling.max_new_tokens = {self.sampling.max_new_tokens} leaves no room for a "
                f"prompt in data.max_length = {self.data.max_length}"
            )


class GenerateConfig(StageConfig):
    """Completions for prompts: rows {prompt, completion, token_ids, logprobs, finish_reason}."""

    summary: ClassVar[str] = "completions for prompts"
    needs: ClassVar[dict[str, str]] = {"model.path": MODEL}

    model: ModelSection = ModelSection()
    mesh: Mesh = Mesh()
    prompt: Texts = Field(default_factory=list, description="prompts as text")
    prompts: Sources = Field(default_factory=list, description="prompts as rows")
    n: Positive = Field(default=1, description="completions per prompt")
    max_prompt_length: Positive = Field(default=512, description="longest prompt, tokens")
    truncation: Literal["error", "drop", "left", "right"] = Field(
        default="left", description="what happens to a longer one"
    )
    template: Template | None = Field(
        default=None,
        description="chat template for prompts that are messages; null = the tokenizer's own",
    )
    sampling: SamplingSection = SamplingSection()
    output: PathName | None = Field(
        default=None,
        description="the jsonl file written; null = completions.jsonl in the run directory; "
        "prompts given as text are answered on the terminal, and written only where a place is "
        "named",
    )

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if not self.prompt and not self.prompts:
            yield ("prompts: is needed; give --prompt TEXT or --prompts FILE.jsonl")


class ScoreConfig(StageConfig):
    """Log-probabilities of completions, or rewards, as the model's kind has it."""

    summary: ClassVar[str] = "log-probs or rewards of given completions"
    needs: ClassVar[dict[str, str]] = {
        "model.path": MODEL,
        "data": "give rows with prompt and completion: jsonl, json, csv or parquet",
    }
    model: ModelSection = ModelSection()
    mesh: Mesh = Mesh()
    data: Sources = Field(default_factory=list, description="rows of prompt and completion")
    max_length: Positive = Field(
        default=512, description="longest row, tokens; a longer one is an error"
    )
    template: Template | None = Field(
        default=None, description="chat template for rows that are messages; null = the tokenizer's"
    )
    append_eos: bool = Field(
        default=False,
        description="end each row with EOS, as what a reward model learns from ends: "
        "true for finished completions",
    )
    batch_size: Positive = Field(default=64, description="rows scored at a time, over all devices")
    output: PathName | None = Field(
        default=None, description="the jsonl file written; null = scores.jsonl in the run directory"
    )


class EvalConfig(StageConfig):
    """Figures of one model with their intervals, written to eval.json."""

    summary: ClassVar[str] = "perplexity, accuracy, rewards, KL, win rates with intervals"
    needs: ClassVar[dict[str, str]] = {"model.path": MODEL}

    model: ModelSection = ModelSection()
    mesh: Mesh = Mesh()
    label: str | None = Field(
        default=None, description="name in the report; null = the stage's or model's"
    )
    data: DataSection = Field(
        default=DataSection(),
        description="held-out text (perplexity) or comparisons (accuracy): data.eval, or what "
        "eval_fraction or folds hold out of data.train, as in training",
    )
    prompts: Sources = Field(default_factory=list, description="prompts that are completed")
    reference: ModelName | None = Field(
        default=None,
        description="KL is measured against this model, implicit rewards on comparisons too",
    )
    baseline: ModelName | None = Field(
        default=None,
        description="win rate against this model's completions, judged by gold, else proxy",
    )
    proxy: Rewards = Field(default_factory=list, description="what was optimised")
    gold: Rewards = Field(default_factory=list, description="what was meant")
    sampling: SamplingSection = SamplingSection()
    eval: EvaluationSection = EvaluationSection()
    batch_size: Positive = Field(default=64, description="rows at a time, over all devices")

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if not self.prompts and not self.data.holds_out:
            yield ("data.eval: is needed (text or comparisons), or prompts (to be completed)")
        if self.data.max_prompt_length is not None and not self.prompts:
            yield (
                f"data.max_prompt_length = {self.data.max_prompt_length} changes nothing without "
                "prompts: data.max_length bounds the whole row"
            )
        if self.eval.baselines and not (self.data.train and self.data.holds_out):
            yield ("eval.baselines learns from data.train: give it beside what is held out")
        for key in ("baseline", "proxy", "gold"):
            if getattr(self, key) and not self.prompts:
                yield (f"{key} is measured on completions: prompts is needed")
        if self.baseline and not (self.gold or self.proxy):
            yield ("baseline needs a judge of the two: give gold or proxy")
        n = self.eval.samples_per_prompt
        if too_many := [k for k in self.eval.best_of if k > n]:
            yield (
                f"eval.best_of = {too_many} is more than eval.samples_per_prompt = {n} completions"
            )
        if self.eval.best_of and not self.proxy:
            yield ("eval.best_of chooses by proxy: give proxy")


class WorldConfig(StageConfig):
    """The embedded customer-support world: texts, demonstrations, prompts and a tokenizer."""

    summary: ClassVar[str] = "the embedded synthetic world's files"
    world_seed: Seed | None = Field(default=None, description="of the generator; null = seed")
    sizes: WorldSizes = WorldSizes()


class LabelConfig(StageConfig):
    """Simulated labelers of a world rank the completions of each prompt."""

    summary: ClassVar[str] = "rankings of completions by simulated labelers"
    needs: ClassVar[dict[str, str]] = {
        "world": "give the folder a world stage wrote",
        "completions": "give rows of prompt and completion, e.g. a generate stage's output",
    }
    world: SourceName | None = Field(default=None, description="the folder of the world")
    completions: Sources = Field(
        default_factory=list, description="several completions per prompt, as generate writes them"
    )
    pairs: Comparisons = Field(
        default="all",
        description="which comparisons are made of a ranking to train on; all of those held out",
    )
    eval_fraction: OpenShare = Field(
        default=0.1, description="share of prompts kept for held-out pairs"
    )


class ReportConfig(StageConfig):
    """One self-contained HTML of one or several runs."""

    summary: ClassVar[str] = "one HTML page of plots, tables and samples"
    needs: ClassVar[dict[str, str]] = {"runs": "give run directories"}
    runs: Runs = Field(default_factory=list, description="run or pipeline directories")
    output: PathName | None = Field(
        default=None, description="the file written; null = report.html in the (first) run"
    )


class ExportConfig(StageConfig):
    """A run as a folder that transformers loads, parity-checked."""

    summary: ClassVar[str] = "a run as an HF folder"
    needs: ClassVar[dict[str, str]] = {"model.path": MODEL}
    model: ModelSection = ModelSection()
    format: Literal["hf", "merged", "peft"] = Field(
        default="hf",
        description="hf: config.json, safetensors, tokenizer, an adapter merged into them; "
        "merged: the same, of an adapter only; peft: the adapter alone",
    )
    onto: Literal["trained", "original"] = Field(
        default="trained",
        description="an adapter of a quantized base is merged into: trained = that base, so that "
        "it is exactly what was trained; original = the weights before they were quantized",
    )
    output: PathName | None = Field(
        default=None,
        description="the folder, which must be empty; null = export/ in the run directory of this "
        "command, which is not RUN",
    )
    check: bool = Field(
        default=True,
        description="compare with what transformers computes from it, where torch is installed",
    )


class ChatConfig(StageConfig):
    """Talk to a model in the terminal."""

    summary: ClassVar[str] = "talk to a model in the terminal"
    needs: ClassVar[dict[str, str]] = {"model.path": MODEL}
    model: ModelSection = ModelSection()
    mesh: Mesh = Mesh()
    template: Template | None = Field(
        default=None, description="chat template; null = the tokenizer's own"
    )
    system: str | None = Field(default=None, description="system message")
    sampling: ChatSamplingSection = ChatSamplingSection()


class DataShowConfig(StageConfig):
    """Decoded rows coloured by loss mask, lengths, and what is dropped and why."""

    summary: ClassVar[str] = "rows as the model will see them"
    needs: ClassVar[dict[str, str]] = {"data.train": "name a SOURCE"}
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    rows: Positive = Field(default=4, description="rows shown")


class DataPairsConfig(StageConfig):
    """Rankings or ratings to pairs."""

    summary: ClassVar[str] = "rankings or ratings to pairs"
    needs: ClassVar[dict[str, str]] = {"data": "name a SOURCE"}
    data: Sources = Field(default_factory=list, description="rows with completions and ranks")
    pairs: Comparisons = Field(default="all", description="which comparisons are made of a ranking")
    ties: Literal["skip", "keep"] = Field(default="skip", description="pairs of equal rank")
    output: PathName | None = Field(
        default=None, description="the jsonl file written; null = stdout"
    )


# Commands and pipeline stages by name.
STAGES: dict[str, type[StageConfig]] = {
    "world": WorldConfig,
    "pretrain": PretrainConfig,
    "sft": SFTConfig,
    "generate": GenerateConfig,
    "label": LabelConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "ppo": PPOConfig,
    "score": ScoreConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "report": ReportConfig,
    "chat": ChatConfig,
    "data show": DataShowConfig,
    "data pairs": DataPairsConfig,
}
TRAINING = ("pretrain", "sft", "reward", "dpo", "ppo")
# What a pipeline can hold: everything that leaves files behind.
PIPELINE_STAGES = tuple(name for name in STAGES if name != "chat" and " " not in name)

__all__ = ["PIPELINE_STAGES", "STAGES", "TRAINING", "Architecture", "Source", "StageConfig"]
