"""The demo's document and question: real text that every Python has."""

from sparse_attention_decoder.decoder import SparseAttention
from sparse_attention_decoder.errors import InputError

QUESTION = "What is used for repeated execution as long as an expression is true?"


def document(model: SparseAttention, tokens: int) -> str:
    """Python's language reference, cut to `tokens` tokens.

    Short chapters come first, each kind in its order, so that the cut holds many whole ones.

    Raises:
        InputError: the reference is shorter than that, or the model has no tokenizer.
    """
    # imported here: half a megabyte of text that only the demo reads
    from pydoc_data.topics import topics

    chapters = sorted(topics.values(), key=lambda text: len(text) >= 1300)
    if model.tokenizer is None:
        raise InputError("the demo needs a tokenizer; give a model that has one")
    ids = model.tokenizer("\n\n".join(chapters), add_special_tokens=False).input_ids
    if len(ids) < tokens:
        raise InputError(f"the language reference has {len(ids)} tokens; ask for at most that many")
    return str(model.tokenizer.decode(ids[:tokens]))
