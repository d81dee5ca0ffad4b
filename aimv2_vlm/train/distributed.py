"""Placing a model on one process, DDP, FSDP2 or DeepSpeed ZeRO, behind one small interface.

accelerate finds the processes, devices and backend (torchrun, `accelerate launch`, several machines) and wraps for DDP.
Its FSDP and DeepSpeed plug-ins do not run on CPUs and decide on clipping, accumulation and precision themselves; so
FSDP2 is torch's `fully_shard` and ZeRO is DeepSpeed's own engine (zero.py), on accelerate's process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from aimv2_vlm.config import UserError
from aimv2_vlm.train.metrics import format_seconds, say
from aimv2_vlm.train.optim import keeps_8bit_states, state_of_8bit

OptimizerMaker = Callable[[torch.nn.Module], torch.optim.Optimizer]
WAITING_NOTE_S = 30.0
CONNECTION_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")  # gloo's words, NCCL's


@contextlib.contextmanager
def lost_processes() -> Iterator[None]:
    """What the death of another process raises inside becomes a UserError of one line."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in CONNECTION_LOST):
            raise
        raise UserError(f"process {os.environ.get('RANK', '0')}: another process of this run has ended (its own last words say why); the same command "
                        "goes on from the newest checkpoint") from error


@cache
def _host_group() -> dist.ProcessGroup:
    """All processes over gloo, beside NCCL; one for all placements of a process."""
    return dist.new_group(backend="gloo")


