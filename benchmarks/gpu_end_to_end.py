"""Time a token of a whole model: Llama-3.1-8B in shape, weights random, the step one CUDA graph. Called by gpu.py.

Sides, on static caches filled with random keys and values, none of them prefilled:
    transformers: StaticCache and sdpa as they come, with the mask that a static cache needs.
    plain: StaticCache and PyTorch's fastest attention without a mask, the length frozen into the graph: the best dense.
    dense: our static cache, policy "dense".
    sparse: our static cache, a fixed budget.
What is no attention and no matrix product is compiled for all of them alike: as transformers runs it, some 35 small
kernels a layer would cost as much as sparse attention does.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import captured, dense, replayed
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.models.llama import modeling_llama

from sparse_attention_decoder import AttentionConfig, disable, enable
from sparse_attention_decoder.models.static import StaticSparseCache

LAYERS, HIDDEN, INNER, VOCABULARY = 32, 4096, 14336, 128256
# tokens that steps append to a cache, warm-up included
STEPS, FILLED = 64, 8192
PLAIN = "gpu_end_to_end_plain"


def model_of(
    query_heads: int, heads: int, dim: int, device: torch.device, backend: str | None, tiny: bool = False
) -> PreTrainedModel:
    """A Llama of random bfloat16 weights, made where it will run; `backend` of torch.compile, None for as it is."""
    size = (2, 64, 128, 256) if tiny else (LAYERS, HIDDEN, INNER, VOCABULARY)
    config = LlamaConfig(
        num_hidden_layers=size[0], hidden_size=size[1], intermediate_size=size[2], vocab_size=size[3],
        num_attention_heads=query_heads, num_key_value_heads=heads, head_dim=dim, max_position_embeddings=1 << 21,
        tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    for name, weight in model.named_parameters():
        nn.init.ones_(weight) if "norm" in name else nn.init.normal_(weight, std=0.02)
    # its frequencies are no weights, so they were lost with the meta device
    model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(config).to(device)
    if backend is not None:
        fuse(model, backend)
    return model


def fuse(model: PreTrainedModel, backend: str) -> None:
    """Compile norms, MLPs and the rotation of queries and keys in place."""
    for layer in model.model.layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            part.compile(backend=backend, dynamic=False)
    model.model.norm.compile(backend=backend, dynamic=False)
    rotate = torch.compile(modeling_llama.apply_rotary_pos_emb, backend=backend, dynamic=False)
    modeling_llama.apply_rotary_pos_emb = rotate


def attend_plainly(way: str, held: int) -> Callable[..., tuple[Tensor, None]]:
    """An attention function for transformers that reads the first `held` tokens, and asks for no mask."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return dense(way, query[:, :, 0], key[:, :, :held], value[:, :, :held], scaling).unsqueeze(1), None

    return attend


def sides(
    model: PreTrainedModel, context: int, sparse: AttentionConfig, way: str
) -> dict[str, Callable[[], StaticCache]]:
    """Each prepares the model and gives the cache to run it with."""
    capacity = -(-(context + STEPS) // 64) * 64
    whole = AttentionConfig(policy="dense", backend="triton")

    def theirs(name: str) -> StaticCache:
        disable(model)
        model.set_attn_implementation(name)
        return StaticCache(config=model.config, max_cache_len=capacity)

    def plain() -> StaticCache:
        AttentionInterface.register(PLAIN, attend_plainly(way, context + 1))
        return theirs(PLAIN)

    def own(config: AttentionConfig) -> StaticCache:
        disable(model)
        enable(model, config)
        return StaticSparseCache(model.config, config, capacity)

    return {
        "transformers": lambda: theirs("sdpa"), "plain": plain, "dense": lambda: own(whole),
        "sparse": lambda: own(sparse),
    }  # fmt: skip


def fill(cache: StaticCache, model: PreTrainedModel, batch: int, context: int, device: torch.device) -> None:
    """Random keys and values of `context` tokens in every layer, coded where the cache codes."""
    config = model.config
    for layer in cache.layers:
        for at in range(0, context, FILLED):
            shape = batch, config.num_key_value_heads, min(FILLED, context - at), config.head_dim
            layer.update(*(torch.empty(shape, dtype=torch.bfloat16, device=device).normal_() for _ in range(2)))
        if hasattr(layer, "code_prompt"):
            layer.code_prompt()


def one_side(
    model: PreTrainedModel, cache: StaticCache, batch: int, context: int, device: torch.device, timed: bool
) -> tuple[list[float], Tensor | None]:
    """Microseconds of steps behind `context` tokens; not `timed`, the logits of one step instead."""
    fill(cache, model, batch, context, device)
    room = cache.layers[0].keys.shape[2]
    ids, at = (torch.full((batch, 1), number, dtype=torch.int64, device=device) for number in (7, context))
    # of four dimensions, so that transformers takes it as it is: generate() too makes it outside of the step
    mask = (torch.arange(room, device=device) <= context).expand(batch, 1, 1, room)

    def step() -> Tensor:
        logits: Tensor = model(ids, attention_mask=mask, position_ids=at, past_key_values=cache, use_cache=True).logits
        return logits

    if not timed:
        return [], step()
    return replayed({"step": captured([step])}, 0.5, lambda: None, 8, STEPS - 10)["step"], None


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    batch: int,
    context: int,
    sparse: AttentionConfig,
    way: str,
    device: torch.device,
    timed: bool = True,
) -> dict[str, Any]:
    """Milliseconds a token of each side, all of them one after the other, twice; reasons where a side does not fit.

    way: of gpu_timing.DENSE, for the side "plain".
    Not `timed`, each side runs one step, and those that are dense have to agree.
    Raises:
        ArithmeticError: they do not.
    """
    times: dict[str, list[float]] = {}
    logits: dict[str, Tensor] = {}
    found: dict[str, Any] = {"way": way, "left_out": {}}
    for _ in range(2 if timed else 1):
        for name, prepare in sides(model, context, sparse, way).items():
            torch.manual_seed(context)
            cache = prepare()
            try:
                took, output = one_side(model, cache, batch, context, device, timed)
                times.setdefault(name, []).extend(took)
                if output is not None:
                    logits[name] = output
                if isinstance(cache, StaticSparseCache) and name == "sparse":
                    reads = cache.reads
                    found |= {
                        "tokens_read": reads.tokens_read / max(1, reads.steps),
                        "all_sparse": reads.steps == reads.sparse_steps,
                    }
            except torch.OutOfMemoryError as error:
                found["left_out"][name] = str(error).split(". ")[0]
            del cache
            torch.cuda.empty_cache()
    if logits:
        scale = logits["transformers"].abs().max()
        found["off"] = {name: float((of - logits["transformers"]).abs().max() / scale) for name, of in logits.items()}
        if max(found["off"]["plain"], found["off"]["dense"]) > 0.05:
            raise ArithmeticError(f"the dense sides disagree: {found['off']}")
    found["milliseconds"] = {name: round(statistics.median(of) / 1e3, 3) for name, of in times.items() if of}
    found["spread"] = {name: round((max(of) - min(of)) / statistics.median(of), 3) for name, of in times.items() if of}
    return found
