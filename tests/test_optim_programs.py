"""The equivariant optimizer in other people's hands: Trainer, DDP, FSDP2, compiled, averaged, in half precision."""

import copy

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from rigpt_hf import RiGPTConfig, RiGPTForCausalLM, optim
from rigpt_hf.optim import EquivariantOptimizer, equivariant_param_groups
from rigpt_hf.optimizer import step as stepping
from rigpt_hf.optimizer.sharing import assign, shared_work
from rigpt_hf.trainer_optimizer import EquivariantFactory, register_with_trainer
from tests.conversion.sources import gpt2_config
from tests.models import tiny_config, tiny_model, tokens
from tests.processes import together
from tests.tolerances import DISTRIBUTED


OPTIONS = {"attention_score": "squared_distance", "embedding_size": 24, "output_bias": True, "attention_bias": True}
BATCHES = [tokens(4, 17, seed=seed) for seed in range(4)]
STEPS = 8


def make_optimizer(model, **options):
    return EquivariantOptimizer(equivariant_param_groups(model, lr=3e-3), **options)


def losses_of(model, optimizer, rows=slice(None), clip=None, steps=STEPS) -> list[float]:
    losses = []
    for step in range(steps):
        ids = BATCHES[step % len(BATCHES)][rows]
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def reference(clip=None) -> tuple[nn.Module, list[float]]:
    model = tiny_model(dtype=torch.float32, **OPTIONS)
    return model, losses_of(model, make_optimizer(model), clip=clip)


def run_distributed(rank: int, kind: str, folder: str):
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = tiny_model(dtype=torch.float32, **OPTIONS)
    done, asked = [], []
    real, ask = stepping.newton_schulz, stepping.agreeing_group
    stepping.agreeing_group = lambda *arguments: asked.append(1) or ask(*arguments)
    stepping.newton_schulz = lambda stack, *how: done.append(len(stack)) or real(stack, *how)
    sharing = {"ddp": "all", "ensemble-all": "all", "ddp-unshared": "none"}.get(kind, "auto")
    steps = STEPS
    if kind == "accelerate-fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["RiGPTDecoderLayer"],
        )
        accelerator = Accelerator(cpu=True)
        # Accelerate shards on accelerators only, unless told otherwise.
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        wrapped, optimizer = accelerator.prepare(model, make_optimizer(model, sharing=sharing))
        assert all(isinstance(parameter, DTensor) for parameter in wrapped.parameters()), "nothing was sharded"
        model = wrapped
    elif kind.startswith("ensemble"):  # of one start, each with data of its own
        wrapped, steps = model, ensemble_steps(kind, rank)
    elif kind == "fsdp2":
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    else:
        wrapped = nn.parallel.DistributedDataParallel(model)
    if kind != "accelerate-fsdp2":
        optimizer = make_optimizer(wrapped, sharing=sharing)
    halves = slice(2 * rank, 2 * rank + 2)
    losses = losses_of(wrapped, optimizer, halves, clip=0.5, steps=steps)
    whole = {name: optim.full_tensor(parameter.detach()) for name, parameter in model.named_parameters()}
    result = {"losses": losses, "done": sum(done), "asked": len(asked), "weights": whole}
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def ensemble_steps(kind: str, rank: int) -> int:
    """Where nobody asks the others, everybody may stop when he likes."""
    return STEPS - 3 * rank if kind == "ensemble" else STEPS


def launch(kind: str, folder) -> list[dict]:
    together(run_distributed, kind, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["ddp", "ddp-unshared", pytest.param("fsdp2", marks=pytest.mark.full), "accelerate-fsdp2"]
)
def test_two_processes_train_as_one(kind, tmp_path):
    model, losses = reference(clip=0.5)
    first, second = launch(kind, tmp_path)
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    assert losses[0] - losses[-1] > 0.05, "nothing was learned"
    assert max(abs(a - b) for a, b in zip(mean, losses, strict=True)) <= DISTRIBUTED
    for name, parameter in model.named_parameters():
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert (first["weights"][name] - parameter).norm() <= DISTRIBUTED * parameter.norm() + 1e-7, name
    blocks = sum(
        group["blocks"] * len(group["params"])
        for group in equivariant_param_groups(model)
        if group["update_rule"] == "polar"
    )
    assert first["asked"] == second["asked"] == (STEPS if kind == "ddp" else 0)
    if kind == "ddp-unshared":
        assert first["done"] == second["done"] == STEPS * blocks
    else:
        assert first["done"] + second["done"] == STEPS * blocks, "work was repeated"
        assert 0.3 < first["done"] / (STEPS * blocks) < 0.7


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ensemble", "ensemble-all"])
def test_processes_with_models_of_their_own_share_nothing(kind, tmp_path):
    """Nor do they wait for each other, unless asked to."""
    for rank, result in enumerate(launch(kind, tmp_path)):
        model = tiny_model(dtype=torch.float32, **OPTIONS)
        rows, steps = slice(2 * rank, 2 * rank + 2), ensemble_steps(kind, rank)
        losses = losses_of(model, make_optimizer(model), rows, clip=0.5, steps=steps)
        assert max(abs(a - b) for a, b in zip(result["losses"], losses, strict=True)) <= DISTRIBUTED
        assert result["asked"] == (STEPS if kind == "ensemble-all" else 0)


