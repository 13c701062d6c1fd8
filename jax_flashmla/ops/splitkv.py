"""Attention and the merge of partial results: one custom call, or one each."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .. import _native

ALL, ATTEND, COMBINE = (np.int32(phase) for phase in range(3))
"""Phase in csrc/params.h."""


def attend_and_combine(
    target: str, results: Sequence[jax.ShapeDtypeStruct], operands: Sequence[Any], parts: int, **attributes: Any
) -> Sequence[jax.Array]:
    """Results of the target's handler, partial results among them.

    In an XLA that lets custom calls record kernels, a kernel may start while the one before it ends. That is quickest
    in a chain, and of two kernels in one call both would wait for what is before the call: so they are two calls.
    """
    call = jax.ffi.ffi_call(target, results)
    if not _native.records() or parts == 1:
        return call(*operands, phase=ALL, **attributes)
    in_place = {len(operands) + i: i for i in range(len(results))}
    combine = jax.ffi.ffi_call(target, results, input_output_aliases=in_place)
    return combine(*operands, *call(*operands, phase=ATTEND, **attributes), phase=COMBINE, **attributes)
