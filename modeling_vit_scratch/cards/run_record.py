# SPDX-License-Identifier: Apache-2.0
"""The record of a run, results.json: its results, and what it takes to get them again. Cards print nothing else."""

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..common.files import write_text
from ..common.records import METRIC_TITLES, format_score, provenance
from ..data.collation import MixingCollator
from ..data.splits import ImageData
from ..pretraining.arguments import PretrainingArguments
from ..recipes.table import find_recipe
from ..training.arguments import LAMB, ModelArguments
from ..training.optimization import is_temporary
from ..training.trainer import ImageTrainer, ImageTrainingArguments


def build_record(
    trainer: ImageTrainer, data: ImageData, model_arguments: ModelArguments, scores: dict[str, float],
    wall_time: float, pretraining: PretrainingArguments | None = None,
) -> dict[str, Any]:  # fmt: skip
    """
    The record of a run, without secrets and paths of this machine. `scores` are those of `Trainer.evaluate`,
    `wall_time` is that of training with its evaluations, in seconds, or of the part after `resumed_from`. Without
    labels, the main result is the loss on held-out images with the masks of the first epoch.
    """
    if pretraining is None or pretraining.is_supervised:
        # Without the loss: with label smoothing or mixing it is no number to compare.
        metrics = {name: scores[f"eval_{name}"] for name in METRIC_TITLES if f"eval_{name}" in scores}
        n = int(scores["eval_images"])
    else:
        metrics, n = {"loss": scores["eval_loss"]}, len(data.validation)
    main, arguments, state = next(iter(metrics)), trainer.args, trainer.state
    selection = "the last step"
    if arguments.load_best_model_at_end and state.best_model_checkpoint:
        name = arguments.metric_for_best_model.removeprefix("eval_")
        # The evaluation after training repeats the best one.
        equal = len({log["step"] for log in state.log_history if log.get(f"eval_{name}") == state.best_metric})
        tie = f", and of {equal} such the lowest loss" if equal > 1 and name != "loss" else ""
        selection = f"the checkpoint with the best {name}{tie} on these same images (step {state.best_global_step})"
    record = {
        "metric": main,
        "value": metrics[main],
        "n": n,
        "metrics": metrics,
        "selection": selection,
        "seed": arguments.seed,
        "dataset": _dataset_metadata(data),
        "model": _model_metadata(trainer.model, model_arguments),
        "earlier": _earlier_runs(model_arguments.model_name_or_path),
        "training": training_metadata(trainer),
        **provenance(),
        "wall_time_seconds": round(wall_time, 1),
        "resumed_from": Path(arguments.resume_from_checkpoint or "").name or None,
    }
    if pretraining is None:
        return record
    objective = pretraining.metadata()
    if not pretraining.is_supervised:
        encoder = trainer.model.vit.named_parameters()
        record["model"]["num_parameters"] = sum(p.numel() for name, p in encoder if name != "embeddings.mask_token")
        objective["description"] = trainer.objective
    last_logs = [log for log in state.log_history if log.get("step") == state.global_step]
    record["metrics"] |= {name: value for log in last_logs for name, value in log.items() if name.startswith("probe_")}
    return record | {"pretraining": objective}


