"""The copy of a model that drafts, its weights in int4: what it guesses is verified, so only speed depends on it."""

import logging
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import UnsupportedError
from sparse_attention_decoder.models import compiled
from sparse_attention_decoder.models.adapter import enable
from sparse_attention_decoder.models.packing import packed_copy

logger = logging.getLogger(__name__)

# by the model that they draft for, and gone with it; no part of it, so neither copied nor saved with it
_drafters: WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()


def is_smaller(model: PreTrainedModel) -> bool:
    """Whether a copy in int4 would be: the model is on a CPU, and its matrices are not packed already."""
    is_plain = any(type(layer) in (nn.Linear, Conv1D) for layer in model.modules())
    return is_plain and {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def packs(model: PreTrainedModel, weights: str | None) -> bool:
    """Whether a copy in int4 drafts for a model, as `Lossless.weights` says.

    Raises:
        UnsupportedError: "int4" of a model of which there is no smaller copy.
    """
    if weights == "int4" and not is_smaller(model):
        raise UnsupportedError('Lossless(weights="int4") packs a model of 16- or 32-bit weights on a CPU; use "own"')
    return weights == "int4" or (weights is None and compiled.is_installed(model) and is_smaller(model))


def drafter_of(model: PreTrainedModel) -> PreTrainedModel:
    """The copy of an enabled model that drafts for it, on its caches; made at the first call, and kept.

    Its linear layers are in int4 (a head that is tied to the embedding in int8), and its decode steps run compiled.
    It follows no later change of the model's weights: its guesses are then less often right.

    Raises:
        BackendError, UnsupportedError, CacheDirectoryError: see `compiled.install`.
    """
    kept = _drafters.get(model)
    if kept is None:
        logger.info("packing a copy of the model in int4, to draft with")
        # any config will do: what a step reads is the cache's
        kept = enable(packed_copy(model, "int4"), AttentionConfig())
        compiled.install(kept)
        _drafters[model] = kept
    return kept
