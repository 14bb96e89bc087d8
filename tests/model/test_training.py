"""Training: packed sequences, accumulated gradients and fine-tuning with `Trainer`."""

import copy
from itertools import pairwise

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.model.agreement import assert_different, assert_same
from tests.models import ALL, COVER, EACH, OPTIONS, backends, over, randomise_, tiny_model, tokens


KINDS = {
    "learned": {"position_embedding_type": "learned"},
    "rotary": {"attention_score": "distance"},
    "frequencies": {"rotary_learned_frequencies": True, "attention_score": "squared_distance"},
}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())


@over(EACH, [*COVER, *OPTIONS])
def test_packed_sequences_do_not_see_each_other(option):
    model = tiny_model(**ALL[option])
    parts = [tokens(1, length, seed=length) for length in (5, 3, 7)]
    packed = torch.cat(parts, dim=1)
    positions = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    expected = torch.cat([model(part).logits for part in parts], dim=1)
    for backend in backends(ALL[option]):
        model.set_attn_implementation(backend)
        for training, use_cache in ((True, False), (False, True)):
            actual = model.train(training)(packed, position_ids=positions, use_cache=use_cache).logits
            assert_same(actual, expected)
    leaking = model(packed, position_ids=torch.arange(15)[None]).logits
    assert_different(leaking[:, 5:], expected[:, 5:])


def flash_without_a_gpu(module, query, key, value, mask, scaling, cu_seq_lens_q=None, max_length_q=None, **kwargs):
    """What flash attention computes: no mask, and rows cut where it is told to."""
    assert mask is None
    rows, heads, positions, _ = query.shape
    groups = heads // key.shape[1]
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, *(x.repeat_interleave(groups, 1) for x in (key, value)))]
    ends = list(range(0, (rows + 1) * positions, positions)) if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    lengths = [end - begin for begin, end in pairwise(ends)]
    assert max_length_q is None or max_length_q == max(lengths)
    parts = [x.split(lengths) for x in flat]
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        scores = torch.einsum("shd,thd->hst", q, k) * scaling
        scores = scores.masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -torch.inf)
        outputs.append(torch.einsum("hst,thd->shd", scores.softmax(-1), v))
    return torch.cat(outputs).view(rows, positions, heads, -1), None


@pytest.mark.parametrize("score", ["dot", "squared_distance"])
def test_flash_attention_is_told_where_packed_sequences_begin(score, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash_without_a_gpu)
    model = randomise_(tiny_model(attention_score=score), 0).eval()
    packed = tokens(2, 15, seed=1)
    rows = [[5, 3, 7], [15]]
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])
    kinds = {"each": positions, "one": positions[:1], "plain": torch.arange(15)[None]}
    expected = {given: model(packed, position_ids=ids).logits for given, ids in kinds.items()}
    model.config._attn_implementation = "flash_attention_2"
    for use_cache in (False, True):
        for given, ids in kinds.items():
            assert_same(model(packed, position_ids=ids, use_cache=use_cache).logits, expected[given], given)
        assert_same(model(packed, use_cache=use_cache).logits, expected["plain"])
    assert_different(expected["each"], expected["plain"])
    # What somebody says himself is left alone.
    ends = torch.tensor([0, 5, 8, 15, 30], dtype=torch.int32)
    assert_same(model(packed, position_ids=positions, cu_seq_lens_q=ends, max_length_q=15).logits, expected["each"])


class Examples(torch.utils.data.Dataset):
    """Sequences with very different numbers of labels, so that a mean of means is not the mean."""

    def __init__(self, count=8):
        self.input_ids = tokens(count, 12, seed=3)
        self.labels = self.input_ids.masked_fill(torch.arange(12) >= torch.arange(2, 2 + count)[:, None], -100)

    def __len__(self):
        return len(self.input_ids)

    def __getitem__(self, index):
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def train(model, folder, **arguments):
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(model, TrainingArguments(**(settings | arguments)), train_dataset=Examples())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def one_step(folder, batch, accumulation, change=lambda model: None):
    model = tiny_model(embedding_size=24, output_bias=True)
    change(model)
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    losses = train(model, folder, max_steps=1, optim="sgd", learning_rate=0.5, **sizes)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]), losses[0]


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    whole, whole_loss = one_step(tmp_path, 8, 1)
    accumulated, loss = one_step(tmp_path, 2, 4)
    start = tiny_model(embedding_size=24, output_bias=True).parameters()
    assert_different(whole, torch.cat([parameter.detach().flatten() for parameter in start]), "one step")
    assert_same(accumulated, whole)
    assert loss == pytest.approx(whole_loss, rel=1e-4)

    def drop_the_count(model):
        original = model.loss_function
        model.loss_function = lambda num_items_in_batch=None, **kwargs: original(**kwargs)

    wrong, _ = one_step(tmp_path, 2, 4, drop_the_count)
    assert_different(wrong, whole, "accumulation without the number of labels")


@every_kind
@pytest.mark.by_default(1)
def test_trainer_fine_tunes(options, tmp_path):
    model = tiny_model(dtype=torch.float32, **options)
    before = copy.deepcopy(model.state_dict())
    losses = train(model, tmp_path, max_steps=30, per_device_train_batch_size=8, learning_rate=0.01)
    assert losses[-1] < 0.5 * losses[0]
    assert not [name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])]


@pytest.mark.full
def test_a_small_model_learns_one_sequence_by_heart():
    """What the library's training suite asks: loss and gradients vanish, and greedy decoding recites."""
    model = tiny_model(dtype=torch.float32, hidden_size=64, num_hidden_layers=2).train()
    sequence = (torch.arange(32) % 19 + 3)[None].repeat(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(150):
        loss = model(sequence, labels=sequence).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            first = loss.item(), norm.item()
    assert loss.item() < 0.1 * first[0] and norm.item() < 0.1 * first[1]
    recited = model.eval().generate(sequence[:1, :1], max_new_tokens=31, do_sample=False, eos_token_id=-1)
    assert torch.equal(recited, sequence[:1])
