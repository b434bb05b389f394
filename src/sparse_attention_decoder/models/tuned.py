"""What a model is read with where no config is given: one tuned for it, if we ship that, or the plain default."""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.models import identity

logger = logging.getLogger(__name__)

# files of `sparse-decoder tune`, shipped where they beat the plain default on text they were not tuned on
FOLDER = Path(__file__).with_name("tuned_configs")


def default_for(model: PreTrainedModel) -> AttentionConfig:
    """The config tuned for exactly these weights, on a CPU, or the plain one. A tuned one is logged once at info."""
    if model.device.type != "cpu" or torch.cuda.is_available():
        # measured on a CPU alone; where there is a GPU a model may be moved to it, and no backend there has a far field
        return AttentionConfig()
    architecture = identity.architecture(model.config)
    for config in shipped().values():
        # weights are only looked at where the architecture fits: it takes a pass over them
        fits = config.tuned_for is not None and config.tuned_for.split("-")[0] == architecture
        if fits and config.tuned_for == identity.of(model):
            _say(f"{model.config.model_type}: the default is a config tuned for it ({config.tuned_for})")
            return config
    return AttentionConfig()


def shipped() -> dict[str, AttentionConfig]:
    """Every config we ship, by the name of its model."""
    return {_read(path)["tuned_for"]: AttentionConfig.load(path) for path in sorted(FOLDER.glob("*.json"))}


def told(config: AttentionConfig) -> str:
    """What a tuned config reads, in words."""
    words = f"threshold {config.threshold:.2g}, window {config.attention_window}, floor {config.top_k}"
    words += f", far field times {config.far_field:g}" if config.far_field else ""
    scales = [scale for scale in config.layer_scales or () if scale is not None]
    return f"{words}, layers times {min(scales):g} to {max(scales):g}" if scales else words


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@cache
def _say(message: str) -> None:
    logger.info(message)
