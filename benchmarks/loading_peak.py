"""How much memory loading takes at its peak, over the size of the weights: the embedded model, on Linux.

    python benchmarks/loading_peak.py [--weights int4 --weights int8]

Each load runs in a fresh process with the libraries imported: from the GGUF file and from a float32 directory, each
with an empty cache and then, in another process, with what was kept. A table, and a JSON line a load in the record.

peak: the most memory resident meanwhile; held: resident afterwards, when every weight was read once. Both are in MiB
above what the imports take. weights: the bytes of the weights, in MiB. ratio: peak over weights; 1.3 is the bar.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from sparse_attention_decoder.measure.machine import facts
from sparse_attention_decoder.models.identity import weights as fingerprint
from sparse_attention_decoder.models.loading import default_gguf, load
from sparse_attention_decoder.models.weights import FORMS

SOURCES, STARTS = ("gguf", "directory"), ("first", "next")
MIB = 1 << 20


def main() -> None:
    """Load in processes of their own, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", action="append", help="repeat for several; default: all four forms")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"))
    parser.add_argument("--load", nargs=2, metavar=("SOURCE", "WEIGHTS"), help="only load, and print what it took")
    given = parser.parse_args()
    if given.load:
        print(json.dumps(measured(*given.load)))
        return
    machine = facts()
    print(f"{'source':10} {'weights':8} {'start':6} {'peak':>6} {'held':>6} {'weights':>8} {'ratio':>6} {'s':>6}")
    with tempfile.TemporaryDirectory() as folder, given.out.open("a", encoding="utf-8") as file:
        directory = f"{folder}/model"
        load(weights="float32")[0].save_pretrained(directory)
        for name in SOURCES:
            for weights in given.weights or FORMS:
                for start in STARTS:
                    source = str(default_gguf()) if name == "gguf" else directory
                    found = in_a_process(source, weights, f"{folder}/{name}-{weights}")
                    ratio = found["peak_mib"] / found["weights_mib"]
                    print(
                        f"{name:10} {weights:8} {start:6} {found['peak_mib']:6.0f} {found['held_mib']:6.0f} "
                        f"{found['weights_mib']:8.0f} {ratio:6.2f} {found['seconds']:6.1f}"
                    )
                    line = {"source": name, "weights": weights, "start": start, **found, "ratio": ratio}
                    file.write(json.dumps({**line, "cpu": machine["cpu"], "commit": machine["commit"]}) + "\n")


def in_a_process(source: str, weights: str, cache: str) -> dict[str, Any]:
    """What a load takes in a fresh process with this cache directory."""
    command = [sys.executable, __file__, "--load", source, weights]
    environment = {**os.environ, "SPARSE_ATTENTION_DECODER_CACHE": cache}
    told = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(json.loads(told))


def measured(source: str, weights: str) -> dict[str, float]:
    """What a load takes in this process."""
    # resets the peak to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = resident("VmRSS"), time.perf_counter()
    model, _ = load(source, weights=weights)
    seconds = time.perf_counter() - begun
    peak = resident("VmHWM")
    size = sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())
    # reads every weight; what is mapped from a file counts from then on
    fingerprint(model)
    held = resident("VmRSS")
    return {
        "peak_mib": (peak - before) / MIB, "held_mib": (held - before) / MIB, "weights_mib": size / MIB,
        "seconds": seconds,
    }  # fmt: skip


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at the peak."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
