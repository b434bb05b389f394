"""Models with weights of 8 or 4 bits: packed one matrix at a time, kept on disk and mapped into memory from there."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from sparse_attention_decoder.errors import ConfigError, ModelLoadError, SparseAttentionError, UnsupportedError
from sparse_attention_decoder.models import gguf_file
from sparse_attention_decoder.models.conversion import GGUF_ERRORS, check_gguf
from sparse_attention_decoder.models.kept import identity, keep, reason
from sparse_attention_decoder.models.packed import ROWS_AT_ONCE, Int4Linear, Packed
from sparse_attention_decoder.models.tensor_file import TensorFile, Weight, mapped, safetensors_of
from sparse_attention_decoder.models.weights import cast, fill, replace, require_cpu

# raise it when what is written changes: what older versions left is then packed again
_FORMAT = 2
_FILE, _INDEX = "packed.safetensors", "model.safetensors.index.json"
# the arguments that say where a model is: its tokenizer is there too
WHERE = {"cache_dir", "gguf_file", "local_files_only", "revision", "subfolder", "token", "trust_remote_code"}
_OTHERS = {"attn_implementation", "device_map", "dtype", "torch_dtype"}

Stage = Callable[[str], None]
Whole = Callable[[], PreTrainedModel]


def load_packed(
    place: Path | str, weights: str, model_kwargs: dict[str, Any], stage: Stage, load_whole: Whole
) -> tuple[PreTrainedModel, Path | str]:
    """A model with its weights in int8 or int4, and where its tokenizer is.

    Args:
        place: a GGUF file, a directory with config.json, or a name on the hub.
        load_whole: gives the model in bfloat16, for those that transformers rebuilds while it loads them.
    Raises:
        ConfigError: arguments that packed weights do not go with. UnsupportedError: another device than the CPU.
        ModelLoadError: no model, or a damaged one. CacheDirectoryError: no place to keep the packed one.
    """
    _check(weights, model_kwargs)
    where = {key: value for key, value in model_kwargs.items() if key in WHERE}
    is_gguf = isinstance(place, Path) and place.is_file()
    files = [Path(place)] if is_gguf else _files(place, where)
    # the layout of int4 is that of the instruction set, and PyTorch may change it
    capability = torch.backends.cpu.get_cpu_capability() if weights == "int4" else ""
    versions = (torch.__version__.split("+")[0], transformers.__version__.split(".")[0])
    stem = Path(place).stem if is_gguf else Path(place).name

    def write(draft: Path) -> None:
        if is_gguf:
            check_gguf(files[0])
        stage(f"packing {stem} to {weights}, once")
        try:
            config = _config(place, where)
            if is_gguf:
                file = str(files[0].absolute())
                AutoTokenizer.from_pretrained(files[0].parent, gguf_file=file).save_pretrained(draft)
                config.save_pretrained(draft)
            model = _empty(config, model_kwargs)
            found = gguf_file.weights_of(files[0], model) if is_gguf else safetensors_of(files[1:])
        except SparseAttentionError:
            raise
        except GGUF_ERRORS as error:
            raise ModelLoadError(f"cannot load the causal language model {place}: {reason(error)}") from error
        _write(draft / _FILE, model, weights, found or {}, stage, load_whole)

    folder = keep(f"{stem[:40]}-{weights}-{identity(files, 'packed', _FORMAT, capability, *versions)}", write)
    stage("loading weights")
    home = folder if is_gguf else place
    try:
        model = _empty(_config(home, where), model_kwargs)
        if isinstance(home, str) or (home / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(home, **where)
    except GGUF_ERRORS as error:
        raise ModelLoadError(f"cannot load the causal language model {place}: {reason(error)}") from error
    _assign(replace(model, weights), mapped(folder / _FILE))
    return model.eval(), home


@torch.no_grad()
def packed_copy(model: PreTrainedModel, weights: str) -> PreTrainedModel:
    """A copy of a model in memory with its weights in int8 or int4, for transformers' own attention; the model stays.

    Raises:
        UnsupportedError: a model that is not on the CPU.
    """
    require_cpu(weights, {str(parameter.device) for parameter in model.parameters()})
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    with init_empty_weights():
        twin: PreTrainedModel = type(model)._from_config(config, dtype=torch.bfloat16)
    twin.tie_weights()
    replace(twin, weights)
    names, state, tensors = _names(twin), model.state_dict(), dict[str, Tensor]()
    for name, layer in twin.named_modules():
        if isinstance(layer, Packed):
            filled = type(layer)(layer.out_features, layer.in_features)
            fill(filled, model.get_submodule(name))
            tensors |= {names[f"{name}.{part}"]: tensor for part, tensor in filled.named_buffers()}
    for name, tensor in _kept(twin).items():
        if name not in tensors:
            tensors[name] = state[name].to(tensor.dtype, copy=True)
    _assign(twin, tensors)
    return twin.eval()


def _check(weights: str, model_kwargs: dict[str, Any]) -> None:
    if other := sorted(model_kwargs.keys() - WHERE - _OTHERS):
        raise ConfigError(
            f"weights={weights!r} cannot be loaded with {', '.join(other)}; "
            f"load the model with transformers and pass it, with weights={weights!r}"
        )
    dtype = model_kwargs.get("dtype", model_kwargs.get("torch_dtype"))
    if dtype not in (None, "auto", torch.bfloat16, "bfloat16"):
        raise ConfigError(f"weights={weights!r} go with dtype=torch.bfloat16, got {dtype}; leave it out")
    devices = model_kwargs.get("device_map") or {}
    require_cpu(weights, {str(place) for place in (devices.values() if isinstance(devices, dict) else [devices])})


def _files(place: Path | str, where: dict[str, Any]) -> list[Path]:
    """config.json and the safetensors of a directory or of a hub name, which is downloaded."""
    options = {key: value for key, value in where.items() if key not in ("trust_remote_code", "gguf_file")}

    def get(name: str) -> Path | None:
        found = cached_file(place, name, _raise_exceptions_for_missing_entries=False, **options)
        return None if found is None else Path(found)

    try:
        config, single, index = get("config.json"), get("model.safetensors"), None
        if single is None and (index := get(_INDEX)) is not None:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        files = [config, *map(get, names)]
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        hint = "; it is no local path: check name and network, or pass a path" if isinstance(place, str) else ""
        raise ModelLoadError(f"cannot load the causal language model {place}: {reason(error)}{hint}") from error
    missing = [name for name, file in zip(["config.json", *names], files, strict=True) if file is None]
    if missing:
        raise ModelLoadError(
            f"cannot pack the weights of {place}: it has no {', '.join(missing[:3])}; "
            "get all of it, or load the model with transformers and pass it"
        )
    return [file for file in files if file is not None]


def _config(place: Path | str, where: dict[str, Any]) -> Any:
    if isinstance(place, Path) and place.is_file():
        return AutoConfig.from_pretrained(place.parent, gguf_file=str(place.absolute()))
    config = AutoConfig.from_pretrained(place, **where)
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{place} is quantised already; load it without weights=...")
    return config


def _empty(config: Any, model_kwargs: dict[str, Any]) -> PreTrainedModel:
    """The model without memory for its weights; buffers such as rotary frequencies are real."""
    given = {key: model_kwargs[key] for key in ("attn_implementation", "trust_remote_code") if key in model_kwargs}
    with init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **given)
    model.tie_weights()
    return model


def _names(model: nn.Module) -> dict[str, str]:
    """For every tensor of a model's state the first of the names it has, under which it is kept."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def _kept(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    return {name: state[name] for name in _names(model).values()}


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    model.load_state_dict({name: tensors[kept] for name, kept in _names(model).items()}, assign=True)
    model.requires_grad_(False)


