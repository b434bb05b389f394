"""Sparse attention in a few lines: ids in, logits out; text in, text or attention scores out.

    python examples/basic_usage.py [tokenizer]

`tokenizer` is a hub name or a directory; bert-base-uncased if left out.
"""

import sys

import torch
from transformers import AutoTokenizer

from sparse_attention_decoder import AttentionConfig, SparseAttention

config = AttentionConfig(top_k=32, attention_window=512)
model = SparseAttention(config)

# ids in, logits out: any ids within the vocabulary will do
try:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else "bert-base-uncased")
except OSError:
    print("that tokenizer cannot be fetched here; taking the model's own")
    tokenizer = model.tokenizer
input_ids = tokenizer.encode("The quick brown fox jumps over the lazy dog.", return_tensors="pt")
with torch.no_grad():
    output = model(input_ids)
print("Model output:", type(output).__name__, "with logits of shape", tuple(output.logits.shape))

# text in, text out
question = "What is the capital of France?"
print("Question:", question)
print("Answer:", model.complete(question, max_new_tokens=32, do_sample=False))

# text in, attention scores out: what did layer 12 read to go on from here?
trace = model.trace("The quick brown fox jumps over the lazy")
for position, text, weight in trace.head(layer=12, kv_head=0).top(3):
    print(f"layer 12, KV head 0 gives {weight:.2f} to {text!r} at position {position}")
