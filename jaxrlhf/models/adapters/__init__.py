# SPDX-License-Identifier: Apache-2.0
"""Adapters: few extra leaves beside frozen ones, trained instead of them."""
