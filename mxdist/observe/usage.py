"""What a process has taken of its machine, seen from inside it."""

import resource
import sys

from mxdist.messages import ProcessUsage

BF16_PEAK = {  # by part of the name that the driver gives; dense matrix products, vendor's datasheets
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "B200": 2250e12,
}


def process_usage() -> ProcessUsage:
    """Of this process, up to now."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    torch = sys.modules.get("torch")  # without it there is nothing on a GPU
    if torch is None or not torch.cuda.is_available():
        return ProcessUsage("cpu", resident, None)
    return ProcessUsage(torch.cuda.get_device_name(), resident, torch.cuda.max_memory_allocated() / 2**20)


def bf16_peak(device: str) -> float | None:
    """Floating-point operations a second of a device's BF16 matrix products; None where no datasheet says."""
    return next((peak for part, peak in BF16_PEAK.items() if part in device), None)
