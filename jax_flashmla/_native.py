"""The compiled extension: imported and registered at the first lowering for CUDA, never at `import jax_flashmla`.

A registration that XLA refuses makes the user's whole backend fail to initialise, and importing the extension costs
milliseconds that a CPU user has no reason to pay: hence the laziness.
"""

import functools
import importlib
import threading
import warnings

import jax

HOPPER = "9.0"
HOPPER_SM_COUNT = 132  # H100 SXM and H200: assumed where no GPU can be asked

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
            for target, capsule in extension.registrations().items():
                jax.ffi.register_ffi_target(target, capsule, platform="CUDA")
            _registered = True


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
