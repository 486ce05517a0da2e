"""Attention over sequences of different length: against a key mask, and without reading a value."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.without_shortcuts import WithoutShortcuts
from test_ijepa import MODES, RECIPE, built, change, drawn, furthest, gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from jepa_cluster.config import Recipe
from jepa_cluster.ijepa import masks, varlen_attention
from jepa_cluster.ijepa.objective import IJepa, update_target


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return torch's attention of tensors of shape (tokens, heads, head width)."""
    q, k, v = (tensor[None].transpose(1, 2) for tensor in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)[0]


class Loop:
    """Attention of variable length as a loop over sequences; counts its calls and sequences."""

    def __init__(self) -> None:
        self.calls = 0
        self.sequences = 0

    def __call__(
        self,
        q,
        k,
        v,
        q_ends,
        k_ends,
        q_most,
        k_most,
    ):
        assert q_ends.dtype == k_ends.dtype == torch.int32
        assert q_ends[-1] == len(q)
        assert k_ends[-1] == len(k)
        self.calls += 1
        out = []
        for i in range(len(q_ends) - 1):
            q_part = slice(q_ends[i], q_ends[i + 1])
            k_part = slice(k_ends[i], k_ends[i + 1])
            if q_part.stop <= q_part.start:
                continue
            assert q_part.stop - q_part.start <= q_most
            assert k_part.stop - k_part.start <= k_most
            self.sequences += 1
            out.append(attend(q[q_part], k[k_part], v[k_part]))
        return torch.cat(out)


def attend_by_mask(
    q,
    k,
    v,
    q_ends,
    k_ends,
    q_most,
    k_most,
):
    """Attention of variable length in one call: a token attends to its own sequence."""
    q_index = torch.arange(len(q), dtype=torch.int32)
    k_index = torch.arange(len(k), dtype=torch.int32)
    q_sequence = torch.bucketize(q_index, q_ends, right=True)
    k_sequence = torch.bucketize(k_index, k_ends, right=True)
    return attend(q, k, v, mask=q_sequence[:, None] == k_sequence)


@pytest.fixture
def use_kernel(monkeypatch) -> Callable[[Any], None]:
    """A function that puts a kernel in the place of torch's, for tensors of every device."""

    def use(kernel: Any) -> None:
        monkeypatch.setattr(varlen_attention, "flash_varlen", kernel)
        monkeypatch.setattr(varlen_attention, "supports_flash", lambda *_: True)

    return use


def with_modes(recipe: Recipe, mask: str, predictor: str) -> Recipe:
    return dataclasses.replace(
        recipe,
        mask=dataclasses.replace(recipe.mask, mode=mask),
        predictor=dataclasses.replace(recipe.predictor, mode=predictor),
    )


@pytest.mark.parametrize("predictor", ["per_target", "joint"])
@pytest.mark.parametrize(
    ("mode", "timm_"),
    [
        ("multiblock", {}),
        ("packed", {}),
        ("packed", {"reg_tokens": 2}),
    ],
)
def test_attention_by_lengths_is_attention_with_a_key_mask(mode, timm_, predictor, use_kernel):
    """With a loop as the kernel, loss and gradients agree to 5e-6, shortcuts on and off."""
    recipe = with_modes(change("model", timm=timm_), mode, predictor)
    drawn_masks = drawn(recipe)
    masked = gradients(built(recipe, WithoutShortcuts), recipe, drawn_masks)
    blocks = 3  # those of the predictor
    if mode == "packed":
        blocks += 3  # and those of the encoder
    sequences_per_image = 1
    if predictor == "per_target" and mode == "multiblock":
        sequences_per_image = 4
    for kind in (IJepa, WithoutShortcuts):
        loop = Loop()
        use_kernel(loop)
        got = gradients(built(recipe, kind), recipe, drawn_masks)
        assert furthest(got, masked) < 5e-6
        assert loop.calls == blocks
        assert loop.sequences > loop.calls * 8 * sequences_per_image


class CalledOperators(TorchDispatchMode):
    """Count the calls of each torch operator by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func,
        types,
        args=(),
        kwargs=None,
    ):
        self.names[func.name()] += 1
        return func(*args, **(kwargs or {}))


def replace_parameters(model: IJepa, dtype: torch.dtype) -> None:
    """Put new, empty parameters of this type on the current device."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            values = torch.empty(p.shape, dtype=dtype)
            setattr(module, name, torch.nn.Parameter(values, p.requires_grad))


@pytest.mark.parametrize("mode", ["multiblock", "packed"])
def test_on_cuda_in_half_precision_torchs_own_kernel_is_called(mode):
    """In bf16 every padded sequence goes to torch's varlen operator; in fp32 none does.

    Fake CUDA tensors need no GPU, and the operator checks its arguments as on a GPU.
    """
    recipe = dataclasses.replace(
        change("mask", mode=mode),
        model=dataclasses.replace(RECIPE.model, width=96),
        predictor=dataclasses.replace(RECIPE.predictor, width=48),
    )
    padded_blocks = {"multiblock": 3, "packed": 6}[mode]
    for dtype, calls in ((torch.bfloat16, padded_blocks), (torch.float32, 0)):
        with torch.device("meta"):
            model = IJepa(recipe)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
            replace_parameters(model, dtype)
            fields = [
                None if field is None else torch.empty_like(field, device="cuda")
                for field in drawn(recipe)
            ]
            images = torch.empty(
                8,
                3,
                64,
                64,
                dtype=dtype,
            )
            with CalledOperators() as called:
                model(images, masks.Masks(*fields))
            assert called.names["torch_attn::_varlen_attn"] == calls


@pytest.mark.parametrize("mode", MODES)
def test_a_step_never_looks_at_its_values(mode, use_kernel):
    """Forward, backward and target update run on the meta device, which has shapes and no values.

    A step that reads a value (`.item()`, `nonzero`, a boolean index) fails here and makes the host
    wait on a GPU.
    """
    use_kernel(lambda q, *_: q.clone())
    targets = {"rasterized": 3, "random": 1}.get(mode, 4)
    recipe = change("mask", mode=mode, targets=targets)
    fields = [None if field is None else field.to("meta") for field in drawn(recipe)]
    drawn_masks = masks.Masks(*fields)
    for predictor in ("per_target", "joint"):
        chosen = with_modes(recipe, mode, predictor)
        with torch.device("meta"):
            model = IJepa(chosen)
            loss, spread = model(torch.empty(8, 3, 64, 64), drawn_masks)
        loss.backward()
        update_target(model, 0.9)
        assert loss.is_meta
        assert spread["target_std"].is_meta
        assert model.encoder.blocks[0].attn.qkv.weight.grad.is_meta


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_block_by_lengths_compiles_without_a_break(use_kernel):
    """Compiled without a graph break, attention by lengths gives the same loss and gradients."""
    recipe = change("mask", mode="packed")
    drawn_masks = drawn(recipe)
    want = gradients(built(recipe, WithoutShortcuts), recipe, drawn(recipe))
    use_kernel(attend_by_mask)
    model = built(recipe)
    blocks = (
        model.encoder.blocks[0],
        model.predictor.blocks[0],
        model.predictor.blocks[-1],
    )
    for block in blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    got = gradients(model, recipe, drawn_masks)
    assert furthest(got, want) < 5e-5
