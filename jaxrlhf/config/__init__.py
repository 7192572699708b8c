# SPDX-License-Identifier: Apache-2.0
"""Settings: typed sections, YAML and key=value, every error at once. Imports no jax."""
