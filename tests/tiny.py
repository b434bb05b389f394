"""Tiny random models for tests: seeded, offline, with weights large enough that attention matters."""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparse_attention_decoder import AttentionConfig, SparseCache

# matrices this small lose more to waiting for a second thread than it gives
torch.set_num_threads(1)

VOCABULARY = 128
CONTEXT = 1024

# the budget covers any context of these models: everything is attended densely
FULL = AttentionConfig(dense_below=0, attention_window=CONTEXT)
# the budget is exceeded, but the threshold selects every token: all of it goes through the sparse kernels
FORCED = AttentionConfig(dense_below=0, sink_tokens=2, attention_window=4, top_k=5, threshold=1e-30)
# 11 tokens of a longer context are read, so the outcome depends on the selection
BITING = AttentionConfig(dense_below=0, sink_tokens=2, attention_window=4, top_k=5, threshold=None)

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
_HEAD_DIM = {"head_dim": 16}
_GPT2_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}

# family -> what its config needs beside vocabulary and special tokens
SIZES: dict[str, dict[str, Any]] = {
    "llama": _SIZES,
    "qwen2": _SIZES,
    "qwen3": {**_SIZES, **_HEAD_DIM},
    "qwen3_moe": {**_SIZES, **_HEAD_DIM, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "mistral": {**_SIZES, **_HEAD_DIM, "sliding_window": None},
    "phi3": _SIZES,
    "gemma3_text": {
        **_SIZES,
        **_HEAD_DIM,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
    },
    "gpt2": _GPT2_SIZES,
    "gpt_neox": _SIZES,
    "smollm3": {**_SIZES, "no_rope_layers": [1, 0]},
    "olmo2": _SIZES,
    "granite": {**_SIZES, "attention_multiplier": 0.3, "residual_multiplier": 0.8, "logits_scaling": 2.0},
    "gemma": {**_SIZES, **_HEAD_DIM},
    "mixtral": {**_SIZES, **_HEAD_DIM, "num_local_experts": 4, "sliding_window": None},
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
    },
    "llama4_text": {
        **_SIZES,
        **_HEAD_DIM,
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": 16,
        "no_rope_layers": [1, 0],
        "num_local_experts": 2,
        "intermediate_size_mlp": 96,
    },
    "qwen3_next": {
        **_SIZES,
        **_HEAD_DIM,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "diffllama": {**_SIZES, **_HEAD_DIM},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "minimax": {
        **_SIZES,
        **_HEAD_DIM,
        "num_local_experts": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 16,
    },
    "deepseek_v3": {
        **_SIZES,
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 2,
    },
    "gemma2": {**_SIZES, **_HEAD_DIM},
    "gpt_oss": {**_SIZES, **_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2},
    "falcon": {**_SIZES, "new_decoder_architecture": False, "multi_query": True},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": CONTEXT},
    "codegen": {**_GPT2_SIZES, "rotary_dim": 8},
    "t5": {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bert": {**_SIZES, "is_decoder": False},
}

# layers that a SparseCache takes over; the others are left to transformers
SPARSE_LAYERS = {
    "llama": 2,
    "qwen2": 2,
    "qwen3": 2,
    "qwen3_moe": 2,
    "mistral": 2,
    "phi3": 2,
    "gemma3_text": 1,
    "gpt2": 2,
    "gpt_neox": 2,
    "smollm3": 2,
    "olmo2": 2,
    "granite": 2,
    "gemma": 2,
    "mixtral": 2,
    "opt": 2,
    "llama4_text": 1,
    "qwen3_next": 1,
}


# these know no SDPA in transformers
_EAGER_ONLY = ("gemma2", "gpt_oss", "mpt", "bloom", "codegen", "mamba")


def build(
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    auto_class: Any = AutoModelForCausalLM,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny random model in eval mode; it never says end-of-text unless told which token that is."""
    settings = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = AutoConfig.for_model(family, **{**settings, **SIZES[family], **overrides})
    # transformers draws the weights from the global generator
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config, attn_implementation="eager" if family in _EAGER_ONLY else "sdpa")
    _enlarge(model)
    return model.to(dtype).eval()


def prompt(rows: int, tokens: int, seed: int = 0) -> Tensor:
    """Token ids [rows, tokens], none of them special."""
    return torch.randint(2, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def left_pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Rows of ids [n] as one batch [B, T], padded on the left, and its mask."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    mask = torch.stack([torch.cat([row.new_zeros(width - len(row)), torch.ones_like(row)]) for row in rows])
    return ids, mask


def greedy(model: PreTrainedModel, ids: Tensor, tokens: int = 8, **options: Any) -> Any:
    """What `generate` gives for exactly `tokens` greedy tokens, logits and cache included."""
    given = {"attention_mask": torch.ones_like(ids), "min_new_tokens": tokens, "do_sample": False, **options}
    return model.generate(ids, max_new_tokens=tokens, return_dict_in_generate=True, output_logits=True, **given)


@torch.no_grad()
def replay(
    model: PreTrainedModel, config: AttentionConfig, turns: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, SparseCache]:
    """Logits [n, vocabulary] of one row's tokens, without `generate`, and the cache they leave.

    Args:
        turns: what was read at once, ids [n], and what was then decoded one by one, ids [m].
    """
    cache = SparseCache(model.config, config)
    logits = []
    for read, decoded in turns:
        for chunk in (read, *decoded.split(1)):
            if len(chunk):
                logits.append(model(chunk[None], past_key_values=cache).logits[0])
    return torch.cat(logits), cache


def trace(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that `enable` could leave something in."""
    state = {key: value for key, value in vars(model).items() if not key.startswith("_forward")}
    return {
        "attributes": {key: id(value) for key, value in state.items()},
        "hooks": [len(hooks) for key, hooks in vars(model).items() if key.startswith("_forward")],
        "implementations": [part.config._attn_implementation for part in model.modules() if hasattr(part, "config")],
        "config": copy.deepcopy(vars(model.config)),
        "generation_config": model.generation_config.to_dict() if model.can_generate() else None,
    }


def _enlarge(model: PreTrainedModel, factor: float = 6.0) -> None:
    # as drawn, attention is so even that any tokens would do
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not any(part in name for part in ("embed", "wte", "wpe", "lm_head", "shared")):
                weight.mul_(factor)
