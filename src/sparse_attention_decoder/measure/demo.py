"""The demo's document and question: real text that every Python has."""

from sparse_attention_decoder.decoder import SparseAttention
from sparse_attention_decoder.errors import InputError

QUESTION = "What does the method str.zfill do? Answer with the sentence from the text."


def document(model: SparseAttention, tokens: int) -> str:
    """Python's language reference, cut to `tokens` tokens, and the question below it.

    The chapter on string methods comes first, the others follow in their order.

    Raises:
        InputError: the reference is shorter than that, or the model has no tokenizer.
    """
    # imported here: a megabyte of text that only the demo reads
    from pydoc_data.topics import topics

    first = "string-methods"
    chapters = [topics[first], *(text for name, text in topics.items() if name != first)]
    if model.tokenizer is None:
        raise InputError("the demo needs a tokenizer; give a model that has one")
    ids = model.tokenizer("\n\n".join(chapters), add_special_tokens=False).input_ids
    if len(ids) < tokens:
        raise InputError(f"the language reference has {len(ids)} tokens; ask for at most that many")
    return f"{model.tokenizer.decode(ids[:tokens])}\n\n{QUESTION}"
