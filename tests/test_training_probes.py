# SPDX-License-Identifier: Apache-2.0
"""Probes of features, against big_vision's own lines, direct solves, scikit-learn; and that they disturb nothing."""

import json

import numpy as np
import pytest
import torch
from forked import run_forked
from sklearn.neighbors import KNeighborsClassifier
from tiny_images import build, difference, flags, load_script, weights

from modeling_vit_scratch import (
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchModel,
)
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.evaluation.during_training import (
    Features,
    balanced_subset,
    choose_shots,
    extract_features,
    few_shot_accuracies,
    image_features,
    knn_accuracy,
    least_squares,
    linear_probe,
)


def clusters(count: int, classes: int = 3, width: int = 8, spread: float = 1.0, seed: int = 0) -> Features:
    """Features around one point for each class."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centers = np.random.default_rng(99).normal(size=(classes, width))
    values = centers[labels] + spread * generator.normal(size=(count, width))
    return Features(values.astype(np.float32), labels)


# ---------------------------------------------------------------------------------------------------------------------
# Few-shot least squares

# What `_precompute_cache` and `_eig_fewshot_acc_fn` of big_vision at 0127fb6 (evaluators/fewshot_lsr.py) compute with
# numpy in place of jax.numpy, on the numbers of `golden_inputs`: (images, width, l2) -> scores of four test rows.
BIG_VISION = {
    (30, 6, 1024.0): [
        [-0.200055165, -0.330846044, -0.465697069], [-0.19885411, -0.327246946, -0.470497222],
        [-0.197939661, -0.327180043, -0.471478575], [-0.197979927, -0.330694215, -0.467924136],
    ],
    (30, 6, 1.0): [
        [-0.207359734, -0.299367532, -0.4932694], [-0.183575956, -0.196926505, -0.619494205],
        [-0.170873624, -0.191544974, -0.637578069], [-0.178533242, -0.287154762, -0.534308663],
    ],
    (9, 12, 1024.0): [
        [-0.110388306, -0.32903917, -0.549322744], [-0.109422378, -0.331398775, -0.547929066],
        [-0.107948734, -0.331065247, -0.549736239], [-0.109487408, -0.32883527, -0.550427542],
    ],
    (9, 12, 1.0): [
        [-0.110564644, -0.370054048, -0.519370197], [-0.054102262, -0.568388298, -0.37749833],
        [-0.133667154, -0.104579728, -0.761742008], [-0.15920586, -0.08650923, -0.754273799],
    ],
}  # fmt: skip


def golden_inputs(count: int, width: int) -> tuple[Features, np.ndarray]:
    places, scale = np.arange(count * width, dtype=np.float64).reshape(count, width), 1 + np.arange(width)
    values = np.sin(places * 1.7) * scale + np.cos(np.arange(count))[:, None]
    test = np.cos(np.arange(4 * width) * 0.9).reshape(4, width) * scale
    return Features(values, (np.arange(count) * 7 % 11) % 3), test


@pytest.mark.parametrize(("count", "width", "l2"), BIG_VISION)
def test_least_squares_are_those_of_big_vision(count, width, l2):
    features, test = golden_inputs(count, width)
    scores = least_squares(features, test, num_classes=3, l2=l2)
    np.testing.assert_allclose(scores, BIG_VISION[count, width, l2], atol=2e-9)


@pytest.mark.parametrize(("count", "width"), [(40, 7), (8, 7), (7, 7), (6, 30)])
@pytest.mark.parametrize("l2", [2.0**10, 0.5])
def test_both_forms_of_least_squares_are_the_direct_solution(count, width, l2):
    features, test = clusters(count, width=width), clusters(11, width=width, seed=1)
    x = features.values.astype(np.float64)
    mean, std = x.mean(0), x.std(0) + 1e-5
    x, z = (np.c_[(part - mean) / std, np.full(len(part), 100.0)] for part in (x, test.values))
    y = np.where(features.labels[:, None] == np.arange(4), 1.0, -1.0)  # a class without images too
    wanted = z @ np.linalg.solve(x.T @ x + l2 * np.eye(width + 1), x.T @ y)
    np.testing.assert_allclose(least_squares(features, test.values, 4, l2), wanted, atol=1e-5)


def test_shots_are_chosen_as_in_big_vision_and_reported_for_every_seed():
    train, test = clusters(33, spread=0.1), clusters(30, spread=0.1, seed=1)
    # np.random.default_rng(0).permutation of the indices of each class in turn, the first two: big_vision's choice.
    generator = np.random.default_rng(0)
    orders = [generator.permutation(np.where(train.labels == label)[0]) for label in range(3)]
    assert choose_shots(train.labels, 3, 2, seed=0).tolist() == [i for order in orders for i in order[:2].tolist()]
    found = few_shot_accuracies(train, test, 3)
    assert list(found) == [1, 5, 10]  # there are 11 of each class
    assert all(len(values) == 3 for values in found.values())
    assert found[10] == [1.0, 1.0, 1.0]
    # Of a class with fewer images, all of them.
    assert len(choose_shots(np.array([0] * 9 + [1] * 2), 2, 5, seed=0)) == 7


# ---------------------------------------------------------------------------------------------------------------------
# Nearest neighbours and a linear classifier


@pytest.mark.parametrize(("neighbors", "temperature"), [(20, 0.07), (5, 1.0), (1, 0.07), (500, 0.07)])
def test_nearest_neighbours_are_those_of_scikit_learn(neighbors, temperature):
    train, test = clusters(90, spread=1.5), clusters(400, spread=1.5, seed=1)
    theirs = KNeighborsClassifier(
        min(neighbors, 90), metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(train.values.astype(np.float64), train.labels)
    wanted = theirs.score(test.values.astype(np.float64), test.labels)
    assert 0.4 < wanted < 0.99
    assert knn_accuracy(train, test, neighbors, temperature) == pytest.approx(wanted, abs=1e-9)


def test_a_linear_probe_chooses_its_regulariser_without_the_queries():
    # Three useful features and many of noise: what is fitted without regulariser fits the noise.
    generator = np.random.default_rng(3)

    def noisy(count: int, seed: int) -> Features:
        useful = clusters(count, width=3, spread=1.0, seed=seed)
        noise = generator.normal(size=(count, 60)).astype(np.float32)
        return Features(np.concatenate([useful.values, noise], axis=1), useful.labels)

    train, test = noisy(90, 0), noisy(600, 1)
    found = linear_probe(train, test)
    assert found.l2 == max(found.held_out_accuracies, key=lambda l2: (found.held_out_accuracies[l2], l2))
    assert found.l2 > 0.01
    assert found.accuracy > linear_probe(train, test, l2_grid=(1e-6,)).accuracy + 0.03
    wrong = Features(test.values, (test.labels + 1) % 3)
    assert linear_probe(train, wrong).held_out_accuracies == found.held_out_accuracies


def test_a_linear_probe_is_logistic_regression():
    train, test = clusters(60, spread=1.5), clusters(200, spread=1.5, seed=1)
    found = linear_probe(train, test, l2_grid=(3.0,))
    x, z = (torch.from_numpy((part.values - train.values.mean(0)) / train.values.std(0)) for part in (train, test))
    weight, bias = torch.zeros(8, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-9)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits, labels = x @ weight + bias, torch.from_numpy(train.labels)
        total = torch.nn.functional.cross_entropy(logits, labels, reduction="sum") + 1.5 * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    wanted = ((z @ weight + bias).argmax(1).numpy() == test.labels).mean()
    assert 0.4 < wanted < 0.99
    assert found.accuracy == pytest.approx(wanted, abs=1 / 200 + 1e-9)


def test_a_class_with_one_image_is_told():
    with pytest.raises(ValueError, match="at least two images of each"):
        linear_probe(Features(np.eye(3, dtype=np.float32), np.array([0, 0, 1])), clusters(3, width=3))


def test_the_subset_is_balanced_and_the_same_for_the_same_seed():
    labels = [0] * 50 + [1] * 3 + [2] * 50
    chosen = balanced_subset(labels, 21, seed=1)
    assert chosen == balanced_subset(labels, 21, seed=1) != balanced_subset(labels, 21, seed=2)
    assert np.bincount(np.array(labels)[chosen]).tolist() == [9, 3, 9]
    assert balanced_subset(labels, 1000) == list(range(103))


# ---------------------------------------------------------------------------------------------------------------------
# Features


class Images(torch.utils.data.Dataset):
    """Seven fixed random images, with an entry that is nobody's business."""

    def __init__(self, count: int = 7) -> None:
        self.pixel_values = torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixel_values[index], "labels": index % 3, "key": (0, 0, index)}


