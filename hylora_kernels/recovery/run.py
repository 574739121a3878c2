"""One training run of a model's adapters: its recipe, its steps, its log and its checkpoint.

A run is a pure function of model, data and recipe: the order of the data hangs on the seed, the
dropout on seed and step. So a run that was killed and resumed ends with the same bits as one that
was not, and a checkpoint needs no random state.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.loss import token_loss
from hylora_kernels.model.structure import block_list, linears
from hylora_kernels.support.hashing import tensor_hash
from hylora_kernels.support.seeding import forked_rng, seed_rng
from hylora_kernels.support.storage import atomic_path, require_disk, write_text

SAVE_SECONDS = (
    60.0  # between checkpoints without save_every; the demo's, of 0.25 GB, takes half one
)
MOMENTS = ("exp_avg", "exp_avg_sq")


@contextmanager
def training_mode(
    model: nn.Module, adapters: dict[str, nn.Parameter], gradient_checkpointing: bool
) -> Iterator[None]:
    """Float32 masters, and of all modules only the adapters' in train(): no other dropout acts.

    Gradient checkpointing is done here, block by block: that of transformers works only with blocks
    in train(), which wakes their dropouts. Afterwards the model is in eval(), and the adapters that
    it still has are in the dtype they came in.
    """
    dtypes = [(parameter, parameter.dtype) for parameter in adapters.values()]
    paths = block_list(model, linears(model)) if gradient_checkpointing else []
    if gradient_checkpointing and not paths:
        raise ValueError("gradient_checkpointing found no list of blocks in this model")
    blocks = [(block, vars(block).get("forward")) for block in map(model.get_submodule, paths)]
    try:
        model.eval()
        for layer in model.modules():
            if isinstance(layer, SVDLoRALinear):
                layer.train()
        for block, _ in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        for parameter, dtype in dtypes:
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
        yield
    finally:
        for block, forward in blocks:
            del block.forward
            if forward is not None:
                block.forward = forward
        for parameter, dtype in dtypes:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)
        model.eval()


class Run:
    """The state of one run; `losses` has an entry for every step done.

    adapters: name -> parameter, in training_mode. blocks: int64 [n, L]. folder: for log.jsonl and
    checkpoint/, or None. good_steps: how many updates the adapters held when they last gave a
    finite loss.
    """

    def __init__(self, model, adapters, blocks, recipe, accelerator, teacher=None, folder=None):
        self.model, self.blocks, self.recipe = model, blocks, recipe
        self.accelerator, self.teacher = accelerator, teacher
        self.folder = folder if accelerator.is_main_process else None
        self.checkpoint = None if folder is None else folder / "checkpoint" / "training.safetensors"
        self.adapters, self.parameters = adapters, list(adapters.values())
        self.device = model.get_input_embeddings().weight.device
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=self.device.type in ("cpu", "cuda"),
        )
        generator = torch.Generator().manual_seed(recipe.seed)
        self.order = torch.randperm(len(blocks), generator=generator)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.good_steps, self.good = 0, [p.detach().clone() for p in self.parameters]

    def train(
        self,
        save_every: int | None,
        progress: bool,
        on_step: Callable[[int], object] | None = None,
    ) -> str:
        """Do the steps that are left; returns "", or why not all were done."""
        if self.folder is not None:  # adapters and two moments, and those of the last time
            size = 6 * sum(p.nbytes for p in self.parameters)
            require_disk(self.folder, size, "finetune's checkpoint")
        steps, done, saved_at = self.recipe.steps, len(self.losses), time.monotonic()
        shown = progress and self.accelerator.is_main_process
        bar = tqdm(total=steps, initial=done, desc="finetune", unit="step", disable=not shown)
        with bar, self._log() as log, forked_rng(self.device):
            if on_step is not None:
                on_step(done)
            for step in range(done + 1, steps + 1):
                fields = self._step(step)
                if not math.isfinite(fields["loss"] + fields["grad_norm"]):
                    return self._stop(fields)
                log(fields)
                bar.set_postfix_str(_in_short(fields), refresh=False)
                bar.update()
                late = time.monotonic() - saved_at > SAVE_SECONDS
                if step == steps or (late if save_every is None else step % save_every == 0):
                    self.save()
                    saved_at = time.monotonic()
                if on_step is not None:
                    on_step(step)
        self.good_steps = len(self.losses)
        return ""

    def _step(self, step: int) -> dict:
        """One update; none if loss or gradient is not finite. The fields of the log's line."""
        start, rate = time.perf_counter(), self.recipe.learning_rate(step)
        loss, norm = self._gradients(step)
        if math.isfinite(loss):
            with torch.no_grad():
                torch._foreach_copy_(self.good, self.parameters)
            self.good_steps = step - 1
        if math.isfinite(loss + norm):
            self.optimizer.param_groups[0]["lr"] = rate
            self.optimizer.step()
            self.losses.append(loss)
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - start
        self.seconds += seconds
        speed = self.recipe.blocks_per_step * self.recipe.length / seconds
        return {
            "step": step,
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            "seconds": seconds,
            "tokens_per_second": speed,
        }

    def _gradients(self, step: int) -> tuple[float, float]:
        """Leave the mean loss's clipped gradient in the adapters; (mean loss, norm unclipped)."""
        recipe, accelerator = self.recipe, self.accelerator
        seed_rng(self.device, recipe.seed + (step << 16) + accelerator.process_index)
        first = (step - 1) * recipe.blocks_per_step + accelerator.process_index
        places = first + accelerator.num_processes * torch.arange(recipe.batch * recipe.accumulate)
        total, count = torch.zeros((), device=self.device), 0
        for rows in self.order[places % len(self.order)].split(recipe.batch):
            ids = self.blocks[rows].to(self.device)
            loss, predicted = token_loss(
                self.model, ids, recipe.chunk, self.teacher, recipe.distill
            )
            accelerator.backward(loss)
            total, count = total + loss.detach().to(self.device), count + predicted
        # The backward is the sum's, and its mean is taken here in float32, so that gradients which
        # pass through a float16 model don't underflow.
        for parameter in self.parameters:
            if parameter.grad is None:  # a layer that no token came through, an expert for instance
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters]
        torch._foreach_mul_(gradients, 1 / count)
        if accelerator.num_processes > 1:
            for gradient in gradients:
                gradient.copy_(accelerator.reduce(gradient, "mean"))
        loss = accelerator.reduce(total / count, "mean")
        return float(loss), float(accelerator.clip_grad_norm_(self.parameters, recipe.clip))

    @torch.no_grad()
    def _stop(self, fields: dict) -> str:
        torch._foreach_copy_(self.parameters, self.good)
        return (
            f"step {fields['step']}: loss {fields['loss']:g}, gradient norm "
            f"{fields['grad_norm']:g}; kept are the adapters after {self.good_steps} steps, the "
            "last that gave a finite loss; a lower lr may help"
        )

    # ------------------------------------------------------------------------------------ files

    @contextmanager
    def _log(self) -> Iterator:
        """A function that writes its argument as a line of log.jsonl, first cut to what is done."""
        if self.folder is None:
            yield lambda fields: None
            return
        path, done = self.folder / "log.jsonl", len(self.losses)
        lines = path.read_text("utf-8").splitlines() if done and path.exists() else []
        write_text(path, "".join(f"{line}\n" for line in lines[:done]))
        with path.open("a", encoding="utf-8", buffering=1) as file:
            yield lambda fields: file.write(json.dumps(fields) + "\n")

    def save(self) -> None:
        """One file, so that adapters, moments and step are always of the same moment."""
        if self.folder is None:
            return
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for name, parameter in self.adapters.items():
            state = self.optimizer.state[parameter]
            tensors[name] = parameter.detach()
            tensors |= {f"{name}.{moment}": state[moment] for moment in MOMENTS}
        about = {"format": 1, "seconds": self.seconds, "recipe": asdict(self.recipe)}
        with atomic_path(self.checkpoint) as temporary:
            save_file(tensors, temporary, {"hylora_finetune": json.dumps(about)})

    def load(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises ValueError naming the file if it can't be read, and the field if it is another run's.
        """
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        anew = "pass resume=False to start anew, or another output_dir"
        try:
            about, tensors = _read(self.checkpoint)
            theirs, seconds, losses = about["recipe"], about["seconds"], tensors["losses"].tolist()
            for field, ours in asdict(self.recipe).items():
                if theirs[field] != ours:
                    was, here = (str(value)[:16] for value in (theirs[field], ours))
                    raise ValueError(f"{field} was {was} there and is {here} here")
            states = {name: self._state(name, tensors, len(losses)) for name in self.adapters}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            what = error if isinstance(error, ValueError) else f"it is not readable: {error!r}"
            raise ValueError(f"{self.checkpoint} can't be resumed: {what}; {anew}") from error
        for name, parameter in self.adapters.items():
            parameter.data.copy_(tensors[name])
            self.optimizer.state[parameter] = states[name]
        self.losses, self.seconds = losses, seconds
        self.good_steps, self.good = len(losses), [p.detach().clone() for p in self.parameters]

    def _state(self, name: str, tensors: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """What the optimizer keeps of one adapter."""
        parameter = self.adapters[name]
        for part in (name, *(f"{name}.{moment}" for moment in MOMENTS)):
            if tensors[part].shape != parameter.shape:
                shapes = f"{list(tensors[part].shape)} there and {list(parameter.shape)} here"
                raise ValueError(f"{part} is {shapes}")
        state = {m: tensors[f"{name}.{m}"].to(parameter.device) for m in MOMENTS}
        where = parameter.device if self.optimizer.defaults["fused"] else "cpu"
        return {"step": torch.tensor(float(step), device=where), **state}


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {})["hylora_finetune"])
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _in_short(fields: dict) -> str:
    speed = fields["tokens_per_second"]
    return f"loss {fields['loss']:.3f}, lr {fields['lr']:.1e}, {speed:.0f} tokens/s"


# --------------------------------------------------------------------------------------- hashes


def frozen_hash(model: nn.Module) -> str:
    """sha256 of all that is saved of the model but A and B; the layers' alpha and dropout too."""
    named = model.named_modules()
    layers = {path: layer for path, layer in named if isinstance(layer, SVDLoRALinear)}
    seen = {id(p) for layer in layers.values() for p in (layer.A, layer.B)}
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            tensors[name] = tensor
            seen.add(id(tensor))  # a tied weight is read once
    scales = [f"{path} {layer.alpha} {layer.lora_dropout}\n" for path, layer in layers.items()]
    return tensor_hash(tensors.items(), "".join(scales))
