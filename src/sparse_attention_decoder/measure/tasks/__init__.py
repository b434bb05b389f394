"""What a model is asked about a long text. `resolve` turns a name of `TASKS` into its task."""

from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.tasks.protocol import Example, Task, seeded
from sparse_attention_decoder.tables import load

__all__ = ["TASKS", "Example", "Task", "resolve", "seeded"]

_HERE = "sparse_attention_decoder.measure.tasks"

# name -> "module:class"; imported only when asked for. The tasks and their names are RULER's
TASKS = {
    "niah_single": f"{_HERE}.needles:Single",
    "niah_multikey_1": f"{_HERE}.needles:MultiKey1",
    "niah_multikey_2": f"{_HERE}.needles:MultiKey2",
    "niah_multikey_3": f"{_HERE}.needles:MultiKey3",
    "niah_multivalue": f"{_HERE}.needles:MultiValue",
    "niah_multiquery": f"{_HERE}.needles:MultiQuery",
    "vt": f"{_HERE}.variables:VariableTracking",
    "cwe": f"{_HERE}.common_words:CommonWords",
    "fwe": f"{_HERE}.frequent_words:FrequentWords",
}


def resolve(name: str) -> Task:
    """The task called `name`.

    Raises:
        InputError: there is no such task; the message lists them.
    """
    if name not in TASKS:
        raise InputError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}")
    task: Task = load(TASKS[name])()
    return task
