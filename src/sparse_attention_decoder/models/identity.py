"""Which model this is: its architecture and a fingerprint of its weights."""

import hashlib
import json
import logging

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import ConfigError

logger = logging.getLogger(__name__)

# of a config: where it came from and who wrote it, which no number depends on; the weights say their dtype themselves
_CIRCUMSTANCES = ("_name_or_path", "transformers_version", "architectures", "dtype")


def architecture(config: PreTrainedConfig) -> str:
    """16 hex digits that change with any setting of a model's config."""
    settings = {key: value for key, value in config.to_dict().items() if key not in _CIRCUMSTANCES}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def weights(model: PreTrainedModel) -> str:
    """16 hex digits that change with any weight, so that fine-tunes of one architecture differ.

    Of every weight's bits the sum is taken, as whole numbers: exact, so the same however many threads add up,
    and one pass at the speed of memory (measured: 30 ms for 135 million float32).
    """
    digest, known = hashlib.sha256(), set()
    # not the parameters alone: packed matrices are buffers
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        if weight.is_meta or weight.numel() == 0 or weight.data_ptr() in known:
            continue
        known.add(weight.data_ptr())
        raw = weight.detach().flatten().view(torch.uint8)
        # words of eight bytes can only be looked at where they begin at one
        raw = raw.clone() if raw.storage_offset() % 8 else raw
        whole = len(raw) // 8 * 8
        digest.update(f"{int(raw[:whole].view(torch.int64).sum())} {raw[whole:].tolist()} {raw[:64].tolist()}".encode())
    return digest.hexdigest()[:16]


def of(model: PreTrainedModel) -> str:
    """Architecture and weights, as `AttentionConfig.tuned_for` names them."""
    return f"{architecture(model.config)}-{weights(model)}"


def check(model: PreTrainedModel, config: AttentionConfig) -> None:
    """Warn of a config that was tuned for other weights.

    Raises:
        ConfigError: it was tuned for another architecture.
    """
    if config.tuned_for is None:
        return
    found = of(model)
    if config.tuned_for.split("-")[0] != found.split("-")[0]:
        raise ConfigError(
            f"this config was tuned for another model ({config.tuned_for}; this {model.config.model_type} is {found}); "
            "tune one for this model with `sparse-decoder tune`, or set tuned_for=None to use it all the same"
        )
    if config.tuned_for != found:
        logger.warning(
            "this config was tuned for other weights of this architecture, or the same in another form (%s; these are "
            "%s): what it lost was not measured on these",
            config.tuned_for, found,
        )  # fmt: skip