def build_probe_record(
    probes: dict[str, Any], data: ImageData, model: PreTrainedModel, model_arguments: ModelArguments, seed: int,
    random_weights: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The record of scripts/probe.py, from the result of `run_probes` on the features of a model."""
    return {
        "probes": probes,
        "n": len(data.validation),
        "seed": seed,
        "random_weights": random_weights,
        "dataset": _dataset_metadata(data),
        "model": _model_metadata(model, model_arguments),
        **provenance(),
    }


def write_record(record: dict[str, Any], folder: str | os.PathLike[str]) -> None:
    write_text(Path(folder, "results.json"), json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def result_message(
    record: dict[str, Any], folder: str | os.PathLike[str], example: Path | None = None, warning: str | None = None
) -> str:
    """The last lines that training prints: the result, a warning about it, where the model is, and how to use it."""
    value = format_score(record["value"], record["metric"])
    title, broken = METRIC_TITLES.get(record["metric"], record["metric"]), record["training"]["broken_images"]
    replaced = f"\n{broken} training images could not be read: others took their places." if broken else ""
    warned = "" if warning is None else f"\n{warning}"
    ended = record["training"].get("ended_early")
    early = f"\nEnded early {ended}. To train on, raise it, with --resume_from_checkpoint True." if ended else ""
    found = record.get("dataset", {}).get("overlap")
    overlap = f"\n{found['sentence']}" if found else ""
    if "pretraining" in record:
        use = f"""To go on from it:

    accelerate launch scripts/finetune.py --model_name_or_path {folder} --train_dir PHOTOS"""
    else:
        use = f"""To use it:

    from transformers import pipeline
    classify = pipeline("image-classification", model="{folder}", trust_remote_code=True)
    print(classify("{example or "image.png"}"))"""
    return f"""
Held-out {title}: {value} on {record["n"]:,} images ({record["selection"]}).{early}{replaced}{overlap}{warned}
The model is in {folder}. {use}
"""


def _dataset_metadata(data: ImageData) -> dict[str, Any]:
    return {
        **{key: getattr(data.source, key) for key in ("name", "hub_id", "license", "url", "note")},
        "num_labels": len(data.label_names),
        "is_multi_label": data.is_multi_label,
        "num_training_images": data.num_train,
        "num_held_out_images": len(data.validation),
        "held_out": data.split,
        "images": data.images,
        "overlap": data.overlap or None,
    }


def _model_metadata(model: PreTrainedModel, arguments: ModelArguments) -> dict[str, Any]:
    start = arguments.model_name_or_path
    is_local = start is not None and Path(start).exists()
    return {
        "num_parameters": sum(p.numel() for name, p in model.named_parameters() if not is_temporary(name)),
        "started_from": "scratch" if start is None else Path(start).resolve().name if is_local else start,
        "base_model": None if is_local else start,
        "license": None if start is None else _license_of(Path(start, "README.md") if is_local else start),
    }


def _license_of(card: str | Path) -> dict[str, str] | None:
    """The licence in a model card, a file's or that of a Hub id, with name and link if it has its own; None without."""
    try:
        data = ModelCard.load(card, ignore_metadata_errors=True).data
    except Exception:  # no card, no connection, no YAML
        return None
    named = {name: data.get(name) for name in ("license", "license_name", "license_link") if data.get(name)}
    return named if isinstance(named.get("license"), str) else None


def _earlier_runs(start: str | None) -> list[dict[str, Any]]:
    """The runs that led to the model in a folder, the first one first."""
    try:
        record = json.loads(Path(start or "", "results.json").read_text(encoding="utf-8"))
        names = ("metric", "value", "n", "seed", "training", "command", "versions", "hardware", "wall_time_seconds")
        run = {"data": record["dataset"]["name"], "started_from": record["model"]["started_from"]}
        return [*record.get("earlier", []), run | {name: record[name] for name in names}]
    except (OSError, ValueError, KeyError, TypeError):  # no record, or not one of ours
        return []


def training_metadata(trainer: ImageTrainer) -> dict[str, Any]:
    arguments: ImageTrainingArguments = trainer.args
    recipe = arguments.recipe_arguments
    published = None if recipe.recipe is None else find_recipe(recipe.recipe)
    is_adam = arguments.optim == LAMB or "adam" in arguments.optimizer_name
    is_multi_label = trainer.model.config.problem_type == "multi_label_classification"
    schedule = (arguments.lr_scheduler_kwargs or {}).items()
    # As the launcher has set it, too: `accelerate launch --mixed_precision bf16`.
    # accelerate has no float16 on a CPU, and says nothing.
    mixed = trainer.accelerator.mixed_precision if trainer.accelerator.native_amp else "no"
    precision = {"bf16": "bfloat16", "fp16": "float16"}.get(mixed, "float32")
    return {
        "epochs": round(trainer.state.epoch or 0.0, 2),
        "steps": trainer.state.global_step,
        "ended_early": trainer.early_end.reason,
        "samples_seen": trainer.samples_before + sum(trainer.samples_by_process),
        "samples_seen_by_process": trainer.samples_by_process,
        "batch_size": trainer.get_total_train_batch_size(arguments),
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "optimizer": arguments.optimizer_name,
        "optimizer_settings": arguments.optim_args,
        "adam_betas": [arguments.adam_beta1, arguments.adam_beta2] if is_adam else None,
        "adam_epsilon": arguments.adam_epsilon if is_adam else None,
        "learning_rate": arguments.learning_rate,
        "schedule": arguments.lr_scheduler_type.value,
        "schedule_settings": ", ".join(f"{key} {value:g}" for key, value in schedule) or None,
        "warmup_steps": arguments.get_warmup_steps(trainer.state.max_steps),
        "weight_decay": arguments.weight_decay,
        "gradient_clipping": arguments.max_grad_norm,
        "label_smoothing": arguments.label_smoothing_factor,
        "loss": "bce" if is_multi_label and recipe.loss == "softmax" else recipe.loss,
        "class_weights": recipe.class_weights,
        "augmentation": trainer.augmentation_of_images,
        "mixing": trainer.data_collator.description if isinstance(trainer.data_collator, MixingCollator) else None,
        "recipe": recipe.recipe,
        "recipe_source": published and published.source,
        "recipe_differs": (published and published.differs) or None,
        "layer_decay": recipe.layer_decay,
        "head_learning_rate_multiplier": recipe.head_learning_rate_multiplier,
        "weight_average": recipe.ema_decay,
        "frozen": recipe.freeze,
        "lora_rank": recipe.lora_rank,
        **(trainer.distillation.metadata() if trainer.distillation else {}),
        "precision": precision,
        "processes": arguments.world_size,
        "broken_images": len(trainer.step_guard.broken_images),
    }
