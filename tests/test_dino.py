# SPDX-License-Identifier: Apache-2.0
"""DINO: its loss, teacher, centre and schedules against plain arithmetic, its crops, and runs that resume or stop."""

import math

import numpy as np
import pytest
import torch
from forked import run_forked
from PIL import Image
from safetensors.torch import load_file
from tiny_images import build, build_pretrainer, difference, flags, image, weights
from transformers import AutoModel

from modeling_vit_scratch import ViTScratchConfig, ViTScratchImageProcessor
from modeling_vit_scratch.augmentation.multi_crop import MultiCrop, turn_hue
from modeling_vit_scratch.common.errors import InputError, TrainingStopped
from modeling_vit_scratch.data.dataset import Photo
from modeling_vit_scratch.pretraining import dino
from modeling_vit_scratch.pretraining.arguments import PRETRAIN
from modeling_vit_scratch.pretraining.dino import SelfDistillation, cosine, dino_loss
from modeling_vit_scratch.training.command_line import parse_arguments


FLAGS = ("--objective", "dino", "--out_dim", "16", "--local_crops_number", "3")


def tiny(out_dim=16, **fields):
    torch.manual_seed(0)
    return SelfDistillation(ViTScratchConfig.from_variant("test/4", **fields), out_dim)


def softmax(values):
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_the_loss_is_numpy_s():
    generator = np.random.default_rng(0)
    student, logits, center = (generator.normal(size=shape) for shape in ((3, 5, 7), (3, 2, 7), (7,)))
    targets, logs = softmax((logits - center) / 0.04), np.log(softmax(student / 0.1))
    pairs = [(teacher, crop) for teacher in range(2) for crop in range(5) if teacher != crop]
    expected = np.mean([-(targets[:, teacher] * logs[:, crop]).sum(-1).mean() for teacher, crop in pairs])
    found = dino_loss(torch.from_numpy(student / 0.1), torch.from_numpy(targets))
    assert found.item() == pytest.approx(expected)


def test_the_forward_pass_centres_sharpens_and_gives_the_teacher_no_gradient():
    model = tiny(image_size=8).train()
    model.center.copy_(torch.linspace(-0.1, 0.1, 16))
    crops, local = torch.randn(2, 2, 3, 8, 8), torch.randn(2, 3, 3, 4, 4)
    outputs = model(crops, local)
    assert outputs.predictions.shape == (2, 5, 16)
    expected = softmax((outputs.logits.numpy() - model.center.numpy()) / model.teacher_temp)
    np.testing.assert_allclose(outputs.targets.numpy(), expected, rtol=1e-4)
    assert outputs.loss.item() == pytest.approx(dino_loss(outputs.predictions, outputs.targets).item())
    # The head: cosines with unit vectors.
    assert outputs.logits.abs().max() <= 1 + 1e-6
    # Student and teacher are the same at first, and each crop's outputs do not depend on the others.
    alone = model.eval()(crops)
    torch.testing.assert_close(alone.predictions * dino.STUDENT_TEMP, alone.logits)
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        is_teacher = name.startswith(("vit.", "teacher_head."))
        assert (parameter.grad is None) == is_teacher, name
        assert parameter.requires_grad != is_teacher


def test_the_teacher_has_no_dropout():
    model = tiny(image_size=8, hidden_dropout_prob=0.5).train()
    crops = torch.randn(2, 2, 3, 8, 8)
    first, second = model(crops), model(crops)
    assert torch.equal(first.logits, second.logits)
    assert not torch.equal(first.predictions, second.predictions)


def test_equal_outputs_cost_ln_k():
    predictions, targets = torch.zeros(4, 6, 32), torch.full((4, 2, 32), 1 / 32)
    assert dino_loss(predictions, targets).item() == pytest.approx(math.log(32))


def test_the_teacher_is_the_closed_form_average_and_the_centre_that_of_its_logits(pets, tmp_path):
    trainer = build_pretrainer(tmp_path, *flags(pets, *FLAGS, "--max_steps", "7", "--weight_decay_end", "0.3"))
    model, (steps,) = trainer.model, [c for c in trainer.callback_handler.callbacks if isinstance(c, dino.DinoSteps)]
    students, sums, decays, frozen = [weights(trainer)], [], [], []
    last = steps.on_step_end

    def note(args, state, control, **kwargs):
        sums.append(steps.sums.clone())
        last(args, state, control, **kwargs)
        students.append(weights(trainer))
        decays.append(kwargs["optimizer"].param_groups[0]["weight_decay"])
        frozen.append(
            torch.equal(students[-1]["student_head.last_layer.weight"], students[-2]["student_head.last_layer.weight"])
        )

    steps.on_step_end = note
    trainer.train()
    momenta = [1 - 0.004 * (1 + math.cos(math.pi * step / 7)) / 2 for step in range(7)]
    for name in ("student.layers.0.mlp.fc1.weight", "student_head.last_layer.weight", "student.embeddings.cls_token"):
        shares = [(1 - momenta[step]) * math.prod(momenta[step + 1 :]) for step in range(7)]
        expected = math.prod(momenta) * students[0][name].double()
        expected += sum(share * student[name].double() for share, student in zip(shares, students[1:]))
        teacher = name.replace("student_head", "teacher_head").replace("student.", "vit.")
        torch.testing.assert_close(students[-1][teacher].double(), expected, rtol=1e-5, atol=1e-7)
    center = np.zeros(16)
    for part in sums:
        center = 0.9 * center + 0.1 * part[:16].numpy() / part[-1].item()
    np.testing.assert_allclose(model.center.numpy(), center, rtol=1e-4, atol=1e-7)
    assert decays == pytest.approx([cosine(0.04, 0.3, step / 7) for step in range(7)])
    assert (cosine(0.04, 0.3, 0), cosine(0.04, 0.3, 1)) == pytest.approx((0.04, 0.3))
    assert frozen == [True] * 5 + [False] * 2  # an epoch has five steps


