"""What a matrix costs in time: nanoseconds of a decoded token, or of a prompt, by this machine's
rates.

The time of a model is that of its linears, one by one, and of its output head, which reads the last
token alone. Attention, norms and whatever else a model computes are left out: no candidate changes
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from hylora_kernels.compression.costs import as_is
from hylora_kernels.compression.embedding import holders
from hylora_kernels.compression.options import CompressOptions
from hylora_kernels.compression.ranks import DENSE, Choice, rank_cost
from hylora_kernels.compression.report import Timing
from hylora_kernels.evaluation.rates import rates_of
from hylora_kernels.evaluation.speed import prompt_that_fits, throughput
from hylora_kernels.layers.experts import ExpertLinears
from hylora_kernels.layers.linear import SVDLoRALinear
from hylora_kernels.model.context import check_context
from hylora_kernels.model.structure import Target, as_matrix, is_linear
from hylora_kernels.support.devices import device_name, floating_dtype, input_device

NEW_TOKENS = 32  # Of a measurement of decoding.


class Times:
    """The times of the candidates of a model's matrices.

    candidates: the linears, and the embedding and output head, that the budget replaces.
    rest:       nanoseconds of all other linears.

    The rates are those of the model's device, dtype and, on a CPU, torch's threads; what has not
    been measured is measured now. Raises ValueError naming target_time for more rows than the
    model's context, and for experts whose share of the tokens its config doesn't tell.
    """

    def __init__(self, model: nn.Module, candidates: Sequence[Target], options: CompressOptions):
        self._options, self._model, self._candidates = options, model, candidates
        self.rows = options.workload.rows
        try:
            check_context(model, self.rows)
        except ValueError as error:
            raise ValueError(f"target_time={options.target_time!r}: {error}") from None
        self._head = model.get_output_embeddings()
        self._shares = expert_shares(model)
        self.device, self._dtype = input_device(model), floating_dtype(model)
        all_rows = {1, self.rows, *(self.rows * share for share in self._shares.values())}
        self._rates = rates_of(self.device, [self._dtype], all_rows, options.progress)
        weights = {id(_weight(target.module)) for target in candidates}
        others = [
            Target(path, module, _shape(module))
            for path, module in model.named_modules()
            if is_linear(module) and id(_weight(module)) not in weights
        ]
        self.rest = sum(self.nanoseconds(target, as_is(target)) for target in others)

    def nanoseconds(self, target: Target, choice: Choice) -> int:
        """Of a candidate, 1 at least; adapters count as the option `count` says."""
        (N, K), o, module = target.shape, self._options, target.module
        form, weights = "dense", N * K
        if isinstance(module, SVDLoRALinear):
            form = "dense" if module.form == "pivoted" and module.rank == N else module.form
            weights = module.parameter_count(merged=o.count == "merged")
        elif choice.rank != DENSE:
            form = o.form
            weights = rank_cost(choice.rank, N, K, o.form, o.lora_rank, o.count)
        seconds = self._rates.seconds(
            self._dtype, form, choice.bits, weights, self._rows_of(target)
        )
        return max(round(1e9 * seconds), 1)

    def compare(self, choices: Mapping[str, Choice]) -> Timing:
        """The times predicted of the model as it is and with these choices by path, and the speed
        that it has as it is."""
        chosen = dense = self.rest
        for target in self._candidates:
            dense += self.nanoseconds(target, as_is(target))
            chosen += self.nanoseconds(target, choices[target.path])
        timing = Timing(self.rows, device_name(self.device), dense / 1e9, chosen / 1e9)
        timing.dense_tok_s = self._tokens_per_second(timing)
        return timing

    def measure(self, timing: Timing) -> None:
        """Add the speed that the model has now."""
        timing.tok_s = self._tokens_per_second(timing)

    def _tokens_per_second(self, timing: Timing) -> float | None:
        """Of the model packed for inference: decoded ones after a prompt, or those of a prompt."""
        decodes = self.rows == 1
        if not self._options.measure or timing.not_measured:
            return None
        try:
            new = NEW_TOKENS if decodes else 1
            prompt = prompt_that_fits(self._model, new) if decodes else self.rows
            speed = throughput(self._model, prompt, new, optimize=True)
        except Exception as error:  # A model's own forward with a cache may fail in any way.
            timing.not_measured = f"{type(error).__name__}: {error}"
            return None
        return speed.decode_tok_s if decodes else speed.prefill_tok_s

    def _rows_of(self, target: Target) -> float:
        """The rows of x of a token or prompt, as a mean over an expert's siblings."""
        module = target.module
        if isinstance(module, nn.Embedding):
            return 1 if len(holders(self._model, module.weight)) > 1 else 0
        if module is self._head:
            return 1
        return self.rows * self._shares.get(target.path, 1.0)


def expert_shares(model: nn.Module) -> dict[str, float]:
    """path of an expert's linear -> the share of the tokens that it reads, the same for all.

    Raises ValueError for experts whose share the config doesn't tell.
    """
    stacks = {p: m for p, m in model.named_modules() if isinstance(m, ExpertLinears)}
    if not stacks:
        return {}
    config = model.config.get_text_config()
    each = getattr(config, "num_experts_per_tok", None)
    if not each:
        raise ValueError(
            "the time of experts can't be predicted: config.num_experts_per_tok, the experts that a"
            " token is routed to, is not given"
        )
    return {
        f"{path}.{name}": each / stack.num_experts
        for path, stack in stacks.items()
        for name, module in stack.named_modules()
        if is_linear(module)
    }


def _weight(module: nn.Module) -> object:
    """What tells a matrix from others: a Parameter, or factors in place of one."""
    return module.SVh if isinstance(module, SVDLoRALinear) else module.weight


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, SVDLoRALinear):
        return module.out_features, module.in_features
    N, K = as_matrix(module).shape
    return N, K
