"""Losses of TRL, which applies the head to the last hidden state of the base model, are those of the model."""

import copy

import pytest
import torch

from tests.models import noisy, tiny_model, tokens


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
SETS = {
    "tied": {},
    "tied-projected": {"embedding_size": 40, "output_bias": True},
    "untied": {"tie_word_embeddings": False, "attention_score": "squared_distance"},
    "untied-projected": {"tie_word_embeddings": False, "embedding_size": 24, "output_bias": True},
}
ALIKE = 1e-6


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, 61)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def settings(kind, folder):
    return kind(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )


def text(row: torch.Tensor) -> str:
    return " ".join(f"w{int(token)}" for token in row)


@pytest.mark.parametrize("option", SETS)
def test_the_loss_of_supervised_fine_tuning(option, tmp_path):
    model = tiny_model(**SETS[option])
    rows = datasets.Dataset.from_dict({"text": [text(row) for row in tokens(4, 9)]})
    own = copy.deepcopy(model)
    trainer = trl.SFTTrainer(
        model, args=settings(trl.SFTConfig, tmp_path), train_dataset=rows, processing_class=tokenizer()
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    expected = own(**batch).loss
    assert abs(loss.item() / expected.item() - 1) < ALIKE
    # The head on the stream, which is what stands in the place of the last hidden state in other models.
    stream = own.model.residual_stream(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    assert (stream.shape[-1] == own.config.lexical_size) is (own.model.project_out is None)
    loss.backward()
    expected.backward()
    for (name, a), (_, b) in zip(trainer.model.named_parameters(), own.named_parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= ALIKE * b.grad.abs().max().clamp_min(1e-3), name


def log_probability(model, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    logits = model(torch.cat((prompt, answer))[None]).logits[0].log_softmax(-1)
    return logits[len(prompt) - 1 : -1].gather(1, answer[:, None]).sum()


@pytest.mark.parametrize("option", SETS)
def test_the_loss_of_direct_preference_optimisation(option, tmp_path):
    model, prompts, chosen, rejected = tiny_model(**SETS[option]), *(tokens(2, 5, seed=seed) for seed in (1, 2, 3))
    reference = noisy(model, 0.3)
    columns = {"prompt": prompts, "chosen": chosen, "rejected": rejected}
    rows = datasets.Dataset.from_dict(
        # A space in front, as answers are tokenized behind their prompts.
        {name: [(" " if name != "prompt" else "") + text(row) for row in table] for name, table in columns.items()}
    )
    trainer = trl.DPOTrainer(
        copy.deepcopy(model),
        ref_model=copy.deepcopy(reference),
        args=settings(trl.DPOConfig, tmp_path),
        train_dataset=rows,
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    end, margins = torch.tensor([2]), []
    for prompt, good, bad in zip(prompts, chosen, rejected, strict=True):
        gains = [
            log_probability(model, prompt, torch.cat((answer, end)))
            - log_probability(reference, prompt, torch.cat((answer, end)))
            for answer in (good, bad)
        ]
        margins.append(gains[0] - gains[1])
    expected = -torch.nn.functional.logsigmoid(trainer.args.beta * torch.stack(margins)).mean()
    assert abs(loss.item() / expected.item() - 1) < ALIKE
    assert abs(expected.item() - torch.tensor(2.0).log().item()) > 1e-3, "the models are alike"
