"""SparseAttention on a tiny model: ids and text in, everything that can come out, every wrong input."""

import threading

import pytest
import torch
from tiny import BITING, CONTEXT, FORCED, VOCABULARY, build, greedy, prompt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StoppingCriteria

from sparse_attention_decoder import AttentionConfig, SparseAttention, SparseCache
from sparse_attention_decoder.errors import ContextLengthError, InputError, NonFiniteError
from sparse_attention_decoder.trace import Trace

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def tokenizer(template: str | None = None, spaced: bool = False) -> PreTrainedTokenizerFast:
    """One token a character: printable ASCII is within the tiny vocabulary; `spaced` writes a space after each."""
    backend = Tokenizer(models.WordLevel({chr(code): code for code in range(VOCABULARY)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if not spaced:
        backend.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
    fast.chat_template = template
    return fast


@pytest.fixture
def model() -> SparseAttention:
    return SparseAttention(BITING, build("llama"), tokenizer())


TEXT = "".join(chr(40 + (7 * i * i + i) % 60) for i in range(90))


def test_ids_in_gives_what_transformers_gives(model: SparseAttention) -> None:
    ids = prompt(2, 40)
    output = model(ids)
    assert torch.equal(output.logits, build("llama")(ids).logits)
    assert isinstance(output.past_key_values, SparseCache)


@torch.no_grad()
def test_the_cache_of_a_forward_decodes_sparsely(model: SparseAttention) -> None:
    cache = model(prompt(1, 40)).past_key_values
    model(prompt(1, 1), past_key_values=cache)
    assert cache.reads.sparse_steps == cache.reads.steps == 2
    assert cache.reads.tokens_read == 2 * 2 * (2 + 4 + 5)


def test_generate_takes_what_transformers_takes(model: SparseAttention) -> None:
    ids = prompt(1, 40)
    plain = greedy(SparseAttention(FORCED, build("llama")), ids, 6)
    assert torch.equal(plain.sequences, greedy(build("llama"), ids, 6).sequences)
    sampled = model.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=3, temperature=2.0)
    assert sampled.shape == (3, 46)


def test_complete_and_stream_write_the_same_text(model: SparseAttention) -> None:
    text = model.complete(TEXT, max_new_tokens=12, do_sample=False)
    assert text
    assert "".join(model.stream(TEXT, max_new_tokens=12, do_sample=False)) == text
    assert "".join(model.stream(TEXT, 12, on_prefill=lambda done, total: None, do_sample=False)) == text


def test_stream_reports_the_prompt_being_read(model: SparseAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_attention_decoder.models.reading.PREFILL_CHUNK", 32)
    seen: list[tuple[int, int]] = []
    list(model.stream(TEXT, 2, on_prefill=lambda done, total: seen.append((done, total)), do_sample=False))
    assert seen == [(32, 88), (64, 88), (88, 88)]


def test_leaving_a_stream_ends_the_generation(model: SparseAttention) -> None:
    pieces = model.stream(TEXT, max_new_tokens=900, do_sample=False)
    next(pieces)
    pieces.close()
    assert [thread.name for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name] == []


def test_a_failing_stream_raises_instead_of_waiting(model: SparseAttention) -> None:
    class Broken(StoppingCriteria):
        def __call__(self, *args: object, **kwargs: object) -> torch.Tensor:
            raise RuntimeError("broken criteria")

    with pytest.raises(RuntimeError, match="broken criteria"):
        list(model.stream(TEXT, 4, stopping_criteria=[Broken()]))


def test_the_chat_template_is_used_where_there_is_one() -> None:
    model = SparseAttention(BITING, build("llama"), tokenizer(TEMPLATE))
    chat = model.tokenizer.decode(model.prompt_ids("hello")[0])
    assert chat == "<user>hello>"
    assert model.tokenizer.decode(model.prompt_ids("hello", chat=False)[0]) == "hello"


def test_prefill_leaves_the_cache_that_a_forward_leaves(
    model: SparseAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_attention_decoder.models.reading.PREFILL_CHUNK", 16)
    for tokens in (50, 49, 48, 17, 16, 1):
        ids = prompt(2, tokens)
        chunked, whole = model.prefill(ids), model(ids).past_key_values
        assert chunked.reads.sparse_steps == 0
        for one, other in zip(chunked.layers, whole.layers, strict=True):
            torch.testing.assert_close(one.keys, other.keys, rtol=1e-4, atol=1e-4)


def test_trace_names_the_tokens_read_and_their_weights(model: SparseAttention) -> None:
    trace = model.trace(TEXT)
    assert isinstance(trace, Trace)
    assert "".join(trace.tokens) == TEXT
    assert len(trace.heads) == 2 * 2
    for head in trace.heads:
        assert len(head.positions) == 2 + 4 + 5
        assert {0, 1, 86, 87, 88, 89} <= set(head.positions.tolist())
        assert head.positions.tolist() == sorted(set(head.positions.tolist()))
        assert "".join(head.texts) == "".join(TEXT[position] for position in head.positions)
        torch.testing.assert_close(head.weights.sum(-1), torch.ones(2))
        assert 0 < head.missing_mass < 1
        position, text, weight = head.top(1)[0]
        assert text == TEXT[position]
        assert weight == pytest.approx(float(head.weights.mean(0).max()))
    assert str(trace).count("\n") == 3
    with pytest.raises(KeyError, match="no trace of layer 7"):
        trace.head(7, 0)


def test_trace_weights_are_the_softmax_over_the_tokens_read() -> None:
    """At full budget the traced weights are the ones eager attention reports."""
    dense = build("llama")
    dense.set_attn_implementation("eager")
    model = SparseAttention(FORCED, build("llama"), tokenizer())
    expected = dense(model.prompt_ids(TEXT), output_attentions=True).attentions
    trace = model.trace(TEXT)
    for layer in range(2):
        for head in range(2):
            exact = expected[layer][0, 2 * head : 2 * head + 2, -1]
            torch.testing.assert_close(trace.head(layer, head).weights, exact, rtol=1e-3, atol=1e-5)


def test_a_dense_trace_reads_everything() -> None:
    trace = SparseAttention(AttentionConfig(), build("llama"), tokenizer()).trace("abc")
    assert [head.positions.tolist() for head in trace.heads] == [[0, 1, 2]] * 4
    assert trace.heads[0].missing_mass == 0.0
    assert len(SparseAttention(AttentionConfig(), build("llama"), tokenizer()).trace("a").tokens) == 1


def test_attributes_and_module_behaviour(model: SparseAttention) -> None:
    assert model.config is BITING
    assert model.tokenizer is not None
    assert model.context_length == CONTEXT
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in build("llama").parameters())
    assert model.to(torch.float64)(prompt(1, 8)).logits.dtype == torch.float64


@pytest.mark.parametrize(
    ("ids", "error", "says"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), InputError, "at least one token"),
        (torch.zeros(4, dtype=torch.int64), InputError, "expected \\[B, T\\]"),
        ([[1, 2]], InputError, "expected \\[B, T\\]"),
        (torch.zeros(1, 4), InputError, "expected integers"),
        (torch.zeros(1, 4, dtype=torch.bool), InputError, "expected integers"),
        (torch.tensor([[1, VOCABULARY]]), InputError, f"{VOCABULARY} is outside the vocabulary"),
        (torch.tensor([[-1, 3]]), InputError, "-1 is outside the vocabulary"),
        (torch.zeros(1, CONTEXT + 1, dtype=torch.int64), ContextLengthError, "shorten the prompt by 2"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate", "prefill"])
def test_wrong_ids_are_refused_before_work_starts(
    model: SparseAttention, ids: object, error: type[Exception], says: str, call: str
) -> None:
    with pytest.raises(error, match=says):
        getattr(model, call)(ids)


def test_a_prompt_and_new_tokens_beyond_the_context_are_refused_with_the_way_out(model: SparseAttention) -> None:
    with pytest.raises(ContextLengthError, match="max_new_tokens=24"):
        model.generate(prompt(1, 1000), max_new_tokens=25)
    with pytest.raises(ContextLengthError, match="exceed the model's context"):
        model.complete("x" * CONTEXT)
    assert len(model.complete("x" * (CONTEXT - 3), do_sample=False)) <= 3
    cache = model(prompt(1, CONTEXT)).past_key_values
    with pytest.raises(ContextLengthError, match="1025 tokens exceed"):
        model(prompt(1, 1), past_key_values=cache)


@pytest.mark.parametrize("call", ["complete", "stream", "trace"])
def test_wrong_text_is_refused_at_the_call(model: SparseAttention, call: str) -> None:
    with pytest.raises(InputError, match="prompt is empty"):
        getattr(model, call)(" \n")
    with pytest.raises(InputError, match="needs a tokenizer"):
        getattr(SparseAttention(BITING, build("llama")), call)("hello")
    with pytest.raises(InputError, match="no chat template"):
        getattr(model, call)("hello", chat=True)


def test_nan_weights_are_refused_at_loading() -> None:
    broken = build("llama")
    broken.model.layers[1].self_attn.k_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.self_attn\.k_proj\.weight"):
        SparseAttention(BITING, broken)
