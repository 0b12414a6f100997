# SPDX-License-Identifier: Apache-2.0
"""Weights for another image, patch, number of channels or labels: what must stay the same, does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import golden_checkpoints
import jax_oracle
import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForImageClassification

from modeling_vit_scratch import (
    ViTScratchBackbone,
    ViTScratchConfig,
    ViTScratchForImageClassification,
    ViTScratchForMaskedImageModeling,
    ViTScratchImageProcessor,
    ViTScratchModel,
    ViTScratchPreTrainedModel,
)
from modeling_vit_scratch.checkpoint.adaptation import (
    adapt_channels,
    resize_matrix,
    resize_patch_kernel,
    resize_positions,
)
from modeling_vit_scratch.checkpoint.conversion import load_checkpoint


@pytest.fixture(autouse=True)
def warnings_of_the_loader(caplog):
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.enable_propagation()
    return caplog


@pytest.fixture
def folder(config, tmp_path) -> Path:
    """A saved model that is far from its initialisation, and its image processor."""
    save(ViTScratchForImageClassification(config), tmp_path / "model")
    return tmp_path / "model"


def save(model: torch.nn.Module, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    height, width = model.config.image_hw
    ViTScratchImageProcessor(size={"height": height, "width": width}).save_pretrained(folder)


def logits(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(images).logits


# The arithmetic -------------------------------------------------------------------------------------------------------


def test_resize_matrix_is_the_bilinear_resize():
    image = torch.randn(5, 7, dtype=torch.float64)
    resized = F.interpolate(image[None, None], size=(3, 11), mode="bilinear", align_corners=False)[0, 0]
    assert torch.allclose((resize_matrix((5, 7), (3, 11)) @ image.flatten()).view(3, 11), resized, atol=1e-12)


@pytest.mark.parametrize(("old", "new"), [((8, 8), (16, 16)), ((4, 6), (6, 10)), ((3, 3), (4, 3))])
def test_patches_that_grow_give_the_same_tokens(old, new):
    kernel, patches = torch.randn(5, 3, *old, dtype=torch.float64), torch.randn(10, 3, *old, dtype=torch.float64)
    grown = F.interpolate(patches, size=new, mode="bilinear", align_corners=False)
    before, after = F.conv2d(patches, kernel), F.conv2d(grown, resize_patch_kernel(kernel, new))
    assert torch.allclose(before, after, atol=1e-10)


def test_a_patch_that_shrinks_is_flexivits_least_squares():
    """The best w' for <x, w> with x = B x' for random small patches x', by FlexiViT's definition: pinv(B^T) w."""
    kernel = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    matrix = resize_matrix((6, 6), (3, 3)).numpy()
    expected = np.linalg.pinv(matrix.T) @ kernel.numpy().ravel()
    assert np.allclose(resize_patch_kernel(kernel, (3, 3)).numpy().ravel(), expected, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_channels_that_are_equal_give_what_they_gave(channels):
    kernel, gray = torch.randn(5, 3, 4, 4), torch.randn(2, 1, 4, 4)
    before = F.conv2d(gray.expand(-1, 3, -1, -1), kernel)
    adapted = adapt_channels(kernel, channels)
    if channels in (1, 6):
        assert torch.allclose(F.conv2d(gray.expand(-1, channels, -1, -1), adapted), before, atol=1e-5)
    else:
        assert torch.equal(adapted, kernel.repeat(1, 2, 1, 1)[:, :channels] * (3 / channels))


@pytest.mark.parametrize("grid", [(7, 7), (24, 24), (5, 13), (1, 3)])
def test_positions_equal_scipys_zoom(grid):
    """checkpoint.py of the paper's code: scipy.ndimage.zoom(order=1)."""
    positions = torch.randn(1, 1 + 14 * 14, 8)
    expected = scipy.ndimage.zoom(positions[0, 1:].view(14, 14, 8).numpy(), (grid[0] / 14, grid[1] / 14, 1), order=1)
    resized = resize_positions(positions, (14, 14), grid, "bilinear")
    assert torch.equal(resized[:, :1], positions[:, :1])
    assert abs(resized[0, 1:].numpy() - expected.reshape(-1, 8)).max() < 1e-6


