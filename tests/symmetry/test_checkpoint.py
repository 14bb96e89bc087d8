"""A transformation of a folder is the transformation of its model."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig

from rigpt_hf import RiGPTForCausalLM, RiGPTForSequenceClassification
from rigpt_hf.conversion import Certificate, CertificateError
from rigpt_hf.symmetry import GaugeTransformation
from rigpt_hf.symmetry import checkpoint as module
from rigpt_hf.symmetry.checkpoint import transform_checkpoint
from tests.checkpoints.folders import contents, stored, transformation
from tests.models import ALL, COVER, SYMMETRIES, over, tiny_config, tiny_model
from tests.tolerances import SYMMETRY


def save(folder: Path, max_shard_size: str = "5GB", **options) -> RiGPTForCausalLM:
    model = tiny_model(**options)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def transformed(folder: Path, g: GaugeTransformation, source: str = "source", output: str = "out", **options):
    return transform_checkpoint(folder / source, folder / output, g, progress=False, **options)


def largest_difference(tensors: dict[str, torch.Tensor], model: RiGPTForCausalLM) -> float:
    """Relative to the largest value of each of the model's parameters, all of which must be there exactly once."""
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert tensors.keys() == expected.keys() and len(expected) > 15
    return max(float((tensors[name] - p).abs().max() / p.abs().max()) for name, p in expected.items())


@over(["learned-untied-projected", "local-frames", "recipe"], [*COVER, *SYMMETRIES])
def test_a_folder_becomes_what_its_model_becomes(option, tmp_path):
    model = save(tmp_path / "source", **ALL[option])
    g = transformation(model.config)
    certificate = transformed(tmp_path, g)
    assert certificate.passed and Certificate.load(tmp_path / "out") == certificate
    tensors = stored(tmp_path / "out")
    assert largest_difference(tensors, g(model)) <= SYMMETRY[torch.float64]
    assert largest_difference(tensors, model) > 0.1, "the transformation did nothing to speak of"
    assert largest_difference(tensors, transformation(model.config, seed=1)(model)) > 0.1
    transformed(tmp_path, g.inverse(), "out", "back")
    assert largest_difference(stored(tmp_path / "back"), model) <= SYMMETRY[torch.float64]


def test_large_tables_are_transformed_in_parts_and_no_certificate_is_asked_for(tmp_path, monkeypatch):
    model = save(tmp_path / "source", max_shard_size="20KB", **SYMMETRIES["learned-untied-projected"])
    g = transformation(model.config)
    monkeypatch.setattr(module, "CHUNK", 8 * 24 * 5)  # five rows of the embeddings
    parts = []
    transform = GaugeTransformation.transform
    monkeypatch.setattr(
        GaugeTransformation, "transform", lambda self, *args: parts.append(args[0]) or transform(self, *args)
    )
    assert transformed(tmp_path, g, certificate=False) is None
    assert "certificate.json" not in contents(tmp_path / "out")
    assert parts.count("model.embed_tokens.weight") == 13  # 61 rows
    assert parts.count("model.layers.0.mlp.up_proj.weight") == 1
    monkeypatch.undo()
    assert largest_difference(stored(tmp_path / "out"), g(model)) <= SYMMETRY[torch.float64]


def test_a_second_copy_of_a_tied_head_is_dropped_if_it_is_a_copy(tmp_path):
    model = save(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path, {"format": "pt"})
    g = transformation(model.config)
    transformed(tmp_path, g, certificate=False)
    assert largest_difference(stored(tmp_path / "out"), g(model)) <= SYMMETRY[torch.float64]
    save_file(tensors | {"lm_head.weight": 2 * tensors["model.embed_tokens.weight"]}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="`lm_head.weight` differs from `model.embed_tokens.weight`"):
        transformed(tmp_path, g, output="again")


def test_a_matrix_outside_of_the_group_leaves_nothing_behind(tmp_path):
    model = save(tmp_path / "source")
    shear = transformation(model.config, "stream").elements["stream"].clone()
    shear[0, 0] *= 1.05
    g = GaugeTransformation(model.config, {"stream": shear})
    with pytest.raises(CertificateError, match="`transformation` must leave the function of .* alone"):
        transformed(tmp_path, g)
    assert contents(tmp_path) == {"source"}


class TestRefusals:
    def refuses(self, tmp_path: Path, message: str, g: GaugeTransformation | None = None):
        with pytest.raises(ValueError, match=message):
            transformed(tmp_path, g or transformation(tiny_config()))
        assert contents(tmp_path) == {"source"}

    def test_a_stock_model_that_does_not_convert(self, tmp_path):
        BertConfig(vocab_size=11).save_pretrained(tmp_path / "source")
        self.refuses(tmp_path, "`model_type='bert'` cannot be converted: no weight map has been written for it")

    def test_a_model_with_another_head(self, tmp_path):
        RiGPTForSequenceClassification(tiny_config()).save_pretrained(tmp_path / "source")
        self.refuses(tmp_path, "`source` must be a RiGPTForCausalLM, got .* is a RiGPTForSequenceClassification")

    def test_a_transformation_of_another_configuration(self, tmp_path):
        save(tmp_path / "source")
        g = transformation(tiny_config(hidden_size=40, head_dim=8), "stream")
        self.refuses(tmp_path, r"`transformation` must be one of .* shape \(1, 32, 32\), got \(1, 40, 40\)", g)
        g = transformation(tiny_config(embedding_size=24), "lexical")
        self.refuses(tmp_path, "`transformation` must be one of .* got 'lexical'", g)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"model.layers.1.mlp.up_proj.bias": None}, "lacks `model.layers.1.mlp.up_proj.bias`"),
            ({"model.layers.3.mlp.up_proj.bias": torch.ones(2)}, "has no place for `model.layers.3.mlp.up_proj.bias`"),
            (
                {"model.layers.1.mlp.up_proj.bias": torch.ones(2)},
                "gives another shape to `model.layers.1.mlp.up_proj.bias`",
            ),
        ],
        ids=["missing", "unknown", "reshaped"],
    )
    def test_weights_of_another_configuration(self, change, message, tmp_path):
        save(tmp_path / "source")
        path = tmp_path / "source" / "model.safetensors"
        tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
        save_file(tensors, path, {"format": "pt"})
        self.refuses(tmp_path, f"`source` must hold the weights of its configuration, got .*, which {message}")

    def test_no_folder(self, tmp_path):
        (tmp_path / "source").mkdir()
        with pytest.raises(
            ValueError, match="`source` must be the folder of a saved model or the id of a repository.*no such folder"
        ):
            transform_checkpoint(tmp_path / "absent", tmp_path / "out", transformation(tiny_config()))
        with pytest.raises(ValueError, match="`revision` names a version on the Hub"):
            transform_checkpoint(tmp_path / "source", tmp_path / "out", transformation(tiny_config()), revision="main")
