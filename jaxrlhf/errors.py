# SPDX-License-Identifier: Apache-2.0
"""Errors meant for the person running a command: printed as they are, without a traceback.

Each message names the field, the value, the place and the fix. Anything else that is raised is a
bug of ours and keeps its traceback.
"""


class JaxrlhfError(Exception):
    """Base of all user-facing errors; `exit_code` is what a command ends with."""

    exit_code = 1


class ConfigError(JaxrlhfError):
    """A setting is unknown, of the wrong type, or contradicts another; every error at once."""

    exit_code = 2


class DataError(JaxrlhfError):
    """A row, file or source cannot be used; names file, line and columns."""


class ModelError(JaxrlhfError):
    """A model folder is missing, damaged, of the wrong kind or of an unsupported family."""


class CheckpointError(JaxrlhfError):
    """A checkpoint is missing, damaged or does not belong to this run; nothing is overwritten."""
