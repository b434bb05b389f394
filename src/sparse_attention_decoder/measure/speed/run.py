"""All settings of a bench, one after another: contexts, batches, dtypes; each with fresh processes."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.decoder import SparseAttention
from sparse_attention_decoder.errors import ContextLengthError, InputError, WorkerError
from sparse_attention_decoder.measure.compare import STOCK, TURN
from sparse_attention_decoder.measure.machine import facts
from sparse_attention_decoder.measure.process import Process
from sparse_attention_decoder.measure.record import OURS, Records, Row, as_cell, model_name
from sparse_attention_decoder.measure.speed import others
from sparse_attention_decoder.measure.speed.bench import Listener, Setting, Side, baselines, measure, missing
from sparse_attention_decoder.measure.texts import passages, texts

_WORKER = [sys.executable, "-m", "sparse_attention_decoder.measure.speed.worker"]


@dataclass(frozen=True)
class Plan:
    """What to measure: every context with every batch size and dtype, and in each of them every config.

    out: the record file. model: what `load` takes. threads: None for PyTorch's own choice. rounds: timed turns of
    8 tokens for every side. texts: the first is decoded. peers: the folder of their environments, or None for none.
    weights, kv_dtype, compile: of our sides, see `Setting`.
    """

    contexts: tuple[int, ...]
    configs: tuple[AttentionConfig, ...]
    out: Path
    model: str | None = None
    batches: tuple[int, ...] = (1,)
    dtypes: tuple[str, ...] = ("float32",)
    threads: int | None = None
    device: str = "cpu"
    rounds: int = 6
    texts: tuple[Path, ...] = ()
    peers: Path | None = None
    weights: str | None = None
    kv_dtype: str | None = None
    compile: bool = False


def run(plan: Plan, listener: Listener) -> Iterator[tuple[Setting, list[tuple[Row, Row]]]]:
    """Measure what the record file lacks, a setting at a time; rows are on disk before they are yielded.

    Raises:
        InputError: too little text, or sides that cannot be compared. ContextLengthError: too long a context.
        WorkerError: a side's process failed.
    """
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda was asked for, and this PyTorch sees none; use cpu, or install a CUDA build")
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    machine = facts(plan.device)
    records = Records(plan.out, machine)
    # only its tokenizer is wanted here: the weights are loaded by the sides' processes
    decoder = SparseAttention.from_pretrained(plan.model, dtype=torch.bfloat16)
    directory = str(decoder.model.config._name_or_path)
    for dtype, batch, context in product(plan.dtypes, plan.batches, plan.contexts):
        setting = _setting(plan, decoder, dtype, batch, context, machine["bandwidth_gb_s"])
        wished = [replace(config, kv_dtype=plan.kv_dtype) for config in plan.configs]
        todo = missing(setting, wished, records)
        peers = [] if plan.peers is None else others.missing(setting, plan.peers, records)
        wanted = [
            *(setting.cell(OURS, as_cell(config)) for config in baselines(plan.kv_dtype)),
            setting.cell(STOCK, {}),
        ]
        if not todo and not peers and all(records.has("speed", cell) for cell in wanted):
            listener.stage(f"context {context}, batch {batch}, {dtype}: all in {plan.out}")
            continue
        with ExitStack() as stack:
            ours = stack.enter_context(Process([*_WORKER, "ours"], setting.threads))
            stock = stack.enter_context(Process([*_WORKER, "stock"], setting.threads))
            joined = _joined(setting, peers, plan, directory, stack, listener)
            rows = list(measure(setting, todo, ours, stock, joined, listener))
        for cell, result in rows:
            records.add("speed", cell, result)
        yield setting, rows


def _joined(
    setting: Setting, cells: list[Row], plan: Plan, directory: str, stack: ExitStack, listener: Listener
) -> list[Side]:
    """The peers that work; one that does not is named and left out, so that the others are measured."""
    found = []
    for cell in cells:
        assert plan.peers is not None
        try:
            found.append(others.join(setting, cell, plan.peers, directory, stack, listener))
        except (WorkerError, InputError) as error:
            listener.stage(f"left out: {error}")
    return found


def _setting(
    plan: Plan, decoder: SparseAttention, dtype: str, batch: int, context: int, bandwidth_gb_s: float
) -> Setting:
    limit, tokens = decoder.context_length, context + (plan.rounds + 1) * TURN
    if limit is not None and tokens > limit:
        raise ContextLengthError(
            f"context {context} and {tokens - context} tokens to decode exceed the model's context of {limit}; "
            f"use --context {limit - tokens + context} at most"
        )
    name, text = next(iter(texts(list(plan.texts)).items()))
    ids = passages({name: text}, lambda part: list(decoder.require_tokenizer()(part).input_ids), tokens * batch)
    return Setting(
        model_name(plan.model), plan.model, dtype, plan.device, plan.threads or torch.get_num_threads(), context,
        plan.rounds, ids.view(batch, tokens).tolist(), bandwidth_gb_s, plan.weights, plan.kv_dtype, plan.compile,
    )  # fmt: skip
