"""
`rigpt verify` as the judge of what other tools do: a Llama is turned, folded, padded and rounded here by hand, by code
that knows nothing of ours, and must be told from the same with one mistake in it.
"""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from rigpt_hf.checkpoints.certificate import TOLERANCES
from rigpt_hf.checkpoints.read import quiet_loading
from rigpt_hf.cli.conversion import verify
from rigpt_hf.text import tokenizer
from tests.checkpoints.folders import save_tokenizer
from tests.cli.conftest import in_one_line
from tests.conversion.sources import stock_model


ROOT = Path(__file__).resolve().parents[2]


def turned_by_hand(unfolded: tuple[str, ...] = ()) -> LlamaForCausalLM:
    """
    Gains go into the maps behind their norms, and the stream is turned, as tools for quantization do it; the gains of
    norms in `unfolded` stay on the coordinates of the turned stream.
    """
    model = stock_model("llama-tied")
    size = model.config.hidden_size
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    config = model.config
    config.tie_word_embeddings = False
    other = LlamaForCausalLM(config).to(torch.float64)
    other.load_state_dict(model.state_dict())
    one = torch.ones(size, dtype=torch.float64)

    def fold(norm, name, *readers):
        gain = one if name in unfolded else norm.weight.detach().clone()
        for reader in readers:
            reader.weight.copy_(reader.weight * gain @ q.T)
        norm.weight.copy_(norm.weight / gain)

    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(other.model.embed_tokens.weight @ q.T)
        for index, layer in enumerate(other.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            fold(layer.input_layernorm, f"attention {index}", attention.q_proj, attention.k_proj, attention.v_proj)
            fold(layer.post_attention_layernorm, f"mlp {index}", mlp.gate_proj, mlp.up_proj)
            attention.o_proj.weight.copy_(q @ attention.o_proj.weight)
            mlp.down_proj.weight.copy_(q @ mlp.down_proj.weight)
        fold(other.model.norm, "last", other.lm_head)
    return other.eval()


def rounded(model: LlamaForCausalLM, bits: int) -> LlamaForCausalLM:
    """Every map to the nearest of so many levels per row."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                step = parameter.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
                parameter.copy_((parameter / step).round() * step)
    return model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("tools")
    padded = turned_by_hand()
    with torch.no_grad():
        padded.resize_token_embeddings(64, mean_resizing=False)
    models = {
        "before": stock_model("llama-tied"),
        "after": turned_by_hand(),
        "half": turned_by_hand().to(torch.bfloat16),
        "padded": padded,
        "mistaken": turned_by_hand(("mlp 1",)),
        "rounded": rounded(turned_by_hand(), 8),
    }
    with quiet_loading():
        for name, model in models.items():
            model.save_pretrained(root / name)
    return root


def test_a_rotation_that_is_right_is_told_from_one_that_is_not(rigpt, done, places):
    out = done("verify", places / "before", places / "after")
    assert "equal up to rounding" in out and "float64" in out and "loss on random tokens" in out
    assert "equal up to rounding" in done("verify", places / "before", places / "after", "--dtype", "float32")
    assert "Of the 64 tokens of" in done("verify", places / "padded", places / "after")
    assert "tolerance 5e-02" in done("verify", places / "before", places / "half")
    for wrong in ("mistaken", "rounded"):
        code, out, _ = rigpt("verify", places / "before", places / wrong)
        assert code == 1 and "NOT EQUAL" in out
        *_, reason, following = out.strip().splitlines()
        assert reason.startswith("The two are not one function: logits differ by ") and reason.endswith(
            "rounding by 1e-12."
        )
        assert following.startswith("Next: ")
    assert in_one_line(rigpt("verify", places / "before", places / "nothing"))


def test_where_there_is_a_tokenizer_models_read_text(rigpt, done, places, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(places / "before", tmp_path / "before")
    save_tokenizer(tmp_path / "before")
    monkeypatch.setattr(tokenizer, "gather_documentation", lambda *_, **__: ["a b c a b a a c b c a"])
    for pair in ((tmp_path / "before", places / "after"), (places / "after", tmp_path / "before")):
        out = done("verify", *pair)
        assert (
            "loss on random" not in out
            and "1 x 11 tokens, of the documentation of Python" in " ".join(out.split())
            and "loss" in out
        )
    assert "loss on random tokens" in done("verify", tmp_path / "before", places / "after", "--random-tokens")
    code, out, _ = rigpt("verify", tmp_path / "before", places / "mistaken")
    assert code == 1 and "documentation" in out


def test_documentation_is_found_on_every_machine():
    text = tokenizer.gather_documentation(16 * 512, roots=tokenizer.QUICK_ROOTS)
    assert sum(map(len, text)) > 4 * 512


def test_the_page_has_the_tolerances_of_the_code():
    """And the codes with which the verb ends."""
    page = (ROOT / "docs" / "verify.md").read_text(encoding="utf-8")
    for dtype, value in TOLERANCES.items():
        assert f"| {str(dtype).removeprefix('torch.')} | {value:.0e} |" in page
    assert all(f"| {code} |" in page for code in range(3)) and len(page.splitlines()) <= 80
    assert "Exit code 1" in verify.__doc__
