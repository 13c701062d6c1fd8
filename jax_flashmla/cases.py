"""One table of named dense-decode cases for tests. bench/cases.py has the shapes that are timed."""

from typing import NamedTuple

# Around every edge of a 64-token block, nothing, and a long one; repeated to fill a batch.
EDGES = (0, 1, 63, 64, 65, 140)
IRREGULAR = (517, 0, 1023, 64, 330, 1, 771, 129)
LISTED = (65, 700, 1300, 450, 700, 1400, 0, 1300)  # a plan of three parts lists them


class Case(NamedTuple):
    name: str
    seqlens: tuple[int, ...]
    s_q: int = 1
    h_q: int = 16
    h_kv: int = 1
    d_qk: int = 576
    page_size: int = 64
    causal: bool = False
    dtype: str = "bfloat16"
    heavy: bool = False  # too slow for the reference on a CPU

    @property
    def b(self) -> int:
        return len(self.seqlens)

    @property
    def flops(self) -> int:
        """Multiply-adds count twice; causal masking is not deducted, as is usual for decode."""
        return 2 * self.s_q * self.h_q * sum(self.seqlens) * (self.d_qk + 512)

    @property
    def kv_bytes(self) -> int:
        item = 4 if self.dtype == "float32" else 2
        return sum(self.seqlens) * self.h_kv * self.d_qk * item


def cycle(lengths: tuple[int, ...], b: int) -> tuple[int, ...]:
    return (lengths * b)[:b]


CASES = (
    Case("one_token", (1,)),
    Case("one_empty", (0,), h_q=128),
    Case("one_long", (4096,), h_q=128),
    Case("edges", EDGES),
    Case("edges_causal_2", EDGES, s_q=2, causal=True),
    Case("edges_causal_3", EDGES, s_q=3, h_q=5, causal=True),
    Case("edges_causal_4", EDGES, s_q=4, h_q=20, causal=True),
    Case("edges_not_causal_4", EDGES, s_q=4, h_q=20),
    Case("long_and_edges", (4096, *EDGES, 3001), h_q=16, causal=True, s_q=2),
    Case("irregular_128", IRREGULAR, h_q=128),
    Case("irregular_128_causal_2", IRREGULAR, h_q=128, s_q=2, causal=True),
    Case("heads_1", IRREGULAR, h_q=1),
    Case("heads_3", IRREGULAR, h_q=3, s_q=2, causal=True),
    Case("heads_5", IRREGULAR, h_q=5),
    Case("heads_20", IRREGULAR, h_q=20),
    Case("heads_63", IRREGULAR, h_q=63),
    Case("heads_64", IRREGULAR, h_q=64),
    Case("heads_65", IRREGULAR, h_q=65),
    Case("heads_126_kv_3", EDGES, h_q=126, h_kv=3),
    Case("heads_126_kv_2_causal_2", EDGES, h_q=126, h_kv=2, s_q=2, causal=True),
    Case("heads_3_kv_3", IRREGULAR, h_q=3, h_kv=3),
    Case("heads_16_kv_8", EDGES, h_q=16, h_kv=8, s_q=2, causal=True),
    Case("heads_128_kv_8", EDGES, h_q=128, h_kv=8),
    Case("heads_64_kv_2_irregular", IRREGULAR, h_q=64, h_kv=2, s_q=3, causal=True),
    Case("queries_17", EDGES, s_q=17, h_q=5, causal=True),
    Case("queries_17_not_causal", EDGES, s_q=17, h_q=3),
    Case("queries_128", (200, 0, 64, 129, 128), s_q=128, h_q=3, causal=True),
    Case("queries_128_heads_128", (330, 64), s_q=128, h_q=128, causal=True, heavy=True),
    Case("latent_only", IRREGULAR, d_qk=512),
    Case("latent_only_causal_2", IRREGULAR, d_qk=512, h_q=64, s_q=2, causal=True),
    Case("f16", IRREGULAR, dtype="float16"),
    Case("f16_causal_2", EDGES, h_q=128, s_q=2, causal=True, dtype="float16"),
    Case("f16_latent_only", EDGES, d_qk=512, dtype="float16"),
    Case("page_16", IRREGULAR, page_size=16, s_q=2, causal=True),
    Case("page_32", IRREGULAR, page_size=32, h_q=20),
    Case("page_128", IRREGULAR, page_size=128, s_q=2, causal=True),
    Case("page_256", IRREGULAR, page_size=256),
    Case("page_16_latent_only_f16", EDGES, page_size=16, d_qk=512, dtype="float16"),
    Case("page_32_kv_2", IRREGULAR, page_size=32, h_q=16, h_kv=2),
    Case("batch_64", cycle(IRREGULAR, 64), heavy=True),
    Case("batch_64_long", cycle((4096, *IRREGULAR), 64), h_q=128, s_q=2, causal=True, heavy=True),
    Case("batch_33_skewed", (4096, *cycle(EDGES, 32)), h_q=64, heavy=True),
)

BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)
