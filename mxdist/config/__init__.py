"""Configuration: the schema, and how a file and ``key=value`` arguments become one. Imports no torch and no Ray."""

from mxdist.config.load import dump_config, load_config
from mxdist.config.schema import Config

__all__ = ["Config", "dump_config", "load_config"]
