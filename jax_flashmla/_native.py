"""The compiled extension: imported and registered at the first lowering for CUDA, never at `import jax_flashmla`.

A registration that XLA refuses makes the user's whole backend fail to initialise, and importing the extension costs
milliseconds that a CPU user has no reason to pay: hence the laziness.
"""

import functools
import importlib
import importlib.metadata
import os
import re
import threading
import warnings
from pathlib import Path

import jax
import jaxlib

HOPPER = "9.0"
HOPPER_SM_COUNT = 132  # H100 SXM and H200: assumed where no GPU can be asked
RECORD_VERSION = "0", "1"  # of XLA's interface in csrc/ffi/record.cc

_lock = threading.Lock()
_registered = False


def register_cuda_targets() -> None:
    """Loads the CUDA kernels and makes their custom-call targets known to XLA.

    Lowering does this by itself. Call it in a process that only *runs* something lowered elsewhere: a deserialized
    `jax.export` artifact or a serialized executable. Repeated calls do nothing.

    Raises:
      ImportError: this installation has no CUDA kernels, or the extension does not load.
    """
    global _registered
    with _lock:  # several devices may be lowered for from several threads
        if not _registered:
            extension = importlib.import_module("jax_flashmla._C")
            for target, capsule in extension.registrations(records()).items():
                jax.ffi.register_ffi_target(target, capsule, platform="CUDA")
            _registered = True


@functools.cache
def records() -> bool:
    """Whether custom calls record their kernels into XLA's command buffers (csrc/ffi/record.cc).

    XLA has an interface for it since jaxlib 0.11.2, and says that it may change: it is used where its version is the
    one that the extension was written for, and the plugin is of jaxlib's release. JAX_FLASHMLA_RECORD=0 turns it off.
    """
    if os.environ.get("JAX_FLASHMLA_RECORD") == "0":
        return False
    header = Path(jaxlib.__file__).parent / "include" / "xla" / "ffi" / "api" / "record_c_api.h"
    text = header.read_text() if header.is_file() else ""
    version = tuple(re.findall(r"#define XLA_FFI_Extension_Record_(?:Major|Minor)Version (\d+)", text))
    return version == RECORD_VERSION and jaxlib.__version__ in plugin_versions()


def plugin_versions() -> set[str]:
    """Releases of the CUDA plugins of JAX that are installed."""
    names = (f"jax-cuda{major}-pjrt" for major in (12, 13))
    found = (next(iter(importlib.metadata.distributions(name=name)), None) for name in names)
    return {distribution.version for distribution in found if distribution}


def local_cuda_devices() -> list[jax.Device]:
    """This process's CUDA devices; empty where there are none, or where JAX_PLATFORMS excludes them."""
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


def sm_count() -> int:
    return next((device.core_count for device in local_cuda_devices()), HOPPER_SM_COUNT)


def obstacle() -> str | None:
    """Why the kernels cannot be lowered for CUDA here, in one sentence; None when they can.

    With no CUDA device at all this is ahead-of-time lowering for a machine elsewhere, and Hopper is assumed.
    """
    for device in local_cuda_devices():
        if device.compute_capability != HOPPER:
            return (
                f"the kernels need a Hopper GPU (compute capability {HOPPER}), got {device.device_kind} "
                f"({device.compute_capability}); hide it with CUDA_VISIBLE_DEVICES if this machine has a Hopper GPU too"
            )
    try:
        register_cuda_targets()
    except ImportError as error:
        return (
            f"this installation of jax_flashmla has no CUDA kernels ({error}); "
            "install a wheel that was built with JAX_FLASHMLA_CUDA=ON, the default"
        )
    return None


@functools.cache
def warn_fallback(reason: str) -> None:
    """Once per reason: a user with a Hopper GPU should learn why decoding is slow."""
    warnings.warn(f"jax_flashmla runs through its XLA reference: {reason}", RuntimeWarning, stacklevel=2)
