# SPDX-License-Identifier: Apache-2.0
"""Recipes as runs: from the command line to the Trainer, updates under accumulation, resuming with everything on."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_images import build, difference, flags, weights
from torch.utils.data import Dataset
from transformers import TrainerCallback

from modeling_vit_scratch import ViTScratchForImageClassification
from modeling_vit_scratch.augmentation.photo import PhotoAugmentation
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.data.collation import MixingCollator
from modeling_vit_scratch.pretraining.arguments import PRETRAIN
from modeling_vit_scratch.recipes.table import RECIPES
from modeling_vit_scratch.training.arguments import ModelArguments
from modeling_vit_scratch.training.command_line import FINETUNE, parse_arguments, recipe_defaults
from modeling_vit_scratch.training.optimization import WeightAverage


EVERYTHING = [
    "--auto_augment", "rand-m9-mstd0.5-inc1", "--color_jitter", "0.3", "--random_erasing", "0.5", "--mixup", "0.8",
    "--cutmix", "1.0", "--label_smoothing_factor", "0.1", "--ema_decay", "0.9", "--layer_decay", "0.75",
    "--head_learning_rate_multiplier", "3", "--config_overrides",
    "hidden_dropout_prob=0.1,attention_probs_dropout_prob=0.1,drop_path_rate=0.2",
]  # fmt: skip


def refusal(*argv):
    with pytest.raises(InputError) as caught:
        raise parse_arguments([*map(str, argv)])[3].as_error()
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_sets_what_it_says_and_flags_replace_it(name, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    recipe = RECIPES[name]
    start = [] if "variant" in recipe.fields else ["--model_name_or_path", "some/model"]
    argv = ["--recipe", name, "--train_dir", "photos", *start]
    script = PRETRAIN if recipe.script == "pretrain" else FINETUNE
    *parsed, problems = parse_arguments(argv, script)
    training = parsed[2]
    assert not problems.messages
    values = {name: value for part in (*parsed, training.recipe_arguments) for name, value in vars(part).items()}
    for field, value in recipe.fields.items():
        assert values[field] == value, field
    total = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert total == recipe.batch_size
    assert "as in the recipe" in training.recipe_arguments.message
    more = ["--learning_rate", "0.5", "--mixup", "0.3", "--weight_decay", "0.7", "--image_size", "64"]
    model, _, training, *_ = parse_arguments([*argv, *more], script)
    assert (training.learning_rate, training.recipe_arguments.mixup, training.weight_decay) == (0.5, 0.3, 0.7)
    assert model.image_size == [64]


def test_another_batch_scales_what_was_not_given():
    recipe = ["--recipe", "paper_finetune_cifar10", "--model_name_or_path", "x", "--train_dir", "photos"]
    half = ["--per_device_train_batch_size", "64", "--gradient_accumulation_steps", "4"]
    training = parse_arguments([*recipe, *half])[2]
    assert (training.learning_rate, training.max_steps, training.warmup_steps) == (0.015, 20_000, 1000)
    assert "learning_rate 0.015" in training.recipe_arguments.message
    training = parse_arguments([*recipe, *half, "--learning_rate", "0.02"])[2]
    assert (training.learning_rate, training.max_steps) == (0.02, 20_000)
    training = parse_arguments([*recipe, "--per-device-train-batch-size", "128"])[2]
    assert (training.gradient_accumulation_steps, training.learning_rate) == (4, 0.03)


def test_several_processes_share_the_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    recipe, settings, told = recipe_defaults(["--recipe", "bv_s16_90ep"], per_device=64, is_saved_architecture=False)
    assert recipe is RECIPES["bv_s16_90ep"]
    assert settings["gradient_accumulation_steps"] == 4
    assert "64 images x 4 processes x 4 accumulated" in told


def test_a_saved_model_keeps_its_architecture():
    model, _, training, _ = parse_arguments(["--recipe", "augreg_light2", "--model_name_or_path", "x"])
    assert (model.variant, model.config_overrides, model.image_size) == (None, None, [224])
    assert training.recipe_arguments.auto_augment == "randaug(2,10)"
    # and a recipe for another network leaves the sizes of a built-in data set behind
    model = parse_arguments(["--recipe", "augreg_light2"])[0]
    assert (model.variant, model.image_size, model.patch_size) == ("B/16", [224], None)


def test_help_shows_the_numbers_of_a_recipe(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--recipe", "bv_s16_90ep", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in ("augmentation:", "(default: randaug(2,10))", "(default: 0.2)", "--recipe list", "ta_wide"):
        assert part in text


@pytest.mark.parametrize("script", [FINETUNE, PRETRAIN])
def test_the_list_of_recipes_is_a_table_of_all(script, capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--recipe", "list"], script)
    assert caught.value.code == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "what", "model", "data", "length", "batch", "rate", "source"]
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert re.split("  +", lines[list(RECIPES).index("mae_finetune_b16")]) == [
        "mae_finetune_b16", "fine-tuning", "B/16", "ImageNet", "100 epochs", "1024", "0.002",
        "He et al., arXiv:2111.06377",
    ]  # fmt: skip
    assert re.split("  +", lines[list(RECIPES).index("paper_jft300m_h14")])[2:7] == [
        "H/14", "JFT-300M", "14 epochs", "4096", "0.0003",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("--recipe", "bv_s16"), "Did you mean bv_s16_90ep"),
        (("--auto_augment", "autoaugment"), "Choose ra, ta_wide"),
        (("--color_jitter", 2), "--color_jitter 2 must be at least 0 and at most 1"),
        (("--random_erasing", 1.5), "--random_erasing 1.5 must be at least 0 and at most 1"),
        (("--mixup", -1), "--mixup -1 must be at least 0"),
        (("--cutmix", -1), "--cutmix -1 must be at least 0"),
        (("--layer_decay", 0), "--layer_decay 0 must be above 0"),
        (("--head_learning_rate_multiplier", 0), "must be above 0"),
        (("--ema_decay", 1), "--ema_decay 1 must be above 0 and below 1"),
        (("--config_overrides", "pooling"), "NAME=VALUE"),
        (("--config_overrides", "poling=mean"), "NAME=VALUE"),
        (("--config_overrides", "image_size=32"), "are flags"),
        (("--config_overrides", "pooling=max"), "pooling='max' is unknown"),
    ],
)
def test_refused(argv, part):
    assert part in refusal(*argv)


def test_a_recipe_with_a_field_that_does_not_exist_is_refused(monkeypatch):
    import dataclasses

    bad = dataclasses.replace(RECIPES["bv_s16_90ep"], fields={**RECIPES["bv_s16_90ep"].fields, "lr": 1})
    monkeypatch.setitem(RECIPES, "bv_s16_90ep", bad)
    assert "there are no fields lr here" in refusal("--recipe", "bv_s16_90ep")


def test_overrides_of_the_configuration_have_types_and_reach_the_model(pets, tmp_path):
    text = "drop_path_rate=0.2, pooling=mean,use_cls_token=True,num_register_tokens=2"
    expected = {"drop_path_rate": 0.2, "pooling": "mean", "use_cls_token": True, "num_register_tokens": 2}
    assert ModelArguments(config_overrides=text).config_fields() == expected
    fields = ModelArguments(config_overrides="stem_layers=[2, 2],qkv_bias=False").config_fields()
    assert fields == {"stem_layers": [2, 2], "qkv_bias": False}
    trainer = build(tmp_path / "out", *flags(pets, "--config_overrides", text))
    assert {name: getattr(trainer.model.config, name) for name in expected} == expected
    trainer.save_model()
    again = build(
        tmp_path / "again",
        *flags(pets, "--model_name_or_path", str(tmp_path / "out"), "--config_overrides", "drop_path_rate=0.1"),
    )
    assert (again.model.config.drop_path_rate, again.model.config.pooling) == (0.1, "mean")


# ---------------------------------------------------------------------------------------------------------------------
# What is built


def test_without_flags_nothing_is_mixed_averaged_or_added(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets))
    assert isinstance(trainer.train_dataset.augmentation, PhotoAugmentation)
    assert trainer.train_dataset.augmentation.smallest_area == 0.35
    assert not isinstance(trainer.data_collator, MixingCollator)
    assert trainer.average is None
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"pixel_values", "labels", "keys"}
    assert batch["pixel_values"].dtype == torch.uint8


def test_every_flag_does_something(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets, *EVERYTHING, "--smallest_area", "0.08", "--no_ema_warmup"))
    steps = trainer.train_dataset.augmentation.steps
    kinds = ["PhotoAugmentation", "RandAugment", "ColorJitter", "RandomErasing"]
    assert [type(step).__name__ for step in steps] == kinds
    assert (steps[0].smallest_area, steps[2].strength, steps[3].probability) == (0.08, 0.3, 0.5)
    assert trainer.train_dataset[5]["key"] == (42, 0, 5)
    trainer.train_dataset.set_epoch(3)
    assert trainer.train_dataset[5]["key"] == (42, 3, 5)
    collator = trainer.data_collator
    assert (collator.mixup_alpha, collator.cutmix_alpha, collator.label_smoothing) == (0.8, 1.0, 0.1)
    assert trainer.label_smoother is None
    assert (trainer.average.decay, trainer.average.warmup) == (0.9, False)
    rates = {group["layer"]: group["lr"] for group in trainer.create_optimizer().param_groups}
    assert rates == pytest.approx(
        {"after the layers": 1e-3, "layer 2": 0.75e-3, "layer 1": 0.75**2 * 1e-3, "embeddings": 0.75**3 * 1e-3}
        | {"head": 3e-3}
    )
    told = "\n".join(trainer.describe())
    for part in ("RandAugment as in timm", "erased with probability 0.5", "Mixup 0.8 or CutMix 1", "layer 2"):
        assert part in told
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"].shape == (4, 3)
    assert batch["labels"].sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    assert next(iter(trainer.get_eval_dataloader()))["labels"].dtype == torch.int64


def test_optimizers_with_groups_of_their_own_have_no_layer_decay(pets, tmp_path):
    trainer = build(
        tmp_path / "out", *flags(pets, "--layer_decay", "0.5", "--optim", "sgd", "--optim_args", "momentum=0.9")
    )
    assert trainer.create_optimizer().defaults["momentum"] == 0.9
    trainer = build(tmp_path / "out", *flags(pets, "--layer_decay", "0.5"))
    trainer.get_optimizer_cls_and_kwargs.__func__.__globals__["is_optimizer_factory"] = lambda kind: True
    try:
        with pytest.raises(InputError, match="its own groups of parameters"):
            trainer.create_optimizer()
    finally:
        from transformers.trainer_optimizer import is_optimizer_factory

        trainer.get_optimizer_cls_and_kwargs.__func__.__globals__["is_optimizer_factory"] = is_optimizer_factory


# ---------------------------------------------------------------------------------------------------------------------
# Updates


class Labelled(Dataset):
    """Seven images with labels of a kind: the last batch of an epoch is smaller than the others."""

    def __init__(self, kind):
        generator = torch.Generator().manual_seed(2)
        self.pixel_values = torch.randn(7, 3, 16, 24, generator=generator)
        hard = torch.randint(3, (7,), generator=generator)
        soft = torch.rand(7, 3, generator=generator).softmax(1)
        several = torch.randint(2, (7, 3), generator=generator).float()
        self.labels = {"hard": hard, "smoothed": hard, "soft": soft, "multi": several}[kind]

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


@pytest.mark.parametrize("kind", ["hard", "smoothed", "soft", "multi"])
def test_the_update_is_that_of_the_whole_batch_however_it_is_cut(pets, tmp_path, kind):
    changes = {}
    for batch, accumulation in ((7, 1), (4, 2), (2, 4), (1, 7)):  # 7; 4 + 3; 2 + 2 + 2 + 1; 1 + ... + 1
        more = ["--optim", "sgd", "--learning_rate", "0.1", "--lr_scheduler_type", "constant", "--warmup_steps", "0"]
        more += ["--max_steps", "2", "--max_grad_norm", "0", "--per_device_train_batch_size", str(batch)]
        more += ["--gradient_accumulation_steps", str(accumulation)]
        more += ["--label_smoothing_factor", "0.1"] if kind == "smoothed" else []
        trainer = build(tmp_path / f"{batch}", *flags(pets, *more))
        trainer.train_dataset = Labelled(kind)
        trainer.try_evaluation = lambda: None  # the held-out images have labels of one kind
        if kind == "multi":
            trainer.model.config.problem_type = "multi_label_classification"
        before = weights(trainer)
        trainer.train()
        after = weights(trainer)
        changes[batch] = torch.cat([(after[key] - before[key]).flatten() for key in after])
    for batch in (4, 2, 1):
        assert changes[batch].norm() / changes[7].norm() == pytest.approx(1.0, abs=5e-5)
        assert torch.allclose(changes[batch], changes[7], atol=1e-6)
    assert changes[7].norm() > 0.003


def test_the_loss_of_mixed_labels_is_their_cross_entropy(pets, tmp_path):
    trainer = build(tmp_path / "out", *flags(pets, "--mixup", "0.8", "--label_smoothing_factor", "0.1"))
    batch = trainer.prepare_batch(next(iter(trainer.get_train_dataloader())))
    trainer.model.eval()
    loss, outputs = trainer.compute_loss(trainer.model, dict(batch), return_outputs=True)
    logits, labels = outputs.logits.detach().double().numpy(), batch["labels"].double().numpy()
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert loss.item() == pytest.approx(-(labels * log_probabilities).sum(1).mean(), abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming, and the average in a run


def test_resuming_with_everything_on_is_exact_for_any_number_of_workers(pets, tmp_path):
    more = [*EVERYTHING, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "9"]
    more += ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "3"]  # 3 steps in an epoch of 18
    more += ["--save_steps", "2"]
    ends, averages = {}, {}
    for workers in ("0", "2"):
        straight = build(tmp_path / workers, *flags(pets, *more, "--dataloader_num_workers", workers))
        straight.train()
        ends[workers] = weights(straight)
        averages[workers] = load_file(tmp_path / workers / "checkpoint-6" / WeightAverage.FILE)
    for start, workers in (("checkpoint-2", "2"), ("checkpoint-4", "0")):
        resumed = build(tmp_path / f"from {start}", *flags(pets, *more, "--dataloader_num_workers", workers))
        resumed.train(resume_from_checkpoint=str(tmp_path / "0" / start))
        ends[start] = weights(resumed)
        averages[start] = load_file(tmp_path / f"from {start}" / "checkpoint-6" / WeightAverage.FILE)
    for name in ("2", "checkpoint-2", "checkpoint-4"):
        assert difference(ends[name], ends["0"]) == 0.0, name
        assert difference(averages[name], averages["0"]) == 0.0, name
    raw = load_file(tmp_path / "0" / "checkpoint-6" / "model.safetensors")
    assert difference({name: ends["0"][name] for name in raw}, raw) > 1e-4  # the model became the average


def test_the_average_of_a_run_is_the_sum_of_its_weights(pets, tmp_path):
    trainer, history = (
        build(tmp_path / "out", *flags(pets, "--max_steps", "7", "--ema_decay", "0.8", "--no_ema_warmup")),
        [],
    )
    start = {name: weight.detach().double().clone() for name, weight in trainer.model.named_parameters()}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            history.append({name: weight.detach().double().clone() for name, weight in model.named_parameters()})

    trainer.add_callback(Watch())
    trainer.train()
    for name, weight in trainer.model.named_parameters():
        expected = 0.8**7 * start[name] + sum(0.2 * 0.8 ** (6 - k) * step[name] for k, step in enumerate(history))
        assert torch.allclose(weight.double(), expected, atol=1e-7), name


def test_the_average_is_what_is_evaluated_chosen_and_saved(pets, tmp_path):
    more = ["--train_dir", pets, "--train_val_split", "0.25", "--num_train_epochs", "3", "--ema_decay", "0.9"]
    more += ["--metric_for_best_model", "loss", "--greater_is_better", "True", "--learning_rate", "3e-3"]
    trainer = build(tmp_path / "out", *more)  # the loss falls, and the largest is called the best: an early checkpoint
    trainer.train()
    logged = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer.state.best_metric == max(logged)
    scores = trainer.evaluate()
    assert scores["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)
    trainer.save_model()
    assert not (tmp_path / "out" / WeightAverage.FILE).exists()
    best = load_file(f"{trainer.state.best_model_checkpoint}/{WeightAverage.FILE}")
    saved = ViTScratchForImageClassification.from_pretrained(tmp_path / "out")
    for name, weight in saved.named_parameters():
        assert torch.equal(weight, best[name]), name


def test_a_run_with_an_average_does_not_go_on_from_one_without(pets, tmp_path):
    build(tmp_path / "a", *flags(pets, "--max_steps", "1", "--save_strategy", "steps")).train()
    with pytest.raises(InputError, match="no average of the weights"):
        build(tmp_path / "b", *flags(pets, "--ema_decay", "0.9")).train(
            resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1")
        )


def test_the_record_tells_what_was_done(pets, tmp_path):
    from modeling_vit_scratch.cards.records import training_metadata

    trainer = build(tmp_path / "out", *flags(pets, *EVERYTHING, "--max_steps", "1"))
    trainer.train()
    facts = json.loads(json.dumps(training_metadata(trainer)))
    assert facts["mixing"] == "Mixup 0.8 or CutMix 1"
    assert (facts["layer_decay"], facts["head_learning_rate_multiplier"], facts["weight_average"]) == (0.75, 3, 0.9)
    assert "RandAugment" in facts["augmentation"]
    assert facts["recipe"] is None