def test_the_costliest_matrices_are_spread():
    owners = assign([(3, 64, 64), (1, 64, 256), (8, 8, 64)], 2)
    load = [0, 0]
    for shape, row in zip([(64, 64), (64, 256), (8, 64)], owners, strict=True):
        for owner in row:
            load[owner] += shape[0] * shape[1] * min(shape)
    assert abs(load[0] - load[1]) <= 64**3 and owners[1] == [0] and owners[0] == [1, 1, 1]
    stacks = [torch.randn(3, 4, 5), torch.randn(1, 2, 2)]
    alone = shared_work(stacks, lambda stack: 2 * stack, None)
    assert all(torch.equal(2 * stack, result) for stack, result in zip(stacks, alone, strict=True))


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        row = BATCHES[index % 4][index // 4]
        return {"input_ids": row, "labels": row}


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        weight_decay=0.2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )


def test_training_arguments_alone_select_it(tmp_path):
    trained = {}
    for name in ("equivariant", "adamw_torch"):
        model = tiny_model(dtype=torch.float32, **OPTIONS)
        options = {"optim_args": "momentum=0.9,embed_tokens=0.5"} if name == "equivariant" else {}
        trainer = Trainer(model, arguments(tmp_path, optim=name, **options), train_dataset=Rows())
        trainer.train()
        trained[name] = model
        if name == "equivariant":
            inner = trainer.optimizer.optimizer
            assert isinstance(inner, EquivariantOptimizer) and inner.defaults["momentum"] == 0.9
            rates = {end: group["initial_lr"] for group in inner.param_groups for end in group["names"]}
            assert rates["model.embed_tokens.weight"] == pytest.approx(1.5e-3)
            assert rates["model.project_in.weight"] == 3e-3
            assert inner.defaults["weight_decay"] == 0.2 and inner.defaults["betas"] == (0.9, 0.999)
    a, b = (model.state_dict()["model.project_in.weight"] for model in trained.values())
    assert not torch.allclose(a, b)


@pytest.mark.full
def test_the_factory_serves_trainers_without_a_table(tmp_path):
    by_name, by_factory = (tiny_model(dtype=torch.float32) for _ in range(2))
    Trainer(by_name, arguments(tmp_path, optim="equivariant"), train_dataset=Rows()).train()
    options = {"lr": 3e-3, "weight_decay": 0.2, "betas": (0.9, 0.999)}
    Trainer(
        by_factory, arguments(tmp_path), train_dataset=Rows(), optimizer_cls_and_kwargs=(EquivariantFactory, options)
    ).train()
    assert all(torch.equal(a, b) for a, b in zip(by_name.parameters(), by_factory.parameters(), strict=True))
    names = list(OptimizerNames)
    register_with_trainer()
    assert list(OptimizerNames) == names, "registering twice must do nothing"


def test_unknown_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="`optim_args` must be numbers for 'steps', got 'many'"):
        Trainer(
            tiny_model(dtype=torch.float32),
            arguments(tmp_path, optim="equivariant", optim_args="steps=many"),
            train_dataset=Rows(),
        ).train()
    with pytest.raises(ValueError, match="`lr_multipliers` must be keyed by .*, got velocity"):
        Trainer(
            tiny_model(dtype=torch.float32),
            arguments(tmp_path, optim="equivariant", optim_args="velocity=2"),
            train_dataset=Rows(),
        ).train()


def test_accumulation_changes_nothing(tmp_path):
    whole, parts = (tiny_model(dtype=torch.float32, **OPTIONS) for _ in range(2))
    Trainer(whole, arguments(tmp_path, optim="equivariant"), train_dataset=Rows()).train()
    halves = arguments(tmp_path, optim="equivariant", gradient_accumulation_steps=2)
    halves.per_device_train_batch_size = 2
    Trainer(parts, halves, train_dataset=Rows()).train()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert (a - b).norm() <= DISTRIBUTED * a.norm() + 1e-7


