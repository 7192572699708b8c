# SPDX-License-Identifier: Apache-2.0
"""Plans before the bill: the real programs compiled ahead of time for hardware that is not here."""
