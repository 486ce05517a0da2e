"""Sequences of different length: attention by lengths against a key mask, and a step that reads no value."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from test_ijepa import MODES, NONE, built, change, drawn, furthest, gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_cluster.ijepa import masks
from jepa_cluster.ijepa.flops import Shortcuts
from jepa_cluster.ijepa.objective import IJepa, update_target


class Loop:
    """Attention of variable length as one would write it, sequence by sequence, for where the kernel is not."""

    def __init__(self) -> None:
        self.calls, self.sequences = 0, 0

    def __call__(self, q, k, v, q_ends, k_ends, q_most, k_most):
        assert q_ends.dtype == k_ends.dtype == torch.int32 and q_ends[-1] == len(q) and k_ends[-1] == len(k)
        self.calls += 1
        out = []
        for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
            if b > a:
                assert b - a <= q_most and d - c <= k_most
                self.sequences += 1
                parts = (t[None].transpose(1, 2) for t in (q[a:b], k[c:d], v[c:d]))
                out.append(torch.nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2)[0])
        return torch.cat(out)


@pytest.mark.parametrize("predictor", ["per_target", "joint"])
@pytest.mark.parametrize(("mode", "timm_"), [("multiblock", {}), ("packed", {}), ("packed", {"reg_tokens": 2})])
def test_attention_by_lengths_is_attention_with_a_key_mask(mode, timm_, predictor):
    """A loop over sequences in the kernel's place: loss and all gradients to 5e-6, all shortcuts on, all off."""
    recipe = change("model", timm=timm_)
    recipe = dataclasses.replace(recipe, mask=dataclasses.replace(recipe.mask, mode=mode))
    recipe = dataclasses.replace(recipe, predictor=dataclasses.replace(recipe.predictor, mode=predictor))
    seen = drawn(recipe)
    masked = gradients(built(recipe, NONE), recipe, seen)
    for shortcuts in (Shortcuts(), NONE._replace(varlen=True)):
        loop = Loop()
        assert furthest(gradients(built(recipe, shortcuts, loop), recipe, seen), masked) < 5e-6
        assert loop.calls == 3 + 3 * (mode == "packed")  # every block of the predictor, and of the encoder
        assert loop.sequences > loop.calls * 8 * (4 if predictor == "per_target" and mode == "multiblock" else 1)
    loop = Loop()
    gradients(built(recipe, Shortcuts(varlen=False), loop), recipe, seen)
    assert not loop.calls


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["multiblock", "packed"])
def test_on_cuda_in_half_precision_torchs_own_kernel_is_asked(mode):
    """Fake CUDA tensors need no GPU: in bf16 every padded sequence goes to torch's varlen operator, which checks what
    it gets as it would there; in fp32 none does."""
    recipe = change("mask", mode=mode)
    model, predictor = dataclasses.replace(recipe.model, width=96), dataclasses.replace(recipe.predictor, width=48)
    recipe = dataclasses.replace(recipe, model=model, predictor=predictor)
    for precision, times in ((torch.bfloat16, 3 + 3 * (mode == "packed")), (torch.float32, 0)):
        with torch.device("meta"):
            model = IJepa(recipe)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            for module in model.modules():
                for name, p in module.named_parameters(recurse=False):
                    setattr(module, name, torch.nn.Parameter(torch.empty(p.shape, dtype=precision), p.requires_grad))
            seen = masks.Masks(*(None if f is None else torch.empty_like(f, device="cuda") for f in drawn(recipe)))
            with Called() as called:
                model(torch.empty(8, 3, 64, 64, dtype=precision), seen)
            assert called.names["torch_attn::_varlen_attn"] == times


@pytest.mark.parametrize("mode", MODES)
def test_a_step_never_looks_at_its_values(mode):
    """Forward, backward and the target's update on the meta device, which has shapes and no values: a step that
    read one (`.item()`, `nonzero`, a boolean index) would fail here, and make the host wait on a GPU."""
    recipe = change("mask", mode=mode, targets={"rasterized": 3, "random": 1}.get(mode, 4))
    seen = masks.Masks(*(None if f is None else f.to("meta") for f in drawn(recipe)))
    for predictor in ("per_target", "joint"):
        chosen = dataclasses.replace(recipe, predictor=dataclasses.replace(recipe.predictor, mode=predictor))
        with torch.device("meta"):
            model = IJepa(chosen, varlen=lambda q, *_: q.clone())
            loss, spread = model(torch.empty(8, 3, 64, 64), seen)
        loss.backward()
        update_target(model, 0.9)
        assert loss.is_meta and spread["target_std"].is_meta and model.encoder.blocks[0].attn.qkv.weight.grad.is_meta


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_block_by_lengths_compiles_without_a_break():
    """The trainer compiles blocks: by lengths as by mask, nothing breaks the graph and the numbers stay."""
    recipe = change("mask", mode="packed")
    seen, want = drawn(recipe), gradients(built(recipe, NONE), recipe, drawn(recipe))
    model = built(recipe, Shortcuts(), masked)
    for block in (model.encoder.blocks[0], model.predictor.blocks[0], model.predictor.blocks[-1]):
        block.compile(fullgraph=True, backend="aot_eager")
    assert furthest(gradients(model, recipe, seen), want) < 5e-5


def masked(q, k, v, q_ends, k_ends, q_most, k_most):
    """Attention of variable length in one piece: a token attends where its sequence's number is the same."""
    rows = torch.bucketize(torch.arange(len(q), dtype=torch.int32), q_ends, right=True)
    columns = torch.bucketize(torch.arange(len(k), dtype=torch.int32), k_ends, right=True)
    parts = (t[None].transpose(1, 2) for t in (q, k, v))
    same = rows[:, None] == columns
    return torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=same).transpose(1, 2)[0]
