# SPDX-License-Identifier: Apache-2.0
# modeling_vit_scratch 0.2.0
"""
What older versions of transformers lack, so that no other file asks which version is there.

A model folder is opened by whatever transformers its user has: 4.57 and every later one. Each stand-in says up to
which version it is for. It goes when nobody needs that version any more; with the last one, this file.
"""

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import torch
import transformers
from torch import Tensor


VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
OLDEST = "4.57"  # cards say it too
if VERSION < (4, 57):
    raise ImportError(
        f"This model needs transformers {OLDEST} or newer, and {transformers.__version__} is installed. "
        "Update it: pip install --upgrade transformers"
    )


def make_importable(name: str) -> None:
    """
    Makes a module of a model folder an attribute of its package, which transformers (all versions) leaves out. Without
    it dill copies the module's classes into a pickle: `datasets.map` with several processes then fails.
    """
    package, _, module = name.rpartition(".")
    setattr(sys.modules[package], module, sys.modules[name])


# Configurations -------------------------------------------------------------------------------------------------------

if VERSION >= (5, 4):
    from huggingface_hub.dataclasses import strict
    from transformers import PreTrainedConfig
else:  # up to 5.3: a configuration is no dataclass
    from transformers import PretrainedConfig as _Config  # the spelling of 4.57, which 5 knows too

    class PreTrainedConfig(_Config):
        """Makes a keyword-only dataclass of each subclass, and gives `__post_init__` what is no field."""

        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            dataclasses.dataclass(init=False, eq=False, repr=False, kw_only=True)(cls)
            cls.__init__ = _init_fields

        def __post_init__(self, **kwargs: Any) -> None:
            labels = {name: value for name in ("id2label", "label2id") if (value := getattr(self, name)) is not None}
            _Config.__init__(self, **kwargs | labels)

    def _init_fields(self: PreTrainedConfig, **kwargs: Any) -> None:
        for name in ("id2label", "label2id"):  # fields of newer versions
            setattr(self, name, kwargs.pop(name, None))
        for field in dataclasses.fields(self):
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        self.__post_init__(**kwargs)

    def strict(cls: type) -> type:
        """Types of fields are not checked here. `validate_vit` checks the values."""
        return cls


# Backbones ------------------------------------------------------------------------------------------------------------

if VERSION >= (5, 1):
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin, filter_output_hidden_states
else:  # up to 5.0
    from transformers.utils import backbone_utils as _backbones

    class BackboneConfigMixin(_backbones.BackboneConfigMixin):
        def set_output_features_output_indices(self, out_features: Any, out_indices: Any) -> None:
            self._out_features, self._out_indices = _backbones.get_aligned_output_features_output_indices(
                out_features=out_features, out_indices=out_indices, stage_names=self.stage_names
            )

    class BackboneMixin(_backbones.BackboneMixin):
        """Sets itself up when the model is made, not in a call of its own."""

        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            self._init_backbone(config)

    def filter_output_hidden_states(forward: Callable) -> Callable:
        """Leaves out hidden states that only the backbone itself has asked for."""

        @functools.wraps(forward)
        def filtered(self: Any, *args: Any, **kwargs: Any) -> Any:
            is_wanted = kwargs.get("output_hidden_states", self.config.output_hidden_states)
            output = forward(self, *args, **kwargs)
            if not is_wanted:
                output = type(output)(**{name: value for name, value in output.items() if name != "hidden_states"})
            return output

        return filtered


# Networks -------------------------------------------------------------------------------------------------------------

if VERSION >= (5, 2):
    from transformers.utils.output_capturing import capture_outputs
else:  # up to 5.1: another name
    from transformers.utils.generic import check_model_inputs as capture_outputs

if VERSION >= (5, 1):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
else:  # up to 5.0
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as _ATTENTION_FUNCTIONS

    class ALL_ATTENTION_FUNCTIONS:
        @staticmethod
        def get_interface(implementation: str | None, default: Callable) -> Callable:
            return default if implementation in (None, "eager") else _ATTENTION_FUNCTIONS[implementation]


if VERSION >= (5, 2):
    from transformers.masking_utils import create_bidirectional_mask
