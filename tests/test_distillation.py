# SPDX-License-Identifier: Apache-2.0
"""A teacher's part of the loss: arithmetic, what it changes, what it must not, and teachers that don't fit."""

import json

import numpy as np
import pytest
import torch
from forked import run_forked
from safetensors.torch import load_file
from tiny_images import CLASSES, build, build_pretrainer, class_folders, difference, flags, weights
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification, ViTScratchModel
from modeling_vit_scratch.cards.records import model_metadata, training_metadata
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.common.pretrained import default_processor
from modeling_vit_scratch.distillation.teacher import Distillation, Teacher
from modeling_vit_scratch.training.arguments import ModelArguments
from modeling_vit_scratch.training.optimization import ClassificationLoss


STEPS = ("--max_steps", "4", "--learning_rate", "0.01", "--dataloader_num_workers", "0")
SAVED = ("--save_strategy", "steps", "--save_steps", "2")
MEAN = ("--config_overrides", "pooling=mean")
OTHERS = ("zebra", "dog", "brown bear", "cat")  # in another order, and one more


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return str(class_folders(tmp_path_factory.mktemp("pets"), each=8))


def labelled(names):
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """transformers' ViT with another size, normalisation and order of classes."""
    folder = tmp_path_factory.mktemp("stock") / "their ViT"
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(1)
    model = ViTForImageClassification(ViTConfig(image_size=24, patch_size=8, **sizes, **labelled(OTHERS)))
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(folder)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=mean, image_std=std).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    config = ViTScratchConfig.from_variant("test/4", zero_init_head=False, **labelled(CLASSES))
    torch.manual_seed(2)
    ViTScratchForImageClassification(config).save_pretrained(folder)
    default_processor(config).save_pretrained(folder)
    return folder


def distil(folder, pets, teacher, kind, *more):
    return build(folder, *flags(pets, *STEPS, "--teacher_model", str(teacher), "--distillation_type", kind, *more))


def softmax(logits):
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


@pytest.mark.parametrize("kind", ["soft", "hard", "token", "features"])
@pytest.mark.parametrize("is_mixed", [False, True])
def test_the_loss_is_the_formula_whatever_the_batches_of_a_step(ours, kind, is_mixed):
    generator, tau, alpha = np.random.default_rng(0), 2.5, 0.3
    teacher_logits, logits = generator.normal(size=(2, 6, 3)) * 3
    labels = generator.integers(3, size=6)
    targets = softmax(generator.normal(size=(6, 3))) if is_mixed else np.eye(3)[labels]
    if kind == "soft":
        p, q = softmax(teacher_logits / tau), softmax(logits / tau)
        of_teacher = tau**2 * (p * np.log(p / q)).sum(1)
    elif kind == "features":
        mean, std = teacher_logits.mean(1, keepdims=True), teacher_logits.std(1, keepdims=True)
        distances = np.abs(logits - (teacher_logits - mean) / std)
        of_teacher = np.where(distances < 2, distances**2 / 4, distances - 1).mean(1)
    else:
        of_teacher = -np.log(softmax(logits))[np.arange(6), teacher_logits.argmax(1)]
    expected = np.mean((1 - alpha) * -(targets * np.log(softmax(logits))).sum(1) + alpha * of_teacher)

    config = ViTScratchConfig.from_variant("test/4", **labelled(CLASSES))
    teacher = Teacher(str(ours), default_processor(config), config, list(CLASSES))
    config.use_distillation_token = config.use_distillation_head = kind == "token"
    model = ViTScratchForImageClassification(config)
    loss = Distillation(model, teacher, kind, alpha, tau, ClassificationLoss("softmax", 3))
    given = torch.tensor(targets).float() if is_mixed else torch.tensor(labels)
    found = []
    for part in (slice(0, 2), slice(2, 6)):
        loss._targets = torch.tensor(teacher_logits[part])
        student = torch.tensor(logits[part])
        loss._kept = {"student": student, "labels": student}  # of the two heads, or projected features
        outputs = {"logits": student if kind != "token" else 0 * student}
        found.append(loss(outputs, given[part], torch.tensor(given.numel())))
    assert sum(found).item() == pytest.approx(expected, rel=1e-5)
    # The next batch was shown to no teacher: an evaluation.
    plain = ClassificationLoss("softmax", 3)({"logits": torch.tensor(logits)}, given)
    assert loss({"logits": torch.tensor(logits)}, given) == plain


