"""The text of a generation, piece by piece, while it goes on in a thread of its own."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from transformers import PreTrainedTokenizerBase, TextIteratorStreamer

from sparse_attention_decoder.models.stopping import StopWhen


def pieces(
    tokenizer: PreTrainedTokenizerBase, generate: Callable[[TextIteratorStreamer, StopWhen], object]
) -> Iterator[str]:
    """What `generate` gives to the streamer, as text. What it raises is raised here, behind the last piece.

    Args:
        generate: called in another thread; has to heed the criterion, which holds once the reader has left.
    When this ends, however it ends, `generate` has ended.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = StopWhen()

    def work() -> None:
        try:
            generate(streamer, stop)
        finally:
            # without this a failed generate would leave the reader waiting for ever
            streamer.end()

    with ThreadPoolExecutor(1) as executor:
        done = executor.submit(work)
        try:
            yield from streamer
            done.result()
        finally:
            stop.now.set()
