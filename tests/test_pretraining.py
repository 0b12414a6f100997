# SPDX-License-Identifier: Apache-2.0
"""Pretraining as runs: every objective resumes bit by bit, accumulates exactly, and ends in a folder to fine-tune."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_images import build, build_pretrainer, difference, flags, image, load_script, weights
from transformers import AutoImageProcessor, pipeline

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForMaskedImageModeling, ViTScratchModel
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.common.pretrained import default_processor
from modeling_vit_scratch.pretraining.arguments import OBJECTIVES, PRETRAIN
from modeling_vit_scratch.training.command_line import parse_arguments


UNLABELLED = [name for name in OBJECTIVES if name != "supervised"]
RANDOM = [
    "--auto_augment", "rand-m9-mstd0.5-inc1", "--ema_decay", "0.9", "--config_overrides",
    "hidden_dropout_prob=0.1,attention_probs_dropout_prob=0.1,drop_path_rate=0.2",
]  # fmt: skip

DINO = ["--out_dim", "16", *RANDOM[4:]]  # which has crops, colours and an average of its own


@pytest.fixture(scope="module")
def naming(tmp_path_factory):
    """The flags that name an objective, with a teacher for that which needs one."""
    folder = tmp_path_factory.mktemp("teacher")
    config = ViTScratchConfig.from_variant("test/4", hidden_size=48)
    ViTScratchModel(config).save_pretrained(folder)
    default_processor(config).save_pretrained(folder)
    teacher = {"distillation": ("--teacher_model", str(folder))}
    return lambda objective: ("--objective", objective, *teacher.get(objective, ()))


def refusal(*argv):
    with pytest.raises(InputError) as caught:
        raise parse_arguments([*map(str, argv)], PRETRAIN)[-1].as_error()
    return str(caught.value)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_resumed_run_has_the_weights_of_one_that_was_not_stopped(objective, naming, pets, tmp_path):
    more = flags(pets, *naming(objective), "--num_train_epochs", "2", *(DINO if objective == "dino" else RANDOM))
    straight = build_pretrainer(tmp_path / "straight", *more, "--dataloader_num_workers", "2")
    straight.args.save_strategy, straight.args.save_steps = "steps", 7  # in the middle of the second epoch
    straight.train()
    resumed = build_pretrainer(tmp_path / "resumed", *more, "--dataloader_num_workers", "0")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-7"))
    assert resumed.state.global_step == straight.state.global_step == 10
    assert difference(weights(resumed), weights(straight)) == 0.0


@pytest.mark.parametrize("objective", UNLABELLED)
def test_the_update_of_accumulated_batches_is_that_of_one(objective, naming, pets, tmp_path):
    # Eight images: one batch, or batches of three, three and two, which a mean of means would weigh alike.
    updates = []
    for folder, batch, accumulation in (("whole", "8", "1"), ("parts", "3", "3")):
        trainer = build_pretrainer(
            tmp_path / folder,
            *flags(pets, *naming(objective), "--optim", "sgd", "--max_grad_norm", "0", "--warmup_steps", "0"),
            *("--max_train_samples", "8", "--max_steps", "1", "--learning_rate", "1"),
            *("--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation),
        )
        before = weights(trainer)
        trainer.train()
        updates.append({key: value - before[key] for key, value in weights(trainer).items()})
    whole, parts = updates
    norm = sum(value.double().square().sum() for value in whole.values()).sqrt()
    other = sum(value.double().square().sum() for value in parts.values()).sqrt()
    assert norm > 0
    assert (other / norm).item() == pytest.approx(1.0, abs=1e-4)
    assert difference(whole, parts) < 1e-5 * norm


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fine_tuning_goes_on_from_the_folder(objective, naming, pets, tmp_path):
    trainer = build_pretrainer(tmp_path / "pre", *flags(pets, *naming(objective), "--max_steps", "2"))
    trainer.train()
    trainer.save_model()
    tuned = build(tmp_path / "tuned", *flags(pets, "--model_name_or_path", str(tmp_path / "pre")))
    trained = trainer.model.vit.state_dict()
    for name, tensor in tuned.model.vit.state_dict().items():
        assert torch.equal(tensor, trained[name]), name
    if objective != "supervised":
        assert tuned.model.classifier.weight.count_nonzero() == 0
        assert tuned.model.config.num_labels == 3
    tuned.train()


def test_the_mean_of_patches_can_be_fine_tuned_after_a_class_token(pets, tmp_path):
    # As MAE and SimMIM are: their class token has learnt nothing.
    trainer = build_pretrainer(tmp_path / "pre", *flags(pets, "--objective", "mae", "--max_steps", "1"))
    trainer.train()
    trainer.save_model()
    mean = ("--model_name_or_path", str(tmp_path / "pre"), "--config_overrides", "pooling=mean")
    tuned = build(tmp_path / "tuned", *flags(pets, *mean))
    assert (tuned.model.config.pooling, tuned.model.config.use_cls_token) == ("mean", True)
    trained = trainer.model.vit.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in tuned.model.vit.state_dict().items())


def test_the_folder_is_the_model_that_people_load(pets, tmp_path):
    classes = {"mpp": ViTScratchModel, "mae": ViTScratchModel, "simmim": ViTScratchForMaskedImageModeling}
    for objective, kind in classes.items():
        trainer = build_pretrainer(
            tmp_path / objective, *flags(pets, "--objective", objective, "--max_steps", "1", "--ema_decay", "0.5")
        )
        trainer.train()
        trainer.save_model()
        model, info = kind.from_pretrained(tmp_path / objective, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        own = trainer.model.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, own[name if objective == "simmim" else f"vit.{name}"]), name
        config = json.loads((tmp_path / objective / "config.json").read_text())
        assert config["architectures"] == [kind.__name__]
        assert (tmp_path / objective / "preprocessor_config.json").is_file()
        assert (tmp_path / objective / "modeling_vit_scratch.py").is_file()


def test_pretraining_goes_on_from_another_model(naming, pets, tmp_path):
    first = build_pretrainer(tmp_path / "first", *flags(pets, "--objective", "mae", "--max_steps", "1"))
    first.train()
    first.save_model()
    for objective in UNLABELLED:
        second = build_pretrainer(
            tmp_path / objective, *flags(pets, *naming(objective), "--model_name_or_path", str(tmp_path / "first"))
        )
        taken = second.model.vit.state_dict()
        assert all(torch.equal(taken[name], tensor) for name, tensor in first.model.vit.state_dict().items())


def test_the_supervised_head_is_that_of_the_paper_and_leaves_with_fine_tuning(pets, tmp_path):
    trainer = build_pretrainer(tmp_path / "a", *flags(pets))
    assert trainer.model.config.representation_size == trainer.model.config.hidden_size
    plain = build_pretrainer(tmp_path / "b", *flags(pets, "--config_overrides", "representation_size=None"))
    assert plain.model.config.representation_size is None


def test_images_need_no_labels_and_no_class_folders(tmp_path):
    folder = tmp_path / "photos"
    (folder / "deep" / "deeper").mkdir(parents=True)
    for number in range(10):
        image(number % 3, number).save(
            [folder, folder / "deep", folder / "deep" / "deeper"][number % 3] / f"{number}.png"
        )
    more = ("--train_dir", str(folder), "--train_val_split", "0.2", "--max_steps", "1")
    trainer = build_pretrainer(tmp_path / "out", *more, "--objective", "mae")
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (8, 2)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    with pytest.raises(InputError, match="in no class folder"):
        build_pretrainer(tmp_path / "out", *more)
    # One folder, or one image in a folder, is no label that anything can be split by.
    shutil.rmtree(folder / "deep")
    for path in list(folder.iterdir()):
        (folder / "all").mkdir(exist_ok=True)
        path.rename(folder / "all" / path.name)
    assert len(build_pretrainer(tmp_path / "out2", *more, "--objective", "mae").eval_dataset) == 1


def test_the_held_out_loss_is_the_same_whenever_it_is_asked_for(pets, tmp_path):
    trainer = build_pretrainer(tmp_path / "out", *flags(pets, "--objective", "simmim"))
    first = trainer.evaluate()["eval_loss"]
    trainer.train_dataset.set_epoch(3)
    assert trainer.evaluate()["eval_loss"] == first


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("--objective", "clip"), "none of supervised, mpp, simmim, mae, distillation, dino"),
        (("--objective", "mae", "--mask_ratio", 1), "--mask_ratio 1 must be above 0 and below 1"),
        (("--mask_ratio", 0.5), "goes with an --objective that masks"),
        (("--objective", "mae", "--mixup", 0.2), "--mixup 0.2 needs labels"),
        (("--objective", "mpp", "--cutmix", 1), "--cutmix 1 needs labels"),
        (("--objective", "mpp", "--label_smoothing_factor", 0.1), "needs labels"),
        (("--objective", "mpp", "--mpp_target", "color"), "none of mean_color"),
        (("--objective", "mae", "--head_learning_rate_multiplier", 2), "has no classifier"),
    ],
)
def test_refused(argv, part):
    assert part in refusal(*argv)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--objective", "simmim", "--mask_patch_size", "6"), "multiple of 4"),
        (("--objective", "mae", "--config_overrides", "position_embedding=relative_1d"), "positions must enter once"),
        (("--objective", "mae", "--decoder_hidden_size", "10", "--decoder_num_attention_heads", "3"), "hidden_size"),
    ],
)
def test_what_does_not_go_together_is_refused_before_training(more, part, pets, tmp_path):
    with pytest.raises(InputError, match=part):
        build_pretrainer(tmp_path / "out", *flags(pets, *more))


def test_the_decoder_of_mae_is_what_its_flags_say(pets, tmp_path):
    sizes = ("--decoder_hidden_size", "16", "--decoder_num_hidden_layers", "3", "--decoder_num_attention_heads", "2")
    model = build_pretrainer(
        tmp_path / "out", *flags(pets, "--objective", "mae", "--norm_pix_loss", "False", *sizes)
    ).model
    assert (model.decoder_pred.in_features, len(model.decoder_layers), model.decoder_layers[0].attention.heads) == (
        16,
        3,
        2,
    )
    assert model.norm_pix_loss is False


def test_the_script_says_what_it_does_and_leaves_a_record(pets, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    settings = [
        "--max_steps",
        "2",
        "--probe",
        "knn",
        "--mpp_target",
        "downsized",
        "--mask_ratio",
        "0.25",
        "--disable_tqdm",
        "True",
    ]
    argv = ["pretrain.py", "--train_dir", pets, "--objective", "mpp", "--variant", "test/4", "--output_dir", str(out)]
    argv += [*settings, "--disable_tqdm", "True"]
    monkeypatch.setattr("sys.argv", argv)
    load_script("pretrain").main()
    record = json.loads((out / "results.json").read_text())
    description = "25 % of patch embeddings corrupted, their colours at 4 x 4 pixels predicted (the paper, B.1.2)"
    facts = {"objective": "mpp", "mask_ratio": 0.25, "mpp_target": "downsized", "description": description}
    assert record["pretraining"] == facts
    assert (record["metric"], record["n"]) == ("loss", 3)
    assert record["value"] == record["metrics"]["loss"] > 0
    assert 0 <= record["metrics"]["probe_knn_accuracy"] <= 1
    assert "scripts/pretrain.py" in record["command"]
    encoder = ViTScratchModel.from_pretrained(out)
    assert record["model"]["num_parameters"] == encoder.num_parameters()
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-feature-extraction" in card
    assert "model-index" not in card  # a loss of one's own is no result to compare
    assert description in card
    assert "knn accuracy on frozen features" in card
    assert "None" not in card
    extract = pipeline(
        "image-feature-extraction", model=encoder, image_processor=AutoImageProcessor.from_pretrained(out)
    )
    assert np.shape(extract(image(0, 0))) == (1, 25, 32)
    text = capsys.readouterr().out
    assert f"Objective: {description}." in text
    assert f"--model_name_or_path {out}" in text
    assert set(load_file(out / "model.safetensors")) == set(encoder.state_dict())
