# SPDX-License-Identifier: Apache-2.0
"""Every flag of transformers' TrainingArguments, which `--help all` offers, trains or is refused with a sentence."""

import dataclasses

import pytest
from tiny_images import build, flags

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.training.trainer import ImageTrainingArguments


# Flags with a value that is not the default; those of a row are tried in one run.
RUNS = {
    "optimization": {
        "per_device_train_batch_size": 5, "num_train_epochs": 2, "learning_rate": 0.01, "lr_scheduler_type": "linear",
        "lr_scheduler_kwargs": "{}", "warmup_steps": 1, "optim": "sgd", "optim_args": "momentum=0.9",
        "weight_decay": 0.1, "gradient_accumulation_steps": 2, "average_tokens_across_devices": False,
        "max_grad_norm": 0.5, "label_smoothing_factor": 0.1, "bf16": True, "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": '{"use_reentrant": false}', "torch_empty_cache_steps": 1, "seed": 3,
        "data_seed": 4, "auto_find_batch_size": True, "use_cache": True, "full_determinism": False, "use_cpu": True,
        "neftune_noise_alpha": 5, "optim_target_modules": "all-linear", "smallest_area": 0.5,
    },
    "reports": {
        "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "logging_strategy": "steps", "logging_steps": 1,
        "logging_first_step": True, "log_on_each_node": False, "logging_nan_inf_filter": True,
        "include_num_input_tokens_seen": True, "log_level": "error", "log_level_replica": "error",
        "disable_tqdm": True, "report_to": "none", "run_name": "a", "project": "a", "trackio_space_id": "a",
        "trackio_bucket_id": "a", "trackio_static_space_id": "a", "debug": "underflow_overflow",
        "skip_memory_metrics": False, "do_train": True, "do_eval": True, "do_predict": False, "license": "mit",
        "license_name": "a", "license_link": "https://example.org",
        "max_steps": 2, "hub_strategy": "end", "hub_always_push": True, "push_to_hub": False,
    },
    "evaluation": {
        "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "eval_delay": 1, "per_device_eval_batch_size": 3,
        "eval_on_start": True, "eval_use_gather_object": True, "eval_accumulation_steps": 1,
        "include_for_metrics": "loss", "save_only_model": True, "save_strategy": "steps", "save_steps": 1,
        "save_on_each_node": True, "save_total_limit": 1, "load_best_model_at_end": True,
        "metric_for_best_model": "loss", "greater_is_better": False, "probe": "knn", "probe_images": 8,
        "probe_steps": 1, "batch_eval_metrics": False, "ignore_data_skip": True,
        "restore_callback_states_from_checkpoint": True, "resume_from_checkpoint": False, "max_broken_images": 1,
    },
    "data": {
        "max_steps": 1, "batch_eval_metrics": True, "accelerator_config": '{"split_batches": true}',
        "dataloader_drop_last": True, "dataloader_num_workers": 1, "dataloader_pin_memory": False,
        "dataloader_persistent_workers": False, "dataloader_prefetch_factor": 3, "dataloader_in_order": False,
        "dataloader_multiprocessing_context": "fork", "remove_unused_columns": True,
        "train_sampling_strategy": "sequential", "length_column_name": "a", "fast_decode": False,
        "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 25, "ddp_broadcast_buffers": True,
        "ddp_static_graph": True, "ddp_timeout": 60,
    },
}  # fmt: skip
REFUSED = {
    "bf16_full_eval": True, "fp16_full_eval": True, "prediction_loss_only": True, "eval_do_concat_batches": False,
    "label_names": "labels", "use_liger_kernel": True, "enable_jit_checkpoint": True, "hub_token": "a",
    "hub_private_repo": True, "hub_model_id": "a", "hub_revision": "a", "do_train": False, "do_predict": True,
    "dataloader_multiprocessing_context": "spawn", "fsdp": "full_shard", "dataloader_prefetch_factor": 2,
    "train_sampling_strategy": "group_by_length", "report_to": "wandb", "metric_for_best_model": "f1",
}  # fmt: skip
# They need an accelerator, a package or minutes of compiling, or are for distributed training: tried by hand.
ELSEWHERE = {
    "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode", "liger_kernel_config",
    "fsdp_config", "deepspeed", "parallelism_config", "activation_checkpointing", "activation_checkpointing_kwargs",
    "images_on_device", "output_dir", "local_rank", "ddp_backend", "early_stopping_patience", "max_hours",
}  # fmt: skip


def words(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def test_every_flag_is_tried():
    names = {field.name for field in dataclasses.fields(ImageTrainingArguments) if field.init}
    tried = {name for options in RUNS.values() for name in options} | REFUSED.keys() | ELSEWHERE
    assert names - tried == set()  # transformers has a new flag: does it train, or is it refused?


@pytest.mark.parametrize("group", RUNS)
def test_it_trains(pets, tmp_path, group):
    trainer = build(tmp_path / "out", *flags(pets, "--dataloader_num_workers", "0", *words(RUNS[group])))
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    assert trainer.state.global_step == trainer.state.max_steps


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_a_sentence(pets, tmp_path, name):
    more = ("--max_steps", "1", "--dataloader_num_workers", "0", *words({name: REFUSED[name]}))
    with pytest.raises(InputError, match=rf"(?i){name.split('_')[0]}.*\w+ \w+ \w+.*\.$"):
        build(tmp_path / "out", *flags(pets, *more)).train()