def test_positions_from_a_rectangle_equal_scipys_zoom():
    positions = torch.randn(1, 6 * 4, 8)
    expected = scipy.ndimage.zoom(positions.view(6, 4, 8).numpy(), (5 / 6, 9 / 4, 1), order=1)
    assert (
        abs(resize_positions(positions, (6, 4), (5, 9), "bilinear")[0].numpy() - expected.reshape(-1, 8)).max() < 1e-6
    )


def test_positions_as_facebooks_dino_resamples_them():
    """interpolate_pos_encoding of DINOv2's authors, with their offset of 0.1; their grids are squares."""
    positions = torch.randn(1, 7 * 7, 8)
    for rows, columns in ((3, 3), (16, 10), (49, 1)):
        grid, scale = positions.view(1, 7, 7, 8).permute(0, 3, 1, 2), ((rows + 0.1) / 7, (columns + 0.1) / 7)
        theirs = F.interpolate(grid, scale_factor=scale, mode="bicubic").flatten(2).transpose(1, 2)
        ours = resize_positions(positions, (7, 7), (rows, columns), "bicubic_offset")
        assert (ours - theirs).abs().max() < 1e-5
        assert (ours - resize_positions(positions, (7, 7), (rows, columns), "bicubic")).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["bicubic", "bicubic_antialias", "bicubic_align_corners"])
def test_positions_of_the_other_kernels(kind):
    positions = torch.randn(1, 6 * 4, 8)
    options = {"align_corners": kind == "bicubic_align_corners", "antialias": kind == "bicubic_antialias"}
    grid = positions.view(1, 6, 4, 8).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(3, 3), mode="bicubic", **options).flatten(2).transpose(1, 2)
    assert (resize_positions(positions, (6, 4), (3, 3), kind) - expected).abs().max() < 1e-6


# Whole models ---------------------------------------------------------------------------------------------------------


