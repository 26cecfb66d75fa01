"""Page-tiled attention for Hopper: it fits where a page is small, and its needs grow with the page until it does not."""

import pytest

pytest.importorskip("triton")

import triton

if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1: kernels are interpreted in this process", allow_module_level=True)

from benchmarks.block_size import resources, tile_bytes
from benchmarks.resources import SHARED_MEMORY_LIMIT, measure_resources


@pytest.mark.parametrize("operation", ["paged_decode", "paged_prefill"])
def test_small_pages_fit_without_spills(operation):
    found = resources("page_tiled", operation, 16)
    assert found.fits
    assert found.registers
    assert found.spill_bytes == 0


def test_a_page_of_256_tokens_overflows():
    """As measured on an H100 (Triton 3.6): `Required: 278532, Hardware limit: 232448`."""
    found = resources("page_tiled", "paged_decode", 256)
    assert found.shared_bytes > SHARED_MEMORY_LIMIT
    assert not found.fits
    assert found.shared_bytes >= tile_bytes(256) == 2 * 256 * 256 * 2


@pytest.mark.parametrize("operation", ["paged_decode", "paged_prefill"])
def test_an_independent_tile_does_not_grow_with_the_page(operation):
    small, middle, large = (resources("independent", operation, size) for size in (16, 64, 1056))
    assert small.fits
    assert small.shared_bytes >= middle.shared_bytes == large.shared_bytes
    assert not any(found.spill_bytes for found in (small, middle, large))


def test_tiles_are_pages_rounded_up():
    assert tile_bytes(8) == tile_bytes(16)
    assert tile_bytes(1056) == tile_bytes(2048) == 2 * tile_bytes(1024)


def test_a_parameter_without_a_type_is_named():
    from hybridcache.kernels.block_copy import triton as block_copy

    with pytest.raises(ValueError, match="block_copy_kernel: no type for parameter dst_ptr"):
        measure_resources(block_copy.block_copy_kernel, {"src_ptr": "*i64"}, block_copy.constants(16), {})
