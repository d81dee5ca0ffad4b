"""How much memory a tuning step takes on a device, known before the first step, and what to change where it does not fit.

Weights, gradients and the optimizer's states are counted from the model. What a forward and a backward pass hold besides
comes from running them on tensors without content (`FakeTensorMode`): the model's own code, no arithmetic, every storage
counted while it lives.
"""

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode, UnsupportedOperatorException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aimv2_vlm.config import SftRecipe, UserError
from aimv2_vlm.models import adapters
from aimv2_vlm.models.assistant import part_of, supervised_places
from aimv2_vlm.train.distributed import Placement
from aimv2_vlm.train.metrics import say

GB = 1e9
SMALL_STATES = 4096  # elements: tensors below keep fp32 moments beside 8-bit ones
UNTRACEABLE = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException, NotImplementedError)
TIGHT = 0.9  # of what is there: a run above this is warned


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of the tensor storages that come to life inside, real or fake: `now` and `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage(), before)
        return out

    def _meet(self, storage: torch.UntypedStorage, inputs: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in inputs:  # a view, or a tensor that was there before
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step, by what they hold."""

    weights: int
    gradients: int
    states: int
    activations: int  # what a micro-batch's forward and backward pass hold besides: saved tensors, logits, features, work space
    tokens: int  # of that micro-batch

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.states + self.activations

    def __str__(self) -> str:
        parts = ((self.weights, "weights"), (self.gradients, "gradients"), (self.states, "optimizer"), (self.activations, f"activations of {self.tokens:,} tokens"))
        return f"{size(self.total)} a device = " + " + ".join(f"{size(part)} {name}" for part, name in parts)


def size(num_bytes: float) -> str:
    """Bytes for the reader: GB, or MB of what is smaller."""
    return f"{num_bytes / GB:.3g} GB" if num_bytes >= GB else f"{num_bytes / 1e6:.3g} MB"


def estimate(model: torch.nn.Module, batch: dict[str, Any], normalize: Any, recipe: SftRecipe, placement: Placement) -> Memory:
    """Memory of a step of `model` (an AssistantForTraining, not yet placed) whose largest micro-batch is `batch`.

    normalize: what makes the batch's uint8 pictures the encoder's. Exact but for the libraries' own work space with one
    process; what DDP, FSDP2 and ZeRO add is counted from their rules.
    """
    learned = [p for p in model.parameters() if p.requires_grad]
    trained = sum(p.numel() * p.element_size() for p in learned)
    frozen = stored_bytes(p for p in [*model.parameters(), *model.buffers()] if not p.requires_grad)
    accumulates = recipe.optim.batch_size > placement.world * len(batch["row_lengths"])
    peak = _simulate(model, batch, normalize, placement, rounds=2 if accumulates else 1)
    states = state_bytes(learned, recipe.optim.states)
    if recipe.optim.states == "8bit" and placement.device.type == "cpu":  # moments are widened, one tensor at a time
        widened = 4 * 4 * max((p.numel() for p in learned if p.numel() >= SMALL_STATES), default=0)
        peak = max(peak, trained + widened)
    # A quantised layer's weight is widened while its product is computed; the simulation has it whole from the start.
    widths = [adapters.num_elements(p) for p in model.parameters() if not p.is_floating_point()]
    peak += (2 if placement.precision == "bf16" else 4) * max(widths, default=0)
    world, strategy = placement.world, placement.strategy
    block = max((sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
                 for modules in model.modules() if isinstance(modules, torch.nn.ModuleList) for module in modules), default=0)
    activations, gradients = max(peak - trained, 0), trained
    if strategy == "ddp":
        gradients += trained  # buckets that are exchanged
    elif strategy == "fsdp2":  # one block whole, its gradient with it
        trained, gradients, states = trained // world + block, gradients // world + block, states // world
    elif strategy in ("zero2", "zero3"):  # fp32 copies of the weights that are stepped
        share, bucket = trained // world, min(trained, 4 * 200_000_000)
        gradients, states = share + bucket, states // world + share
        if recipe.train.offload == "optimizer" and placement.device.type == "cuda":  # on a CPU it is the same memory
            gradients, states = bucket, 0
        trained, frozen = (trained, frozen) if strategy == "zero2" else (trained // world + block, frozen // world)
    return Memory(frozen + trained, gradients, states, activations, batch["input_ids"].shape[1])


def stored_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of weights as they lie in memory, with the scales of quantised ones."""
    total = 0
    for parameter in parameters:
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        nested = getattr(state, "state2", None)
        scales = [getattr(state, "absmax", None), getattr(nested, "absmax", None), getattr(parameter, "SCB", None)]
        total += sum(t.numel() * t.element_size() for t in scales if t is not None)
    return total


def state_bytes(learned: Iterable[torch.Tensor], states: str) -> int:
    """Bytes of AdamW's moments."""
    total = 0
    for parameter in learned:
        small = states == "fp32" or parameter.numel() < SMALL_STATES
        total += 2 * 4 * parameter.numel() if small else 2 * (parameter.numel() + 4 * -(-parameter.numel() // 256))
    return total


def _simulate(model: torch.nn.Module, batch: dict[str, Any], normalize: Any, placement: Placement, rounds: int) -> int:
    """Peak in bytes of `rounds` forward and backward passes, gradients included, weights not."""
    places = supervised_places(batch["labels"], batch["row_lengths"], batch["weights"])
    mode = FakeTensorMode()
    twin, normalize = _twin(model, mode), copy.deepcopy(normalize)  # it keeps constants, which must not become empty ones
    with _without_checks(), mode:
        fake = {k: mode.from_tensor(v) if torch.is_tensor(v) else v for k, v in batch.items() if k not in ("bad", "num_rows", "num_truncated")}
        places = mode.from_tensor(places)
        with TensorMemory() as memory:
            for _ in range(rounds):
                # As on a CPU, whatever the device: shapes and saved tensors are the same.
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=placement.precision == "bf16"):
                    pixels = fake.get("pixel_values")
                    ready = fake if pixels is None or pixels.dtype != torch.uint8 else fake | {"pixel_values": normalize(pixels)}
                    loss = twin(**ready, places=places)["text_sum"]
                del ready
                loss.backward()
                del loss
    return memory.peak


class _without_checks:  # noqa: N801
    """transformers compares numbers of image tokens on the host, which tensors without content do not have."""

    KEY = "TRANSFORMERS_DISABLE_TORCH_CHECK"

    def __enter__(self) -> None:
        self.old = os.environ.get(self.KEY)
        os.environ[self.KEY] = "1"

    def __exit__(self, *_: object) -> None:
        os.environ.pop(self.KEY) if self.old is None else os.environ.update({self.KEY: self.old})


def _twin(model: torch.nn.Module, mode: Any) -> torch.nn.Module:
    """A copy of `model` without content, in training mode; quantised layers are frozen ordinary ones in it."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() or not isinstance(tensor, torch.nn.Parameter):
            fake = mode.from_tensor(tensor.detach())
            memo[id(tensor)] = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else fake
    for layer in model.modules():
        if adapters.is_quantized(layer):
            with mode:
                plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            memo[id(layer)] = plain.requires_grad_(False)
    return copy.deepcopy(model, memo).train()


# --------------------------------------------------------------------------------------------------- does it fit


def capacity(placement: Placement, resident: int) -> tuple[int, str]:
    """(bytes that this process may have in all, where). resident: what the model takes already, on a CPU."""
    if placement.device.type == "cuda":
        return torch.cuda.mem_get_info(placement.device)[0], "the GPU"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return host_memory() // processes + resident, "the host's memory" + (f" shared by {processes} processes" if processes > 1 else "")


def host_memory(root: Path = Path("/")) -> int:
    """Bytes that can be had on this machine now, within the limit of its control group where there is one."""
    lines = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = ((root / f"sys/fs/cgroup/memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
        return available if limit == "max" else min(available, int(limit) - int(used))
    except (OSError, ValueError):
        return available


def check(model: torch.nn.Module, largest: Callable[[], list[dict[str, Any]]], normalize: Any, recipe: SftRecipe, placement: Placement) -> Memory | None:
    """Tell a step's memory in one line, and refuse a run that cannot fit, with the keys that would help and how much.

    largest: micro-batches that may be the fullest. A collective call. None where `train.memory_check` is off. Raises UserError on every process.
    """
    if recipe.train.memory_check == "off":
        return None
    try:
        needed = max((estimate(model, batch, normalize, recipe, placement) for batch in largest()), key=lambda memory: memory.total)
    except UNTRACEABLE as error:  # a decoder of someone's that looks at numbers: no reason not to train it
        if placement.is_main:
            say(f"memory: not estimated, the model cannot be run without content ({type(error).__name__})")
        return None
    there, where = capacity(placement, stored_bytes([*model.parameters(), *model.buffers()]))
    if placement.is_main:
        say(f"memory: {needed}; {where} has {size(there)}" + (" (tight)" if TIGHT * there < needed.total <= there else ""))
    problem = ""
    if needed.total > there:
        problem = (f"memory: a step needs {size(needed.total)}, {where} has {size(there)}, {size(needed.total - there)} less; "
                   f"{advice(model, needed, there, recipe, placement)} (train.memory_check=off starts anyway)")
    problem = next(filter(None, placement.gather_strings([problem])), "")
    if problem:
        raise UserError(problem)
    return needed


def advice(model: torch.nn.Module, needed: Memory, there: int, recipe: SftRecipe, placement: Placement) -> str:
    """Keys that make room and about what each saves: those that are enough alone, or else all."""
    short, world = needed.total - there, placement.world
    learned = [p for p in model.parameters() if p.requires_grad]
    llm = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and part_of(n) == "llm" and not adapters.is_adapter(n))
    linears = adapters.block_linears(model.assistant)
    savings: dict[str, float] = {}
    if (rows := recipe.optim.micro_batch_size) > 1:  # what is held grows with the tokens of a micro-batch
        left = max(0, needed.activations - short)
        if left > needed.activations / rows:
            savings[f"data.tokens_per_microbatch={int(needed.tokens * left / needed.activations)}"] = short
        savings["optim.micro_batch_size=1"] = needed.activations * (1 - 1 / rows)
    if recipe.optim.states == "fp32" and placement.strategy in ("single", "ddp"):
        savings["optim.states=8bit"] = state_bytes(learned, "fp32") - state_bytes(learned, "8bit")
    if recipe.adapter.kind == "none" and llm:
        savings["adapter.kind=lora"] = llm * (4 + (2 if recipe.optim.states == "8bit" else 8)) * 0.95  # the adapters take some
    if recipe.llm.quantization == "none" and placement.strategy in ("single", "ddp"):
        stored = stored_bytes(adapters.stored_weight(linear) for linear in linears.values())
        saved = stored - 0.53 * sum(linear.weight.numel() for linear in linears.values())
        with_adapter = recipe.adapter.kind == "none" and llm
        savings["adapter.kind=lora llm.quantization=nf4" if with_adapter else "llm.quantization=nf4"] = saved + savings.get("adapter.kind=lora", 0.0)
    if placement.strategy in ("single", "ddp", "zero2"):
        processes = max(2, world)
        savings[f"train.strategy=fsdp2 on {processes} devices" if world == 1 else "train.strategy=fsdp2"] = (1 - 1 / processes) * (
            needed.gradients + needed.states + sum(p.numel() * p.element_size() for p in learned))
    if placement.strategy in ("zero2", "zero3") and recipe.train.offload == "none" and placement.device.type == "cuda":
        savings["train.offload=optimizer"] = needed.states
    enough = {key: saved for key, saved in savings.items() if saved >= short}
    told = ", ".join(f"{key} saves {size(saved)}" for key, saved in sorted((enough or savings).items(), key=lambda item: -item[1]) if saved > 0)
    if enough:
        return f"one of these makes room: {told}"
    return f"no key alone makes room: {told or 'nothing is left to save'}; combine them or take a smaller llm.path"
