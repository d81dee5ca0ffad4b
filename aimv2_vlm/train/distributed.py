"""Placing a model on one process, DDP, FSDP2 or DeepSpeed ZeRO through accelerate, behind one small interface."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from aimv2_vlm.config import UserError


class Placement:
    """Where this process stands (`rank` of `world`, `device`, `dtype`) and how gradients travel.

    The loss handed to `backward` is already divided by global counts and multiplied by `world` (design: sums and counts are
    divided once), because DDP, FSDP2 and ZeRO average gradients over processes.
    """

    def __init__(self, strategy: str = "auto", precision: str = "auto"):
        from accelerate import Accelerator

        from aimv2_vlm.train.precision import choose_precision

        world = int(os.environ.get("WORLD_SIZE", "1"))
        if strategy == "auto":
            strategy = "ddp" if world > 1 else "single"
        if strategy == "single" and world > 1:
            raise UserError(f"train.strategy: single, but {world} processes were launched; use ddp, fsdp2, zero2 or zero3")
        self.strategy = strategy
        self.precision = choose_precision(precision)
        cpu = not torch.cuda.is_available()
        self.accelerator = Accelerator(cpu=cpu, mixed_precision="no")
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.device = self.accelerator.device
        self.is_main = self.rank == 0

    def place(
        self, model: torch.nn.Module, make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer]
    ) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        """`model` wrapped for this strategy and the optimizer of its trainable parameters."""
        model = model.to(self.device)
        optimizer = make_optimizer(model)
        if self.strategy == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(model)
        return model, optimizer

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def accumulate(self, model: torch.nn.Module, last: bool) -> Iterator[None]:
        """Gradients are exchanged in the last micro-batch of a step only."""
        if self.strategy == "ddp" and not last:
            with model.no_sync():
                yield
        else:
            yield

    def backward(self, model: torch.nn.Module, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> torch.Tensor:
        """Clip to `clip`, step, clear. Returns the gradient norm before clipping (a tensor on the device).

        A norm that is not finite leaves weights and step counters untouched on every process alike (fused AdamW's
        `found_inf`), without the host having to look.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        if clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm, foreach=True)
        optimizer.grad_scale = torch.ones((), device=norm.device)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def sum_counts(self, counts: dict[str, int]) -> dict[str, int]:
        """Integer counts added over processes, exactly."""
        if self.world == 1:
            return counts
        total = torch.tensor([counts[k] for k in sorted(counts)], dtype=torch.int64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(sorted(counts), total.tolist(), strict=True))

    def sum_tensor(self, values: torch.Tensor) -> torch.Tensor:
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather_strings(self, items: list[str]) -> list[str]:
        """All processes' strings on every process (as JSON bytes: no pickle)."""
        if self.world == 1:
            return items
        import json

        mine = torch.frombuffer(bytearray(json.dumps(items).encode()), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros((), dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor(len(mine), dtype=torch.int64, device=self.device))
        longest = max(int(s) for s in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(mine)] = mine
        parts = [torch.zeros_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return [s for size, part in zip(sizes, parts, strict=True) for s in json.loads(bytes(part[: int(size)].tolist()))]

    def any(self, flag: bool) -> bool:
        return self.sum_counts({"flag": int(flag)})["flag"] > 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model

    def state_tensors(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
        """Trained weights and AdamW moments under flat names: `model.<name>`, `exp_avg.<name>`, `exp_avg_sq.<name>`.

        The tensors are the live ones (on FSDP2 their shards), so loading into them restores the run.
        """
        tensors = {}
        for name, parameter in self.unwrap(model).named_parameters():
            if not parameter.requires_grad:
                continue
            state = optimizer.state[parameter]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"exp_avg.{name}"], tensors[f"exp_avg_sq.{name}"] = state["exp_avg"], state["exp_avg_sq"]
            tensors[f"step.{name}"] = state["step"]
        return tensors

    def after_load(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Whatever copies a strategy keeps of the weights are brought up to date."""
