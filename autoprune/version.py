"""Which version this is: what policy files and `--version` say."""

__version__ = "0.1.0"
