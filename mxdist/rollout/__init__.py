"""Rollout workers: vLLM engines whose linears are this project's MXFP4 linears."""
