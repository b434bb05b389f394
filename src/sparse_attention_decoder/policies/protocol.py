"""What a policy is asked, and what it must answer."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from sparse_attention_decoder.cache import Index, KVBuffer, Witness
from sparse_attention_decoder.config import AttentionConfig
from sparse_attention_decoder.kernels import Kernels
from sparse_attention_decoder.selection import Regions, Rows, Selection


@dataclass(frozen=True)
class Step:
    """One decode step of one layer, as a policy sees it.

    query: [B, Hq, D], after RoPE, not scaled.
    buffer, index: the cached keys and values, and the policy's own index over them.
    rows, regions: which tokens exist, and which of them are near (always read) or middle.
    scaling: what logits are multiplied by.
    witness: what earlier queries attended to; there for policies that need it.
    threshold: in force in this step; 0.0 when it is off.
    """

    query: Tensor
    buffer: KVBuffer
    index: Any
    rows: Rows
    regions: Regions
    scaling: float
    kernels: Kernels
    config: AttentionConfig
    witness: Witness | None = None
    threshold: float = 0.0

    def read(self, selection: Selection) -> tuple[Tensor, Tensor, Selection]:
        """Attend to sinks, window and what was selected."""
        tokens, valid = self.regions.with_chosen(selection)
        output, lse = self.kernels.attend(self.query, self.buffer.keys, self.buffer.values, tokens, valid, self.scaling)
        return output, lse, selection

    def near_lse(self) -> Tensor:
        """[B, Hkv, G], log-sum-exp of the exact logits of sinks and window."""
        keys, near, valid = self.buffer.keys, self.regions.near, self.regions.near_valid
        tokens = near[:, None].expand(-1, keys.shape[1], -1)
        logits = self.kernels.exact_logits(self.query, keys, tokens, self.scaling)
        if valid is not None:
            logits = logits.masked_fill(~valid[:, None, None], float("-inf"))
        return logits.logsumexp(-1)


class Policy(Protocol):
    """Chooses which tokens of the middle a step reads. One idea a file, one row in `tables.POLICIES`.

    evicts: what it does not read it would have thrown away; kept here only so that one prefill serves every policy.
    needs_witness: it chooses by what the prompt's queries attended to.
    needs_sums: and by how much attention each token received from all of them, a second pass over the prompt.
    """

    reads_everything: ClassVar[bool]
    evicts: ClassVar[bool] = False
    needs_witness: ClassVar[bool] = False
    needs_sums: ClassVar[bool] = False

    @staticmethod
    def new_index(kernels: Kernels, config: AttentionConfig) -> Index | None:
        """A fresh index for one layer, or None if the policy keeps none."""

    @staticmethod
    def select(step: Step) -> Selection:
        """The tokens to read beside sinks and window; called only where the middle is not empty."""

    @classmethod
    def attend(cls, step: Step) -> tuple[Tensor, Tensor, Selection]:
        """Output [B, Hq, Dv], log-sum-exp [B, Hq] and selection; override where kernels do both in one."""
        return step.read(cls.select(step))
