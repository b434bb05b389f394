"""Quality runs: agreement, retrieval and question answering, cell by cell into a record file."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.decoder import SparseAttention
from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.quality import compare
from sparse_attention_decoder.measure.record import OURS, Records, Row, as_cell, label
from sparse_attention_decoder.measure.retrieval import answer
from sparse_attention_decoder.measure.tasks import Example, resolve, seeded
from sparse_attention_decoder.measure.tasks.documents import cut_middle, load, scores
from sparse_attention_decoder.measure.tasks.format import frame_tokens, split_prompt
from sparse_attention_decoder.measure.tasks.matching import score
from sparse_attention_decoder.measure.texts import about, passages, text_of
from sparse_attention_decoder.models.cache import SparseCache


@dataclass(frozen=True)
class Listener:
    """Told what is done, in words, cells done of all, and every finished row."""

    stage: Callable[[str], None]
    progress: Callable[[int, int], None]
    row: Callable[[Row, Row], None]


@dataclass(frozen=True)
class Evaluation:
    """One model under a set of configs; what is recorded already is not run again.

    name: the model as records call it.
    configs: sparse ones, and dense where retrieval and answers are asked for: it is the baseline beside them. All of
        the decoder's kv_dtype.
    weights: the form of the decoder's weights, if one was asked for.
    """

    decoder: SparseAttention
    name: str
    configs: list[AttentionConfig]
    records: Records
    listener: Listener
    weights: str | None = None

    def agreement(self, texts: dict[str, str], contexts: Iterable[int], steps: int) -> None:
        """KL, top-1, perplexity and audited attention, decoding `steps` true tokens behind each context.

        Raises:
            InputError: a text is too short. ContextLengthError: a context is too long for the model.
        """
        kind, named = "agreement", about(texts)
        for context in contexts:
            own = {"context": context, "steps": steps, "texts": named}
            todo = [config for config in self._sparse(context) if not self.records.has(kind, self._cell(config, own))]
            if not todo:
                continue
            self.listener.stage(f"agreement at {context} tokens: dense prefill")
            ids = passages(texts, self._encode, context + steps + 1)
            self.decoder.check_ids(ids)
            passes = (len(todo) + 1) * steps

            names = ["dense", *(label(self._cell(config, own)) for config in todo)]

            def on_step(
                number: int, step: int, total: int = passes, context: int = context, names: list[str] = names
            ) -> None:
                if step == 0:
                    self.listener.stage(f"agreement at {context} tokens: {names[number]}")
                self.listener.progress(number * steps + step + 1, total)

            for outcome in compare(self.decoder, ids, context, todo, on_step, self.listener.progress):
                self._add(kind, self._cell(outcome.config, own), outcome.result(list(texts)))

    def retrieval(self, tasks: list[str], lengths: list[int], format: str, samples: int, seed: int) -> None:
        """RULER's tasks: the context is read densely, question and answer are decoded as each config says.

        Raises:
            InputError: an unknown task, or a length too short for it. ContextLengthError: too long.
        """
        made = [resolve(task) for task in tasks]
        grid = [(n, task, length, sample) for length in lengths for sample in range(samples)
                for n, task in enumerate(tasks)]  # fmt: skip
        for done, (number, task, length, sample) in enumerate(grid):
            self.listener.progress(done, len(grid))
            own = {"task": task, "length": length, "format": format, "sample": sample, "samples": samples, "seed": seed}
            todo = self._todo("retrieval", own, length)
            if not todo:
                continue
            self.listener.stage(f"{task} at {length} tokens, sample {sample + 1} of {samples}")
            room = length - frame_tokens(self.decoder.require_tokenizer(), format)
            example = made[number].example(room, self._count, seeded(seed, task, length, sample), sample, samples)
            context, question = split_prompt(self.decoder.require_tokenizer(), example, format)
            # once every expected string is there the score cannot change any more
            found = self._answers(context, question, example, todo, partial(_has_all, example.answers))
            for config, text, reads in found:
                result = {"score": score(text, example.answers), "depth": example.depth, "expected": example.answers,
                          "context_sha256": sha256(example.context.encode()).hexdigest()[:16]}  # fmt: skip
                self._add("retrieval", self._cell(config, own), {**result, **reads, "prediction": text})
        self.listener.progress(len(grid), len(grid))

    def answers(self, path: Path, format: str) -> None:
        """Questions about documents of a JSON-lines file; too long ones are cut in the middle.

        Raises:
            InputError: a line of the file that is none. UnsupportedError: rouge-score is missing.
        """
        examples = load(path)

        def stops(text: str) -> bool:
            # without a chat template nothing else tells the model that the answer is over
            return format == "base" and "\n" in text.lstrip()

        named = about({path.name: text_of(path)})[0]
        limit = self.decoder.context_length
        for done, example in enumerate(examples):
            self.listener.progress(done, len(examples))
            own = {"file": named, "sample": done, "format": format}
            context, question = split_prompt(self.decoder.require_tokenizer(), example, format)
            cut = 0
            if limit is not None:
                context, cut = cut_middle(context, limit - question.shape[1] - example.new_tokens)
            todo = self._todo("answers", own, context.shape[1])
            self.listener.stage(f"question {done + 1} of {len(examples)}: {context.shape[1]} tokens")
            for config, text, reads in self._answers(context, question, example, todo, stops):
                result = {**scores(text, example.answers), "cut": cut, "expected": example.answers}
                self._add("answers", self._cell(config, own), {**result, **reads, "prediction": text})
        self.listener.progress(len(examples), len(examples))

    def _answers(
        self,
        context: Tensor,
        question: Tensor,
        example: Example,
        todo: list[AttentionConfig],
        is_done: Callable[[str], bool],
    ) -> Iterable[tuple[AttentionConfig, str, Row]]:
        """Every config's answer to one prefilled context, as text, and what was read for it."""
        if not todo:
            return
        self.decoder.check_ids(context, 0, question.shape[1] + example.new_tokens)
        cache: SparseCache = self.decoder.prefill(context, watched=[config.policy for config in todo])
        tokenizer = self.decoder.require_tokenizer()

        def text_so_far(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        for config in todo:
            found = answer(
                self.decoder.model, cache, question, config, example.new_tokens, lambda ids: is_done(text_so_far(ids))
            )
            reads = found.reads
            yield config, text_so_far(found.ids).strip(), {
                "share_read": reads.share_read, "sparse_share": reads.sparse_steps / max(1, reads.steps),
                "steps": question.shape[1] + len(found.ids), "context_tokens": context.shape[1],
            }  # fmt: skip

    def _todo(self, kind: str, own: Row, context: int) -> list[AttentionConfig]:
        possible = [config for config in self.configs if config.policy == "dense" or config in self._sparse(context)]
        return [config for config in possible if not self.records.has(kind, self._cell(config, own))]

    def _sparse(self, context: int) -> list[AttentionConfig]:
        """Configs that leave something unread in so long a context; the others would be dense, compared with dense."""
        return [config for config in self.configs if config.policy != "dense" and config.budget_tokens < context]

    def _cell(self, config: AttentionConfig, own: Row) -> Row:
        dtype = str(self.decoder.model.dtype).removeprefix("torch.")
        form = {"weights": self.weights} if self.weights else {}
        return {"model": self.name, "dtype": dtype, "engine": OURS, "config": as_cell(config), **form, **own}

    def _add(self, kind: str, cell: Row, result: Row) -> None:
        if result["share_read"] >= 1.0 and cell["config"]["policy"] not in ("dense", "oracle"):
            raise InputError(f"{label(cell)} read {result['share_read']:.0%} of the bytes: nothing was sparse")
        self.records.add(kind, cell, result)
        self.listener.row(cell, result)

    def _encode(self, text: str) -> list[int]:
        ids: Any = self.decoder.require_tokenizer()(text).input_ids
        return list(ids)

    def _count(self, text: str) -> int:
        ids: Any = self.decoder.require_tokenizer()(text, add_special_tokens=False).input_ids
        return len(ids)


def _has_all(answers: tuple[str, ...], text: str) -> bool:
    return score(text, answers) == 1.0
