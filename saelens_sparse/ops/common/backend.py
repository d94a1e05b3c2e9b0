"""What computes an operation."""

from typing import Literal

Backend = Literal["triton", "torch"]