class Placement:
    """Where this process stands (`rank` of `world`, `device`, `precision`) and how weights and gradients travel.

    The loss handed to `backward` is already divided by global counts and multiplied by `world` (sums and counts are
    divided once), because DDP, FSDP2 and ZeRO average gradients over processes.
    """

    def __new__(cls, strategy: str = "auto", precision: str = "auto", offload: str = "none") -> Placement:
        if strategy in ("zero2", "zero3"):
            from aimv2_vlm.train.zero import ZeroPlacement

            cls = ZeroPlacement
        return super().__new__(cls)

    @classmethod
    def of(cls, recipe: Any) -> Placement:
        """The placement that a recipe (with `train` and `precision`) asks for. Raises UserError."""
        return cls(recipe.train.strategy, recipe.precision, recipe.train.offload)

    def __init__(self, strategy: str = "auto", precision: str = "auto", offload: str = "none"):
        """Raises UserError where the strategy, what it offloads and the processes launched do not go together."""
        from accelerate import Accelerator

        from aimv2_vlm.train import launch
        from aimv2_vlm.train.precision import choose_precision

        launch.join()
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if strategy == "auto":
            strategy = "ddp" if world > 1 else "single"
        if strategy == "single" and world > 1:
            raise UserError(f"train.strategy: single, but {world} processes were launched; use ddp, fsdp2, zero2 or "
                            "zero3")
        if strategy != "single" and world == 1:
            raise UserError(f"train.strategy: {strategy}, but one process was launched; use single, or start "
                            "`torchrun --nproc_per_node N -m aimv2_vlm ...`")
        for plugin in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
            if os.environ.get(plugin, "false").lower() == "true":
                raise UserError(f"train.strategy: {strategy}, but `accelerate launch` set {plugin}; launch with plain "
                                "--multi_gpu or --cpu, the recipe alone chooses the strategy")
        if offload != "none" and not strategy.startswith("zero"):
            raise UserError(f"train.offload: {offload} goes with train.strategy: zero2 and zero3, not with {strategy}; write none")
        self.strategy, self.offload = strategy, offload
        self.precision = choose_precision(precision)
        cpu = not torch.cuda.is_available()
        if cpu:  # an installed DeepSpeed, which transformers imports when it saves a model, guesses aloud otherwise
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.is_main = self.rank == 0
        self._turns = 0  # of main_first

    # ------------------------------------------------------------------------------------------------------- one step

    def place(
        self, model: torch.nn.Module, make_optimizer: OptimizerMaker
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """`model` wrapped for this strategy and the optimizer of its trainable parameters.

        Every process starts from rank 0's weights.
        """
        from aimv2_vlm.models.adapters import move

        move(model, self.device)
        if self.strategy == "fsdp2":
            self._shard(model)
            return model, make_optimizer(model)
        return self.accelerator.prepare_model(model), make_optimizer(model)

    def _shard(self, model: torch.nn.Module) -> None:
        """FSDP2: one unit a transformer block (an element of a ModuleList), one for the rest.

        Frozen weights stay whole on every process: a frozen encoder is also called outside the model's own forward.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.detach(), src=0)
        frozen = {p for p in model.parameters() if not p.requires_grad}
        settings = {"mesh": init_device_mesh(self.device.type, (self.world,)), "ignored_params": frozen}
        halved = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks(model):
            if any(p.requires_grad for p in block.parameters()):
                fully_shard(block, **settings, mp_policy=halved if self.precision == "bf16" else MixedPrecisionPolicy())
        fully_shard(model, **settings)  # without a policy: pixel targets and norms outside the blocks stay fp32

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def accumulate(self, model: torch.nn.Module, last: bool) -> Iterator[None]:
        """DDP exchanges gradients in the last micro-batch of a step only; sharded strategies have no room to wait."""
        if self.strategy == "ddp" and not last:
            with model.no_sync():
                yield
        else:
            yield

    def backward(self, model: torch.nn.Module, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> torch.Tensor:
        """Clip to `clip` (0: no clipping), step, clear. Returns the global norm before clipping, on the device.

        A norm that is not finite leaves weights and step counters untouched on every process alike, without the host
        having to look: fused AdamW divides gradients by `grad_scale` and does nothing where `found_inf` is 1.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([_local(p.grad) for p in parameters], foreach=True)
        if self.strategy == "fsdp2":  # each process saw its shards only
            norm = self.sum_tensor(norm.square()).sqrt()
        optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1.0) if clip > 0 else torch.ones_like(norm)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    # ------------------------------------------------------------------------------------------- between the processes

    def sum_counts(self, counts: dict[str, int]) -> dict[str, int]:
        """Integer counts added over processes, exactly."""
        if self.world == 1:
            return counts
        total = torch.tensor([counts[k] for k in sorted(counts)], dtype=torch.int64)
        # Counts are known on the host: added up on a GPU, the host would wait for the step before.
        dist.all_reduce(total, group=_host_group() if self.device.type == "cuda" else None)
        return dict(zip(sorted(counts), total.tolist(), strict=True))

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        """`values` added over processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather_strings(self, items: list[str]) -> list[str]:
        """All processes' strings on every process, in rank order (as JSON bytes: no pickle)."""
        if self.world == 1:
            return items
        mine = torch.frombuffer(bytearray(json.dumps(items).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor(len(mine), dtype=torch.int64, device=self.device))
        longest = max(int(s) for s in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(mine)] = mine
        parts = [torch.zeros_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        lists = [json.loads(bytes(part[: int(size)].tolist())) for size, part in zip(sizes, parts, strict=True)]
        return [text for texts in lists for text in texts]

    def any(self, flag: bool) -> bool:
        return self.sum_counts({"flag": int(flag)})["flag"] > 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def main_first(self, work: Callable[[], Any], what: str = "prepare the data") -> Any:
        """`work()` on every process, rank 0 before the others (it builds files that they then find).

        The others look at the process group's store now and then: indexing, or writing a large model, may take longer than
        any collective call may, and the second process says what is waited for.
        """
        if self.world == 1:
            return work()
        self._turns += 1
        store, turn = dist.distributed_c10d._get_default_store(), f"main_first/{self._turns}"
        if not self.is_main:
            self._wait_for(store, turn, what)
        try:
            return work()
        finally:
            if self.is_main:
                store.set(turn, "done")

    def main_alone(self, work: Callable[[], Any], what: str) -> Any:
        """`work()` on rank 0, for which the others wait as in `main_first`; None on them."""
        return self.main_first(lambda: work() if self.is_main else None, what)

    def _wait_for(self, store: dist.Store, turn: str, what: str) -> None:
        start = told = time.monotonic()
        while not store.check([turn]):
            time.sleep(0.2)
            if self.rank == 1 and time.monotonic() - told > WAITING_NOTE_S:
                told = time.monotonic()
                say(f"waiting for the first process to {what}, {format_seconds(told - start)} so far")

    # ------------------------------------------------------------------------------------------------------------ state

    @property
    def shards_weights(self) -> bool:
        """Whether the placed model holds only a part of each weight on this process."""
        return self.strategy in ("fsdp2", "zero3")

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model

    def state_tensors(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """Trained weights and AdamW moments as `model.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>`, `step.<name>`; and
        `buffer.<name>`, running statistics (under ZeRO none: probes, which have some, do not run there).

        The same names and shapes in every strategy: whole tensors where they are replicated, DTensors under FSDP2;
        under ZeRO each process holds some of the names.
        8-bit moments come as uint8 with `exp_avg_scales.<name>`, `exp_avg_sq_scales.<name>`.
        Fill them in place and call `after_load` to restore a run. A collective call.
        """
        tensors = {}
        self._reshard(model)
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.unwrap(model).named_parameters():
            if not parameter.requires_grad:
                continue
            if id(parameter) not in stepped:
                raise RuntimeError(f"{name} is trainable but not in the optimizer: its moments would be lost")
            tensors[f"model.{name}"] = parameter.detach()
            if keeps_8bit_states(optimizer):
                tensors |= {f"{key}.{name}": tensor for key, tensor in state_of_8bit(optimizer, parameter).items()}
                continue
            state = optimizer.state[parameter]
            if "exp_avg" not in state:
                state |= fresh_moments(parameter)
            for key in ("exp_avg", "exp_avg_sq", "step"):
                tensors[f"{key}.{name}"] = state[key]
        kept = self.unwrap(model).state_dict().keys()  # without buffers that are computed anew
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.unwrap(model).named_buffers() if name in kept}
        return tensors

    def after_load(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]
    ) -> None:
        """Make `tensors` (what `state_tensors` gave, filled anew) the run's state. Here they are the live ones, but for the
        step counters of 8-bit moments, which live on the host."""
        if keeps_8bit_states(optimizer):
            for name, parameter in self.unwrap(model).named_parameters():
                if parameter.requires_grad:
                    optimizer.state[parameter]["step"] = int(tensors[f"step.{name}"])

    def full_state(self, model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
        """The unwrapped model's whole state dict on the CPU of rank 0, None elsewhere: what `final/` is written from.

        A collective call. Tied names share one tensor, as in `state_dict()`.
        """
        self._reshard(model)
        whole: dict[str, torch.Tensor] = {}
        seen: dict[int, torch.Tensor] = {}
        for name, tensor in self.unwrap(model).state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                gathered = self._gather(tensor)
                seen[id(tensor)] = gathered.detach().cpu() if self.is_main else tensor
            whole[name] = seen[id(tensor)]
        return whole if self.is_main else None

    def _reshard(self, model: torch.nn.Module) -> None:
        """After a forward pass without a backward one (validation) FSDP2's outermost unit still shows whole weights."""
        for module in model.modules() if self.strategy == "fsdp2" else ():
            if hasattr(module, "reshard"):
                module.reshard()

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks of a model: the elements of its ModuleLists."""
    return [block for module in model.modules() if isinstance(module, torch.nn.ModuleList) for block in module]


def fresh_moments(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """AdamW's state of a parameter that has not been stepped yet."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
