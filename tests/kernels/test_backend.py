"""Attention backends: what is installed is said, what is not is refused by name, and FlashAttention-3 gets its arguments.

A stand-in for ``flash_attn_interface`` computes attention from exactly the arguments that FlashAttention 3.0 documents, so
that the translation is checked by its result.
"""

import gc
import itertools
import random
import sys
import weakref
from collections import Counter
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from kernel_checks import run

from hybridcache.errors import UserError
from hybridcache.kernels import operations
from hybridcache.kernels.backend import Backend, attention_backends, make_backend
from hybridcache.kernels.paged_decode import naive as naive_decode
from hybridcache.kernels.paged_prefill import naive as naive_prefill
from hybridcache.kernels.testing import attention_case, cached, rel_error, state_case
from hybridcache.memory.layout import Layout


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    *,
    cache_seqlens,
    page_table,
    cu_seqlens_q=None,
    max_seqlen_q=None,
    softmax_scale=None,
    causal=False,
):
    """Attention over pages ``[pages, tokens, heads, dim]``; causal masks are aligned to the last key."""
    assert page_table.dtype == cache_seqlens.dtype == torch.int32
    assert page_table.stride(-1) == k_cache.stride(-1) == v_cache.stride(-1) == q.stride(-1) == 1
    assert causal
    if cu_seqlens_q is None:
        rows, out = list(q), torch.full_like(q, float("nan"))
        outs = list(out)
    else:
        assert cu_seqlens_q.dtype == torch.int32
        out, bounds = torch.full_like(q, float("nan")), cu_seqlens_q.tolist()
        assert max_seqlen_q >= max(b - a for a, b in itertools.pairwise(bounds))
        rows, outs = ([x[a:b] for a, b in itertools.pairwise(bounds)] for x in (q, out))
    page_tokens, group = k_cache.shape[1], q.shape[-2] // k_cache.shape[2]
    for q_QHD, out_QHD, table, length in zip(rows, outs, page_table, cache_seqlens.tolist()):
        if length == 0 or q_QHD.shape[0] == 0:
            out_QHD.zero_()
            continue
        used = table[: -(-length // page_tokens)].long()
        assert (used >= 0).all()
        k_SHD, v_SHD = (x[used].flatten(0, 1)[:length].double().repeat_interleave(group, 1) for x in (k_cache, v_cache))
        score_HQS = torch.einsum("qhd,shd->hqs", q_QHD.double(), k_SHD) * softmax_scale
        position_Q = torch.arange(length - q_QHD.shape[0], length)
        score_HQS = score_HQS.masked_fill(torch.arange(length) > position_Q[:, None], float("-inf"))
        out_QHD.copy_(torch.einsum("hqs,shd->qhd", score_HQS.softmax(-1), v_SHD))
    return out


@pytest.fixture
def fa3_module(monkeypatch) -> ModuleType:
    """The stand-in where ``import flash_attn_interface`` finds it."""
    module = ModuleType("flash_attn_interface")
    module.__spec__ = ModuleSpec("flash_attn_interface", None)
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    return module


@pytest.fixture
def generator() -> torch.Generator:
    seed = random.SystemRandom().randrange(1 << 31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


LAYOUTS = [
    pytest.param("block_major", 8, 3, id="block-kb8x3"),
    pytest.param("block_major", 16, 1, id="block-kb16"),
    pytest.param("layer_major", 24, 1, id="layer-kb24"),
    pytest.param("layer_major", 8, 3, id="layer-kb8x3"),
]


def case_and_backend(generator, order, kb, blocks, lengths):
    case = attention_case(
        generator, lengths=lengths, order=order, kernel_block_tokens=kb, kernel_blocks=blocks, k_dim=32, v_dim=32
    )
    return case, Backend("triton", "fa3")


@pytest.mark.parametrize(("order", "kb", "blocks"), LAYOUTS)
def test_decode_arguments(order, kb, blocks, generator, fa3_module):
    case, backend = case_and_backend(generator, order, kb, blocks, [1, 0, 24, 25, 130])
    q_BHD = torch.randn(5, 8, 32, generator=generator).bfloat16()
    inputs = (case.layout, 1, q_BHD, case.kv_table_BN, case.context_len_B, 0.3)
    out = run(backend, "paged_decode", case.buffer, *inputs)
    assert out.shape == (5, 8, 32)
    assert (out[1] == 0).all(), "a padding row's stale length reached the kernel"
    assert rel_error(out, naive_decode.paged_decode(*cached(case.buffer, *inputs))) < 1e-2
    expected = {"paged_decode[fa3]": 1} | ({"expand_table[fa3]": 1} if blocks > 1 else {})
    assert backend.launches == expected


@pytest.mark.parametrize(("order", "kb", "blocks"), LAYOUTS)
def test_prefill_arguments(order, kb, blocks, generator, fa3_module):
    lengths, queries = [65, 9, 0, 64, 7], [65, 0, 5, 3, 7]
    case, backend = case_and_backend(generator, order, kb, blocks, lengths)
    offsets = torch.tensor([0, *queries]).cumsum(0).int()
    q_THD = torch.randn(sum(queries), 8, 32, generator=generator).bfloat16()
    inputs = (case.layout, 0, q_THD, case.kv_table_BN, offsets, case.context_len_B, 0.3, max(queries), max(lengths))
    out = run(backend, "paged_prefill", case.buffer, *inputs)
    assert rel_error(out, naive_prefill.paged_prefill(*cached(case.buffer, *inputs))) < 1e-2


def test_a_layout_without_one_page_stride_is_refused(generator, fa3_module):
    case, backend = case_and_backend(generator, "block_major", 8, 3, [10])
    odd = type(case.layout)(**{**vars(case.layout), "manager_stride": case.layout.manager_stride + 64})
    inputs = (odd, 0, torch.zeros(1, 8, 32).bfloat16(), case.kv_table_BN, case.context_len_B, 1.0)
    with pytest.raises(UserError, match=r"attention_backend='fa3'.*no one stride.*triton"):
        run(backend, "paged_decode", case.buffer, *inputs)
    assert not backend.launches


@pytest.mark.parametrize(
    ("dtype", "k_dim", "v_dim", "words"),
    [("float32", 32, 32, "float32"), ("bfloat16", 32, 64, "32 and 64"), ("bfloat16", 512, 512, "512")],
)
def test_what_it_cannot_compute_is_refused(dtype, k_dim, v_dim, words, generator, fa3_module):
    case = attention_case(generator, lengths=[3], k_dim=k_dim, v_dim=v_dim, dtype=dtype)
    q_BHD = torch.zeros(1, 2, k_dim, dtype=getattr(torch, dtype))
    inputs = (case.layout, 0, q_BHD, case.kv_table_BN, case.context_len_B, 1.0)
    with pytest.raises(UserError, match=f"fa3.*{words}"):
        run(Backend("triton", "fa3"), "paged_decode", case.buffer, *inputs)


def test_names_say_what_is_here(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # an import that fails
    found = attention_backends()
    assert list(found) == ["torch", "triton", "fa3"]
    assert found["torch"] == "installed"
    assert found["fa3"] != "installed"


def test_an_absent_one_is_refused_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    with pytest.raises(UserError, match=r"attention_backend='fa3': flash_attn_interface .*choose triton or torch"):
        make_backend("triton", "cuda", "fa3")


def test_wrong_names_and_devices():
    with pytest.raises(UserError, match=r"attention_backend='fa9': choose auto or one of torch, triton, fa3"):
        make_backend("torch", "cpu", "fa9")
    for name in ("triton", "fa3"):
        with pytest.raises(UserError, match=f"attention_backend='{name}': needs a CUDA device, not cpu"):
            make_backend("torch", "cpu", name)


def test_auto_and_the_own_name_change_nothing():
    for name in ("auto", "torch"):
        assert make_backend("auto", "cpu", name).name == "torch"


def test_only_attention_is_replaced(generator, fa3_module):
    backend = Backend("torch", "fa3")
    case = attention_case(generator, lengths=[40, 3], k_dim=32, v_dim=32)
    q_BHD = torch.randn(2, 4, 32, generator=generator).bfloat16()
    k_TKD, v_TKD = torch.randn(2, 2, 2, 32, generator=generator).bfloat16()
    last = case.context_len_B - 1
    cache = backend.bind_layer(case.buffer, case.layout, 0)
    cache.kv_store(k_TKD, v_TKD, case.kv_table_BN, torch.arange(2), last)
    inputs = (q_BHD, case.kv_table_BN, case.context_len_B, 0.2)
    expected = naive_decode.paged_decode(*cached(case.buffer, case.layout, 0, *inputs))
    assert rel_error(cache.paged_decode(*inputs), expected) < 1e-2
    assert backend.block_copy(case.buffer, [(0, 1024, 512)]) == 512
    assert backend.name == "torch+fa3"
    assert backend.launches == Counter(
        {"kv_store[torch]": 1, "paged_decode[fa3]": 1, "expand_table[fa3]": 1, "block_copy[torch]": 1}
    )


def test_every_operation_has_one_entry_and_its_implementations_exist():
    """The contracts of the protocols and the table name the same operations; the names of implementations resolve."""
    for entries, protocol in (
        (operations.ATTENTION, operations.AttentionOperations),
        (operations.STATE, operations.StateOperations),
        ({**operations.LAYER, "block_copy": operations.BLOCK_COPY}, operations.LayerOperations),
    ):
        assert set(entries) == {name for name in vars(protocol) if not name.startswith("_")}
        for name, entry in entries.items():
            for module in (entry.torch_module, entry.triton_module, *entry.others.values()):
                assert callable(operations.load(module, name))
            assert operations.load(entry.torch_module, name).__name__ == name


def test_properties_say_what_a_backend_can_do():
    assert [(b.fused, b.capturable) for b in (Backend("torch"), Backend("triton"), Backend("triton", "fa3"))] == [
        (False, False),
        (True, True),
        (True, False),
    ]
    assert not Backend("triton", "torch").capturable


def test_every_layer_of_a_pool_is_bound(generator):
    """Each bound layer reads its own part of the pool, and all count in one counter."""
    case = attention_case(generator, lengths=[5, 9], layers=3, kv_heads=1, k_dim=16, v_dim=16, dtype="float32")
    state = state_case(generator, positions=[3], layers=2, k_heads=1, v_heads=1, key_dim=8, value_dim=8)
    backend = Backend("torch")
    caches = backend.bind(case.buffer, Layout(case.buffer.numel(), case.layout, state.layout))
    assert (len(caches.attention), len(caches.states)) == (3, 2)
    q_BHD = torch.randn(2, 2, 16, generator=generator)
    for layer, cache in enumerate(caches.attention):
        inputs = (q_BHD, case.kv_table_BN, case.context_len_B, 0.25)
        expected = naive_decode.paged_decode(*cached(case.buffer, case.layout, layer, *inputs))
        assert rel_error(cache.paged_decode(*inputs), expected) < 1e-5
    assert backend.launches == {"paged_decode[torch]": 3}


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_a_pool_goes_with_its_caches(generator, name):
    """Nothing that is bound refers to itself: memory comes back without the garbage collector, which the engine holds off."""
    case = attention_case(generator, lengths=[5], kv_heads=1, k_dim=16, v_dim=16, dtype="float32")
    state = state_case(generator, positions=[3], layers=2, k_heads=1, v_heads=1, key_dim=8, value_dim=8)
    backend, buffer = Backend(name), torch.zeros(case.buffer.numel(), dtype=torch.uint8)
    gone, caches = weakref.ref(buffer), backend.bind(buffer, Layout(buffer.numel(), case.layout, state.layout))
    gc.disable()
    try:
        del buffer
        assert gone() is not None
        del caches
        assert gone() is None
    finally:
        gc.enable()