@pytest.mark.parametrize("fields", [{}, {"representation_size": 12}, {"pooling": "mean"}, {"hidden_dropout_prob": 0.5}])
def test_features_are_what_the_classifier_sees(fields):
    model, images = ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", **fields)), Images()
    model.train()
    model.vit.layernorm.eval()
    seen = []
    model.classifier.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].detach()))
    state = torch.get_rng_state()
    found = extract_features(model, images, batch_size=3)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert model.classifier.training
    assert not model.vit.layernorm.training
    model.eval()(images.pixel_values)
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert found.values.dtype == np.float32
    np.testing.assert_allclose(found.values, seen[0], atol=1e-5)


@pytest.mark.parametrize("cls", [True, False])
def test_features_of_an_encoder_without_pooling(config, cls):
    fields = {} if cls else {"pooling": "mean"}
    config = ViTScratchConfig.from_variant("test/4", num_register_tokens=2, **fields)
    pixels, model = Images().pixel_values, ViTScratchForMaskedImageModeling(config).eval()
    tokens = model.vit(pixels).last_hidden_state
    wanted = tokens[:, 0] if cls else tokens[:, 2:].mean(1)
    torch.testing.assert_close(image_features(model, pixels), wanted)
    torch.testing.assert_close(image_features(model.vit, pixels), wanted)