def test_the_temperature_follows_the_epoch(pets, tmp_path):
    more = ("--max_steps", "1", "--warmup_teacher_temp_epochs", "4", "--teacher_temp", "0.07")
    trainer = build_pretrainer(tmp_path, *flags(pets, *FLAGS, *more))
    (steps,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, dino.DinoSteps)]
    for epoch, expected in ((0, 0.04), (1, 0.0475), (4, 0.07), (9, 0.07)):
        trainer.state.epoch = epoch
        steps.on_train_begin(trainer.args, trainer.state)
        assert trainer.model.teacher_temp == pytest.approx(expected)


@pytest.mark.parametrize("size", [(8, 12), (12, 12)])
def test_a_resumed_run_has_the_weights_of_one_that_was_not_stopped(pets, tmp_path, size):
    more = flags(pets, *FLAGS, "--num_train_epochs", "2", "--config_overrides", "drop_path_rate=0.2")
    more += ["--image_size", *map(str, size)]
    straight = build_pretrainer(tmp_path / "straight", *more, "--dataloader_num_workers", "2")
    straight.args.save_strategy, straight.args.save_steps = "steps", 7  # in the middle of the second epoch
    straight.train()
    resumed = build_pretrainer(tmp_path / "resumed", *more, "--dataloader_num_workers", "0")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-7"))
    assert difference(weights(resumed), weights(straight)) == 0.0
    assert straight.model.center.abs().max() > 0