def test_a_teacher_sees_its_own_size_and_normalisation_and_its_classes_are_matched_by_name(stock):
    config = ViTScratchConfig.from_variant("test/4", image_size=24, **labelled(CLASSES))
    pixels = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    their_model = ViTForImageClassification.from_pretrained(stock).eval()
    with torch.no_grad():
        logits = their_model(pixel_values=(pixels - mean) / std).logits
    expected = logits[:, [OTHERS.index(name) for name in CLASSES]]
    teacher = Teacher(str(stock), default_processor(config), config, list(CLASSES))
    assert torch.allclose(teacher((pixels - 0.5) / 0.5), expected, atol=1e-5)
    assert teacher.name == "their ViT"
    # Of another size: of pixels that do not change, nothing changes.
    assert torch.allclose(teacher(torch.full((1, 3, 8, 16), 0.2)), teacher(torch.full((1, 3, 24, 24), 0.2)), atol=1e-5)
    with torch.no_grad():
        states = their_model.vit(pixel_values=(pixels - mean) / std).last_hidden_state
    features = Teacher(str(stock), default_processor(config), config, None)
    assert torch.allclose(features((pixels - 0.5) / 0.5), states[:, 0], atol=1e-5)


def test_a_convolutional_teacher_of_grey_images(tmp_path):
    config = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, **labelled(CLASSES))
    model = ConvNextForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    ConvNextImageProcessor(size={"shortest_edge": 32}).save_pretrained(tmp_path)
    grey = ViTScratchConfig.from_variant("test/4", num_channels=1, **labelled(CLASSES))
    pixels = torch.rand(2, 1, 32, 32)
    processor = ConvNextImageProcessor.from_pretrained(tmp_path)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    seen = ((pixels + 1) / 2 - mean) / std
    with torch.no_grad():
        expected, states = model(pixel_values=seen).logits, model.convnext(pixel_values=seen).last_hidden_state
    found = Teacher(str(tmp_path), default_processor(grey), grey, list(CLASSES))(pixels)
    assert torch.allclose(found, expected, atol=1e-5)
    features = Teacher(str(tmp_path), default_processor(grey), grey, None)
    assert features.width == 12
    assert torch.allclose(features(pixels), states.mean((2, 3)), atol=1e-5)


def test_a_teacher_that_is_the_student_has_nothing_to_say(pets, tmp_path, ours):
    start = ("--model_name_or_path", str(ours), "--distillation_alpha", "1", "--distillation_tau", "2")
    trainer = distil(tmp_path / "out", pets, ours, "soft", *start, "--mixup", "0.5", "--max_steps", "1")
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"]) < 1e-7
    assert trainer.state.log_history[0]["grad_norm"] < 1e-5


@pytest.mark.parametrize("more", [(), ("--mixup", "0.5", "--label_smoothing_factor", "0.1")])
def test_without_weight_it_is_the_plain_run(pets, tmp_path, stock, more):
    plain = build(tmp_path / "plain", *flags(pets, *STEPS, *more))
    plain.train()
    for kind in ("soft", "token", "features"):
        trainer = distil(tmp_path / kind, pets, stock, kind, *more, "--distillation_alpha", "0")
        trainer.train()
        assert difference(weights(trainer), weights(plain)) == 0.0
    taught = distil(tmp_path / "taught", pets, stock, "hard", *more)
    taught.train()
    assert difference(weights(taught), weights(plain)) > 1e-4
    assert taught.evaluate()["eval_loss"] != plain.evaluate()["eval_loss"]


