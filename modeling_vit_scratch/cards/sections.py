# SPDX-License-Identifier: Apache-2.0
"""What a card says of a model, its data, its training and what that cost. Nothing that no record says."""

from typing import Any

from PIL import Image

from .. import __version__
from ..common.metric_titles import METRIC_TITLES, title_of
from .emissions import same_hardware
from .metadata import base_model, interval_of, license_of, task
from .records import CURVES, SHEET, Facts
from .words import by, count, name, names, paragraphs, picture, rough, score, setting, share, table


# Settings that change nothing at these values, and say nothing.
_NEUTRAL: dict[str, Any] = {
    "label_smoothing": 0, "layer_decay": 1, "head_learning_rate_multiplier": 1, "processes": 1, "broken_images": 0,
    "gradient_accumulation_steps": 1, "gradient_clipping": 0, "weight_decay": 0,
}  # fmt: skip
_HIDDEN = {"recipe", "recipe_source", "recipe_differs", "samples_seen_by_process"}
_PAPER = """@inproceedings{dosovitskiy2021image,
  title = {An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale},
  author = {Dosovitskiy, Alexey and Beyer, Lucas and Kolesnikov, Alexander and Weissenborn, Dirk and Zhai, Xiaohua and
            Unterthiner, Thomas and Dehghani, Mostafa and Minderer, Matthias and Heigold, Georg and Gelly, Sylvain and
            Uszkoreit, Jakob and Houlsby, Neil},
  booktitle = {International Conference on Learning Representations},
  year = {2021},
  url = {https://arxiv.org/abs/2010.11929}
}"""
_OBJECTIVES = {
    "mae": """@inproceedings{he2022masked,
  title = {Masked Autoencoders Are Scalable Vision Learners},
  author = {He, Kaiming and Chen, Xinlei and Xie, Saining and Li, Yanghao and Doll{\\'a}r, Piotr and Girshick, Ross},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2022},
  url = {https://arxiv.org/abs/2111.06377}
}""",
    "simmim": """@inproceedings{xie2022simmim,
  title = {SimMIM: A Simple Framework for Masked Image Modeling},
  author = {Xie, Zhenda and Zhang, Zheng and Cao, Yue and Lin, Yutong and Bao, Jianmin and Yao, Zhuliang and Dai, Qi and
            Hu, Han},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2022},
  url = {https://arxiv.org/abs/2111.09886}
}""",
}


def summary(facts: Facts) -> str:
    """What it is for, where it comes from, and how good it is: the first paragraph."""
    training, labels = facts.training, facts.labels
    if training is None:
        origin = "How it was trained is not on record here."
    else:
        start = training["model"]["started_from"]
        earlier = training.get("earlier", [])
        how = "trained from scratch" if start == "scratch" else f"fine-tuned from {_start(facts)}"
        on_the_same = {run["data"] for run in earlier} == {training["dataset"]["name"]}
        if on_the_same and earlier[0]["started_from"] == "scratch":
            how = f"trained from scratch, in {len(earlier) + 1} runs,"
        origin = f"It was {how} on {_data_name(training['dataset'])}."
    if facts.is_encoder:
        learnt = ""
        if training is not None:
            described = training["pretraining"].get("description", training["pretraining"]["objective"])
            learnt = f", pretrained without labels on {_data_name(training['dataset'])}: {described}"
        use = "It has no classifier: fine-tune it, or use its features."
        return f"The encoder of a Vision Transformer{learnt}. {use}{_probes(training)}"
    if facts.is_multi_label:
        purpose = (
            f"says which of {count(facts.config.num_labels)} labels an image has, any number of them: {names(labels)}"
        )
    else:
        purpose = f"sorts images into {count(facts.config.num_labels)} classes: {names(labels)}"
    return f"A Vision Transformer that {purpose}. {origin} {_headline(facts)}"


def _start(facts: Facts) -> str:
    base = base_model(facts)
    return f"[{name(base)}](https://huggingface.co/{base})" if base else name(facts.training["model"]["started_from"])


