"""Predicted speeds of a model and of what becomes of it, on devices."""

from __future__ import annotations

from dataclasses import dataclass

from hylora_kernels.planning.devices import DEVICES, machine_of
from hylora_kernels.planning.machine import Machine
from hylora_kernels.planning.work import Work

PROMPT = 512  # Tokens of the prompt whose speed is predicted.


@dataclass(frozen=True)
class Speed:
    """Predicted tokens/s on a device, at batch 1: decoded ones of the dense model and of the result
    with adapters folded in, and those of a prompt of the result.

    fits: whether the weights of the result fit into the device's memory.
    """

    device: str
    dense_decode: float
    decode: float
    prefill: float
    fits: bool


def speeds(work: Work, machine: Machine | None) -> list[Speed]:
    """On the machine, if there are rates of one, and on all devices of the table.

    A decoded token takes a latency for each block, and reads each weight once; of an embedding it
    reads a row, of experts those that it is routed to.
    """
    machines = [machine_of(name) for name in DEVICES]
    if machine is not None and machine.name not in [m.name for m in machines]:
        machines.insert(0, machine)
    dense, smaller = work.budget.dense.bytes, work.result.bytes / work.budget.dense.bytes
    read = work.bytes_of_token
    blocks, flops = len(work.structure.blocks), work.forward_flops()
    found = []
    for m in machines:
        step = m.latency * blocks
        found.append(
            Speed(
                device=m.name,
                dense_decode=1 / (step + read / m.bandwidth),
                decode=1 / (step + read * smaller / m.bandwidth),
                prefill=m.forward / (flops * work.kept_products),
                fits=dense * smaller < m.memory,
            )
        )
    return found