@pytest.mark.parametrize("kind", ["soft", "token", "features"])
def test_a_run_resumes_exactly_and_its_folder_needs_no_teacher(pets, tmp_path, stock, kind):
    options = (kind, *SAVED, "--cutmix", "1", "--class_weights", "balanced", "--gradient_accumulation_steps", "2")
    straight = distil(tmp_path / "straight", pets, stock, *options)
    line = next(line for line in straight.describe() if line.startswith("Teacher: their ViT, vit, "))
    assert ("left out of its probabilities: 1 class" in line.lower()) == (kind != "features")
    straight.train()
    resumed = distil(tmp_path / "resumed", pets, stock, *options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert difference(weights(resumed), weights(straight)) == 0.0
    manifest = json.loads((tmp_path / "straight" / "checkpoint-4" / "run.json").read_text())
    metadata = {name: training_metadata(resumed)[name] for name in ("teacher", "teacher_weights", "distillation")}
    assert manifest["settings"]["teacher"] == metadata
    assert (metadata["teacher"], len(metadata["teacher_weights"])) == ("their ViT", 16)
    assert "--teacher_model" not in manifest["settings"]  # a path, which may change

    straight.save_model()
    stored = load_file(tmp_path / "straight" / "model.safetensors")
    model = ViTScratchForImageClassification.from_pretrained(tmp_path / "straight").eval()
    assert stored.keys() == model.state_dict().keys()
    assert not any("teacher" in name for name in stored)
    assert model_metadata(straight.model, ModelArguments())["num_parameters"] == model.num_parameters()
    pixels = torch.rand(2, 3, *model.config.image_hw)
    with torch.no_grad():
        assert torch.allclose(model(pixels).logits, straight.model.eval()(pixels).logits, atol=1e-5)
    learned = ["classifier.weight", "vit.layers.0.mlp.fc1.weight"]
    learned += ["distillation_classifier.weight", "vit.embeddings.distillation_token"] if kind == "token" else []
    fresh = weights(distil(tmp_path / "fresh", pets, stock, kind))
    assert not any(torch.equal(stored[name], fresh[name]) for name in learned)


def test_the_distillation_token_starts_as_the_class_token_and_learns_the_teachers_classes_alone(pets, tmp_path, ours):
    start = ("--model_name_or_path", str(ours), "--distillation_alpha", "1")
    trainer = distil(tmp_path / "out", pets, ours, "token", *start)
    embeddings, before = trainer.model.vit.embeddings, weights(trainer)
    assert torch.equal(embeddings.distillation_token, embeddings.cls_token)
    assert torch.equal(before["distillation_classifier.weight"], before["classifier.weight"])
    trainer.train()
    after = weights(trainer)
    assert torch.equal(after["classifier.bias"], before["classifier.bias"])
    assert not torch.equal(after["distillation_classifier.bias"], before["distillation_classifier.bias"])


def test_adapters_learn_features(pets, tmp_path, stock):
    trainer = distil(tmp_path / "out", pets, stock, "features", "--lora_rank", "2")
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    assert not torch.equal(before["teacher_projection.weight"], after["teacher_projection.weight"])
    trainer.save_model()
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert not any(".lora_" in name or "teacher" in name for name in names)


def test_two_processes_are_one(pets, tmp_path, stock):
    kinds = ("token", "features")

    def train(rank, folder, batch):
        torch.set_num_threads(1)
        for kind in kinds:
            options = (kind, "--per_device_train_batch_size", str(batch), "--optim", "sgd", "--learning_rate", "0.05")
            trainer = distil(folder / kind, pets, stock, *options)
            trainer.train()
            if rank == 0:
                torch.save(weights(trainer), folder / f"{kind}.pt")

    run_forked(train, 2, tmp_path / "two", 2)
    run_forked(train, 1, tmp_path / "one", 4)
    for kind in kinds:
        found = [torch.load(tmp_path / number / f"{kind}.pt") for number in ("one", "two")]
        assert difference(*found) < 1e-5


def test_pretraining_on_a_teachers_features(pets, tmp_path, stock):
    options = ("--train_dir", pets, "--train_val_split", "0.25", *STEPS, "--eval_strategy", "no", "--max_steps", "8")
    options += ("--objective", "distillation", "--teacher_model", str(stock), "--smallest_area", "1")
    trainer = build_pretrainer(tmp_path / "out", *options)
    assert any("Objective: the teacher's features" in line for line in trainer.describe())
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * before
    trainer.save_model()
    encoder = ViTScratchModel.from_pretrained(tmp_path / "out").eval()
    pixels = torch.rand(2, 3, *encoder.config.image_hw)
    with torch.no_grad():
        expected = trainer.model.eval()(pixels).logits  # without labels, the features
        assert torch.allclose(encoder(pixels).last_hidden_state[:, 0], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--distillation_type", "hard"), "--distillation_type: there is no teacher"),
        (("--teacher_model", "S", "--loss", "sigmoid"), "type soft compares .* --loss softmax, not sigmoid"),
        (("--teacher_model", "S", "--distillation_type", "hard", "--distillation_tau", "2"), "tau is for .* soft"),
        (("--teacher_model", "S", "--distillation_type", "token", "--freeze", "1"), "trains what --freeze 1 keeps"),
        (("--teacher_model", "S", "--distillation_alpha", "2"), "--distillation_alpha 2"),
        (("--teacher_model", "outputs/none/at all"), "--teacher_model .* there is no such file or folder"),
        (("--teacher_model", "S", "--distillation_type", "token", *MEAN), "token: .* needs the class token"),
    ],
)  # fmt: skip
def test_mistakes_are_named(pets, tmp_path, stock, more, message):
    more = [str(stock) if word == "S" else word for word in more]
    with pytest.raises(InputError, match=message):
        build(tmp_path / "out", *flags(pets, *STEPS, *more))


def test_teachers_that_do_not_fit_are_refused(pets, tmp_path, stock, ours):
    config = ViTScratchConfig.from_variant("test/4", **labelled(["cat", "owl"]))
    with pytest.raises(InputError, match=r"for 1 of 2: owl\. It has zebra, dog"):
        Teacher(str(stock), default_processor(config), config, ["cat", "owl"])
    several = ViTScratchConfig(**labelled(CLASSES), problem_type="multi_label_classification")
    with pytest.raises(InputError, match="several labels"):
        Teacher(str(stock), default_processor(config), several, list(CLASSES))
    five = ViTScratchConfig.from_variant("test/4", num_channels=5)
    with pytest.raises(InputError, match="takes 3 channels, the images have 5"):
        Teacher(str(stock), default_processor(five), five, None)
    ViTForImageClassification.from_pretrained(stock).vit.save_pretrained(tmp_path)  # no classifier
    ViTImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"lacks weights, e\.g\. classifier\.bias"):
        Teacher(str(tmp_path), default_processor(config), config, list(CLASSES))
