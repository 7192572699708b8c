# SPDX-License-Identifier: Apache-2.0
"""Maths on arrays: no models, no jit, no configuration objects."""
