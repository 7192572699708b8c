# SPDX-License-Identifier: Apache-2.0
"""Devices: the mesh, the table from logical to mesh axes, and several processes."""