def _headline(facts: Facts) -> str:
    evaluation = facts.best_evidence
    if evaluation is not None:
        main, record = evaluation.main, evaluation.record
        unseen = " that it was not trained on" if record["dataset"].get("seen_in_training") is False else ""
        return (
            f"{title_of(main['metric'])} on {count(main['n'])} images of {name(evaluation.title)}{unseen}: "
            f"**{score(main['metric'], main['value'])}**{_between(main, record['confidence_level'])}."
        )
    if facts.training is None:
        return ""
    record = facts.training
    value = score(record["metric"], record["value"])
    return f"{title_of(record['metric'])} on {count(record['n'])} held-out images: **{value}**."


def _between(result: dict[str, Any], level: float) -> str:
    interval = interval_of(result)
    if interval is None:
        return ""
    low, high = (score(result["metric"], bound) for bound in interval)
    return f" ({100 * level:g} % interval: {low} to {high})"


def _probes(training: dict[str, Any] | None) -> str:
    found = {key: value for key, value in (training or {"metrics": {}})["metrics"].items() if key.startswith("probe_")}
    if not found:
        return ""
    told = ", ".join(f"{key.removeprefix('probe_').replace('_', ' ')} {share(value)}" for key, value in found.items())
    return f" Accuracy of classifiers on its frozen features, on held-out images: {told}."


def use(facts: Facts) -> str:
    """Three lines of Python, and what they need and do."""
    kind = task(facts)
    verb, more = ("extract", ", pool=True") if facts.is_encoder else ("classify", "")
    call = 'extract("photo.jpg")' if facts.is_encoder else 'classify("photo.jpg", top_k=3)'
    code = f"""```python
from transformers import pipeline
{verb} = pipeline("{kind}", model="{facts.location}"{more}, trust_remote_code=True)
print({call})
```"""
    told = [
        "`pip install torch transformers pillow` is all it takes. The code of the model is in this repository, Python "
        "files beside the weights, and `trust_remote_code=True` lets it run: read it before, and fix it with "
        "`revision=` and the name of a commit."
    ]
    if facts.is_multi_label:
        told.append("Each score is a probability of its own, so that they don't sum to 1; `top_k=None` gives all.")
    if facts.config.temperature != 1.0:
        told.append(
            f"The logits are divided by a temperature of {facts.config.temperature:.4g} that was fitted after "
            "training, so that scores are probabilities that hold; "
            "`AutoModelForImageClassification.from_pretrained(..., calibrated=False)` is without."
        )
    return paragraphs("## Use", code, " ".join(told))


def architecture(facts: Facts) -> str:
    """A table of what the configuration says."""
    config = facts.config
    rows = {
        "parameters": count(facts.num_parameters),
        "layers": setting(config.num_hidden_layers),
        "width": setting(config.hidden_size),
        "attention heads": setting(config.num_attention_heads),
        "MLP": f"{setting(config.intermediate_size)} wide, {name(config.hidden_act)}",
        "input": f"{by(config.image_hw)} pixels, {_channels(config.num_channels)}",
        "patches": f"{by(config.patch_hw)} pixels, {by(config.grid_hw)} of them",
        "positions": f"{_POSITIONS[config.position_embedding]}{_placement(config.position_embedding_placement)}",
        "image represented by": "the class token" if config.pooling == "cls" else "the mean of the patches",
    }
    extra = {
        "convolutional stem": "a ResNet with units " + (", ".join(map(str, config.stem_layers or [])) or "none"),
        "register tokens": setting(config.num_register_tokens),
        "tanh layer before the classifier": f"{setting(config.representation_size)} wide",
        "dropout": f"{config.hidden_dropout_prob:g}",
        "stochastic depth": f"{config.drop_path_rate:g}",
        "layer scale": f"from {config.layer_scale_init_value}",
        "distillation token": "yes",
    }
    there = (
        config.stem_layers is not None, config.num_register_tokens, config.representation_size,
        config.hidden_dropout_prob, config.drop_path_rate, config.layer_scale_init_value is not None,
        config.use_distillation_token,
    )  # fmt: skip
    rows |= {key: told for (key, told), shown in zip(extra.items(), there) if shown}
    if facts.processor is not None:
        rows["preparation of images"] = _preparation(facts.processor)
    return paragraphs(
        "## Architecture",
        table(("", ""), rows.items(), right=2),
        "The pipeline prepares images by itself, whatever their size and kind.",
    )


