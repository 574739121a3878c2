"""The training loop: steps, log and checkpoint.

A run is a pure function of model, data and recipe: the order of the data follows from the seed, the
dropout from seed and step. So a run that was killed and resumed ends with the same bits as one that
was not, and a checkpoint holds no random state.
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
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.loss import token_loss
from hylora_kernels.model.structure import block_list
from hylora_kernels.recovery.options import FinetuneOptions
from hylora_kernels.recovery.recipe import Recipe
from hylora_kernels.recovery.teacher import Teacher
from hylora_kernels.support.seeding import forked_rng, seed_rng
from hylora_kernels.support.storage import atomic_path, require_disk, write_text

SAVE_SECONDS = 60.0  # between checkpoints by default; writing the demo's, 0.25 GB, takes 0.5 s
VECTOR_RATE = 10.0  # Norms at 2e-4 beside factors at 2e-5: SmolLM2-135M, keep 0.8.
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, besides its step


@contextmanager
def training_mode(
    model: nn.Module, trained: dict[str, nn.Parameter], gradient_checkpointing: bool
) -> Iterator[None]:
    """In the block, `trained` is float32 (float64 stays) and only the adapters' dropout acts.

    Gradient checkpointing is done here, block by block: that of transformers needs blocks in
    train(), where their own dropouts would act. Afterwards the model is in eval(), and
    `trained` has the dtype it came in.

    Raises ValueError if gradient_checkpointing finds no list of blocks.
    """
    dtypes = [(parameter, parameter.dtype) for parameter in trained.values()]
    paths = block_list(model, _holders(model, trained)) if gradient_checkpointing else []
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


def _holders(model: nn.Module, trained: dict[str, nn.Parameter]) -> dict[str, nn.Module]:
    """path -> module, of those that hold a trained parameter themselves."""
    ids = {id(parameter) for parameter in trained.values()}
    named = model.named_modules()
    return {path: m for path, m in named if any(id(p) in ids for p in m.parameters(recurse=False))}


def taken_rows(options: FinetuneOptions, n: int, accelerator: Accelerator) -> Tensor:
    """The rows of n blocks that this process takes in all its steps, in order, int64: every
    num_processes-th one, over and over."""
    count = options.steps * options.batch * options.accumulate
    places = accelerator.num_processes * torch.arange(count, device="cpu")
    return (accelerator.process_index + places) % n


class Run:
    """The state of one run, to be used in training_mode().

    trained:    name -> parameter. A vector among them, a norm's weight, learns VECTOR_RATE times as
                fast as the matrices.
    blocks:     token ids, int64 [n, L], taken one after the other, over and over.
    teacher:    with the states of all of them that this process takes, or None.
    folder:     of log.jsonl and the checkpoint; None without one and in all but the main process.
    losses:     one for every step done.
    good:       copies of the parameters when they last gave a finite loss, good_steps updates in.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: dict[str, nn.Parameter],
        blocks: Tensor,
        recipe: Recipe,
        options: FinetuneOptions,
        accelerator: Accelerator,
        teacher: Teacher | None = None,
    ) -> None:
        self.model, self.blocks, self.recipe, self.teacher = model, blocks, recipe, teacher
        self.options, self.accelerator = options, accelerator
        self.folder = self.checkpoint = None
        if options.output_dir is not None:
            folder = Path(options.output_dir)
            self.checkpoint = folder / "checkpoint" / "training.safetensors"
            self.folder = folder if accelerator.is_main_process else None
        self.trained, self.parameters = trained, list(trained.values())
        self.device = model.get_input_embeddings().weight.device
        self.optimizer = adamw(self.parameters, self.device)
        if accelerator.num_processes > 1:  # An SVD's signs may be others elsewhere.
            for parameter in self.parameters:
                broadcast(parameter.data)
        self.rows = taken_rows(options, len(blocks), accelerator)
        self.losses: list[float] = []
        self.seconds = 0.0
        self.good_steps, self.good = 0, [p.detach().clone() for p in self.parameters]

    def train(self) -> str:
        """Do the remaining steps; returns "", or the reason why training ended early."""
        if self.folder is not None:  # the old checkpoint and the new: weights and two moments each
            size = 6 * sum(p.nbytes for p in self.parameters)
            require_disk(self.folder, size, "finetune's checkpoint")
        steps, done, saved_at = self.recipe.steps, len(self.losses), time.monotonic()
        shown = self.options.progress and self.accelerator.is_main_process
        on_step = self.options.on_step or (lambda step: None)
        bar = tqdm(total=steps, initial=done, desc="finetune", unit="step", disable=not shown)
        with bar, self._log() as log, forked_rng(self.device):
            on_step(done)
            for step in range(done + 1, steps + 1):
                fields = self._step(step)
                if not math.isfinite(fields["loss"] + fields["grad_norm"]):
                    return self._stop(fields)
                log(fields)
                bar.set_postfix_str(_progress_text(fields), refresh=False)
                bar.update()
                if step == steps or self._save_is_due(step, saved_at):
                    self.save()
                    saved_at = time.monotonic()
                on_step(step)
        self.good_steps = len(self.losses)
        return ""

    def _save_is_due(self, step: int, saved_at: float) -> bool:
        if self.options.save_every is None:
            return time.monotonic() - saved_at > SAVE_SECONDS
        return step % self.options.save_every == 0

    def _step(self, step: int) -> dict[str, float]:
        """Do one update, or none if loss or gradient is not finite; returns the log's fields."""
        start, rate = time.perf_counter(), self.recipe.learning_rate(step)
        loss, norm = self._gradients(step)
        if math.isfinite(loss):
            with torch.no_grad():
                torch._foreach_copy_(self.good, self.parameters)
            self.good_steps = step - 1
        if math.isfinite(loss + norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["scale"]
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
        """Set the parameters' grad to the clipped gradient of the step's mean loss.

        Returns the mean loss in nats a token and the norm before clipping, over all processes.
        """
        recipe, accelerator = self.recipe, self.accelerator
        seed_rng(self.device, recipe.seed + (step << 16) + accelerator.process_index)
        total, count = torch.zeros((), device=self.device), 0
        own = recipe.batch * recipe.accumulate
        for rows in self.rows[(step - 1) * own : step * own].split(recipe.batch):
            ids = self.blocks[rows].to(self.device)
            soft = self.teacher.logits(ids) if self.teacher else None
            loss, predicted = token_loss(self.model, ids, recipe.chunk, soft, recipe.distill)
            accelerator.backward(loss)
            total, count = total + loss.detach().to(self.device), count + predicted
        # The backward is that of the sum of the losses. Dividing here, in float32, keeps gradients
        # that pass through a float16 model from underflowing.
        for parameter in self.parameters:
            if parameter.grad is None:  # no token reached the layer, as in an unused expert
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters]
        torch._foreach_mul_(gradients, 1 / count)
        if accelerator.num_processes > 1:
            for gradient in gradients:
                gradient.copy_(accelerator.reduce(gradient, "mean"))
        loss = accelerator.reduce(total / count, "mean")
        return float(loss), float(accelerator.clip_grad_norm_(self.parameters, recipe.clip))

    @torch.no_grad()
    def _stop(self, fields: dict[str, float]) -> str:
        """Restore the last good parameters; returns the reason in words."""
        torch._foreach_copy_(self.parameters, self.good)
        return (
            f"step {fields['step']}: loss {fields['loss']:g}, gradient norm "
            f"{fields['grad_norm']:g}; kept are the {self.recipe.train} after {self.good_steps} "
            "steps, the last that gave a finite loss; a lower lr may help"
        )

    @contextmanager
    def _log(self) -> Iterator[Callable[[dict[str, float]], object]]:
        """A function that appends a line to log.jsonl, which is first cut to the steps done."""
        if self.folder is None:
            yield lambda fields: None
            return
        path, done = self.folder / "log.jsonl", len(self.losses)
        lines = path.read_text("utf-8").splitlines() if done and path.exists() else []
        write_text(path, "".join(f"{line}\n" for line in lines[:done]))
        with path.open("a", encoding="utf-8", buffering=1) as file:
            yield lambda fields: file.write(json.dumps(fields) + "\n")

    def save(self) -> None:
        """Write the checkpoint: one file, so that weights, moments and step belong together."""
        if self.folder is None or self.checkpoint is None:
            return
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64, device="cpu")}
        for name, parameter in self.trained.items():
            state = self.optimizer.state[parameter]
            tensors[name] = parameter.detach()
            tensors |= {f"{name}.{moment}": state[moment] for moment in MOMENTS}
        about = {"format": 1, "seconds": self.seconds, "recipe": asdict(self.recipe)}
        with atomic_path(self.checkpoint) as temporary:
            save_file(tensors, temporary, {"hylora_finetune": json.dumps(about)})

    def load(self) -> None:
        """Continue from the checkpoint, if there is one.

        Raises ValueError naming the file if it can't be read, or the field in which its recipe is
        another one.
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
            states = {name: self._state(name, tensors, len(losses)) for name in self.trained}
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            what = error if isinstance(error, ValueError) else f"it is not readable: {error!r}"
            raise ValueError(f"{self.checkpoint} can't be resumed: {what}; {anew}") from error
        for name, parameter in self.trained.items():
            parameter.data.copy_(tensors[name])
            self.optimizer.state[parameter] = states[name]
        self.losses, self.seconds = losses, seconds
        self.good_steps, self.good = len(losses), [p.detach().clone() for p in self.parameters]

    def _state(self, name: str, tensors: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The optimizer's state of one parameter; ValueError if a shape is another one."""
        parameter = self.trained[name]
        for part in (name, *(f"{name}.{moment}" for moment in MOMENTS)):
            if tensors[part].shape != parameter.shape:
                shapes = f"{list(tensors[part].shape)} there and {list(parameter.shape)} here"
                raise ValueError(f"{part} is {shapes}")
        state = {m: tensors[f"{name}.{m}"].to(parameter.device) for m in MOMENTS}
        device = parameter.device if self.optimizer.defaults["fused"] else "cpu"
        return {"step": torch.tensor(float(step), device=device), **state}


def adamw(parameters: list[nn.Parameter], device: torch.device) -> torch.optim.AdamW:
    """The optimizer of parameters on a device, whose groups have the scale of their rate."""
    return torch.optim.AdamW(
        _groups(parameters),
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=device.type in ("cpu", "cuda"),
    )


def _groups(parameters: list[nn.Parameter]) -> list[dict]:
    """The optimizer's groups, each with the scale of its learning rate: matrices, then vectors."""
    groups: list[dict] = [{"params": [], "scale": 1.0}, {"params": [], "scale": VECTOR_RATE}]
    for parameter in parameters:
        groups[parameter.dim() == 1]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def _read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The metadata and the tensors that save() wrote."""
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {})["hylora_finetune"])
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _progress_text(fields: dict[str, float]) -> str:
    speed = fields["tokens_per_second"]
    return f"loss {fields['loss']:.3f}, lr {fields['lr']:.1e}, {speed:.0f} tokens/s"