def _train(rank, folder, pets, processes):
    more = ("--max_steps", "2", "--per_device_train_batch_size", str(4 // processes), "--max_train_samples", "8")
    trainer = build_pretrainer(folder / f"{processes}_{rank}", *flags(pets, *FLAGS, *more, "--optim", "sgd"))
    trainer.train()
    torch.save(weights(trainer), folder / f"{processes}_{rank}.pt")


def test_two_processes_are_one(pets, tmp_path):
    run_forked(_train, 1, tmp_path, pets, 1)
    run_forked(_train, 2, tmp_path, pets, 2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1_0", "2_0", "2_1"))
    assert difference(first, second) == 0.0
    assert difference(one, first) < 1e-5
    assert one["center"].abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "part"), [("uniform", "all outputs are equally likely"), ("one", "the same outputs")])
def test_a_collapsed_teacher_stops_the_run(pets, tmp_path, monkeypatch, kind, part):
    monkeypatch.setattr(dino, "_LEAST_STEPS", 3)
    forward = dino.DinoHead.forward

    def same(self, features):
        outputs = forward(self, features)
        wanted = torch.zeros(16) if kind == "uniform" else torch.linspace(0, 5, 16).square()
        return outputs * 1e-4 + wanted

    monkeypatch.setattr(dino.DinoHead, "forward", same)
    monkeypatch.setattr(dino, "CENTER_MOMENTUM", 1.0)  # the centre stays at 0
    trainer = build_pretrainer(tmp_path, *flags(pets, *FLAGS, "--max_steps", "9"))
    with pytest.raises(TrainingStopped, match=part) as caught:
        trainer.train()
    assert trainer.state.global_step == 3
    assert "--teacher_temp" in str(caught.value)


def test_a_run_that_learns_is_not_stopped_and_reports_entropies(pets, tmp_path, monkeypatch):
    monkeypatch.setattr(dino, "_LEAST_STEPS", 3)
    trainer = build_pretrainer(tmp_path, *flags(pets, *FLAGS, "--max_steps", "6"))
    trainer.train()
    reports = [log for log in trainer.state.log_history if "teacher_entropy" in log]
    assert len(reports) == 2
    assert all(0 < log["teacher_entropy"] < log["mean_teacher_entropy"] < math.log(16) for log in reports)


def test_the_folder_is_the_teacher_s_encoder_and_can_be_fine_tuned_and_continued(pets, tmp_path):
    trainer = build_pretrainer(tmp_path / "pre", *flags(pets, *FLAGS, "--max_steps", "2"))
    trainer.train()
    trainer.save_model()
    teacher = trainer.model.vit.state_dict()
    model = AutoModel.from_pretrained(tmp_path / "pre", trust_remote_code=True)
    assert all(torch.equal(tensor, teacher[name]) for name, tensor in model.state_dict().items())
    assert set(load_file(tmp_path / "pre" / "model.safetensors")) == set(teacher)
    start = ("--model_name_or_path", str(tmp_path / "pre"))
    tuned = build(tmp_path / "tuned", *flags(pets, *start))
    continued = build_pretrainer(tmp_path / "continued", *flags(pets, *FLAGS, *start, "--image_size", "12"))
    for name in ("layers.0.mlp.fc1.weight", "embeddings.cls_token"):
        for encoder in (tuned.model.vit, continued.model.vit, continued.model.student):
            assert torch.equal(encoder.state_dict()[name], teacher[name])


def test_crops_depend_on_the_generator_alone_and_have_their_sizes_and_areas():
    crops = MultiCrop((16, 24), (8, 8), 4, Image.Resampling.BICUBIC, (0.4, 1.0), (0.05, 0.4))
    photo = image(0, 0, (60, 40))
    first, again, other = (crops(photo, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert {name: [crop.size for crop in found] for name, found in first.items()} == {
        "pixel_values": [(24, 16)] * 2, "local_pixel_values": [(8, 8)] * 4,
    }  # fmt: skip
    assert [crop.tobytes() for crop in first["pixel_values"]] == [crop.tobytes() for crop in again["pixel_values"]]
    assert first["pixel_values"][0].tobytes() != other["pixel_values"][0].tobytes()
    plain = MultiCrop((16, 24), (8, 8), 0, Image.Resampling.BICUBIC, (1.0, 1.0), (0.05, 0.4), is_photo=False)
    pair = plain(photo, np.random.default_rng(3))["pixel_values"]
    assert pair[0].tobytes() == pair[1].tobytes() == photo.resize((24, 16), Image.Resampling.BICUBIC).tobytes()
    for part, low, high in ((crops.crops[0][0], 0.4, 1.0), (crops.crops[-1][0], 0.05, 0.4)):
        boxes = [part.draw(600, 400, np.random.default_rng(seed))[0] for seed in range(200)]
        areas = [(right - left) * (bottom - top) / 240_000 for left, top, right, bottom in boxes]
        assert low * 0.9 < min(areas) < low + 0.1
        assert high - 0.1 < max(areas) < high * 1.1


def test_crops_of_a_jpeg_are_those_of_the_decoded_image(tmp_path):
    smooth = np.add.outer(np.arange(320), np.arange(480))[..., None] * [0.3, 0.2, 0.1]
    Image.fromarray(smooth.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    processor, whole = ViTScratchImageProcessor(), Image.open(tmp_path / "a.jpg").convert("RGB")
    crops = MultiCrop((16, 24), (8, 8), 2, Image.Resampling.BICUBIC, (0.4, 1.0), (0.05, 0.4))
    crops._change = lambda crop, *_: crop
    photo = Photo(str(tmp_path / "a.jpg"), processor, "a.jpg")
    found, expected = (crops(source, np.random.default_rng(0)) for source in (photo, whole))
    assert photo.image.size[0] < 480  # decoded at a smaller scale
    for name, images in expected.items():
        for ours, theirs in zip(found[name], images):
            np.testing.assert_allclose(np.asarray(ours, float), np.asarray(theirs, float), atol=3)


def test_a_hue_is_turned_as_by_torchvision():
    # A third of the circle makes red green; 255 steps, not 256, are a whole turn.
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    assert turn_hue(red, 1 / 3).getpixel((0, 0)) == (0, 255, 0)
    assert turn_hue(red, 0.0).getpixel((0, 0)) == (255, 0, 0)
    assert turn_hue(Image.new("L", (1, 1), 7), 0.1).getpixel((0, 0)) == 7


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (("--local_crops_scale", "0.4", "0.1"), "--local_crops_scale 0.4 0.1: give the least and the largest"),
        (("--global_crops_scale", "0.4"), "--global_crops_scale 0.4: give"),
        (("--smallest_area", "0.2"), "--smallest_area does not go with --objective dino"),
        (("--color_jitter", "0.2"), "--color_jitter does not go with --objective dino"),
        (("--images_on_device", "True"), "--images_on_device does not go with"),
        (("--ema_decay", "0.9"), "whose teacher is an average itself"),
        (("--mask_ratio", "0.5"), "goes with an --objective that masks"),
    ],
)
def test_refused(argv, part):
    with pytest.raises(InputError) as caught:
        raise parse_arguments([*FLAGS, *argv], PRETRAIN)[-1].as_error()
    assert part in str(caught.value)
