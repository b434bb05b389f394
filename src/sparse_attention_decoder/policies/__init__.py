"""Which tokens to read. `resolve` turns a name of `tables.POLICIES` into its class."""

from sparse_attention_decoder.policies.protocol import Policy, Step
from sparse_attention_decoder.tables import POLICIES, load

__all__ = ["Policy", "Step", "resolve"]


def resolve(name: str) -> type[Policy]:
    """The policy class called `name`; AttentionConfig has checked that it exists."""
    policy: type[Policy] = load(POLICIES[name])
    return policy
