"""Paged KV caches: formats, allocation, writing and reading. docs/kvcache.md has the byte tables."""

from .formats import FORMATS, Field, KVFormat, layout
from .paged import append_kv_cache, copy_pages, gather_kv_cache, init_kv_cache, slot_mapping, topk_to_slots
from .pages import OutOfPages, PageAllocator, num_pages_that_fit
from .quantize import dequantize_kv, quantize_kv

__all__ = [
    "FORMATS",
    "Field",
    "KVFormat",
    "OutOfPages",
    "PageAllocator",
    "append_kv_cache",
    "copy_pages",
    "dequantize_kv",
    "gather_kv_cache",
    "init_kv_cache",
    "layout",
    "num_pages_that_fit",
    "quantize_kv",
    "slot_mapping",
    "topk_to_slots",
]
