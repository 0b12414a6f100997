# SPDX-License-Identifier: Apache-2.0
"""The preview shows the images of the run itself."""

import sys

import numpy as np
import pytest
from PIL import Image
from tiny_images import build, load_script

from modeling_vit_scratch.common.errors import InputError
from modeling_vit_scratch.visualization.figures import draw_grid
from visualizing.commands import augmentation_grid


def test_the_grid_has_what_the_run_will_see(pets, tmp_path):
    trainer = build(tmp_path / "out", "--train_dir", pets, "--auto_augment", "ta_wide")
    grid = augmentation_grid(trainer, rows=3, epochs=2)
    assert (grid.shape, grid.dtype) == ((3, 3, 16, 24, 3), np.uint8)
    train_set = trainer.train_dataset
    for row, index in enumerate(np.linspace(0, len(train_set) - 1, 3).round().astype(int).tolist()):
        photo = train_set.examples.decode(index, train_set.decoder)
        theirs = photo.resize((24, 16), train_set.processor.resample)
        assert np.abs(grid[row, 0].astype(int) - np.asarray(theirs)).max() <= 1
        for epoch in (0, 1):
            generator = np.random.default_rng((trainer.args.seed, epoch, index))
            theirs = np.asarray(train_set.augmentation(photo, generator))
            # One level of resizing, which a policy that raises the contrast can double.
            assert np.abs(grid[row, 1 + epoch].astype(int) - theirs).max() <= 2
    assert int(train_set._epoch) == 0


def test_mixed_images_are_shown_mixed_and_grey_ones_grey(pets, tmp_path):
    plain = augmentation_grid(build(tmp_path / "a", "--train_dir", pets), rows=3, epochs=1)
    mixed = augmentation_grid(build(tmp_path / "b", "--train_dir", pets, "--mixup", "1.0"), rows=3, epochs=1)
    assert np.array_equal(plain[:, 0], mixed[:, 0])
    before = plain[:, 1].astype(float)
    difference = before - np.roll(before, 1, axis=0)
    weight = 1 + ((mixed[:, 1] - before) * difference).sum() / (difference**2).sum()
    assert np.abs(mixed[:, 1] - (weight * before + (1 - weight) * np.roll(before, 1, axis=0))).max() < 1.5
    digits = build(tmp_path / "c", "--dataset_name", "digits", "--variant", "Mi/4", "--verify_images", "False")
    grid = augmentation_grid(digits, rows=2, epochs=1)
    assert grid.shape == (2, 2, 8, 8, 3)
    assert (grid[..., 0] == grid[..., 2]).all()


def test_the_script_draws_a_picture(pets, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    script = load_script("visualize")
    out = tmp_path / "out"
    argv = ["visualize.py", "augmentation", "--train_dir", pets, "--variant", "test/4", "--output_dir", str(out)]
    monkeypatch.setattr(sys, "argv", [*argv, "--random_erasing", "0.5"])
    script.main()
    assert "erased with probability 0.5" in capsys.readouterr().out
    with Image.open(out / "augmentation.png") as picture:
        assert picture.width > 700
        assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 100
    monkeypatch.setattr(sys, "argv", ["visualize.py", "attention"])
    with pytest.raises(SystemExit) as end:
        script.main()
    assert end.value.code == 2
    assert "invalid choice: 'attention'" in capsys.readouterr().err


def test_without_matplotlib_there_is_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="plot"):
        draw_grid(np.zeros((1, 1, 4, 4, 3), dtype=np.uint8), "", tmp_path / "x.png")