def test_half_the_patch_on_half_the_image_gives_equal_logits(tmp_path):
    """B/8 -> B/16 on images twice as large, as in FlexiViT, at the size of the tests."""
    save(ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", num_labels=3)), tmp_path)
    small = ViTScratchForImageClassification.from_pretrained(tmp_path)
    large = ViTScratchForImageClassification.from_pretrained(tmp_path, patch_size=8, image_size=(32, 48))
    patches = torch.randn(2, 3, 4, 4, 6, 4)  # (B, C, rows, patch height, columns, patch width)
    flat = patches.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
    grown = F.interpolate(flat, size=(8, 8), mode="bilinear").unflatten(0, (2, 4, 6)).permute(0, 3, 1, 4, 2, 5)
    got = logits(large, grown.reshape(2, 3, 32, 48))
    assert (got - logits(small, patches.reshape(2, 3, 16, 24))).abs().max() < 1e-5


def test_a_size_that_is_baked_in_equals_the_same_at_run_time(folder, caplog):
    before = ViTScratchForImageClassification.from_pretrained(folder)
    after = ViTScratchForImageClassification.from_pretrained(folder, image_size=(32, 20))
    images = torch.randn(2, 3, 32, 20)
    assert after.config.image_hw == (32, 20)
    assert torch.allclose(logits(before, images), logits(after, images), atol=1e-6)
    assert "Positions: resampled, bilinear; grid 4 x 6 to 8 x 5, images 16 x 24 to 32 x 20." in caplog.messages
    assert torch.equal(before.classifier.weight, after.classifier.weight)


SAME_COUNT = [((48, 80), (80, 48)), ((96, 96), (72, 128)), ((112, 112), (56, 224))]


@pytest.mark.parametrize(("old", "new"), SAME_COUNT)
@pytest.mark.parametrize(
    "fields",
    [{}, {"position_embedding": "learned_2d"},
     {"position_embedding_placement": "every_layer", "position_embedding_interpolation": "bicubic_antialias"},
     {"position_embedding_placement": "every_layer_shared", "num_register_tokens": 2}],
    ids=str,
)  # fmt: skip
def test_another_grid_of_as_many_patches_is_resampled_too(old, new, fields, tmp_path, caplog):
    """Tensors of the same shape are not the same positions. The model itself, at the other size, is the oracle."""
    config = ViTScratchConfig.from_variant("test/4", patch_size=8, image_size=old, num_labels=3, **fields)
    save(ViTScratchForImageClassification(config), tmp_path)
    before = ViTScratchForImageClassification.from_pretrained(tmp_path)
    after = ViTScratchForImageClassification.from_pretrained(tmp_path, image_size=new)
    images = torch.randn(2, 3, *new)
    assert torch.allclose(logits(before, images), logits(after, images), atol=1e-5)
    assert any(message.startswith("Positions: ") for message in caplog.messages)


@pytest.mark.parametrize(("old", "new"), [*SAME_COUNT, ((32, 32), (8, 8))])
def test_a_table_of_distances_is_not_adapted(old, new, tmp_path):
    config = ViTScratchConfig.from_variant("test/4", patch_size=8, image_size=old, position_embedding="relative_1d")
    save(ViTScratchForImageClassification(config), tmp_path)
    with pytest.raises(ValueError, match=r"'relative_1d' has a table for .* which is not adapted to"):
        ViTScratchForImageClassification.from_pretrained(tmp_path, image_size=new)


def test_another_patch_of_as_many_pixels_or_patches(tmp_path, caplog):
    """Patches of 2 x 8 for 4 x 4: another grid of as many patches, and a new decoder, of the same shape as the old."""
    save(
        ViTScratchForMaskedImageModeling(ViTScratchConfig.from_variant("test/4", patch_size=4, image_size=16)), tmp_path
    )
    source = ViTScratchForMaskedImageModeling.from_pretrained(tmp_path)
    model = ViTScratchForMaskedImageModeling.from_pretrained(tmp_path, patch_size=(2, 8))
    assert model.decoder.weight.shape == source.decoder.weight.shape
    assert not torch.equal(model.decoder.weight, source.decoder.weight)
    assert any(message.startswith("New, initialised at random: decoder.") for message in caplog.messages)
    stored = source.vit.embeddings.position_embeddings.weight.detach()
    got = model.vit.embeddings.position_embeddings.weight
    assert got.shape == stored.shape
    assert torch.allclose(got, resize_positions(stored, (4, 4), (8, 2), "bilinear"), atol=1e-6)


@pytest.mark.parametrize("wanted", [(144, 256), (192, 192), (96, 384), (288, 288)])
def test_a_wanted_size_is_not_taken_for_that_of_the_stored_positions(wanted, tmp_path, caplog):
    """12 x 12 positions in a file that says nothing, and images of 9 x 16 patches."""
    tensors = golden_checkpoints.weights(
        {
            **json.loads(golden_checkpoints.FILE.read_text())["cases"]["timm:deit_base_patch16_224"]["shapes"],
            "pos_embed": [1, 145, 16],
            "patch_embed.proj.weight": [16, 3, 16, 16],
        }
    )
    save_file(tensors, tmp_path / "weights.safetensors")
    file, heads = tmp_path / "weights.safetensors", {"num_attention_heads": 2}
    model = ViTScratchForImageClassification.from_pretrained(file, image_size=wanted, **heads)
    before = ViTScratchForImageClassification.from_pretrained(file, **heads)
    assert before.config.image_hw == (192, 192)
    images = torch.randn(1, 3, *wanted)
    assert torch.allclose(logits(before, images), logits(model, images), atol=1e-5)
    # Said, the positions are what they are said to be.
    said = load_checkpoint(file, {"source_image_size": (144, 256), **heads})
    assert said.config.image_hw == (144, 256)


@pytest.mark.parametrize("kind", ["learned_2d", "sincos_2d", "none"])
def test_every_kind_of_position(kind, tmp_path):
    save(ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", position_embedding=kind)), tmp_path)
    before = ViTScratchForImageClassification.from_pretrained(tmp_path)
    after = ViTScratchForImageClassification.from_pretrained(tmp_path, image_size=(32, 20))
    images = torch.randn(2, 3, 32, 20)
    assert torch.isfinite(logits(after, images)).all()
    if kind in ("learned_2d", "none"):
        assert torch.allclose(logits(before, images), logits(after, images), atol=1e-5)


def test_positions_of_every_layer(tmp_path):
    fields = {"position_embedding_placement": "every_layer", "num_register_tokens": 2}
    save(ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", **fields)), tmp_path)
    images = torch.randn(2, 3, 32, 20)
    before = logits(ViTScratchForImageClassification.from_pretrained(tmp_path), images)
    after = logits(ViTScratchForImageClassification.from_pretrained(tmp_path, image_size=(32, 20)), images)
    assert torch.allclose(before, after, atol=1e-6)


def test_gray_images_give_what_they_gave_as_rgb(folder, caplog):
    before = ViTScratchForImageClassification.from_pretrained(folder)
    after = ViTScratchForImageClassification.from_pretrained(folder, num_channels=1)
    gray = torch.randn(2, 1, 16, 24)
    assert torch.allclose(logits(before, gray.expand(-1, 3, -1, -1)), logits(after, gray), atol=1e-5)
    assert "Input channels: 3 to 1, the kernel's summed." in caplog.messages
    assert (after.image_processor.num_channels, after.image_processor.image_mean) == (1, (0.5,))


def test_new_labels_start_at_zero(folder, caplog):
    model = ViTScratchForImageClassification.from_pretrained(folder, num_labels=7, image_size=32)
    assert not model.classifier.weight.any()
    assert not model.classifier.bias.any()
    assert "Classifier: new, zeros, 7 labels (the checkpoint's has 3)." in caplog.messages
    assert len(model.config.id2label) == 7


def test_new_labels_alone_are_as_in_transformers(folder):
    """An error that says the way out, which programs for transformers' models know; and then zeros here too."""
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ViTScratchForImageClassification.from_pretrained(folder, num_labels=7)
    wanted = {"id2label": {0: "cat", 1: "dog"}, "ignore_mismatched_sizes": True}
    named = ViTScratchForImageClassification.from_pretrained(folder, **wanted)
    assert named.config.label2id == {"cat": 0, "dog": 1}
    assert not named.classifier.weight.any()
    assert named.vit.layernorm.weight.any()


def test_what_fits_is_left_to_transformers_and_says_nothing(folder, caplog):
    model = ViTScratchForImageClassification.from_pretrained(folder, image_size=(16, 24), num_labels=3)
    assert model.classifier.weight.any()
    assert model.image_processor is None
    assert not [record for record in caplog.records if "checkpoint" in record.name]


def test_representation_layer_kept_or_taken_away(tmp_path, caplog):
    save(ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", representation_size=8)), tmp_path)
    kept = ViTScratchForImageClassification.from_pretrained(tmp_path, num_labels=5, image_size=32)
    assert kept.vit.pooler.dense.weight.any()
    assert "representation_size=None" in caplog.text
    gone = ViTScratchForImageClassification.from_pretrained(tmp_path, representation_size=None)
    assert gone.vit.pooler.dense is None
    assert not gone.classifier.weight.any()
    assert "Representation layer: 8 wide in the checkpoint, taken away." in caplog.messages


def test_masked_image_modeling_is_adapted_too(config, tmp_path):
    save(ViTScratchForMaskedImageModeling(config), tmp_path)
    model = ViTScratchForMaskedImageModeling.from_pretrained(tmp_path, patch_size=8, image_size=32, num_channels=1)
    images = torch.randn(2, 1, 32, 32)
    outputs = model(images, bool_masked_pos=torch.ones(2, 16))
    assert outputs.reconstruction.shape == images.shape
    before = ViTScratchForMaskedImageModeling.from_pretrained(tmp_path)
    assert torch.equal(model.vit.embeddings.mask_token, before.vit.embeddings.mask_token)


@pytest.mark.parametrize("cls", [ViTScratchModel, ViTScratchBackbone])
def test_the_encoder_alone(cls, folder, caplog):
    before, after = cls.from_pretrained(folder), cls.from_pretrained(folder, image_size=(32, 20))
    images = torch.randn(2, 3, 32, 20)
    with torch.inference_mode():
        outputs = [model.eval()(images)[0] for model in (before, after)]
    outputs = [output[0] if isinstance(output, tuple) else output for output in outputs]
    assert torch.allclose(*outputs, atol=1e-6)
    assert "Not used by" in caplog.text


def test_an_encoder_gets_a_new_classifier(config, tmp_path, caplog):
    save(ViTScratchModel(config), tmp_path)
    model = ViTScratchForImageClassification.from_pretrained(tmp_path, num_labels=9)
    assert not model.classifier.weight.any()
    assert "(the checkpoint has none)" in caplog.text
    theirs = ViTScratchModel.from_pretrained(tmp_path)
    assert torch.equal(model.vit.layernorm.weight, theirs.layernorm.weight)


def test_through_the_auto_class_and_with_a_configuration(folder):
    model = AutoModelForImageClassification.from_pretrained(folder, image_size=[32, 20])
    config = ViTScratchConfig.from_pretrained(folder, image_size=[32, 20])
    other = ViTScratchForImageClassification.from_pretrained(folder, config=config)
    images = torch.randn(1, 3, 32, 20)
    assert torch.equal(logits(model, images), logits(other, images))
    half = ViTScratchForImageClassification.from_pretrained(folder, image_size=32, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    wanted = {"num_labels": 4, "num_channels": 1, "output_loading_info": True}
    both, info = ViTScratchForImageClassification.from_pretrained(folder, **wanted)
    assert both.num_labels == 4
    assert not info["missing_keys"]


def test_what_cannot_be_adapted_is_an_error(folder):
    with pytest.raises(ValueError, match="no way to adapt"):
        ViTScratchForImageClassification.from_pretrained(folder, image_size=32, intermediate_size=80)
    with pytest.raises(ValueError, match="patch"):
        ViTScratchForImageClassification.from_pretrained(folder, image_size=30)


def test_a_damaged_folder_is_not_filled_up_with_random_numbers(folder):
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    del state["vit.layernorm.weight"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"vit\.layernorm\.weight"):
        ViTScratchForImageClassification.from_pretrained(folder, image_size=32)


# From every format, and served ----------------------------------------------------------------------------------------


def foreign(format: str, folder: Path) -> tuple[Path, dict]:
    golden = json.loads(golden_checkpoints.FILE.read_text())["cases"]
    if format == "npz":
        np.savez(folder / "model.npz", **jax_oracle.random_parameters(representation=20))
        return folder / "model.npz", {}
    if format == "hybrid":
        np.savez(folder / "model.npz", **jax_oracle.random_parameters(stem=(1,), patch=(2, 2)))
        return folder / "model.npz", {}
    if format == "transformers":
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
        )
        transformers.ViTForImageClassification(config).save_pretrained(folder)
        return folder, {}
    if format == "timm":
        (folder / "config.json").write_text(json.dumps(golden["timm:deit_base_patch16_224"]["config"]))
    case = golden["timm:deit_base_patch16_224" if format == "timm" else "torchvision:vit"]
    save_file(golden_checkpoints.weights(case["shapes"]), folder / "weights.safetensors")
    said = {"num_attention_heads": 2, "source_image_size": case["image"][1:]}
    return folder / "weights.safetensors", said


@pytest.mark.parametrize("format", ["npz", "hybrid", "timm", "transformers", "torchvision"])
def test_from_every_format_saved_and_served(format, tmp_path, caplog):
    """Adapted, saved, and served at the new size by a pipeline in a process that has not got the package."""
    source, said = foreign(format, tmp_path)
    size = (32, 48)
    wanted = {"image_size": size, "num_channels": 1, "id2label": {0: "cat", 1: "dog", 2: "bird", 3: "fish"}}
    wanted["patch_size"] = 16 if format == "hybrid" else 8
    model = ViTScratchForImageClassification.from_pretrained(source, **wanted, **said)
    for words in (
        "Patch kernel: resized",
        "Input channels: 3 to 1",
        "Positions: resampled",
        "Classifier: new, zeros, 4 labels",
    ):
        assert any(message.startswith(words) for message in caplog.messages), words
    with torch.no_grad():
        model.classifier.weight.normal_()
    model.save_pretrained(tmp_path / "out")
    image = np.random.RandomState(0).randint(0, 255, (40, 40), dtype=np.uint8)
    pixels = model.image_processor(image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 1, *size)
    assert pixels.dtype == torch.float32
    scores = logits(model, pixels).softmax(-1)[0]
    again = ViTScratchForImageClassification.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.allclose(logits(again, pixels), logits(model, pixels), atol=1e-5)
    if format not in ("npz", "timm"):
        return  # one fresh process for each way of cropping is enough
    code = f"""
import numpy as np
from PIL import Image
from transformers import pipeline
image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (40, 40), dtype=np.uint8))
serve = pipeline("image-classification", {str(tmp_path / "out")!r}, trust_remote_code=True)
print([[s["label"], s["score"]] for s in serve(image, top_k=4)])
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    served = dict(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))
    for index, label in wanted["id2label"].items():
        assert abs(served[label] - scores[index].item()) < 1e-5


def test_in21k_file_for_fine_tuning_at_another_size(tmp_path):
    """How people work: the in21k file, another size, new labels, and a step of training."""
    np.savez(tmp_path / "in21k.npz", **jax_oracle.random_parameters(representation=24, classes=50))
    model = ViTScratchForImageClassification.from_pretrained(
        tmp_path / "in21k.npz", image_size=24, num_labels=3, representation_size=None
    )
    loss = model.train()(torch.randn(4, 3, 24, 24), labels=torch.tensor([0, 1, 2, 0])).loss
    assert loss.item() == pytest.approx(np.log(3), abs=1e-6)  # a head of zeros
    loss.backward()
    assert model.classifier.weight.grad.any()


def test_the_processor_keeps_its_way_of_cropping(tmp_path):
    source, said = foreign("torchvision", tmp_path)
    model = ViTScratchForImageClassification.from_pretrained(source, image_size=(32, 48), **said)
    assert (model.image_processor.crop_pct, model.image_processor.size["width"]) == (0.875, 48)
    config = transformers.DeiTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    transformers.DeiTForImageClassification(config).save_pretrained(tmp_path / "deit")
    settings = {
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
    }
    (tmp_path / "deit" / "preprocessor_config.json").write_text(json.dumps({**settings, "resample": 3}))
    model = ViTScratchForImageClassification.from_pretrained(tmp_path / "deit")
    image = np.zeros((300, 400, 3), np.uint8)
    assert model.image_processor(image, return_tensors="pt")["pixel_values"].shape[2:] == (224, 224)
    model = ViTScratchForImageClassification.from_pretrained(tmp_path / "deit", image_size=384)
    assert model.image_processor(image, return_tensors="pt")["pixel_values"].shape[2:] == (384, 384)
    assert model.image_processor.crop_pct == pytest.approx(0.875)


@pytest.mark.parametrize("kind", ["learned_1d", "relative_1d", "sincos_2d"])
def test_alone_a_folder_refuses_a_grid_of_as_many_patches(kind, tmp_path, monkeypatch):
    # Without the package, transformers loads what has the right shape.
    monkeypatch.setattr(ViTScratchPreTrainedModel, "checkpoint_loader", None)
    config = ViTScratchConfig.from_variant("test/4", position_embedding=kind)
    ViTScratchModel(config).save_pretrained(tmp_path)
    assert ViTScratchModel.from_pretrained(tmp_path, image_size=[16, 24]).config.grid_hw == (4, 6)
    if kind == "sincos_2d":  # computed for any grid
        assert ViTScratchModel.from_pretrained(tmp_path, image_size=[24, 16]).config.grid_hw == (6, 4)
        return
    with pytest.raises(ValueError, match=r"image_size=\[24, 16\]: the positions are for \[16, 24\]"):
        ViTScratchModel.from_pretrained(tmp_path, image_size=[24, 16], output_loading_info=True)
