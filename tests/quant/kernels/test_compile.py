"""Kernels compile for sm_90a and sm_100a on any machine; ptxas reports no spills, which bandwidth depends on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="compiling kernels needs Triton")


@pytest.fixture(scope="module")
def reports() -> dict[str, dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.quant.kernels.compile_check"]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_no_kernel_spills_registers(reports: dict[str, dict[str, Any]]) -> None:
    assert {name: report["spilt_bytes"] for name, report in reports.items() if report["spilt_bytes"]} == {}


def test_ptxas_has_no_warnings(reports: dict[str, dict[str, Any]]) -> None:
    assert {name: report["warnings"] for name, report in reports.items() if report["warnings"]} == {}


def test_row_kernels_leave_room_for_many_programs(reports: dict[str, dict[str, Any]]) -> None:
    assert reports["rows of 2048"]["registers"] <= 64
    assert reports["rows of 22016"]["registers"] <= 128
    assert reports["tiles by row"]["registers"] <= 96
    assert reports["values, macro and fallback"]["registers"] <= 96
    assert reports["packed, plain"]["registers"] <= 64
    assert reports["listed tiles"]["registers"] <= 128
    assert reports["decode, 16 rows"]["registers"] <= 128
    assert reports["halves, plain"]["registers"] <= 128
    assert reports["halves, all"]["registers"] <= 168
    assert reports["tiles, 32 rows"]["registers"] <= 128


def test_on_blackwell_products_run_on_fp4_tensor_cores(reports: dict[str, dict[str, Any]]) -> None:
    kinds = {name: reports[name]["instructions"] for name in ("mxfp4", "nvfp4")}
    assert kinds == {
        "mxfp4": ["tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::2X"],
        "nvfp4": ["tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale.scale_vec::4X"],
    }
