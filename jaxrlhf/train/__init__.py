# SPDX-License-Identifier: Apache-2.0
"""One state, one step, one loop for every stage; checkpoints and metrics beside them."""
