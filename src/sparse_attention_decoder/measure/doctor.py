"""What `sparse-decoder doctor` says: versions, backends, threads, the model."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version

import torch

from sparse_attention_decoder import __version__
from sparse_attention_decoder.errors import ModelLoadError
from sparse_attention_decoder.kernels import Request
from sparse_attention_decoder.kernels.cpu import isa
from sparse_attention_decoder.models.kept import cache_directory
from sparse_attention_decoder.models.loading import default_gguf
from sparse_attention_decoder.models.memory import gguf_bytes
from sparse_attention_decoder.models.tuned import shipped, told
from sparse_attention_decoder.tables import BACKENDS, load


def facts() -> Iterator[tuple[str, str]]:
    """Pairs of a name and what is so, one a line."""
    yield "sparse_attention_decoder", __version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield "torch", torch.__version__
    yield "transformers", version("transformers")
    yield "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    yield "device", torch.cuda.get_device_name() if device.type == "cuda" else "cpu, no CUDA device"
    for name, row in BACKENDS.items():
        kernels = load(row)()
        reason = kernels.refuses(Request(device, torch.float32, 64))
        usable = f"usable; contexts of {kernels.crossover_tokens} tokens and more are read sparsely"
        detail = f"{isa()}; " if reason is None and name == "cpu" else ""
        yield f"backend {name}", detail + usable if reason is None else f"not usable: {reason}"
    try:
        place = default_gguf()
        yield "default model", str(place)
        forms, whole = gguf_bytes(place)
        each = ", ".join(f"{size} bytes in {form}" for form, size in forms.items())
        yield "its KV, a token", f"{each}; beside int8 or int4 {whole} for the newest tokens, which stay whole"
    except ModelLoadError as error:
        yield "default model", f"not found: {error}"
    for name, config in shipped().items():
        yield f"default for {name}", f"tuned: {told(config)}"
    yield "converted models", str(cache_directory())