def _write(
    path: Path, model: PreTrainedModel, weights: str, found: Mapping[str, Weight], stage: Stage, load_whole: Whole
) -> None:
    """Pack what was found for an empty model, a matrix at a time; or the model as transformers loads it, in memory."""
    plain_names = _names(model)
    transposed = {name for name, layer in model.named_modules() if isinstance(layer, Conv1D)}
    replace(model, weights)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Packed)}
    names, kept = _names(model), _kept(model)
    packed = {names[f"{name}.{part}"]: name for name, layer in layers.items() for part, _ in layer.named_buffers()}
    # a file has a shared matrix under one of its names or under all of them
    sources = {plain_names[name]: weight for name, weight in found.items() if name in plain_names}
    matrices = {name: sources.get(plain_names[f"{name}.weight"]) for name in layers}
    plain = {name: tensor for name, tensor in kept.items() if name not in packed}
    weighed = {name: sources.get(plain_names[name]) for name, tensor in plain.items() if tensor.is_meta}
    if None in matrices.values() or None in weighed.values():
        # transformers renames, merges or splits the weights of some families while it loads them
        stage("loading weights in bfloat16, to be packed in memory")
        _write_all(path, _kept(cast(load_whole(), weights)))
        return
    with TensorFile(path, kept) as file:
        for done, (name, layer) in enumerate(layers.items()):
            stage(f"packing to {weights}, matrix {done + 1} of {len(layers)}")
            weight = matrices[name]
            assert weight is not None
            for part, tensor in _pack(f"{name}.weight", layer, weight, name in transposed).items():
                file.put(names[f"{name}.{part}"], tensor)
        for name, tensor in plain.items():
            source = weighed.get(name)
            file.put(name, tensor if source is None else _checked(name, source.rows(0, None), tensor).to(tensor.dtype))


def _write_all(path: Path, tensors: dict[str, Tensor]) -> None:
    with TensorFile(path, tensors) as file:
        for name, tensor in tensors.items():
            file.put(name, tensor)


def _pack(name: str, layer: Packed, weight: Weight, is_transposed: bool) -> dict[str, Tensor]:
    """Codes and scales of a layer like this one."""
    rows, columns = layer.out_features, layer.in_features
    filled = type(layer)(rows, columns)
    whole = _checked(name, weight.rows(0, None), torch.empty(columns, rows, device="meta")).T if is_transposed else None
    for start in range(0, rows, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, rows)
        groups = weight.groups(start, stop) if isinstance(filled, Int4Linear) else None
        if isinstance(filled, Int4Linear) and groups is not None:
            filled.fill_codes(start, *groups)
            continue
        part = weight.rows(start, stop) if whole is None else whole[start:stop]
        filled.fill(start, _checked(name, part, torch.empty(stop - start, columns, device="meta")))
    return dict(filled.named_buffers())


def _checked(name: str, found: Tensor, expected: Tensor) -> Tensor:
    if found.shape != expected.shape or not found.is_floating_point():
        raise ModelLoadError(
            f"{name} is {found.dtype} {[*found.shape]} where the model has numbers {[*expected.shape]}; "
            "the checkpoint does not fit its config"
        )
    return found
