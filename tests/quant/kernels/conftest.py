"""Kernel tests run on the GPU if there is one, otherwise in Triton's interpreter on the CPU."""

import tests.interpreted  # noqa: F401
