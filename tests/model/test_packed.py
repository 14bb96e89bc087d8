"""Linear maps made of codes: bytes, kernels and dense products are one function."""

import copy
import math

import pytest
import torch
from torch import nn

from rigpt_hf import packed_rigpt
from rigpt_hf.kernels_rigpt import linear
from rigpt_hf.packed_rigpt import QuantizedLinear, pack, unpack
from tests.codes import rounded
from tests.model.agreement import difference
from tests.processes import run
from tests.tolerances import DISTANCE, SYMMETRY


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 32])
def test_codes_come_back_from_their_bytes(bits, columns):
    reach = 2 ** (bits - 1)
    codes = torch.arange(-reach, reach, dtype=torch.int8).repeat(columns, 2).t()[: 2 * reach].contiguous()
    stored = pack(codes, bits)
    assert stored.shape == (2 * reach, columns if bits == 8 else math.ceil(columns / 2))
    assert torch.equal(unpack(stored, columns), codes) and len(codes.unique()) == 2 * reach


FORMS = {
    "rows-of-16": (32, 64, 4, 32),
    "other-rows": (24, 128, 4, 64),
    "row": (61, 576, 4, None),
    "large-groups": (16, 256, 4, 128),
    "eight": (61, 48, 8, None),
}
PLAIN = {"odd": (24, 37, 4, None), "eight-odd": (24, 40, 8, None), "eight-grouped": (32, 64, 8, 32)}


