"""Read a document once, ask about it many times: now, and later from a file.

Runs offline, with the embedded SmolLM2-135M-Instruct, in about a minute on two cores. The document is what every
Python has: chapters of its language reference.
"""

import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

from sparse_attention_decoder import Session, SparseAttention

QUESTIONS = [
    "What is used for repeated execution as long as an expression is true?",
    "What does the del statement do?",
    "What does the pass statement do?",
]
CHAPTERS = ["assert", "break", "continue", "del", "pass", "return", "while", "if", "for", "bool-ops", "in"]

model = SparseAttention()


def ask_all(session: Session) -> None:
    for question in QUESTIONS:
        begun = time.perf_counter()
        answer = session.ask(question, max_new_tokens=32, do_sample=False)
        print(f"\n{question} ({time.perf_counter() - begun:.1f} s)\n  {str(answer).strip()}")


# read: densely, once
document = "\n\n".join(topics[name] for name in CHAPTERS if name in topics)
begun = time.perf_counter()
session = model.read(document)
print(f"{session.ids.shape[1]} tokens, read in {time.perf_counter() - begun:.1f} s")

# ask: each question starts behind the document, whatever was asked before
ask_all(session)

# keep: the file is mapped into memory when it is loaded, and nothing is read again
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "reference.session"
    session.save(path)
    begun = time.perf_counter()
    session = Session.load(path, model)
    print(f"\nsaved, {path.stat().st_size / 1e6:.0f} MB, and loaded in {time.perf_counter() - begun:.2f} s")
    ask_all(session)

# talk: what is remembered is what the next question follows
print()
for question in ("Which statement ends a loop?", "And which one goes on with its next round?"):
    print(f"> {question}")
    for piece in session.stream(question, max_new_tokens=32, remember=True, do_sample=False):
        print(piece, end="", flush=True)
    print()
