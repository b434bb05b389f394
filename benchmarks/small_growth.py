"""How time per token grows with the context on a CPU: the embedded model's compiled step, 512 to 32,768 tokens.

    python benchmarks/small_growth.py [--weights int4] [--kv-dtype int8] [--threads 2] [--peers .peers]

The cache is filled synthetically: 2,048 real tokens are read, and their keys and values repeated. The model was made
for 8,192 tokens; only times are taken here. Lengths take turns; medians; a JSON line a length, appended to the record.

With --peers, OpenVINO takes its turns at the longest length too: it has no cache to fill, so it reads the same tokens,
repeated, which takes it many minutes.
"""

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from sparse_attention_decoder import AttentionConfig, SparseAttention, SparseCache
from sparse_attention_decoder.measure.machine import facts
from sparse_attention_decoder.measure.peer import PEERS, Peer, model_for
from sparse_attention_decoder.measure.texts import texts

LENGTHS = (512, 2048, 8192, 16384, 32768)
READ, ROUNDS, TURN = 2048, 6, 16
PEER = "openvino"


@torch.inference_mode()
def main() -> None:
    """Fill, take turns, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--kv-dtype")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--peers", type=Path, help="folder that scripts/peers has installed OpenVINO in")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = AttentionConfig(kv_dtype=given.kv_dtype)
    decoder = SparseAttention.from_pretrained(None, config, weights=given.weights, compile=True)
    text = next(iter(texts([]).values()))
    ids = decoder.prompt_ids(text, chat=False)[:, : READ + (ROUNDS + 1) * TURN]
    caches = {length: filled(decoder, ids, length) for length in given.lengths}
    seconds: dict[int, list[float]] = {length: [] for length in given.lengths}
    with ExitStack() as stack:
        peers = [] if given.peers is None else read_by_peers(stack, given, ids[0, :READ].tolist())
        theirs: list[list[float]] = [[] for _ in peers]
        for round_ in range(ROUNDS + 1):
            for length in given.lengths:
                for at in range(READ + round_ * TURN, READ + (round_ + 1) * TURN):
                    begun = time.perf_counter()
                    decoder.model(ids[:, at : at + 1], past_key_values=caches[length], use_cache=True).logits.argmax(-1)
                    # the first round builds indexes, and is not counted
                    seconds[length] += [time.perf_counter() - begun] if round_ else []
            for (peer, _), times in zip(peers, theirs, strict=True):
                steps = peer.step([0] * TURN).ms
                times += steps if round_ else []
    machine = facts()
    common = {"threads": given.threads, "cpu": machine["cpu"], "commit": machine["commit"]}
    with given.out.open("a", encoding="utf-8") as file:
        for length in given.lengths:
            reads = caches[length].reads
            line = {
                "engine": "ours", "weights": given.weights, "kv_dtype": given.kv_dtype, "context": length,
                "step_ms": statistics.median(seconds[length]) * 1e3, "share_read": reads.share_read,
                "sparse_share": reads.sparse_steps / reads.steps, **common,
            }  # fmt: skip
            print(json.dumps(line))
            file.write(json.dumps(line) + "\n")
        for (_, options), times in zip(peers, theirs, strict=True):
            line = {
                "engine": PEER,
                **options,
                "context": max(given.lengths),
                "step_ms": statistics.median(times),
                **common,
            }
            print(json.dumps(line))
            file.write(json.dumps(line) + "\n")


def read_by_peers(stack: ExitStack, given: argparse.Namespace, ids: list[int]) -> list[tuple[Peer, dict[str, object]]]:
    """OpenVINO with each set of options, having read as many tokens as the longest length."""
    length, found = max(given.lengths), []
    for options in PEERS[PEER].option_sets:
        peer = stack.enter_context(Peer.installed_in(given.peers, PEER, given.threads))
        peer.load(model_for(PEER, None, ""), length + (ROUNDS + 1) * TURN + 1, dict(options))
        peer.read((ids * (length // len(ids) + 1))[:length])
        found.append((peer, dict(options)))
    return found


def filled(decoder: SparseAttention, ids: torch.Tensor, length: int) -> SparseCache:
    """A cache of `length` tokens, real ones and their repetitions."""
    cache = decoder.prefill(ids[:, : min(length, READ)])
    cache.reserve(length + (ROUNDS + 1) * TURN)
    for layer in cache.sparse_layers:
        keys, values = (x.clone() for x in layer.plain())
        while layer.state.buffer.length < length:
            layer.state.append(keys, values)
    return cache


if __name__ == "__main__":
    main()