def module_of(rows: int, columns: int, bits: int, group: int | None, **options) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(0)
    made = rounded(torch.randn(rows, columns, generator=generator), bits, group)
    module = QuantizedLinear(rows, columns, bits, group, **options)
    state = {"codes": pack(made.codes, bits), "scales": made.scales}
    for name in ("bias", "gain"):
        if (parameter := getattr(module, name)) is not None:
            state[name] = torch.rand(parameter.shape, generator=generator) + 0.5
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("form", [*FORMS, *PLAIN])
@torch.no_grad()
def test_inputs_may_lie_in_any_order(form):
    """As the last positions of several rows do, and what was transposed; factors of inputs would make a copy."""
    module = module_of(*(FORMS | PLAIN)[form], bias=True).to(torch.bfloat16)
    inputs = torch.randn(2, 5, 2 * module.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
    for strided in (
        inputs[:, -1:, : module.in_features],
        inputs[..., module.in_features :],
        inputs.transpose(0, 1)[..., : module.in_features],
    ):
        assert not strided.is_contiguous()
        assert torch.equal(module(strided), module(strided.contiguous()))


@pytest.mark.parametrize("form", [*FORMS, *PLAIN])
@torch.no_grad()
def test_kernels_and_dense_products_are_one_function(form):
    module = module_of(*(FORMS | PLAIN)[form], bias=True, gain=True).to(torch.bfloat16)
    inputs = torch.randn(2, 5, module.in_features, generator=torch.Generator().manual_seed(1))
    for each in (inputs, inputs[0, :1]):
        expected = nn.functional.linear(each, module.dense(torch.float32), module.bias.float())
        for actual in (module(each.to(torch.bfloat16)), linear(module, each.to(torch.bfloat16))):
            assert actual.dtype == torch.bfloat16
            assert difference(actual.float(), expected) <= DISTANCE[torch.bfloat16]
    assert (module._kernel(inputs.to(torch.bfloat16)) is not None) == (form in FORMS), "the wrong product was tried"
    module.float()
    assert (
        difference(module(inputs), nn.functional.linear(inputs, module.weight, module.bias)) <= SYMMETRY[torch.float32]
    )
    assert module(inputs[:0]).shape == (0, 5, module.out_features)


def test_what_is_packed_in_parts_is_what_is_packed_at_once(monkeypatch):
    """Of what is between, as whole numbers of 32 bits, little is in memory at a time."""
    module = module_of(200, 64, 4, 32)
    at_once = packed_rigpt.pack_for_cpu(module)
    monkeypatch.setattr(packed_rigpt, "BLOCK", 1)
    in_parts = packed_rigpt.pack_for_cpu(module)
    assert torch.equal(at_once[1], in_parts[1]) and torch.equal(at_once[3], in_parts[3]) and len(at_once[1]) == 208


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_many_rows_are_multiplied_by_weights_made_in_parts(form, monkeypatch):
    """Where a CPU multiplies in bfloat16 by itself, whatever this machine does."""
    module = module_of(*FORMS[form], bias=True, gain=True).to(torch.bfloat16)
    rows = torch.randn(2, packed_rigpt.DENSE_ROWS["cpu"] // 2 + 1, module.in_features).to(torch.bfloat16)
    expected = nn.functional.linear(rows.float(), module.dense(torch.float32), module.bias.float())
    monkeypatch.setattr(packed_rigpt, "BLOCK", 8 * module.in_features)
    assert module.out_features > 8, "several parts"
    for by_itself in (False, True):
        monkeypatch.setattr(packed_rigpt, "multiplies_bfloat16", lambda here=by_itself: here)
        assert (module._kernel(rows) is None) == by_itself and module._kernel(rows[:, :1]) is not None
        assert difference(module(rows).float(), expected) <= DISTANCE[torch.bfloat16]


@torch.no_grad()
def test_the_kernel_of_8_bits_gets_aligned_tensors(monkeypatch):
    """With AVX-512 it ends the process where they begin within a register; a mapped file puts them anywhere."""
    module, seen = module_of(61, 32, 8, None), []
    module.codes.data = displaced(module.codes.data)
    inputs = displaced(torch.randn(5, 32).to(torch.bfloat16))
    wanted = nn.functional.linear(inputs.float(), module.spread(torch.float32))
    kernel = torch._weight_int8pack_mm

    def checked(rows, codes, scales):
        seen.extend((rows.data_ptr() % 64, codes.data_ptr() % 64))
        return kernel(rows, codes, scales)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", checked)
    assert inputs.data_ptr() % 64 and module.codes.data_ptr() % 64, "what this is about"
    difference = (module(inputs).float() - wanted).norm() / wanted.norm()
    assert seen == [0, 0] and difference < 0.01


EXPORTED = """
import torch
from tests.model.test_packed import displaced, module_of
module, inputs = module_of(61, 32, 8, None).to(torch.bfloat16), torch.randn(5, 32).to(torch.bfloat16)
with torch.no_grad():
    module.prepare()
    exported = torch.export.export(module, (inputs,)).module()
    assert "int8pack" in str(exported.graph) and torch.equal(exported(displaced(inputs)), module(inputs))
    assert torch.equal(torch.func.vmap(module)(inputs[:, None])[:, 0], module(inputs))
"""


def test_the_kernel_of_8_bits_gets_aligned_inputs_wherever_it_is_called():
    """In a graph nobody can ask where a tensor lies; the process would end."""
    assert not run("-c", EXPORTED).returncode


def displaced(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, one place behind the beginning of their memory."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


def test_what_is_packed_follows_the_codes(tmp_path):
    module = module_of(*FORMS["rows-of-16"]).to(torch.bfloat16)
    inputs = torch.randn(3, module.in_features).to(torch.bfloat16)
    first = module(inputs)
    assert module._packed is not None and not any("packed" in name for name in module.state_dict())
    assert copy.deepcopy(module)._packed is None and torch.equal(copy.deepcopy(module)(inputs), first)
    # In place, by an assignment and by a loader.
    module.codes.bitwise_xor_(0x10)
    second = module(inputs)
    assert not torch.equal(second, first)
    module.scales = nn.Parameter(2 * module.scales, requires_grad=False)
    assert torch.equal(module(inputs), 2 * second)
    module.load_state_dict({"codes": module.codes ^ 0x10, "scales": module.scales / 2})
    assert torch.equal(module(inputs), first)


@torch.no_grad()
def test_autocast_is_heeded():
    module = module_of(*FORMS["rows-of-16"], bias=True)
    inputs = torch.randn(3, module.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(inputs)
        expected = nn.Linear(module.in_features, 2)(inputs)
    assert actual.dtype == expected.dtype == torch.bfloat16
