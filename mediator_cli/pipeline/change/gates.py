"""The gates of a bundle that loses an expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mediator_cli.bundle.gates_record import GATES, GatesRecord
from mediator_cli.runtime.gates import Gate, Gates
from mediator_cli.runtime.gates_file import read_gates, write_gates

if TYPE_CHECKING:
    from mediator_cli.bundle.exchange import Exchange
    from mediator_cli.bundle.manifest import Manifest

_OTHER_GATES = "gates-2.safetensors"


def gates_without(change: Exchange, manifest: Manifest, name: str) -> GatesRecord | None:
    """Write the gates without an expert, under a name that the old ones do not have; None where there are none.

    The scores of the others stay as they were; a softmax gives them its share in proportion.
    """
    gates = read_gates(change.folder, manifest)
    if gates is None or manifest.gates is None:
        return None
    kept = [at for at, expert in enumerate(gates.experts) if expert != name]
    k = gates.rule.top_k
    rule = gates.rule.model_copy(update={"top_k": None if k is None else min(k, len(kept))})
    by_name = {place: Gate(gate.directions[kept], gate.bias[kept]) for place, gate in gates.by_name.items()}
    record = write_gates(change.scratch, Gates(gates.method, rule, tuple(gates.experts[at] for at in kept), by_name))
    if manifest.gates.file.name != GATES:
        return record
    change.place(GATES).rename(change.place(_OTHER_GATES))
    return record.model_copy(update={"file": record.file.model_copy(update={"name": _OTHER_GATES})})
