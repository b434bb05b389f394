"""read, ask and chat: a document read once, and questions about it."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparse_attention_decoder.cli.generate import (
    BelowOption,
    PolicyOption,
    SinksOption,
    ThresholdOption,
    TokensOption,
    TopKOption,
    WindowOption,
    dense_below_of,
)
from sparse_attention_decoder.cli.terminal import (
    CompileOption,
    KvOption,
    MissingOption,
    ModelOption,
    QualityOption,
    Weights,
    WeightsOption,
    console,
    load_model,
    out,
    progress_bar,
)
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.errors import InputError

if TYPE_CHECKING:
    from sparse_attention_decoder.session import Session

_DEFAULTS = AttentionConfig()

SessionArgument = Annotated[Path, typer.Argument(help="A session file, as `sparse-decoder read` writes it.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="0 is greedy; higher samples.")]


def read(
    file: Annotated[Path, typer.Argument(help="The document, UTF-8 text.")],
    out_file: Annotated[Path, typer.Option("--out", "-o", help="Where to keep what was read.")],
    model: ModelOption = None,
    weights: WeightsOption = None,
    kv_dtype: KvOption = None,
    top_k: TopKOption = _DEFAULTS.top_k,
    threshold: ThresholdOption = _DEFAULTS.threshold or 0.0,
    window: WindowOption = _DEFAULTS.attention_window,
    sinks: SinksOption = _DEFAULTS.sink_tokens,
    policy: PolicyOption = _DEFAULTS.policy,
    dense_below: BelowOption = "auto",
    missing_mass: MissingOption = None,
    quality: QualityOption = None,
) -> None:
    """Read a document once and keep it, to ask about it many times.

    The session file holds the document's tokens, keys and values, so it is as private as the document.
    Answers are read from it with the settings given here.

    Examples:

      sparse-decoder read report.txt --out report.session

      sparse-decoder ask report.session "What does the report conclude?"
    """
    from sparse_attention_decoder.measure.texts import text_of

    text = text_of(file)
    # found out before minutes of reading, not after
    if not out_file.parent.is_dir() or out_file.is_dir():
        raise InputError(f"cannot write {out_file}: give the name of a file in a folder that is there")
    config = AttentionConfig(
        top_k, threshold, window, sinks, policy, dense_below=dense_below_of(dense_below),
        kv_dtype=kv_dtype and kv_dtype.value, missing_mass=missing_mass, quality=quality and quality.value,
    )  # fmt: skip
    decoder = load_model(model, config, weights)
    begun = time.perf_counter()
    with progress_bar("reading the document", "tokens") as on_progress:
        session = decoder.read(text, on_progress)
    seconds = time.perf_counter() - begun
    with console.status(f"writing {out_file}"):
        session.save(out_file)
    tokens, size = session.ids.shape[1], out_file.stat().st_size / 1e6
    out.print(f"{out_file}: {tokens} tokens, read in {seconds:.1f} s ({tokens / seconds:.0f} tokens/s), {size:.0f} MB")


def ask(
    session: SessionArgument,
    question: Annotated[str, typer.Argument(help="What to ask about the document.")],
    model: ModelOption = None,
    weights: WeightsOption = None,
    compile_steps: CompileOption = False,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
) -> None:
    """Ask about a document that `read` has read; it is not read again.

    --model has to be the one that read it; another is refused.

    Example:

      sparse-decoder ask report.session "Who wrote the report?"
    """
    asked = _load(session, model, weights, compile_steps)
    _print(asked.stream(question, max_new_tokens, **_sampling(temperature)))


def chat(
    session: Annotated[
        Path | None,
        typer.Argument(help="A session file to talk about; left out, the conversation begins with nothing."),
    ] = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    compile_steps: CompileOption = False,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
) -> None:
    """Talk with the model, about a document that `read` has read or about nothing; it remembers every turn.

    A line is a message. /quit or Ctrl-D ends the conversation, Ctrl-C only the answer being written, which
    is then forgotten with its question. The session file stays as it is.

    Examples:

      sparse-decoder chat report.session

      sparse-decoder chat --temperature 0.7
    """
    if session is None:
        talk = load_model(model, AttentionConfig(), weights, compile=compile_steps).read(None)
    else:
        talk = _load(session, model, weights, compile_steps)
    for message in _messages():
        try:
            _print(talk.stream(message, max_new_tokens, remember=True, **_sampling(temperature)))
        except KeyboardInterrupt:
            console.print("\nstopped; this turn is forgotten")
        except InputError as error:
            # most often the context is full: a shorter message may still fit
            console.print(f"[red]error:[/red] {error}", highlight=False)


def _load(path: Path, model: str | None, weights: Weights | None, compile_steps: bool) -> "Session":
    from sparse_attention_decoder.session import Session

    decoder = load_model(model, AttentionConfig(), weights, compile=compile_steps)
    with console.status(f"opening {path}"):
        return Session.load(path, decoder)


def _messages() -> Iterator[str]:
    """Lines typed or piped in, until /quit or the end; empty ones are passed over."""
    is_typed = sys.stdin.isatty()
    if is_typed:
        # importing it is what gives input() editing and history; not every Python has it
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
        console.print("/quit or Ctrl-D ends the conversation, Ctrl-C an answer", style="dim")
    while True:
        try:
            line = input("> " if is_typed else "").strip()
        except EOFError:
            if is_typed:
                print()
            return
        if line == "/quit":
            return
        if line:
            yield line


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}


def _print(pieces: Any) -> None:
    # closed, so that the session is free again when this is left by Ctrl-C
    with contextlib.closing(pieces):
        with console.status("reading the question"):
            first = next(pieces, "")
        print(first, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
