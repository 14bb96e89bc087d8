"""Small runs of experiments: two candidates, and a network that is trained a little and gone on from."""

from pathlib import Path
from typing import Any

from evaluation.experiments.candidates import Candidate
from rigpt_hf.training.loop import RunReport
from rigpt_hf.training.options import ModelOptions, OptimizerOptions
from tests.training.runs import make_data, pretrain


TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 257}
STOCK = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 257}
SMALL_CANDIDATES = {
    "rigpt": Candidate(ModelOptions(config_overrides=TINY), OptimizerOptions(), (0.01,)),
    "stock-gpt2": Candidate(ModelOptions("stock-gpt2", STOCK), OptimizerOptions(optim="adamw"), (0.003,)),
}


def trained(folder: Path, kind: str, config: dict[str, Any], **optimizer: Any) -> RunReport:
    """The report of a run that has learned something, and from whose folder another one has gone on."""
    data = make_data(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    report = pretrain(
        data, folder / "run", model_kind=kind, config_overrides=sizes | config, **optimizer, max_steps=16
    )
    assert report.losses[-1] < report.losses[0] - 0.3
    start = {"init_from": str(report.model_folder), "config_overrides": {}}
    going_on = pretrain(data, folder / "more", model_kind=kind, **start, **optimizer, max_steps=4, warmup_steps=1)
    assert going_on.losses[0] < report.losses[0] - 0.3
    return report
