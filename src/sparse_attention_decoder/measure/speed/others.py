"""Peers as sides of the bench: started, loaded, the prompt read, ready for their turns."""

from contextlib import ExitStack
from pathlib import Path

from sparse_attention_decoder.errors import InputError
from sparse_attention_decoder.measure.compare import TURN
from sparse_attention_decoder.measure.peer import PEERS, Peer, installed, model_for
from sparse_attention_decoder.measure.record import Records, Row
from sparse_attention_decoder.measure.speed.bench import Listener, Setting, Side
from sparse_attention_decoder.measure.speed.worker import WARM_UP


def missing(setting: Setting, folder: Path, records: Records) -> list[Row]:
    """Cells of the installed peers that have no record; peers decode one row.

    Raises:
        InputError: no peer is installed there.
    """
    there = [name for name in PEERS if installed(name, folder)]
    if not there:
        raise InputError(f"no peer is installed in {folder}; run scripts/peers, or leave --peers out")
    if len(setting.ids) > 1:
        return []
    cells = [setting.cell(name, dict(options)) for name in there for options in PEERS[name].option_sets]
    return [cell for cell in cells if not records.has("speed", cell)]


def join(setting: Setting, cell: Row, folder: Path, directory: str, stack: ExitStack, listener: Listener) -> Side:
    """Start a peer for as long as `stack` is open, and have it read the prompt.

    Args:
        directory: where transformers has the model from.
    Raises:
        WorkerError: it failed. InputError: it cannot read this form of model.
    """
    name = cell["engine"]
    model = model_for(name, setting.model, directory)
    peer = stack.enter_context(Peer.installed_in(folder, name, setting.threads))
    listener.stage(f"{name} {cell['config'] or ''} loads and reads the prompt")
    # one more than is fed: the token chosen last is held by some
    loaded = peer.load(model, setting.context + (setting.rounds + 1) * TURN + 1, cell["config"])
    peer.read(setting.ids[0][:WARM_UP])
    first = peer.read(setting.ids[0][: setting.context])

    def turn(at: int, ids: list[list[int]]) -> Row:
        steps = peer.step(ids[0])
        return {"ms": steps.ms, "tokens": [steps.tokens]}

    def finish() -> Row:
        return {"peak_bytes": peer.end().peak_bytes}

    versions = ", ".join(f"{package} {version}" for package, version in loaded.versions.items())
    facts = {"ttft_s": first.seconds, "note": f"{loaded.what}; {versions}"}
    return Side(cell, turn, finish, loaded.feeds, facts=facts)
