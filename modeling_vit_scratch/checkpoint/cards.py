# SPDX-License-Identifier: Apache-2.0
"""From a configuration and the record of a run to a model card. Prints no number that is not in the record."""

import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedConfig


# What a record must have before anything is printed: keys, and keys in them.
_REQUIRED: dict[str, tuple[str, ...]] = {
    "metric": (),
    "value": (),
    "n": (),
    "metrics": (),
    "selection": (),
    "seed": (),
    "dataset": ("name", "num_labels", "num_training_images", "num_held_out_images", "held_out"),
    "model": ("num_parameters", "started_from"),
    "training": ("epochs", "steps", "batch_size", "optimizer", "learning_rate"),
    "command": (),
    "versions": (),
    "hardware": (),
    "wall_time_seconds": (),
}
_METRIC_NAMES = {
    "accuracy": "Accuracy", "top5_accuracy": "Top-5 accuracy", "mean_average_precision": "Mean average precision",
    "micro_f1": "Micro F1", "macro_f1": "Macro F1", "samples_f1": "Samples F1", "exact_match": "Exact match",
}  # fmt: skip
# The names that the Hub knows metrics by.
_METRIC_TYPES = {
    "accuracy": "accuracy", "top5_accuracy": "top5_accuracy", "mean_average_precision": "mean_average_precision",
    "micro_f1": "f1", "macro_f1": "f1", "samples_f1": "f1", "exact_match": "exact_match",
}  # fmt: skip


def write_card(
    folder: str | os.PathLike[str], config: PreTrainedConfig, record: dict[str, Any], hub_model_id: str | None = None
) -> ModelCard:
    """
    Writes README.md into the folder of a model, and returns the card. Arguments and errors as in `build_card`.
    """
    # A path that depends on this machine helps nobody.
    location = str(folder) if not Path(folder).is_absolute() else Path(folder).name
    card = build_card(config, record, name=Path(folder).resolve().name, location=hub_model_id or location)
    card.save(Path(folder, "README.md"))
    return card