@pytest.mark.full
def test_a_compiled_step_is_the_step():
    """With the learning rate as a tensor, so that a schedule does not compile anew."""
    options = OPTIONS | {"num_hidden_layers": 1, "attention_bias": False}
    plain, compiled = (tiny_model(dtype=torch.float32, **options) for _ in range(2))
    optimizers = [make_optimizer(model) for model in (plain, compiled)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    step = torch.compile(optimizers[1].step, backend="aot_eager", fullgraph=True)
    for index, ids in enumerate(BATCHES):
        for model, optimizer, advance in zip((plain, compiled), optimizers, (optimizers[0].step, step), strict=True):
            optimizer.zero_grad()
            model(ids, labels=ids, use_cache=False).loss.backward()
            for group in optimizer.param_groups:
                group["lr"].fill_(3e-3 / (1 + index))
            advance()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert (a - b).norm() <= DISTRIBUTED * a.norm() + 1e-7


def test_copies_of_an_optimizer_work():
    model = tiny_model(dtype=torch.float32)
    optimizer = make_optimizer(model, sharing="none")
    losses_of(model, optimizer)
    copied = copy.deepcopy(optimizer)
    assert copied.defaults["sharing"] == "none"
    for parameter in copied.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    copied.step()


def test_averages_of_weights_turn_along():
    model = tiny_model(dtype=torch.float32)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = make_optimizer(model)
    for _ in range(3):
        losses_of(model, optimizer)
        average.update_parameters(model)
    assert average.module.config == model.config
    way = max(
        float((a - b).detach().abs().max())
        for a, b in zip(model.parameters(), average.module.parameters(), strict=True)
    )
    assert way > 0


@torch.no_grad()
def test_flat_pieces_of_parameters_are_refused():
    """What DeepSpeed's ZeRO leaves in the groups: one flat piece of all parameters per group."""
    model = tiny_model(dtype=torch.float32)
    optimizer = make_optimizer(model)
    for group in optimizer.param_groups:
        flat = nn.Parameter(torch.cat([parameter.flatten() for parameter in group["params"]])[::2].clone())
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]
    with pytest.raises(ValueError, match="DeepSpeed's ZeRO and FSDP1 flatten parameters.*Use DDP or FSDP2"):
        optimizer.step()


def test_half_precision_weights_are_trained():
    model = tiny_model(dtype=torch.bfloat16)
    losses = losses_of(model, make_optimizer(model))
    # The batches come round after four steps.
    assert losses[4] < losses[0] - 0.1
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tiny_model(dtype=torch.float32)
        losses = losses_of(mixed, make_optimizer(mixed))
    assert losses[4] < losses[0] - 0.1 and next(mixed.parameters()).dtype == torch.float32
    matrices = torch.randn(2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = stepping.newton_schulz(matrices)
    assert torch.equal(inside, stepping.newton_schulz(matrices)), "the step lost digits to autocast"


def test_wrapped_models_have_the_same_groups():
    model = RiGPTForCausalLM(tiny_config())
    wrapped = torch.compile(copy.deepcopy(model), backend="eager")
    names = [[group["names"] for group in equivariant_param_groups(each)] for each in (model, wrapped)]
    assert names[0] == names[1]
    with pytest.raises(ValueError, match="`model` must be a RiGPT, got a Linear without a configuration"):
        equivariant_param_groups(nn.Linear(2, 2))


def test_other_models_are_refused_in_one_line(tmp_path):
    """A config made from RiGPT's is none of them, `AffineNormConfig` for one."""
    stock = GPT2LMHeadModel(gpt2_config())
    message = "`model` must be a RiGPT, got a GPT2LMHeadModel with a GPT2Config, .* Convert it with `rigpt convert`"
    with pytest.raises(ValueError, match=message) as caught:
        Trainer(stock, arguments(tmp_path, optim="equivariant"), train_dataset=Rows()).train()
    assert "\n" not in str(caught.value)
    model = RiGPTForCausalLM(tiny_config())
    expected = [group["names"] for group in equivariant_param_groups(model)]
    model.config.__class__ = type("Derived", (RiGPTConfig,), {"model_type": "derived"})
    assert [group["names"] for group in equivariant_param_groups(model)] == expected


def test_trainer_lets_all_processes_share(tmp_path):
    for extra, expected in (({}, "all"), ({"optim_args": "sharing=none"}, "none")):
        options = arguments(tmp_path, optim="equivariant", **extra)
        trainer = Trainer(tiny_model(dtype=torch.float32), options, train_dataset=Rows())
        assert trainer.create_optimizer().defaults["sharing"] == expected
    assert make_optimizer(tiny_model()).defaults["sharing"] == "auto"
