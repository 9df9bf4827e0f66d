"""Keeps other libraries' banners and warnings out of what a person sees. For the process that talks to a person."""

import os
import warnings

# Every value can be set otherwise in the environment, which wins.
QUIET_ENVIRONMENT = {
    "GLOG_minloglevel": "2",  # Ray's C++ log
    "GRPC_VERBOSITY": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",  # else every attempt to reach it is a line; the last one's reason is ours to tell
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns of a future default at every start
    "RAY_DEDUP_LOGS_SKIP_REGEX": "worker died or was killed",  # the run says so itself, in one line
    "RAY_USAGE_STATS_ENABLED": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # TensorBoard looks for TensorFlow
    "TRANSFORMERS_VERBOSITY": "error",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}


def quieten_third_party() -> None:
    """Set the environment, which child processes inherit, before any of these libraries is imported."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("PYTHONWARNINGS"):
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("default", module="mxdist")
