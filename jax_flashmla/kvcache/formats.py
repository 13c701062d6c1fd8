"""The formats of a KV cache: where every byte of a token stands. One table; whoever reads or writes a pool asks it."""

from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp


@dataclass(frozen=True)
class Field:
    """`count` numbers of one dtype, `offset` bytes behind the start of a token's row in plane `plane`."""

    name: str
    dtype: str
    count: int
    offset: int
    plane: int = 0

    @property
    def nbytes(self) -> int:
        return self.count * jnp.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class KVFormat:
    """The layout of a page: plane after plane, and in each plane one row per token.

    Attributes:
      name: as users spell it.
      dtype: the dtype of the pool's elements; every offset and width below is in bytes all the same.
      fields: what a token has, in the order of its bytes; without gaps.
      tile: channels that share a scale; 0 where nothing is scaled.
      page_multiple: pages may be padded to a multiple of this many bytes; 1 where they never are.
    """

    name: str
    dtype: str
    fields: tuple[Field, ...]
    tile: int = 0
    page_multiple: int = 1

    def __post_init__(self):
        end: dict[int, int] = {}
        for field in self.fields:
            assert field.offset == end.get(field.plane, 0), (self.name, field)
            end[field.plane] = field.offset + field.nbytes
        assert list(end) == list(range(len(end)))
        assert not self.tile or self["latent"].count == self.tile * self["scale"].count

    def __getitem__(self, name: str) -> Field:
        return next(field for field in self.fields if field.name == name)

    @property
    def is_fp8(self) -> bool:
        return self.tile > 0

    @cached_property
    def head_dim(self) -> int:
        """d_qk: the width of a row once it is read."""
        return self["latent"].count + self["rope"].count

    @cached_property
    def plane_bytes(self) -> tuple[int, ...]:
        """The row of one token in each plane."""
        planes = range(self.fields[-1].plane + 1)
        return tuple(sum(field.nbytes for field in self.fields if field.plane == plane) for plane in planes)

    @property
    def token_bytes(self) -> int:
        return sum(self.plane_bytes)

    def plane_offset(self, plane: int, page_size: int) -> int:
        """Where a plane begins, in bytes from the start of its page."""
        return page_size * sum(self.plane_bytes[:plane])

    def page_bytes(self, page_size: int, *, padded: bool = False) -> int:
        """The distance from one page to the next."""
        multiple = self.page_multiple if padded else 1
        return -(-page_size * self.token_bytes // multiple) * multiple

    def pool_shape(self, num_pages: int, page_size: int, *, padded: bool = False) -> tuple[int, ...]:
        """In elements of `dtype`. No array of tokens has gaps between its pages, so padded pages are flat."""
        item = jnp.dtype(self.dtype).itemsize
        if padded:
            return num_pages, self.page_bytes(page_size, padded=True) // item
        return num_pages, page_size, 1, self.token_bytes // item


def _plain(name: str, dtype: str, head_dim: int) -> KVFormat:
    latent, item = head_dim - 64, jnp.dtype(dtype).itemsize
    return KVFormat(name, dtype, (Field("latent", dtype, latent, 0), Field("rope", dtype, 64, latent * item)))


FP8_V32 = KVFormat(
    "fp8_v32",
    "uint8",
    (
        Field("latent", "float8_e4m3fn", 512, 0),
        Field("scale", "float32", 4, 512),
        Field("rope", "bfloat16", 64, 528),
    ),
    tile=128,
)

FP8_V4 = KVFormat(
    "fp8_v4",
    "uint8",
    (
        Field("latent", "float8_e4m3fn", 448, 0),
        Field("rope", "bfloat16", 64, 448),
        Field("scale", "float8_e8m0fnu", 7, 0, plane=1),
        Field("pad", "uint8", 1, 7, plane=1),
    ),
    tile=64,
    page_multiple=576,
)

FORMATS = {f.name: f for f in (_plain("bf16", "bfloat16", 576), _plain("f16", "float16", 576), FP8_V32, FP8_V4)}
"""Every format by name; bf16 and f16 with their usual width of 576."""

PLAIN_DIMS = (576, 512)
FP8_DTYPES = ("uint8", "float8_e4m3fn")
assert FP8_V32.token_bytes == 656 and FP8_V4.token_bytes == 584


def layout(name: str, head_dim: int | None = None) -> KVFormat:
    """The format of that name whose rows are `head_dim` wide; bf16 and f16 come in two widths."""
    base = FORMATS[name]
    return base if head_dim in (None, base.head_dim) else _plain(base.name, base.dtype, head_dim)


def page_size_of(shape: tuple[int, ...], token_bytes: int) -> int:
    """Tokens per page of a pool of this shape. The padding of a flat page is shorter than a token."""
    return shape[1] // token_bytes if len(shape) == 2 else shape[1]