def test_broken_weights_and_no_images_are_told(config):
    model = ViTScratchModel(config)
    with pytest.raises(ValueError, match="no images"):
        extract_features(model, Images(0))
    torch.nn.init.constant_(model.layernorm.weight, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        extract_features(model, Images())


def features_of_process(rank: int, folder: str) -> None:
    """One of two processes."""
    from accelerate import PartialState

    assert PartialState(cpu=True, backend="gloo").num_processes == 2
    torch.manual_seed(0)
    found = extract_features(ViTScratchModel(ViTScratchConfig.from_variant("test/4")), Images(), batch_size=2)
    np.savez(f"{folder}/{rank}.npz", **found._asdict())
    torch.distributed.destroy_process_group()


def test_two_processes_count_every_image_once(tmp_path):
    run_forked(features_of_process, 2, str(tmp_path))
    torch.manual_seed(0)
    one = extract_features(ViTScratchModel(ViTScratchConfig.from_variant("test/4")), Images(), batch_size=7)
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as two:
            assert two["labels"].tolist() == one.labels.tolist()
            np.testing.assert_allclose(two["values"], one.values, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# During training


def test_a_probe_logs_and_training_goes_on_bit_by_bit(pets, tmp_path):
    common = ["--train_dir", pets, "--train_val_split", "0.25", "--max_steps", "8", "--ema_decay", "0.9"]
    common += ["--config_overrides", "hidden_dropout_prob=0.2", "--eval_strategy", "steps", "--eval_steps", "4"]
    common += ["--save_strategy", "steps", "--save_steps", "4", "--load_best_model_at_end", "False"]
    common += ["--dataloader_num_workers", "0"]
    probe = ["--probe", "knn", "fewshot", "--probe_images", "12", "--probe_steps", "2"]
    plain = build(tmp_path / "plain", *common)
    plain.train()
    probed = build(tmp_path / "probed", *common, *probe)
    probed.train()
    assert difference(weights(plain), weights(probed)) == 0
    history = [entry for entry in probed.state.log_history if "probe_knn_accuracy" in entry]
    assert [entry["step"] for entry in history] == [2, 4, 6, 8]
    assert {name for name in history[0] if name.startswith("probe_")} == {
        "probe_knn_accuracy",
        "probe_fewshot_1_accuracy",
    }  # fmt: skip  12 training images make 4 of a class
    probed.evaluate()  # after training it says nothing more
    assert sum("probe_knn_accuracy" in entry for entry in probed.state.log_history) == 4
    resumed = build(
        tmp_path / "probed", *common, *probe, "--resume_from_checkpoint", str(tmp_path / "probed" / "checkpoint-4")
    )
    resumed.train(resume_from_checkpoint=resumed.args.resume_from_checkpoint)
    assert difference(weights(resumed), weights(probed)) == 0
    again = [entry for entry in resumed.state.log_history if "probe_knn_accuracy" in entry]
    assert [entry["probe_knn_accuracy"] for entry in again] == [entry["probe_knn_accuracy"] for entry in history]


def test_a_probe_sees_the_averaged_weights(pets, tmp_path):
    run = ["--max_steps", "3", "--ema_decay", "0.5", "--dataloader_num_workers", "0"]
    trainer = build(tmp_path / "out", *flags(pets, *run, "--probe", "knn", "--probe_steps", "1"))
    probe = trainer.callback_handler.callbacks[-1]
    average, seen = trainer.average, []
    probe.accuracies = lambda: seen.append(weights(trainer)) or {}
    trainer.train()
    assert len(seen) == 3
    assert all(torch.equal(seen[-1][name], average.average[name]) for name in average.average)


def test_a_probe_takes_the_pixels_that_training_takes(pets, tmp_path):
    run = ["--dataloader_num_workers", "0", "--probe", "fewshot", "--probe_steps", "1", "--probe_images", "9"]
    trainer = build(tmp_path / "out", *flags(pets, *run))
    probe = trainer.callback_handler.callbacks[-1]
    assert np.bincount([probe.train[i]["labels"] for i in range(len(probe.train))]).tolist() == [3, 3, 3]
    found = extract_features(trainer.model, probe.test, processor=trainer.processing_class)
    images = [probe.test.examples.decode(i, trainer.processing_class) for i in range(len(probe.test))]
    pixels = trainer.processing_class(images, return_tensors="pt")["pixel_values"]
    wanted = image_features(trainer.model.eval(), pixels)
    np.testing.assert_allclose(found.values, wanted.detach().numpy(), atol=1e-5)


def test_probe_flags_are_checked(pets, tmp_path):
    for more, message in (
        (["--probe", "svm"], "--probe: invalid choice: 'svm'"),
        (["--probe", "knn"], "never runs"),
        (["--probe_steps", "3"], "says when, not what"),
        (["--probe", "knn", "--probe_steps", "0"], "--probe_steps 0 must be at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            build(tmp_path / "out", *flags(pets, *more))


def test_the_script_probes_a_checkpoint(pets, tmp_path, monkeypatch, capsys):
    config = ViTScratchConfig.from_variant("test/4", num_labels=7, representation_size=12)
    ViTScratchForImageClassification(config).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    argv = ["probe.py", "model", "--train_dir", pets, "--train_val_split", "0.25", "--dataloader_num_workers", "0"]
    monkeypatch.setattr("sys.argv", argv)
    main = load_script("probe").main
    main()
    record = json.loads((tmp_path / "outputs" / "probe" / "results.json").read_text())
    assert list(record["probes"]) == ["knn", "fewshot_1", "fewshot_5", "linear"]
    assert (record["n"], record["dataset"]["num_training_images"]) == (6, 18)
    assert len(record["probes"]["fewshot_5"]["accuracies"]) == 3
    assert record["probes"]["linear"]["accuracy"] > 0.9  # the colours tell the classes
    printed = capsys.readouterr().out
    assert printed.index("Nearest neighbours of 6 images among 18.") < printed.index("--skip_linear leaves it out.")
    assert f"linear      {100 * record['probes']['linear']['accuracy']:>8.2f} %" in printed
    with pytest.raises(InputError, match="results of another run"):
        main()