def build_card(config: PreTrainedConfig, record: dict[str, Any], name: str, location: str) -> ModelCard:
    """
    A model card with metadata for the Hub.

    Args:
        config: of the model; gives the labels and the architecture.
        record: of the run, as in results.json.
        name: the title.
        location: what to load the model from, in the example of use: a path or a Hub id.

    Raises:
        ValueError: if the record lacks something: then there is no card, rather than one with gaps.
    """
    missing = [key for key in _REQUIRED if record.get(key) is None]
    missing += [
        f"{key}.{part}" for key, parts in _REQUIRED.items() for part in parts if part not in record.get(key, {})
    ]
    if "metric" not in missing and record["metric"] not in record.get("metrics", {}):
        missing.append(f"metrics.{record['metric']}")
    if missing:
        raise ValueError(f"No card without a record: results.json lacks {', '.join(missing)}. Train or evaluate again.")
    sections = [
        f"# {name}",
        _summary(config, record),
        _result(record),
        _use(location, _is_encoder(record)),
        _data(record),
        _training(config, record),
        _environment(record),
    ]
    return ModelCard(f"---\n{_metadata(record, name).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _is_encoder(record: dict[str, Any]) -> bool:
    """Whether the model was pretrained without labels, and has no classifier."""
    return record.get("pretraining", {}).get("objective", "supervised") != "supervised"


def _metadata(record: dict[str, Any], name: str) -> ModelCardData:
    dataset, license = record["dataset"], record["dataset"].get("license")
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset.get("hub_id") or re.sub(r"\W+", "-", dataset["name"].lower()),
            dataset_name=dataset["name"],
            dataset_args={"n": record["n"]},
            metric_type=_METRIC_TYPES[metric],
            metric_name=f"{title} (n = {record['n']:,})",
            metric_value=round(record["metrics"][metric], 4),
        )
        for metric, title in _METRIC_NAMES.items()
        if metric in record["metrics"]
    ]
    return ModelCardData(
        license=license if isinstance(license, str) and re.fullmatch(r"[a-z0-9.-]+", license) else None,
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if _is_encoder(record) else "image-classification",
        tags=["vision", "vit", "custom_code"],
        datasets=[dataset["hub_id"]] if dataset.get("hub_id") else None,
        base_model=record["model"].get("base_model"),
        metrics=sorted({result.metric_type for result in results if result.metric_type != "top5_accuracy"}) or None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _summary(config: PreTrainedConfig, record: dict[str, Any]) -> str:
    if _is_encoder(record):
        return (
            f"The encoder of a Vision Transformer, pretrained without labels on {_data_name(record)}: "
            f"{record['pretraining']['description']}. It has no classifier: fine-tune it, or use its features."
        )
    labels = [config.id2label[index] for index in range(config.num_labels)]
    shown = ", ".join(labels[:10]) + (f" and {len(labels) - 10} more" if len(labels) > 10 else "")
    start = record["model"]["started_from"]
    how = "trained from scratch" if start == "scratch" else f"fine-tuned from {start}"
    if config.problem_type == "multi_label_classification":
        return (
            f"A Vision Transformer that says which of {len(labels)} labels an image has, any number of them: {shown}. "
            f"It was {how} on {_data_name(record)}. The scores are probabilities, each for itself: they don't sum to 1."
        )
    return (
        f"A Vision Transformer that sorts images into {len(labels)} classes: {shown}. It was {how} on "
        f"{_data_name(record)}. It always answers with one of its classes, also for images that show something else."
    )


def _result(record: dict[str, Any]) -> str:
    rows = [
        f"| {title} | {100 * record['metrics'][metric]:.2f} % |"
        for metric, title in _METRIC_NAMES.items()
        if metric in record["metrics"]
    ] or [f"| {record['metric']} | {record['value']:.4f} |"]
    rows += [
        f"| {name.replace('_', ' ')}, of frozen features | {100 * value:.2f} % |"
        for name, value in record["metrics"].items()
        if name.startswith("probe_")
    ]
    return "\n".join(
        [
            "## Result",
            "",
            f"| on {record['n']:,} held-out images | |",
            "|---|---|",
            *rows,
            "",
            f"One run, seed {record['seed']}. Weights: {record['selection']}.",
        ]
    )


def _use(location: str, is_encoder: bool) -> str:
    task, name = ("image-feature-extraction", "extract") if is_encoder else ("image-classification", "classify")
    return f"""## Use

```python
from transformers import pipeline

{name} = pipeline("{task}", model="{location}", trust_remote_code=True)
print({name}("image.png"))
```"""


def _data(record: dict[str, Any]) -> str:
    dataset = record["dataset"]
    count = dataset["num_training_images"]
    lines = [
        f"{_data_name(record)}: {'a stream of' if count is None else f'{count:,}'} images to train on and "
        f"{dataset['num_held_out_images']:,} held out ({dataset['held_out']})."
    ]
    if dataset.get("note"):
        lines.append(dataset["note"])
    if dataset.get("license"):
        lines.append(f"License of the data: {dataset['license']}. The code in this folder is under Apache-2.0.")
    return "## Data\n\n" + " ".join(lines)


def _data_name(record: dict[str, Any]) -> str:
    name, url = record["dataset"]["name"], record["dataset"].get("url")
    return f"[{name}]({url})" if url else name


def _training(config: PreTrainedConfig, record: dict[str, Any]) -> str:
    rows = {
        "parameters": f"{record['model']['num_parameters']:,}",
        "layers, width, heads, MLP width": f"{config.num_hidden_layers}, {config.hidden_size}, "
        f"{config.num_attention_heads}, {config.intermediate_size}",
        "image size, patch size": f"{_by(config.image_size)}, {_by(config.patch_size)}",
        **{key.replace("_", " "): _value(value) for key, value in record["training"].items() if value is not None},
    }
    table = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["## Training", "", "| | |", "|---|---|", *table])


def _environment(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    part = f" (after {record['resumed_from']})" if record.get("resumed_from") else ""
    lines = [
        "## Again",
        "",
        f"```bash\n{record['command']}\n```",
        "",
        f"{record['wall_time_seconds']:,.0f} s{part} on {record['hardware']}; {versions}.",
    ]
    if record.get("git_commit"):
        lines.append(f"Code: commit {record['git_commit']}.")
    return "\n".join(lines)


def _by(size: int | list[int] | tuple[int, int]) -> str:
    height, width = (size, size) if isinstance(size, int) else size
    return f"{height} x {width}"


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)
