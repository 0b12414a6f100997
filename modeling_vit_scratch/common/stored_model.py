# SPDX-License-Identifier: Apache-2.0
"""A stored model with the image processor that fits it: what is trained on, evaluated, predicted with and drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils.hub import cached_file

from ..configuration_vit_scratch import ViTScratchConfig
from ..image_processing_vit_scratch import ViTScratchImageProcessor
from ..modeling_vit_scratch import ViTScratchPreTrainedModel
from .errors import InputError


@contextmanager
def loading(what: str) -> Iterator[None]:
    """
    Turns what loading raises into one message for people.

    Args:
        what: flag and name, e.g. "MODEL outputs/pets".
    """
    try:
        yield
    except Exception as error:  # parsers of damaged, foreign and hostile files raise anything
        raise InputError(f"{what} can't be loaded: {str(error).strip() or type(error).__name__}") from error


def load_stored_model(
    kind: type[ViTScratchPreTrainedModel], what: str, name: str, hub: dict[str, Any], **overrides: Any
) -> tuple[Any, ViTScratchImageProcessor, set[str]]:
    """
    Args:
        kind: the model's class.
        what: what a message calls it, e.g. "MODEL outputs/pets".
        name: whatever `from_pretrained` reads: a folder, a file, an id on the Hub.
        hub: `revision` and `cache_dir`.
        overrides: further arguments of `from_pretrained`, e.g. `dtype`: else weights have that of the file.

    Returns:
        The model, the image processor, and the names of the weights that were not there.

    Raises:
        InputError: if one of the two can't be loaded.
    """
    with loading(what):
        model, info = kind.from_pretrained(name, output_loading_info=True, **hub, **overrides)
        # Where weights were adapted or converted, the loader knows the processor that fits.
        processor = model.image_processor or stored_processor(name, hub, model.config)
    return model, processor, set(info["missing_keys"])


def stored_processor(name: str, hub: dict[str, Any], config: ViTScratchConfig) -> ViTScratchImageProcessor:
    """
    The image processor beside a model; of a model that has none, the default one in its size.

    Raises:
        OSError, ValueError: if there is one, and it can't be read or fetched.
    """
    try:
        return ViTScratchImageProcessor.from_pretrained(name, **hub)
    except OSError:  # not there, or a failure: a connection that breaks must not give other pixels in silence
        if cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, **hub):
            raise
    return default_processor(config)


def default_processor(config: ViTScratchConfig) -> ViTScratchImageProcessor:
    """In the size and with the channels of a network."""
    height, width = config.image_hw
    return ViTScratchImageProcessor(num_channels=config.num_channels, size={"height": height, "width": width})