elif VERSION >= (5, 0):  # up to 5.1: the argument has another name
    from transformers.masking_utils import create_bidirectional_mask as _create_mask

    def create_bidirectional_mask(config: Any, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        return _create_mask(config=config, input_embeds=inputs_embeds, attention_mask=attention_mask)

else:  # up to 4.57

    def create_bidirectional_mask(config: Any, inputs_embeds: Tensor, attention_mask: Tensor) -> Any:
        """Which tokens (B, T) are attended to, in the form that the attention implementation takes."""
        if "flash" in (config._attn_implementation or ""):
            return attention_mask
        kept = attention_mask[:, None, None, :].bool()  # (B, 1, 1, T)
        if config._attn_implementation == "sdpa":
            return kept.expand(-1, -1, inputs_embeds.shape[1], -1)
        lowest = torch.finfo(inputs_embeds.dtype).min
        return torch.zeros_like(kept, dtype=inputs_embeds.dtype).masked_fill(~kept, lowest)


if VERSION >= (5, 0):
    from transformers import initialization as init
else:  # up to 4.57

    def _guarded(initialize: Callable) -> staticmethod:
        """Leaves alone what a checkpoint has filled."""

        @functools.wraps(initialize)
        def guarded(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return tensor if getattr(tensor, "_is_hf_initialized", False) else initialize(tensor, *args, **kwargs)

        return staticmethod(guarded)

    class init:
        normal_, trunc_normal_ = _guarded(torch.nn.init.normal_), _guarded(torch.nn.init.trunc_normal_)
        zeros_, constant_ = _guarded(torch.nn.init.zeros_), _guarded(torch.nn.init.constant_)
        xavier_uniform_ = _guarded(torch.nn.init.xavier_uniform_)


# Image processors -----------------------------------------------------------------------------------------------------

if VERSION >= (5, 0):
    from huggingface_hub.dataclasses import validate_typed_dict
    from transformers.image_utils import httpx
else:  # up to 4.57: names are checked, types are not; and requests is the client for URLs
    from transformers.image_utils import requests  # so named, it need not be installed for newer versions

    def validate_typed_dict(schema: type, data: dict[str, Any]) -> None:
        if unknown := data.keys() - schema.__annotations__.keys():
            raise TypeError(f"{schema.__name__} has no {', '.join(sorted(unknown))}.")

    class httpx:
        class Client(requests.Session):
            def __init__(self, timeout: float, follow_redirects: bool, max_redirects: int) -> None:
                super().__init__()
                self.timeout, self.max_redirects = timeout, max_redirects

            def stream(self, method: str, url: str) -> requests.Response:
                response = self.request(method, url, timeout=self.timeout, stream=True)
                response.iter_bytes = functools.partial(response.iter_content, 65_536)
                return response


if VERSION >= (5, 4):
    from transformers.image_processing_backends import PilBackend
    from transformers.image_utils import SizeDict
    from transformers.processing_utils import ImagesKwargs
else:  # up to 5.3
    from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
    from transformers.image_utils import SizeDict as _SizeDict
    from transformers.image_utils import validate_preprocess_arguments

    class SizeDict(_SizeDict):
        """`dict` gives the entries that are not `None`."""

        def __iter__(self) -> Iterator[tuple[str, int]]:
            return ((name, value) for name, value in vars(self).items() if value is not None)

    _CHECKED = (
        "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize",
        "image_mean", "image_std",
    )  # fmt: skip
    _OTHERS = (
        "default_to_square", "do_convert_rgb", "do_pad", "pad_size", "data_format", "input_data_format", "device",
        "return_tensors", "disable_grouping", "image_seq_length",
    )  # fmt: skip
    ImagesKwargs = TypedDict("ImagesKwargs", dict.fromkeys(_CHECKED + _OTHERS, Any), total=False)

    class PilBackend(BaseImageProcessor):
        """Settings are those of the class, of the object, or of one call."""

        valid_kwargs: type
        default_to_square, rescale_factor, backend, model_input_names = True, 1 / 255, "pil", ["pixel_values"]

        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            self._valid_kwargs_names = list(self.valid_kwargs.__annotations__)
            settings = {key: copy.deepcopy(getattr(type(self), key, None)) for key in self._valid_kwargs_names}
            settings |= {key: value for key, value in kwargs.items() if key in settings and value is not None}
            for key, value in self._standardize_kwargs(**settings).items():
                setattr(self, key, value)

        @classmethod
        def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            settings = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.valid_kwargs.__annotations__}
            return super().from_dict(image_processor_dict | settings, **kwargs)

        def to_dict(self) -> dict[str, Any]:
            settings = {key: dict(v) if isinstance(v, SizeDict) else v for key, v in super().to_dict().items()}
            del settings["_valid_kwargs_names"]
            return {k: v for k, v in settings.items() if v is not None or getattr(type(self), k, None) is not None}

        def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
            for key in ("size", "crop_size", "pad_size"):
                if kwargs.get(key) is not None and not isinstance(kwargs[key], SizeDict):
                    is_square = key != "size" or kwargs["default_to_square"]
                    kwargs[key] = SizeDict(**get_size_dict(kwargs[key], None, True, is_square, key))
            for key in ("image_mean", "image_std"):
                kwargs[key] = tuple(kwargs[key]) if isinstance(kwargs[key], list) else kwargs[key]
            return kwargs

        def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
            validate_preprocess_arguments(**{key: kwargs[key] for key in _CHECKED})

        def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
            validate_typed_dict(self.valid_kwargs, kwargs)
            kwargs = {key: getattr(self, key) for key in self._valid_kwargs_names} | kwargs
            kwargs = self._standardize_kwargs(**kwargs)
            self._validate_preprocess_kwargs(**kwargs)
            return self._preprocess_image_like_inputs(images, *args, **kwargs)


__all__ = [
    "ALL_ATTENTION_FUNCTIONS", "BackboneConfigMixin", "BackboneMixin", "ImagesKwargs", "PilBackend",
    "PreTrainedConfig", "SizeDict", "capture_outputs", "create_bidirectional_mask", "filter_output_hidden_states",
    "httpx", "init", "make_importable", "strict", "validate_typed_dict",
]  # fmt: skip
