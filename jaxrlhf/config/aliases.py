# SPDX-License-Identifier: Apache-2.0
"""TRL's names for our keys, accepted at the top level and printed under our name."""

from __future__ import annotations

ADAPTERS = "say what the adapter is, e.g. model.lora.rank=16"

COMMON = {
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "dtype": "model.dtype",
    "gradient_checkpointing": "model.remat",
    "dataset_name": "data.train",
    "train_dataset": "data.train",
    "eval_dataset": "data.eval",
    "max_length": "data.max_length",
    "group_by_length": "data.group_by_length",
    "pad_to_multiple_of": "data.pad_to_multiple_of",
    "max_seq_length": "data.max_length",
    "max_prompt_length": "data.max_prompt_length",
    "completion_only_loss": "data.completion_only",
    "assistant_only_loss": "data.completion_only",
    "lora_r": "model.adapter.rank",
    "lora_alpha": "model.adapter.alpha",
    "lora_dropout": "model.adapter.dropout",
    "lora_target_modules": "model.adapter.targets",
    "use_rslora": "model.adapter.rslora",
    "learning_rate": "optim.learning_rate",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.clip_norm",
    "lr_scheduler_type": "optim.schedule",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
    "adam_beta1": "optim.b1",
    "adam_beta2": "optim.b2",
    "adam_epsilon": "optim.eps",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "train_batch_size": "train.batch_size",
    "per_device_train_batch_size": "train.microbatch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "logging_steps": "train.log_every",
    "save_total_limit": "train.keep_last",
    "metric_for_best_model": "train.keep_best",
    "report_to": "track",
    "temperature": "sampling.temperature",
    "top_k": "sampling.top_k",
    "top_p": "sampling.top_p",
    "min_p": "sampling.min_p",
    "max_completion_length": "sampling.max_new_tokens",
    "max_new_tokens": "sampling.max_new_tokens",
    "response_length": "sampling.max_new_tokens",
}

BY_STAGE = {
    "reward": {"center_rewards_coefficient": "loss.center_coef"},
    "dpo": {
        "beta": "loss.beta",
        "loss_type": "loss.name",
        "label_smoothing": "loss.label_smoothing",
        "ref_model": "reference",
    },
    "ppo": {
        "beta": "rl.kl_coef",
        "kl_coef": "rl.kl_coef",
        "init_kl_coef": "rl.kl_coef",
        "num_generations": "rl.samples_per_prompt",
        "num_ppo_epochs": "rl.epochs",
        "num_iterations": "rl.epochs",
        "num_mini_batches": "rl.minibatches",
        "cliprange": "rl.clip_eps",
        "epsilon": "rl.clip_eps",
        "cliprange_value": "rl.value_clip",
        "vf_coef": "rl.value_coef",
        "gamma": "rl.gamma",
        "lam": "rl.gae_lambda",
        "whiten_rewards": "rl.whiten_rewards",
        "reward_model_path": "reward",
        "reward_funcs": "reward",
        "sft_model_path": "model.path",
        "ref_model": "reference",
    },
    "generate": {"num_return_sequences": "n", "num_generations": "n"},
}

# Known names that mean nothing here, with what to do instead.
REFUSED = {
    "use_peft": ADAPTERS,
    "peft_config": ADAPTERS,
    "load_in_4bit": "quantized bases are not part of this version; use model.dtype=bfloat16",
    "load_in_8bit": "quantized bases are not part of this version; use model.dtype=bfloat16",
    "bf16": "say model.dtype=bfloat16",
    "fp16": "say model.dtype=bfloat16 (float16 is not used here)",
    "packing": "rows are not packed in this version; leave it out",
    "resume_from_checkpoint": "say --resume auto, never or a path",
    "total_episodes": "say train.steps (iterations) and train.batch_size (episodes in each)",
    "trust_remote_code": "code that comes with a model or data set is never run; leave it out",
}

# What the same name counts differently, or does not bring with it, said when it is used.
GRPO = "the estimator of GRPO is rl.advantage=group (without it, gae)"
REMARKS = {
    ("ppo", "max_steps"): "train.steps counts iterations, each rl.epochs x rl.minibatches updates",
    ("ppo", "num_generations"): GRPO,
    ("ppo", "reward_funcs"): GRPO,
}

# Other names of a value, under TRL's name of its key.
VALUES = {("dpo", "loss_type"): {"sigmoid": "dpo"}}


def aliases(command: str) -> dict[str, str]:
    """{TRL's name: our dotted key} of one command."""
    return {**COMMON, **BY_STAGE.get(command, {})}
