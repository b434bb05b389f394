"""generate and demo: text in, text out, and how sparse compares with dense on it."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparse_attention_decoder.cli.terminal import (
    CompileOption,
    KvOption,
    MissingOption,
    ModelOption,
    QualityOption,
    WeightsOption,
    console,
    load_model,
    out,
    progress_bar,
)
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.tables import POLICIES

if TYPE_CHECKING:
    from sparse_attention_decoder.decoder import SparseAttention
    from sparse_attention_decoder.measure.compare import Comparison, Side
    from sparse_attention_decoder.models.cache import SparseCache
    from sparse_attention_decoder.selection import Held

_DEFAULTS = AttentionConfig()

TokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens to write at most.")]
TopKOption = Annotated[int, typer.Option("--top-k", help="Tokens retrieved per KV head and step, at least.")]
ThresholdOption = Annotated[
    float, typer.Option("--threshold", help="Every token above this share of attention is read too; 0 turns it off.")
]
WindowOption = Annotated[int, typer.Option("--window", help="Newest tokens, always read.")]
SinksOption = Annotated[int, typer.Option("--sinks", help="First tokens, always read.")]
PolicyOption = Annotated[str, typer.Option("--policy", help=f"Who chooses: {', '.join(POLICIES)}.")]
BelowOption = Annotated[
    str,
    typer.Option(
        "--dense-below", help="Contexts shorter than this are read whole; auto: until sparse is measured to be faster."
    ),
]

CacheTokensOption = Annotated[
    int | None,
    typer.Option("--max-cache-tokens", help="Tokens held per layer and KV head at most; what is beyond is evicted."),
]
CacheBytesOption = Annotated[
    str | None,
    typer.Option(
        "--max-cache-bytes",
        help="Bytes that keys, values and sketch may take, such as 200MB: precision goes first, then tokens.",
    ),
]
_UNITS = {"": 1, "B": 1, **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGT", start=1)}}
_UNITS |= {f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGT", start=1)}

StatsOption = Annotated[
    Path | None, typer.Option("--stats", help="Write what each step and layer read here, one JSON object a line.")
]
LosslessOption = Annotated[
    bool, typer.Option("--lossless", help="Draft sparsely, verify densely: the text is that of dense decoding.")
]
_BOTH = (
    "Decode greedily both ways, compare speed, KV bytes and tokens; --compile is for both of ours, not transformers."
)
CompareOption = Annotated[bool, typer.Option("--compare", help=_BOTH)]


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; left out, it is read from --file or standard input.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Read the prompt from this UTF-8 file; PROMPT, if given too, follows it."),
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    kv_dtype: KvOption = None,
    compile_steps: CompileOption = False,
    max_new_tokens: TokensOption = 256,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy; higher samples.")] = 0.0,
    top_k: TopKOption = _DEFAULTS.top_k,
    threshold: ThresholdOption = _DEFAULTS.threshold or 0.0,
    window: WindowOption = _DEFAULTS.attention_window,
    sinks: SinksOption = _DEFAULTS.sink_tokens,
    policy: PolicyOption = _DEFAULTS.policy,
    dense_below: BelowOption = "auto",
    max_cache_tokens: CacheTokensOption = None,
    max_cache_bytes: CacheBytesOption = None,
    missing_mass: MissingOption = None,
    quality: QualityOption = None,
    stats: StatsOption = None,
    dense: Annotated[bool, typer.Option("--dense", help="Read everything: the baseline.")] = False,
    lossless: LosslessOption = False,
    compare: CompareOption = False,
) -> None:
    """Continue or answer a prompt; tokens appear as they come.

    Examples:

      sparse-decoder generate "Why is the sky blue?"

      sparse-decoder generate --file report.txt "What does the report conclude?"

      cat report.txt | sparse-decoder generate --raw -n 64 --compare

      sparse-decoder generate --file long.txt --max-cache-bytes 100MB "What happens in the end?"
    """
    text = _prompt(prompt, file)
    _require_one_way(compare, dense, lossless, stats)
    config = AttentionConfig(
        top_k, threshold, window, sinks, "dense" if dense else policy, dense_below=dense_below_of(dense_below),
        kv_dtype=kv_dtype and kv_dtype.value, max_cache_tokens=max_cache_tokens,
        max_cache_bytes=_bytes(max_cache_bytes), missing_mass=missing_mass, quality=quality and quality.value,
    )  # fmt: skip
    decoder, chat = load_model(model, config, weights, compile=compile_steps), False if raw else None
    if compare:
        _show(_compare(decoder, text, chat, max_new_tokens), ", compiled" if compile_steps else "")
        return
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    _write(decoder, text, max_new_tokens, chat, sampling, lossless, stats)


def _require_one_way(compare: bool, dense: bool, lossless: bool, stats: Path | None) -> None:
    if compare and (dense or stats):
        other = "--dense" if dense else "--stats"
        raise InputError(f"{other} and --compare exclude each other: --compare runs dense and sparse")
    if lossless and (dense or compare):
        other = "--dense" if dense else "--compare"
        raise InputError(f"{other} and --lossless exclude each other: lossless decoding is dense, in fewer passes")


def _write(
    decoder: "SparseAttention",
    text: str,
    max_new_tokens: int,
    chat: bool | None,
    sampling: dict[str, Any],
    lossless: bool,
    stats: Path | None,
) -> None:
    from sparse_attention_decoder.models.lossless import Lossless
    from sparse_attention_decoder.models.statistics import Statistics, record

    if stats is not None and (stats.is_dir() or not stats.parent.is_dir()):
        raise InputError(f"cannot write {stats}: give the name of a file in a folder that is there")
    cache = _cache(decoder)
    if stats is not None:
        record(cache)
    drafting = Lossless() if lossless else None
    if drafting is not None:
        sampling = {**sampling, "lossless": drafting}
    with progress_bar("reading the prompt", "tokens") as on_prefill:
        pieces = decoder.stream(text, max_new_tokens, chat, on_prefill, past_key_values=cache, **sampling)
        first = next(pieces, "")
    print(first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    if decoder.config.is_capped:
        _show_held(cache.held)
    if drafting is not None:
        console.print(str(drafting), highlight=False)
    if stats is not None:
        found = Statistics.of(cache)
        stats.write_text("".join(json.dumps(row) + "\n" for row in found.rows()), encoding="utf-8")
        console.print(f"{found}. {stats} has it by step and layer", markup=False, highlight=False)


def demo(
    tokens: Annotated[int, typer.Option(help="Length of the document, in tokens.", min=64)] = 5900,
    max_new_tokens: TokensOption = 64,
    model: ModelOption = None,
    weights: WeightsOption = None,
) -> None:
    """The main job on a real text: dense and sparse side by side.

    The document is Python's language reference, as `pydoc_data.topics` in every Python has it, cut
    to 5,900 tokens. The embedded model reads it once, then answers a question about it with
    dense and with sparse attention.
    """
    from sparse_attention_decoder.measure.demo import QUESTION, document

    decoder = load_model(model, AttentionConfig(), weights)
    prompt = f"{document(decoder, tokens)}\n\n{QUESTION}"
    console.print(f"The document: Python's language reference, cut to about {tokens} tokens.")
    console.print(f"The question: {QUESTION}\n")
    _show(_compare(decoder, prompt, None, max_new_tokens))


def dense_below_of(text: str) -> int | None:
    """The setting that --dense-below names."""
    if text == "auto":
        return None
    if not text.isdecimal():
        raise InputError(f"--dense-below is {text!r}; expected a number of tokens, or auto")
    return int(text)


def _bytes(text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text.strip().upper())
    if found is None or found[2] not in _UNITS:
        raise InputError(f"--max-cache-bytes is {text!r}; expected a number of bytes such as 200MB, 1.5GB or 512MiB")
    return int(float(found[1]) * _UNITS[found[2]])


def _cache(decoder: "SparseAttention") -> "SparseCache":
    from sparse_attention_decoder.models.cache import SparseCache

    return SparseCache(decoder.model.config, decoder.config)


def _show_held(held: "Held") -> None:
    console.print(
        f"cache: {held.bytes_now / 1e6:.1f} MB held, {held.bytes_most / 1e6:.1f} MB at most, in "
        f"{' and '.join(sorted({*held.kept_as}))}; of {held.tokens_seen} tokens {held.tokens_evicted} were evicted"
    )


def _prompt(prompt: str | None, file: Path | None) -> str:
    parts = []
    if file is not None:
        try:
            parts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {file} as UTF-8 text: {error}") from error
    if prompt is not None:
        parts.append(prompt)
    if not parts:
        if sys.stdin.isatty():
            raise InputError("no prompt; give it as an argument, with --file, or on standard input")
        parts.append(sys.stdin.read())
    return "\n\n".join(parts)


def _compare(decoder: "SparseAttention", text: str, chat: bool | None, max_new_tokens: int) -> "Comparison":
    from sparse_attention_decoder.measure.compare import side_by_side

    if decoder.config.is_capped:
        raise InputError("--compare holds the context three times over; leave --max-cache-tokens and -bytes out of it")
    ids = decoder.prompt_ids(text, chat)
    decoder.check_ids(ids, new_tokens=max_new_tokens)
    with progress_bar("reading the prompt", "tokens") as on_prefill, console.status("") as status:

        def on_token(side: "Side") -> None:
            status.update(f"decoding, {side.name}: {len(side.ids)} of {max_new_tokens} tokens")

        return side_by_side(decoder, ids, max_new_tokens, on_prefill, on_token)


def _show(comparison: "Comparison", how: str = "") -> None:
    rate = comparison.prompt_tokens / comparison.prefill_seconds
    out.print(
        f"prompt: {comparison.prompt_tokens} tokens, read densely once in "
        f"{comparison.prefill_seconds:.1f} s ({rate:.0f} tokens/s)\n"
    )
    table = Table(
        "",
        "tokens/s",
        "ms per token",
        "KV bytes read",
        "tokens",
        title="decoding, in turns on one prefill",
        title_justify="left",
    )
    for side in comparison.sides:
        label = f"{side.name}, dense" if side.name == "transformers" else f"ours, {side.name}{how}"
        table.add_row(
            label,
            f"{side.tokens_per_second:.1f}",
            f"{1000 / side.tokens_per_second:.1f}",
            f"{side.share_read:.1%}",
            str(len(side.ids)),
        )
    out.print(table)
    sparse, dense = comparison.side("sparse"), comparison.side("dense")
    stock = comparison.side("transformers")
    out.print(
        f"speed: sparse is {sparse.tokens_per_second / dense.tokens_per_second:.2f}x dense on our cache, "
        f"{sparse.tokens_per_second / stock.tokens_per_second:.2f}x transformers"
    )
    out.print(f"read: sparse avoided {1 - sparse.share_read:.1%} of the KV cache's bytes, its index counted")
    out.print(f"agreement: the first {comparison.agreeing} of {comparison.shortest} tokens are the same as dense\n")
    for side in (dense, sparse):
        out.print(f"[bold]{side.name}:[/bold] ", end="")
        out.print(side.text.strip(), markup=False, highlight=False)
