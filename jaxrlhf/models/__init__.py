# SPDX-License-Identifier: Apache-2.0
"""One decoder for every family, its heads, and Hugging Face folders in and out."""
