# SPDX-License-Identifier: Apache-2.0
"""jaxrlhf: from a language model and feedback to an aligned model, in JAX."""
