"""Which implementation of the sparse operations runs, and why: the one place that decides."""

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch

from saelens_sparse.measured import MAX_SPARSE_DENSITY
from saelens_sparse.ops.common.backend import Backend
from saelens_sparse.warn import warn_caller

Implementation = Literal["auto", "triton", "torch", "dense"]

IMPLEMENTATIONS: tuple[Implementation, ...] = get_args(Implementation)
NO_TRITON_ENV = "SAELENS_SPARSE_NO_TRITON"

TRITON_DTYPES = (torch.float32, torch.bfloat16)

# GPUs that the kernels are known to fit: NVIDIA's from this compute capability on, and AMD's of
# these architectures. Each kernel compiles with its launch settings for 7.5, 8.0, 8.6, 8.9, 9.0,
# 10.0, 12.0, gfx942 and gfx1100, within what a program may use there
# (tests/test_kernel_compilation.py). Of these 9.0 alone has been run on.
MIN_COMPUTE_CAPABILITY = (7, 5)
HIP_ARCHITECTURES = ("gfx942", "gfx1100")
# NVIDIA's tensor cores multiply float8 from this compute capability on.
MIN_FLOAT8_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Choice:
    """What runs and the reason in one sentence.

    Attributes:
        name: `"triton"` or `"torch"`, sparse operations by that backend; `"fused"`, dense
            products with everything between them in one pass; `"dense"`, SAELens's arithmetic.
        reason: why.
        backend: what the operations other than dense products run on; meaningless for "dense".
    """

    name: Literal["triton", "torch", "fused", "dense"]
    reason: str
    backend: Backend = "torch"


def choose_implementation(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    density: float,
    full_precision: bool = True,
) -> Choice:
    """Decide at call time what runs.

    Args:
        requested: one of `IMPLEMENTATIONS`. Anything but `"auto"` is obeyed or refused,
            never replaced.
        device: where the weights and inputs are.
        dtype: dtype of the weights.
        density: share of latents that are active on a row, `k / d_sae`; 0 where it is measured
            from step to step.
        full_precision: whether dense products would run in float32 or float64, and not in less.

    Raises:
        ValueError: `requested` is unknown, or is `"triton"` where Triton cannot run.
    """
    if requested not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {', '.join(IMPLEMENTATIONS)}; got {requested!r}"
        )
    if requested == "dense":
        return Choice("dense", "implementation='dense' was requested")
    if requested == "torch":
        return Choice("torch", "implementation='torch' was requested")

    if requested == "triton":
        problem = triton_problem(device, dtype)
        if problem is not None:
            raise ValueError(
                f"implementation='triton' cannot run here: {problem}. "
                "Use 'auto' to let the plugin choose, or 'torch'."
            )
        return Choice("triton", "implementation='triton' was requested", "triton")

    limit = MAX_SPARSE_DENSITY[full_precision]
    if density > limit:
        return Choice(
            "dense",
            f"{density:.1%} of the latents are active; above {limit:.1%} dense products are faster",
        )
    if device.type != "cuda":
        return Choice("torch", f"Triton kernels need a CUDA device, not {device.type!r}")
    problem = triton_problem(device, dtype)
    if problem is not None:
        _warn_once(f"saelens_sparse runs its slower PyTorch path on this GPU: {problem}.")
        return Choice("torch", problem)
    return Choice("triton", "CUDA device with a working Triton", "triton")


def require_float8(device: torch.device) -> None:
    """
    Check that a float8 screen can run on a device.

    Raises:
        ValueError: it cannot.
    """
    problem = _float8_problem(device)
    if problem is not None:
        raise ValueError(
            f"screen_dtype='float8' cannot run here: {problem}. Use 'auto', which runs anywhere."
        )


def _float8_problem(device: torch.device) -> str | None:
    least = "{}.{}".format(*MIN_FLOAT8_CAPABILITY)
    needed = f"it needs an NVIDIA GPU of compute capability {least} or higher"
    problem = triton_problem(device, torch.float32)
    if device.type != "cuda":
        return None if problem is None else f"{needed}, not {device.type!r}"
    if problem is not None:
        return problem
    if torch.version.hip is not None:
        return f"{needed}; this is one of AMD's"
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_FLOAT8_CAPABILITY:
        return None
    return f"{needed}; this one has {{}}.{{}}".format(*capability)


def triton_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton kernels cannot run for this device and dtype, or None when they can."""
    if os.environ.get(NO_TRITON_ENV, "0") not in ("", "0"):
        return f"Triton is turned off by {NO_TRITON_ENV}"
    if dtype not in TRITON_DTYPES:
        return f"the Triton kernels take float32 and bfloat16, not {dtype}"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton kernels run on a CPU only in Triton's interpreter (TRITON_INTERPRET=1)"
    elif device.type != "cuda":
        return f"Triton kernels need a CUDA device, not {device.type!r}"
    return _triton_installation_problem(str(device))


@cache
def _triton_installation_problem(device: str) -> str | None:
    """Why this Triton cannot run the kernels on this device, or None when it can."""
    try:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
    except ImportError as error:
        return f"the package triton cannot be imported ({_first_line(error)})"
    try:
        problem = None if device == "cpu" else _gpu_problem(device)
        if problem is None:
            # Only a launch shows whether Triton finds a C compiler and a driver that it can use.
            from saelens_sparse.ops.rows.kernels import launch_probe

            launch_probe(torch.device(device))
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        return f"Triton could not compile and run a kernel ({reason})"
    return problem


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _gpu_problem(device: str) -> str | None:
    """Why the kernels are not known to fit a GPU, or None when they are."""
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        if architecture in HIP_ARCHITECTURES:
            return None
        known = ", ".join(HIP_ARCHITECTURES)
        return f"of AMD's GPUs the Triton kernels are known to fit {known}; this is {architecture}"
    capability = torch.cuda.get_device_capability(device)
    if capability >= MIN_COMPUTE_CAPABILITY:
        return None
    least, found = ("{}.{}".format(*version) for version in (MIN_COMPUTE_CAPABILITY, capability))
    return f"the Triton kernels need compute capability {least} or higher; this GPU has {found}"


@cache
def _warn_once(message: str) -> None:
    warn_caller(message)
