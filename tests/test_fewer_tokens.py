# SPDX-License-Identifier: Apache-2.0
"""Images that grow while a model trains, and patches that are left out."""

import copy

import numpy as np
import pytest
import torch
from tiny_images import build, build_pretrainer, class_folders, difference, flags, image, weights

from modeling_vit_scratch import ViTScratchConfig, ViTScratchForImageClassification
from modeling_vit_scratch.augmentation.fewer_tokens import FewerTokens, image_size
from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.training.arguments import RecipeArguments


STEPS = ("--max_steps", "6", "--learning_rate", "0.01", "--dataloader_num_workers", "0")
BOTH = ("--progressive_image_size", "8", "--patch_drop_rate", "0.5")


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return str(class_folders(tmp_path_factory.mktemp("pets"), each=8))


def model(**options):
    torch.manual_seed(0)
    return ViTScratchForImageClassification(ViTScratchConfig.from_variant("test/4", num_labels=3, **options))


def test_sizes_grow_in_patches_to_the_full_size_and_keep_the_sides_in_proportion():
    shares = np.linspace(0, 1, 101)
    sizes = np.array([image_size(96, (160, 224), (16, 16), share) for share in shares])
    assert sizes[0].tolist() == [64, 96]  # 160 / 224 * 96 = 69, in patches
    assert (sizes % 16 == 0).all()
    assert (np.diff(sizes, axis=0) >= 0).all()
    assert (sizes[shares >= 0.67] == (160, 224)).all()
    assert {height for height, _ in sizes.tolist()} == set(range(64, 161, 16))
    assert {width for _, width in sizes.tolist()} == set(range(96, 225, 16))
    assert abs(sizes[33] - (112, 160)).max() <= 16  # half way


def test_small_images_are_those_of_pillow():
    fewer = FewerTokens(model(), RecipeArguments(progressive_image_size=12))
    photo = image(0, 0, size=(24, 16))
    pixels = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None].float()
    got = fewer.resize(pixels, 0.0)
    wanted = np.asarray(photo.resize((12, 8), 2)).transpose(2, 0, 1)
    np.testing.assert_allclose(got[0].numpy(), wanted, atol=1)
    assert fewer.resize(pixels, 0.7) is pixels


@pytest.mark.parametrize("options", [{}, {"num_register_tokens": 2}, {"pooling": "mean", "use_cls_token": False}])
def test_dropped_patches_are_other_ones_in_each_image_and_the_others_keep_their_positions(pixel_values, options):
    plain, count = model(**options), 24
    dropping = copy.deepcopy(plain)
    fewer = FewerTokens(dropping, RecipeArguments(patch_drop_rate=0.75))
    whole = plain.train().vit.embeddings(pixel_values)
    prefix = whole.shape[1] - count
    kept = dropping.train().vit.embeddings(pixel_values)
    assert kept.shape[1] == prefix + 6
    assert torch.equal(kept[:, :prefix], whole[:, :prefix])
    chosen = [
        {tuple(row) for row in torch.nonzero((whole[i, prefix:, None] == kept[i, None, prefix:]).all(-1)).tolist()}
        for i in range(2)
    ]
    assert [len({patch for patch, _ in pairs}) for pairs in chosen] == [6, 6]
    assert chosen[0] != chosen[1]
    torch.testing.assert_close(dropping.eval()(pixel_values).logits, plain.eval()(pixel_values).logits)
    fewer.progress = 0.95  # the end of the training sees all patches
    assert dropping.train().vit.embeddings(pixel_values).shape == whole.shape


def test_each_patch_is_left_out_equally_often(pixel_values):
    dropping = model().train()
    FewerTokens(dropping, RecipeArguments(patch_drop_rate=0.5))
    embeddings = dropping.vit.embeddings
    with torch.no_grad():
        embeddings.patch_embeddings.projection.weight.zero_()
        embeddings.position_embeddings.weight[0, 1:, 0] = torch.arange(24.0)
    many = pixel_values[:1].expand(4000, -1, -1, -1)
    found = embeddings(many)[:, 1:, 0] - embeddings.patch_embeddings.projection.bias[0]
    counts = np.bincount(found.round().long().flatten(), minlength=24) / 4000
    np.testing.assert_allclose(counts, 0.5, atol=0.04)  # five standard deviations


def test_a_run_resumes_exactly_and_its_model_is_plain(pets, tmp_path, monkeypatch):
    seen, original = [], torch.nn.LayerNorm.forward

    def forward(layer, inputs):
        if getattr(layer, "is_first", False) and layer.training:
            seen.append(tuple(inputs.shape))
        return original(layer, inputs)

    monkeypatch.setattr(torch.nn.LayerNorm, "forward", forward)
    saved = ("--save_strategy", "steps", "--save_steps", "3")

    def run(name, **resume):
        trainer = build(tmp_path / name, *flags(pets, *STEPS, *BOTH), *saved)
        trainer.model.vit.layers[0].layernorm_before.is_first = True
        trainer.train(**resume)
        return trainer

    straight = run("straight")
    # Images of (4, 8), (8, 12), (12, 16), (12, 20) and (16, 24) pixels have 2, 6, 12, 15 and 24 patches: half stay.
    assert [tokens - 1 for _, tokens, _ in seen] == [1, 3, 6, 8, 12, 12]
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert difference(weights(resumed), weights(straight)) == 0.0
    straight.save_model()
    reloaded = ViTScratchForImageClassification.from_pretrained(tmp_path / "straight").train()
    assert not reloaded.vit.embeddings._forward_hooks


def test_without_the_flags_nothing_changes(pets, tmp_path):
    trainers = [build(tmp_path / name, *flags(pets, *STEPS)) for name in ("plain", "none")]
    trainers[1].fewer_tokens.resize = lambda pixel_values, share: pixel_values
    for trainer in trainers:
        trainer.train()
    assert not trainers[0].model.vit.embeddings._forward_hooks
    assert difference(*map(weights, trainers)) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--progressive_image_size", "10"), "10: give a multiple of the patch, 4, below the image size, 24"),
        (("--progressive_image_size", "24"), "24: give a multiple of the patch, 4, below the image size, 24"),
        (("--patch_drop_rate", "0.5", "--config_overrides", "position_embedding=relative_1d"), "added once"),
        (("--patch_drop_rate", "0.5", "--config_overrides", "position_embedding_placement=every_layer"), "added once"),
        (("--patch_drop_rate", "0.5", "--freeze", "encoder"), "not frozen"),
    ],
)
def test_what_does_not_fit_is_refused(pets, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        build(tmp_path / "run", *flags(pets, *STEPS, *options))


def test_pretraining_without_labels_refuses_them(pets, tmp_path):
    with pytest.raises(InputError, match="for the training of a classifier"):
        build_pretrainer(tmp_path / "run", "--objective", "mae", *flags(pets, *STEPS), "--patch_drop_rate", "0.5")
