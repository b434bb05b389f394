"""eval: quality against dense on the same weights, always by decoding token by token."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparse_attention_decoder.cli.bench import (
    BudgetList,
    ContextList,
    Dtype,
    NearOption,
    OutOption,
    PolicyList,
    TextList,
    ThreadsOption,
)
from sparse_attention_decoder.cli.terminal import (
    KvOption,
    ModelOption,
    WeightsOption,
    console,
    load_model,
    out,
    progress_bar,
)
from sparse_attention_decoder.errors import InputError

if TYPE_CHECKING:
    from sparse_attention_decoder.measure.evaluation import Listener
    from sparse_attention_decoder.measure.record import Row

PARTS = ("agreement", "retrieval", "answers")

PartsArgument = Annotated[
    list[str] | None, typer.Argument(help="agreement, retrieval, answers; default: agreement and retrieval.")
]
FileOption = Annotated[Path | None, typer.Option("--file", "-f", help="answers: JSON lines as in LongBench or L-Eval.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Of the weights; float32 where --weights leaves it open.")]


def evaluate(
    parts: PartsArgument = None,
    model: ModelOption = None,
    context: ContextList = [4096],
    policy: PolicyList = ["sketch", "quest", "window"],
    budget: BudgetList = ["default", "256"],
    window: NearOption = None,
    steps: Annotated[int, typer.Option(min=16, help="agreement: tokens decoded on every text.")] = 128,
    text: TextList = [],
    task: Annotated[list[str], typer.Option("--task", "-t", help="retrieval: RULER's tasks; default: all.")] = [],
    samples: Annotated[int, typer.Option(min=1, help="retrieval: examples of every task and length.")] = 5,
    seed: Annotated[int, typer.Option(help="retrieval: another seed, other examples.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Use the model's chat template; otherwise plain text.")] = False,
    file: FileOption = None,
    dtype: DtypeOption = None,
    weights: WeightsOption = None,
    kv_dtype: KvOption = None,
    threads: ThreadsOption = None,
    out_file: OutOption = Path("records/quality.jsonl"),
) -> None:
    """How far sparse decoding strays from dense: agreement, perplexity, retrieval, question answering.

    The context is read densely once and shared by all policies; what is measured is then decoded one token at
    a time under each. Dense has the same weights, keys and values, packed alike where --weights or --kv-dtype say
    so: what is told is what reading few tokens costs. Interrupted runs go on where they stopped.

    Examples:

      sparse-decoder eval agreement --context 4096 --text novel.txt --weights int4 --kv-dtype int8

      sparse-decoder eval retrieval --task niah_single --task vt --context 4096 --samples 11

      sparse-decoder eval answers --file questions.jsonl --chat
    """
    wanted, form = _parts(parts, file), "chat" if chat else "base"
    import torch

    from sparse_attention_decoder.measure.evaluation import Evaluation
    from sparse_attention_decoder.measure.grid import configs
    from sparse_attention_decoder.measure.machine import facts
    from sparse_attention_decoder.measure.record import Records, model_name
    from sparse_attention_decoder.measure.tasks import TASKS
    from sparse_attention_decoder.measure.texts import texts

    if threads is not None:
        torch.set_num_threads(threads)
    grid = [replace(one, kv_dtype=kv_dtype and kv_dtype.value) for one in configs(["dense", *policy], budget, window)]
    dtype = dtype or (None if weights else Dtype.float32)
    decoder = load_model(model, grid[0], weights, **({"dtype": dtype.value} if dtype else {}))
    with _listener() as listener:
        records = Records(out_file, facts())
        run = Evaluation(decoder, model_name(model), grid, records, listener, weights and weights.value)
        if "agreement" in wanted:
            run.agreement(texts(text), context, steps)
        if "retrieval" in wanted:
            run.retrieval(task or list(TASKS), context, form, samples, seed)
            _sum_up(run.records.rows)
        if file is not None:
            run.answers(file, form)
    out.print(f"records: {out_file}; sparse-decoder report {out_file} draws them", highlight=False)


def _sum_up(rows: list["Row"]) -> None:
    """Mean scores of all samples in the file, with intervals, and what each side scores more than dense."""
    from sparse_attention_decoder.measure.report.samples import scores

    out.print("\nretrieval in all, 95 % intervals:")
    for score in scores([row for row in rows if row["kind"] == "retrieval"]):
        told = f"{score.mean:5.1f} % ({score.low:.0f} to {score.high:.0f}) of {score.samples}"
        if score.dense_fails:
            told += "; dense cannot do it, so it says nothing"
        elif score.over_dense is not None:
            over = score.over_dense
            told += f"; {over.mean:+.1f} points over dense ({over.low:+.0f} to {over.high:+.0f})"
        out.print(f"{score.task} {score.length}, {score.side.label}: {told}", markup=False, highlight=False)


def _parts(parts: list[str] | None, file: Path | None) -> list[str]:
    """What to run: what is asked for; answers where there is a file, and else agreement and retrieval."""
    wanted = parts or (["answers"] if file else ["agreement", "retrieval"])
    for part in wanted:
        if part not in PARTS:
            raise InputError(f"{part!r} is no part of the evaluation; choose from {', '.join(PARTS)}")
    if ("answers" in wanted) != (file is not None):
        raise InputError("answers and a file of questions go together; give one with --file")
    return wanted


@contextmanager
def _listener() -> Iterator["Listener"]:
    from sparse_attention_decoder.measure.evaluation import Listener

    def stage(text: str) -> None:
        console.print(f"[dim]{text}[/dim]", highlight=False)

    with progress_bar("measuring", "steps") as progress:
        yield Listener(stage, progress, _show)


def _show(cell: "Row", result: "Row") -> None:
    from sparse_attention_decoder.measure.record import label

    name, read = label(cell), f"read {result['share_read']:6.1%}"
    if "kl" in result:
        low, high = result["kl_ci"]
        ppl_low, ppl_high = result["ppl_change_ci"]
        told = (
            f"KL {result['kl']:.4f} ({low:.4f} to {high:.4f})  top-1 {result['top1']:.3f}  perplexity "
            f"{result['ppl_change']:+.2%} ({ppl_low:+.2%} to {ppl_high:+.2%})  mass {result['mass']:.4f}"
        )
    elif "score" in result:
        told = f"{cell['task']} {cell['length']}: {result['score']:.0%}"
    else:
        told = f"F1 {result['f1']:.0%}  exact {result['exact']:.0%}  ROUGE-L {result['rouge_l']:.0%}"
    out.print(f"{name:32}  {read}  {told}", markup=False, highlight=False)
