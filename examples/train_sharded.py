"""Train a compressed model's adapters with its weights divided among processes (FSDP2).

    torchrun --nproc-per-node 2 examples/train_sharded.py FOLDER TEXT OUT

FOLDER is a compressed model, of factors or of codes, with adapters; hylora_kernels.add_adapters
gives them to one without. TEXT is "brown", or a .txt, .jsonl or .parquet file. On a CPU the
processes talk by gloo, on GPUs by NCCL. They share the `batch` blocks of text of each step.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard

from hylora_kernels import load_model, save_pretrained
from hylora_kernels.text.blocks import token_blocks


def main(
    folder: str, text: str, out: str, *, steps: int = 8, batch: int = 8, length: int = 128
) -> list[float]:
    """The mean loss of each step, in nats a token."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    model, tokenizer = load_model(folder)
    blocks = token_blocks(text, tokenizer, length, limit=steps * batch, progress=False)
    for block in model.get_decoder().layers:
        fully_shard(block)
    fully_shard(model)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        taken = blocks[step * batch : (step + 1) * batch][rank::processes].to(model.device)
        loss = model(input_ids=taken, labels=taken).loss
        loss.backward()  # The gradients become the mean over the processes.
        optimizer.step()
        optimizer.zero_grad()
        distributed.all_reduce(mean := loss.detach() / processes)
        losses.append(mean.item())
    save_pretrained(model, out, tokenizer)  # The first process writes the gathered tensors.
    distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    losses = main(*sys.argv[1:])
    if int(os.environ["RANK"]) == 0:
        print("losses", *losses)