_POSITIONS = {
    "learned_1d": "learned, one for each patch", "learned_2d": "learned, of rows and columns",
    "sincos_2d": "sines and cosines of rows and columns", "relative_1d": "relative, learned", "none": "none",
}  # fmt: skip


def _placement(where: str) -> str:
    return {"stem": "", "every_layer": ", in every layer", "every_layer_shared": ", in every layer the same"}[where]


def _channels(number: int) -> str:
    return {1: "grey", 3: "RGB"}.get(number, f"{setting(number)} channels")


def _preparation(processor: Any) -> str:
    steps = []
    if processor.do_resize and processor.size:
        size = {key: value for key, value in dict(processor.size).items() if value}
        if "height" in size:
            told = f"resized to {by((size['height'], size['width']))}"
        else:
            told = "resized to " + ", ".join(f"{key.replace('_', ' ')} {setting(value)}" for key, value in size.items())
        if processor.crop_pct:
            told += f" after a cut to the centre, {processor.crop_pct:g} of the shorter side"
        steps.append(f"{told} ({Image.Resampling(processor.resample).name.lower()})")
    if processor.do_center_crop and processor.crop_size:
        steps.append(f"the centre of {by((processor.crop_size['height'], processor.crop_size['width']))}")
    values = "values from 0 to 1" if processor.do_rescale else "values from 0 to 255"
    if processor.do_normalize:
        mean, deviation = (_once(values) for values in (processor.image_mean, processor.image_std))
        values += f", minus {mean}, divided by {deviation}"
    return "; ".join([*steps, values])


def _once(values: float | list[float]) -> str:
    """Of channels that are all alike, one value."""
    many = list(values) if isinstance(values, (list, tuple)) else [values]
    return setting(many[:1] if len(set(many)) == 1 else many)


def data(facts: Facts) -> str | None:
    """Of the training."""
    if facts.training is None:
        return None
    dataset = facts.training["dataset"]
    number = dataset["num_training_images"]
    amount = "a stream of" if number is None else count(number)
    told = [
        f"{_data_name(dataset)}: {amount} images to train on and {count(dataset['num_held_out_images'])} held out "
        f"({name(dataset['held_out'])})."
    ]
    if dataset.get("note"):
        told.append(dataset["note"])
    if broken := facts.training["training"].get("broken_images"):
        told.append(f"Images that could not be read in training: {count(broken)}; others took their places.")
    return paragraphs("## Training data", " ".join(told))


def _data_name(dataset: dict[str, Any]) -> str:
    url = dataset.get("url")
    return f"[{name(dataset['name'])}]({url})" if url else name(dataset["name"])


def training(facts: Facts) -> str | None:
    """Recipe, settings, curves, and how to do it again."""
    record = facts.training
    if record is None:
        return None
    settings = record["training"]
    rows = [
        (key.replace("_", " "), setting(value))
        for key, value in settings.items()
        if value is not None and key not in _HIDDEN and not (key in _NEUTRAL and value == _NEUTRAL[key])
    ]
    rows = [("seed", setting(record["seed"])), ("starts from", _started(facts)), *rows]
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    part = f" (the part after {name(record['resumed_from'])})" if record.get("resumed_from") else ""
    again = f"```bash\n{record['command']}\n```"
    ran = f"{record['wall_time_seconds']:,.0f} s{part} on {name(record['hardware'])}, with evaluations; {versions}."
    if record.get("git_commit"):
        ran += f" Code: commit {record['git_commit']} of modeling\\_vit\\_scratch."
    return paragraphs(
        "## Training",
        _recipe(settings),
        table(("", ""), rows, right=2),
        f"The weights are those of {_selection(record)}.",
        picture(CURVES, "Learning curves") if facts.has_curves else None,
        "To do it again:",
        again,
        ran,
        *_earlier(record),
    )


