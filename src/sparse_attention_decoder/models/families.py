"""Model families that cannot be hooked, or only partly. Ordinary families need no row."""

import inspect
import logging

from transformers import PreTrainedModel

from sparse_attention_decoder.errors import UnsupportedError

logger = logging.getLogger(__name__)

REFUSED = {
    "gemma2": "its attention logits are soft-capped, which the sparse kernels do not do",
    "gpt_oss": "its softmax has learned sink logits, which the sparse kernels do not know",
    "falcon": "its attention does not go through transformers' attention interface",
    "bloom": "its attention adds an ALiBi bias and does not go through transformers' attention interface",
    "mpt": "its attention adds an ALiBi bias and does not go through transformers' attention interface",
}


def check(model: PreTrainedModel, kv_dtype: str | None = None) -> None:
    """Refuse a model whose output would be wrong, by name, or with keys and values packed as `kv_dtype`.

    Raises:
        UnsupportedError: what the model does that sparse attention cannot.
    """
    config = model.config
    text = config.get_text_config(decoder=True)
    name = text.model_type
    if name in REFUSED:
        raise UnsupportedError(f"{name} cannot be decoded sparsely: {REFUSED[name]}; run it without enable()")
    if getattr(text, "attn_logit_softcapping", None):
        raise UnsupportedError(f"{name} cannot be decoded sparsely: {REFUSED['gemma2']}; run it without enable()")
    if config.is_encoder_decoder:
        raise UnsupportedError(f"{name} is an encoder-decoder; sparse decoding needs a decoder-only causal LM")
    if not model.can_generate():
        raise UnsupportedError(f"{type(model).__name__} does not generate text; load the model as a causal LM")
    takes_cache = "past_key_values" in inspect.signature(model.forward).parameters
    if not takes_cache or not model._supports_default_dynamic_cache():
        raise UnsupportedError(f"{name} keeps a cache of its own kind; sparse decoding needs one of keys and values")
    latent = getattr(text, "kv_lora_rank", None)
    if kv_dtype is not None and (latent or name == "diffllama"):
        what = "caches latents (MLA)" if latent else "takes differences of values"
        raise UnsupportedError(f"{name} {what}: it needs its cache in numbers; use kv_dtype=None")
    if latent:
        logger.warning("%s caches latents (MLA), not keys: its attention stays dense, correct but no faster", name)
