"""Configuration: the schema, and how a file and ``key=value`` arguments become one. Imports no torch and no Ray."""

from mxdist.config.schema import Config

__all__ = ["Config"]
