# SPDX-License-Identifier: Apache-2.0
"""Offline, on one thread per process, on the CPU; and the tiny model that most tests use: rectangular on purpose."""

import gc
import os


# Before transformers and huggingface_hub are imported: they read these once.
os.environ.update(
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_XET="1", TOKENIZERS_PARALLELISM="false"
)
os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")

import pytest
import torch

from modeling_vit_scratch import ViTScratchConfig


torch.set_num_threads(1)

try:
    import openvino
except ImportError:
    pass
else:
    # On a processor with AMX each core brings a stack for signals, and puts back the one before when it ends: of two
    # that end in another order, a dead one, on which a later signal ends the process. So none ends.
    _cores, _make_core = [], openvino.Core.__init__

    def _keep_core(core, *args, **kwargs):
        _cores.append(core)
        _make_core(core, *args, **kwargs)

    openvino.Core.__init__ = _keep_core


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def config() -> ViTScratchConfig:
    """Two layers, width 32, 4 heads, patches of 4 pixels on an image of 16 rows and 24 columns, three labels."""
    return ViTScratchConfig.from_variant("test/4", num_labels=3)


@pytest.fixture
def pixel_values() -> torch.Tensor:
    """Two images of the size that `config` has, (2, 3, 16, 24)."""
    return torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pets(tmp_path) -> str:
    """A folder of twenty-four images of three classes: with a quarter held out, five steps of four in an epoch."""
    from tiny_images import class_folders  # not before it is needed: it imports what fine-tuning needs

    return str(class_folders(tmp_path / "pets", each=8))


@pytest.fixture(autouse=True, scope="module")
def _old_objects_are_not_collected_again():
    """accelerate collects garbage before each training: half a second with all that the libraries have made."""
    gc.collect()
    gc.freeze()
