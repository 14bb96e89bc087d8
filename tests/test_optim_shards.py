"""The equivariant optimizer on shards: FSDP2, replicas of it, tensor parallelism and both together are one process."""

import inspect
import json

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rigpt_hf import RiGPTForCausalLM
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups, full_tensor
from rigpt_hf.optimizer import exchange
from rigpt_hf.optimizer import step as stepping
from rigpt_hf.optimizer.dealing import boxes_of, numel
from tests.models import tiny_model, tokens
from tests.processes import together
from tests.tolerances import CONVERSION


# Neurons and dimensions that no two processes can divide, heads that lie across the borders of shards.
OPTIONS = {"attention_score": "squared_distance", "embedding_size": 26, "output_bias": True, "vocab_size": 62}
OPTIONS |= {"intermediate_size": 70, "gated_mlp": True, "hidden_act": "silu", "num_hidden_layers": 2}
STEPS = 3
BATCHES = [tokens(4, 17, seed=seed, vocab_size=62) for seed in range(STEPS)]
# Processes, and the shape of the mesh: replicas, shards, tensor parallelism.
MESHES = {
    "fsdp-2": (1, 2, 1),
    "fsdp-4": (1, 4, 1),
    "hsdp": (2, 2, 1),
    "tp": (1, 1, 2),
    "fsdp-tp": (1, 2, 2),
}


def train(model, rows=slice(None), **options) -> EquivariantOptimizer:
    optimizer = EquivariantOptimizer(equivariant_param_groups(model, lr=3e-3), **options)
    for ids in BATCHES:
        optimizer.zero_grad()
        model(ids[rows], labels=ids[rows], use_cache=False).loss.backward()
        optimizer.step()
    return optimizer


def sharded(kind: str, folder: str) -> RiGPTForCausalLM:
    replicas, shards, tensor = MESHES[kind]
    if tensor > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        sizes = {"tp_size": tensor} | ({"fsdp_size": shards} if shards > 1 else {})
        return RiGPTForCausalLM.from_pretrained(folder, dtype=torch.float64, distributed_config=DistributedConfig(**sizes))
    model = RiGPTForCausalLM.from_pretrained(folder, dtype=torch.float64)
    shape, names = ((replicas, shards), ("replicas", "shards")) if replicas > 1 else ((shards,), ("shards",))
    mesh = torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def run_sharded(rank: int, kind: str, folder: str, options: dict):
    world = torch.Size(MESHES[kind]).numel()
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    model = sharded(kind, folder)
    made = []
    real = stepping.newton_schulz
    stepping.newton_schulz = lambda stack, steps: made.append(stack.numel()) or real(stack, steps)
    _, _, tensor = MESHES[kind]
    share = len(BATCHES[0]) * tensor // world
    place = rank // tensor
    optimizer = train(model, slice(place * share, (place + 1) * share), **options)
    polar = [weight for group in optimizer.param_groups if group["update_rule"] == "polar" for weight in group["params"]]
    for weight in polar:
        layout = exchange.layout_of(weight, 1, 0)
        own = boxes_of(layout)[weight.device_mesh.mesh.flatten().tolist().index(rank)]
        assert numel(own) == weight.to_local().numel() == optimizer.state[weight]["momentum_buffer"].to_local().numel()
    result = {
        "weights": {name: full_tensor(weight.detach()) for name, weight in model.named_parameters()},
        "made": sum(made),
        "largest": max(made, default=0),
        "sharded": sum(isinstance(weight, DTensor) for weight in polar),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def trained(kind: str, folder, **options) -> tuple[RiGPTForCausalLM, RiGPTForCausalLM, list[dict]]:
    start = tiny_model(dtype=torch.float64, **OPTIONS)
    start.save_pretrained(folder)
    model = RiGPTForCausalLM.from_pretrained(folder, dtype=torch.float64)
    train(model)
    world = torch.Size(MESHES[kind]).numel()
    together(run_sharded, kind, str(folder), options, world=world)
    return start, model, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp-2", "hsdp", "fsdp-4", "tp", "fsdp-tp"])
def test_shards_train_as_one_process(kind, tmp_path):
    _, model, results = trained(kind, tmp_path)
    for result in results:
        print(kind, {k: v for k, v in result.items() if k != "weights"})
    for name, parameter in model.named_parameters():
        for result in results:
            e = float((result["weights"][name] - parameter).norm() / parameter.norm())
            if e > 1e-13: print(name, e)
            assert (result["weights"][name] - parameter).norm() <= CONVERSION[torch.float64] * parameter.norm(), name
