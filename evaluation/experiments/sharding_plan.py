"""Bytes and messages of a step on shards, for many GPUs: `python -m evaluation.experiments.sharding_plan --help`.

The plan is computed from shapes and the table of frames, without a process; then the same formulas are compared, to
the byte, with what a small model holds and sends on two and four processes of this machine.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import torch
import torch.distributed as dist
from rich.table import Table
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM
from rigpt_hf.checkpoints.folder import check_file
from rigpt_hf.command_line import WRITES
from rigpt_hf.dataclass_options import program
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.optimizer import step as stepping
from rigpt_hf.optimizer.plan import PeakBytes, plan
from rigpt_hf.processes import python
from rigpt_hf.terminal import Console

from .common import check_least, write_json


LLAMA: dict[str, Any] = {
    "hidden_act": "silu",
    "gated_mlp": True,
    "attention_bias": False,
    "attention_output_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "124m": {"hidden_size": 768, "embedding_size": 768},
    # The sizes of Llama 2 7B.
    "7b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
}
# Nothing here is divided evenly by four.
SMALL: dict[str, Any] = LLAMA | {
    "hidden_size": 36,
    "intermediate_size": 70,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 61,
}
# Shards and replicas.
MEASURED = ((2, 1), (4, 1), (2, 2))
ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from evaluation.experiments.sharding_plan import measure_process
measure_process(*map(int, sys.argv[2:5]), sys.argv[5])
"""
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Options:
    """The model, and the numbers of GPUs."""

    shape: Literal["124m", "7b"] = "7b"
    """Size of the model."""
    gpus: list[int] = field(default_factory=lambda: [8, 64])
    """Numbers of GPUs, separated by commas."""
    node: int = 8
    """GPUs of a machine: where there are more, HSDP with shards within machines is planned, too."""
    only_plan: bool = False
    """Start no processes to measure on."""
    output: Annotated[Path | None, WRITES] = None
    """File for the numbers, JSON."""

    def __post_init__(self):
        check_least(self, node=1)
        for gpus in self.gpus:
            if gpus < 1 or (gpus > self.node and gpus % self.node):
                raise ValueError(f"`gpus` must be positive, in whole machines of {self.node}, got {gpus}.")


def run(options: Options) -> None:
    """Plan a step on shards, print what each GPU holds and sends, and measure the formulas on small processes."""
    seen = check_file(options.output, "output", force=True)
    meshes = [(gpus, 1) for gpus in options.gpus]
    meshes += [(options.node, gpus // options.node) for gpus in options.gpus if gpus > options.node]
    planned = [planned_on(SHAPES[options.shape], *mesh) for mesh in meshes]
    columns = ("GPUs", "weights", "gradients", "moments", "factors", "sent", "messages", "calls")
    table = Table(*columns, title=f"{options.shape}, the most of any GPU in a step, GB")
    for row in planned:
        most = row["most"]
        sizes = (most["weights"], most["gradients"], most["momenta"] + most["second_moments"], most["transient"])
        gigabytes = [f"{size / 1e9:.3f}" for size in (*sizes, most["sent"])]
        name = f"{row['replicas']} × {row['shards']}" if row["replicas"] > 1 else str(row["shards"])
        table.add_row(name, *gigabytes, str(most["messages"]), str(most["collectives"]))
    console = Console()
    console.print(table)
    result: dict[str, Any] = {"shape": options.shape, "torch": torch.__version__, "planned": planned}
    if not options.only_plan:
        result["measured"] = [measured_on(*mesh) for mesh in MEASURED]
        pairs = [pair for row in result["measured"] for pair in row["processes"]]
        same = sum(pair["planned"] == pair["measured"] for pair in pairs)
        console.print(f"Measured as planned, to the byte: {same} of {len(pairs)} processes.")
    write_json(options.output, result, seen=seen, named=True)


def planned_on(shape: dict[str, Any], shards: int, replicas: int) -> dict[str, Any]:
    """The plan of the process with the most of each, and the sums of all."""
    with torch.device("meta"):
        model = RiGPTForCausalLM(RiGPTConfig(**shape))
    processes = [asdict(one) for one in plan(equivariant_param_groups(model), shards, replicas)]
    most, total = ({key: pick(one[key] for one in processes) for key in processes[0]} for pick in (max, sum))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "shards": shards, "replicas": replicas, "most": most, "total": total}


def measured_on(shards: int, replicas: int) -> dict[str, Any]:
    """The bytes that every process of a small model holds and sends, beside those that were planned."""
    groups = equivariant_param_groups(RiGPTForCausalLM(RiGPTConfig(**SMALL)))
    planned = plan(groups, shards, replicas, sent=torch.float32, computed=torch.float32)
    ranks = range(shards * replicas)
    with tempfile.TemporaryDirectory() as folder:
        commands = [python("-c", CHILD, ROOT, rank, shards, replicas, folder) for rank in ranks]
        children = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
        try:
            said = [child.communicate()[1] for child in children]
        finally:
            for child in children:
                child.kill()
        for child, lines in zip(children, said, strict=True):
            if child.returncode:
                raise RuntimeError(f"A process that was measured failed: {lines.strip()}")
        measured = [torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in ranks]
    pairs = zip(map(asdict, planned), measured, strict=True)
    processes = [{"planned": one, "measured": {key: other[key] for key in one}} for one, other in pairs]
    return {"shards": shards, "replicas": replicas, "processes": processes}


def measure_process(rank: int, shards: int, replicas: int, folder: str) -> None:
    """One of the processes: two steps, of which the second is measured."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=shards * replicas)
    model = RiGPTForCausalLM(RiGPTConfig(**SMALL))
    shape, names = ((replicas, shards), ("replicas", "shards")) if replicas > 1 else ((shards,), ("shards",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = EquivariantOptimizer(equivariant_param_groups(model))
    ids = torch.arange(16)[None]
    model(ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    torch.save(measured_step(model, optimizer), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def measured_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """One more step with the gradients there are: what is held, and what polar factors hold besides and send."""
    counts = {"sent": 0, "received": 0, "messages": 0, "collectives": 0, "transient": 0}
    exchange, map_blocks = dist.all_to_all_single, stepping.map_blocks

    def counted(into: torch.Tensor, out: torch.Tensor, taken: list[int], given: list[int], **options: Any) -> None:
        counts["sent"] += out.numel() * out.element_size()
        counts["received"] += into.numel() * into.element_size()
        counts["messages"] += sum(count > 0 for count in given)
        counts["collectives"] += 1
        # With copies that are not counted: the threads of gloo let go of what they sent a moment later.
        with _disable_current_modes():
            got = torch.empty_like(into)
            exchange(got, out.clone(), taken, given, **options)
        into.copy_(got)

    def watched(*arguments: Any) -> None:
        with PeakBytes() as peak:
            map_blocks(*arguments)
        counts["transient"] = max(counts["transient"], peak.most)

    with patch.object(dist, "all_to_all_single", counted), patch.object(stepping, "map_blocks", watched):
        optimizer.step()
    states = {name: [state[name] for state in optimizer.state.values() if name in state] for name in MOMENTS}
    return counts | {
        "weights": _held(model.parameters()),
        "gradients": _held(parameter.grad for parameter in model.parameters() if parameter.grad is not None),
        "momenta": _held(states["momentum_buffer"]) + _held(states["exp_avg"]),
        "second_moments": _held(states["exp_avg_sq"]),
    }


def _held(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the shards that are here."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


main = program(Options, run, name="python -m evaluation.experiments.sharding_plan")

if __name__ == "__main__":
    sys.exit(main())