def _earlier(record: dict[str, Any]) -> list[str]:
    """The runs before, the last first: what each ended with, its settings where they are others, and its command."""
    parts, last = [], record["training"]
    for run in reversed(record.get("earlier", [])):
        settings = run["training"]
        others = ", ".join(
            f"{key.replace('_', ' ')} {setting(value)}"
            for key, value in settings.items()
            if value is not None and key not in _HIDDEN and value != last.get(key)
        )
        start = "random weights" if run["started_from"] == "scratch" else name(run["started_from"])
        found = f"{METRIC_TITLES[run['metric']]} {score(run['metric'], run['value'])} on {count(run['n'])} images"
        parts.append(
            f"Before that, a run on {name(run['data'])} from {start} ended with {found}; seed {run['seed']}, "
            f"{run['wall_time_seconds']:,.0f} s on {name(run['hardware'])}. Its other settings: {others}."
        )
        parts.append(f"```bash\n{run['command']}\n```")
        last = settings
    return parts


def _selection(record: dict[str, Any]) -> str:
    words = record["selection"].replace("these same images", "the held-out images")
    return name(words.replace("_", " "))


def _started(facts: Facts) -> str:
    return "random weights" if facts.training["model"]["started_from"] == "scratch" else _start(facts)


def _recipe(settings: dict[str, Any]) -> str | None:
    if not settings.get("recipe"):
        return None
    source = f", from {name(settings['recipe_source'])}" if settings.get("recipe_source") else ""
    told = f"Recipe: `{settings['recipe']}`{source}; the values below are what ran."
    if settings.get("recipe_differs"):
        told += f" It differs from the published run: {name(settings['recipe_differs'])}."
    return told


def inside(facts: Facts) -> str | None:
    """The figures of visualize.py, where they are in the folder."""
    if not facts.has_sheet:
        return None
    told = (
        "Filters of the patches, similarity of the position embeddings, how far each head looks, and where the class "
        "token looks in a photo: the paper's Figures 6 and 7, by `python scripts/visualize.py sheet`."
    )
    told = told if facts.sheet_credit is None else f"{told} {facts.sheet_credit}"
    return paragraphs("## What is inside", picture(SHEET, "What is inside"), told)


def cost(facts: Facts) -> str | None:
    """The estimate, with what it assumes."""
    one = facts.cost
    if one is None:
        return None
    record = facts.training
    left_out = ["other runs"]
    earlier, counted = record.get("earlier", []), same_hardware(record)
    if (earlier[0] if earlier else record["model"])["started_from"] != "scratch":
        left_out.append("the training of the weights that it started from")
    if record.get("resumed_from"):
        left_out.append(f"the steps before {name(record['resumed_from'])}")
    if len(counted) < len(earlier):
        left_out.append("earlier runs on other hardware")
    seconds = f"{one.seconds:,.0f} s (measured{', all runs' if counted else ''})"
    return paragraphs(
        "## Environmental cost",
        f"About **{rough(one.grams)} g of CO2 equivalent** for {rough(one.watt_hours)} Wh of electricity: an estimate, "
        f"not a measurement. It is {seconds} x {rough(one.watts)} W ({one.power}) x {rough(one.grams_per_kwh)} g per "
        f"kWh ({one.grid}). Left out: {', '.join(left_out)}, cooling, and the making of the machine.",
    )


def terms(facts: Facts) -> str:
    """Who may do what, and whom to cite."""
    told, license = [], license_of(facts)
    dataset = (facts.training or {"dataset": {}})["dataset"]
    if license:
        of_data = " (that of the data it was trained on)" if facts.wishes.license is None else ""
        told.append(f"The model: {license}{of_data}.")
    else:
        told.append("The model: no licence is given, so that its makers have to be asked.")
    if dataset.get("license"):
        told.append(f"The data, {_data_name(dataset)}: {name(str(dataset['license']))}.")
    told.append("The code in this repository: Apache-2.0.")
    objective = (facts.training or {}).get("pretraining", {}).get("objective")
    version = (facts.training or facts.evaluations[0].record)["versions"].get("modeling_vit_scratch", __version__)
    package = f"""@software{{modeling_vit_scratch,
  title = {{modeling\\_vit\\_scratch: the Vision Transformer, written from scratch for Hugging Face transformers}},
  version = {{{version}}},
  license = {{Apache-2.0}}
}}"""
    entries = "\n".join(filter(None, (_PAPER, _OBJECTIVES.get(objective), package)))
    return paragraphs("## Terms and citation", " ".join(told), f"```bibtex\n{entries}\n```")
