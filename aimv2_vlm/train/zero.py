"""DeepSpeed ZeRO-2 and ZeRO-3 behind `Placement`'s interface; the only file that knows DeepSpeed's inside.

DeepSpeed keeps AdamW's state and fp32 weights as flat pieces per process. `_fragment` finds a parameter's piece, so
that checkpoints carry the same names and shapes as everywhere else and no DeepSpeed checkpoint (a pickle) is written.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
import torch.distributed as dist

from aimv2_vlm.config import UserError
from aimv2_vlm.train.distributed import OptimizerMaker, Placement, fresh_moments

MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST_BUCKET = 200_000_000  # elements reduced at once


class ZeroPlacement(Placement):
    """train.strategy zero2 (gradients and optimizer state sharded) and zero3 (weights too)."""

    def __init__(self, strategy: str = "zero2", precision: str = "auto", offload: str = "none"):
        super().__init__(strategy, precision, offload)
        self.stage = int(strategy.removeprefix("zero"))
        self.deepspeed = _import_deepspeed(self.device)

    def place(self, model: torch.nn.Module, make_optimizer: OptimizerMaker) -> tuple[torch.nn.Module, Any]:
        model.to(self.device)
        engine, optimizer, _, _ = self.deepspeed.initialize(
            model=model, optimizer=make_optimizer(model), config=self._config(model), dist_init_required=False
        )
        return engine, optimizer

    def _config(self, model: torch.nn.Module) -> dict[str, Any]:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed's bookkeeping only: the loop cuts batches itself
            "gradient_accumulation_steps": 1,  # else it divides the loss
            "managed_gradient_accumulation": False,  # any number of backward passes, then one step
            "gradient_clipping": 0.0,  # absent means 1.0; `step` sets the recipe's value
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # keep the given AdamW, build no extension
            "zero_optimization": {
                "stage": self.stage,
                "reduce_bucket_size": max(1, min(trained, LARGEST_BUCKET)),
                "memory_efficient_linear": False,  # it would replace torch's linear for the whole process
            },
        }
        if self.offload == "optimizer":
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type == "cuda"}
        if self.precision == "bf16":  # weights and their exchange stay fp32, as in the other strategies
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        return config

    def autocast(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # the engine's forward enters it, and switches off any other

    def backward(self, model: Any, loss: torch.Tensor) -> None:
        model.backward(loss)

    def step(self, model: Any, optimizer: Any, clip: float) -> torch.Tensor:
        """As Placement.step; DeepSpeed itself leaves everything untouched where the norm is not finite."""
        optimizer.clip_grad = clip
        model.step()
        return torch.as_tensor(optimizer._global_grad_norm, dtype=torch.float32, device=self.device)

    # ------------------------------------------------------------------------------------------------------------ state

    def unwrap(self, model: Any) -> torch.nn.Module:
        return model.module

    def state_tensors(self, model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
        """Whole tensors, each gathered on one process, so that all write about as much."""
        self._make_moments(optimizer)
        tensors = {}
        for name, parameter, owner in self._owned(model):
            for kind in ("model", *MOMENTS):
                whole = torch.zeros(_numel(parameter), device=self.device)
                start, piece = self._fragment(optimizer, parameter, kind)
                whole[start : start + len(piece)] = piece
                dist.reduce(whole, dst=owner)  # every element comes from one process, the others add 0
                if owner == self.rank:
                    tensors[f"{kind}.{name}"] = whole.view(_shape(parameter))
            if owner == self.rank:
                tensors[f"step.{name}"] = self._state(optimizer, parameter)["step"].clone()
        return tensors

    @torch.no_grad()
    def after_load(self, model: Any, optimizer: Any, tensors: dict[str, torch.Tensor]) -> None:
        for name, parameter, owner in self._owned(model):
            for kind in ("model", *MOMENTS, "step"):
                mine = owner == self.rank
                shape = () if kind == "step" else _shape(parameter)
                whole = tensors[f"{kind}.{name}"].to(self.device) if mine else torch.empty(shape, device=self.device)  # what is offloaded was read to the host
                dist.broadcast(whole, src=owner)
                if kind == "step":
                    self._state(optimizer, parameter)["step"].copy_(whole)
                    continue
                start, piece = self._fragment(optimizer, parameter, kind)
                piece.copy_(whole.flatten()[start : start + len(piece)])
                if kind == "model":
                    self._set_working_weight(parameter, whole)

    def _set_working_weight(self, parameter: torch.nn.Parameter, whole: torch.Tensor) -> None:
        """The weights that forward reads are a copy of the fp32 ones."""
        if self.stage == 2:
            parameter.data.copy_(whole)
            return
        with self.deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(whole)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if not hasattr(tensor, "ds_id"):
            return tensor
        with self.deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone() if self.is_main else tensor

    def _owned(self, model: Any) -> list[tuple[str, torch.nn.Parameter, int]]:
        """(name, parameter, process that holds its whole tensors in a checkpoint) of every trained parameter.

        The largest goes first, each to the process that has least so far.
        """
        trained = [(n, p) for n, p in model.module.named_parameters() if p.requires_grad]
        load, owner = [0] * self.world, {}
        for name, parameter in sorted(trained, key=lambda item: -_numel(item[1])):
            owner[name] = load.index(min(load))
            load[owner[name]] += _numel(parameter)
        return [(name, parameter, owner[name]) for name, parameter in trained]

    def _flat_groups(self, optimizer: Any) -> list[torch.Tensor]:
        """The flat fp32 pieces of this process: what AdamW's state is keyed by."""
        return optimizer.single_partition_of_fp32_groups if self.stage == 2 else optimizer.fp32_partitioned_groups_flat

    def _make_moments(self, optimizer: Any) -> None:
        for flat in self._flat_groups(optimizer):
            if "exp_avg" not in optimizer.optimizer.state[flat]:
                optimizer.optimizer.state[flat] |= fresh_moments(flat.detach())

    def _state(self, optimizer: Any, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        if self.stage == 3:
            group = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
        else:
            group = next(i for i, params in enumerate(optimizer.bit16_groups) if any(p is parameter for p in params))
        return optimizer.optimizer.state[self._flat_groups(optimizer)[group]]

    def _fragment(self, optimizer: Any, parameter: torch.nn.Parameter, kind: str) -> tuple[int, torch.Tensor]:
        """(start, live piece): this process's elements of the flattened parameter's fp32 weight or moment."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        if self.stage == 3:
            weight = kind == "model"
            piece = safe_get_local_fp32_param(parameter) if weight else safe_get_local_optimizer_state(parameter, kind)
            start = min(self.rank * len(piece), parameter.ds_numel)
            return start, piece[: parameter.ds_numel - start].detach()  # the last pieces are padded
        if parameter._hp_mapping is None:  # lies wholly with other processes
            return 0, torch.empty(0, device=self.device)
        inside, outside = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
        flat = self._flat_groups(optimizer)[parameter._hp_mapping.param_group_index]
        source = flat if kind == "model" else optimizer.optimizer.state[flat][kind]
        return inside.start, source.detach().narrow(0, outside.start, outside.numel)


def _numel(parameter: torch.nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _shape(parameter: torch.nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def _import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and on a CPU without compiling its shared-memory exchange (gloo does that work)."""
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(f"train.strategy: zero2 and zero3 need DeepSpeed ({error}); "
                        "pip install 'aimv2-vlm[deepspeed]', or use fsdp2, which shards as much") from None
    import deepspeed.ops

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__ = {}  # what may be compiled here; read once, when the exchange is set up
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
